"""The base class of every setting: frozen, keyword-only, unknown keys refused, clashes between keys told all at once."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator


class Clash(ValueError):
    """A fault between settings that are each valid alone, with the key to change."""

    def __init__(self, key: str, found: str, expected: str, mend: str) -> None:
        self.key, self.found, self.expected, self.mend = key, found, expected, mend
        super().__init__(f"{key}: found {found}; expected {expected}. {mend}")


class Clashes(ValueError):
    """Every clash of one group of settings."""

    def __init__(self, clashes: list[Clash]) -> None:
        self.clashes = clashes
        super().__init__("; ".join(map(str, clashes)))


class StrictModel(BaseModel):
    """A group of settings. An unknown key is an error; a value is never coerced from a different kind in silence."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        protected_namespaces=(),
        validate_default=False,
        allow_inf_nan=False,
    )

    def clashes(self) -> Iterable[Clash]:
        """Settings of this group that contradict each other, or that can have no effect. Asked once each is valid alone."""
        return ()

    def changed(self, *keys: str) -> list[str]:
        """Those of the keys whose value is not the default."""
        fields = type(self).model_fields
        return [key for key in keys if getattr(self, key) != fields[key].get_default(call_default_factory=True)]

    def without_effect(self, keys: Iterable[str], unless: str) -> Iterable[Clash]:
        """A clash for each of the keys that is set although nothing reads it."""
        for key in self.changed(*keys):
            value: Any = getattr(self, key)
            yield Clash(key, f"`{value}`, which has no effect here", unless, f"Remove `{key}`, or meet the condition.")

    @model_validator(mode="after")
    def _no_clash(self):
        clashes = list(self.clashes())
        if clashes:
            raise Clashes(clashes)
        return self
