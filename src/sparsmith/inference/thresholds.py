"""How sure each request must be at each visited depth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sparsmith.errors import UsageError
from sparsmith.inference.calibrate import CLOSED, Calibration, load
from sparsmith.inference.visits import chosen_visits

if TYPE_CHECKING:
    from torch import Tensor, nn


def thresholds_of(model: nn.Module, given: Any, visit: Sequence[int] | None, rows: int) -> dict[int, Tensor]:
    """Depth -> (rows,) thresholds; above 1 = closed for that row.

    Args:
        given: a number for every exit; a mapping from depth to number, whose other exits are closed; a calibration, its file or the
            folder that holds it; or a list of such, one per request.
        visit: the depths to look at; default the mapping's or the calibration's own, else `chosen_visits`.

    Raises:
        UsageError: a list of another length, or a threshold that is none. CheckpointMismatch: thresholds of another model.
    """
    several = given if isinstance(given, list | tuple) else [given] * rows
    if len(several) != rows:
        raise UsageError(
            "exit_threshold", f"{len(several)} values", f"{rows}, one per prompt", "Give one, or one each."
        )
    read: dict[int, dict[int, float] | float] = {}
    for one in several:
        if id(one) not in read:
            read[id(one)] = _one(model, one)
    tables = [read[id(one)] for one in several]
    named = {depth for table in tables if isinstance(table, dict) for depth in table}
    bare = any(not isinstance(table, dict) for table in tables)
    depths = set(chosen_visits(model, visit if visit is not None else (sorted(named) if named else None)))
    if visit is None and bare and named:
        depths |= set(chosen_visits(model, None))
    return {
        depth: torch.tensor([table.get(depth, CLOSED) if isinstance(table, dict) else table for table in tables])
        for depth in sorted(depths)
    }


def _one(model: nn.Module, given: Any) -> dict[int, float] | float:
    if isinstance(given, Calibration | str | Path):
        return load(given, model).thresholds
    if isinstance(given, Mapping):
        return {int(depth): _number(value) for depth, value in given.items()}
    return _number(given)


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise UsageError(
            "exit_threshold",
            repr(value),
            "a probability above 0 (above 1 closes an exit), a mapping from depth to one, or a calibrated file",
            "Mend the threshold.",
        )
    return float(value)
