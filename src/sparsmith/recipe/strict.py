"""The base class of every setting: frozen, keyword-only, unknown keys refused."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class StrictModel(BaseModel):
    """A group of settings. An unknown key is an error; a value is never coerced from a different kind in silence."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        protected_namespaces=(),
        validate_default=False,
    )
