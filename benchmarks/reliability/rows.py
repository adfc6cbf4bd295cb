"""The promises with their trials at full size. A later method joins by adding cases to a trial, a later promise by adding a row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.kit.tally import Tally


@dataclass(frozen=True)
class Row:
    """One promise."""

    number: int
    promise: str
    target: str
    field: str
    """What the plain stack did under the same trial, where that was measured."""
    run: Callable[[Path], Tally]
    """The trial at full size, in an empty folder."""


def rows() -> list[Row]:
    """All rows, in order."""
    return []
