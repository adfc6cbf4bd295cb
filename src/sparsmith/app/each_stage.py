"""The same view of every stage, one after the other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class EachStage:
    """What a verb shows of each stage of a recipe."""

    stages: tuple[tuple[str, Any], ...]
    """(name, view); a view has `as_dict()` and prints itself through rich."""

    def as_dict(self) -> dict[str, Any]:
        return {"stages": [{"name": name, **view.as_dict()} for name, view in self.stages]}

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.text import Text

        parts = [part for name, view in self.stages for part in (Text(f"Stage {name}", style="bold"), view)]
        return Group(*parts)
