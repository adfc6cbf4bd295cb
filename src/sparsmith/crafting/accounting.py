"""`accounting.json`: what a pruned model was counted to lose, what its form deletes, and what its files measure. Three columns, together.

    counted      as the reference counts: of every gated linear, numel - open rows x open columns; a soft gate counts as kept
    deletable    parameters that this form leaves out exactly, per tensor kind
    measured     numbers and bytes in the safetensors files; with a measurement, FLOPs and latency beside the dense model

`deletable` is worked out from the gates before anything is cut; the files must hold exactly that many numbers less.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsmith import durable
from sparsmith.crafting.record import record_of
from sparsmith.crafting.settle import settle_report
from sparsmith.errors import CheckpointError, ExportMismatch

if TYPE_CHECKING:
    from torch import nn

FILE = "accounting.json"
TABLE = "accounting"


def write(model: nn.Module, folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Beside the weights of a model that a method has pruned; nothing for others, nor for a slice, which is no whole model.

    Args:
        shapes: of every tensor of the files, tied ones once.

    Raises:
        ExportMismatch: the files do not hold what the accounting says.
    """
    report = settle_report(model)
    tables = {name: dict(table) for name, table in report.tables.items()} if report else {}
    if not tables or record_of(model).slice is not None:
        return
    measured = {
        "numbers": sum(math.prod(shape) for shape in shapes.values()),
        "bytes": sum(file.stat().st_size for file in folder.glob("*.safetensors")),
    }
    for name, table in tables.items():
        if TABLE in table:
            table[TABLE] = {**table[TABLE], "measured": _held_against(folder, name, table[TABLE], measured)}
    (folder / FILE).write_text(durable.json_text(tables), encoding="utf-8")


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """Method -> its tables; empty where there are none.

    Raises:
        CheckpointError: a file of another make.
    """
    if not (folder / FILE).is_file():
        return {}
    found = durable.read_json(folder / FILE)
    if not isinstance(found, dict) or not all(isinstance(table, dict) for table in found.values()):
        raise CheckpointError(str(folder / FILE), "no tables", "what an export writes", "Export the model again.")
    return found


def add_measured(folder: Path, figures: Mapping[str, Any]) -> None:
    """More figures for the third column."""
    tables = read(folder)
    for table in tables.values():
        if TABLE in table:
            table[TABLE]["measured"] |= figures
    (folder / FILE).write_text(durable.json_text(tables), encoding="utf-8")


def columns(folder: Path) -> dict[str, Any] | None:
    """The accounting of a folder, or None."""
    return next((table[TABLE] for table in read(folder).values() if TABLE in table), None)


def _held_against(folder: Path, name: str, account: Mapping[str, Any], measured: dict[str, int]) -> dict[str, Any]:
    before, removed = account["base"]["parameters"], account["deletable"]["removed"]
    if before - measured["numbers"] != removed:
        raise ExportMismatch(
            str(folder),
            f"{measured['numbers']:,} numbers in the files, {before - measured['numbers']:,} less than the dense model",
            f"{removed:,} less, as `{name}` says that this form deletes",
            "This is a fault of the accounting or of the cut; please report it.",
        )
    known = account.get("measured") or {}  # read from a settled folder: what was timed stays with it
    return {
        **{key: known[key] for key in known if key not in measured},
        **measured,
        "removed": before - measured["numbers"],
    }
