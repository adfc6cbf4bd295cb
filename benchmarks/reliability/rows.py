"""The promises with their trials at full size. A later method joins by adding cases to a trial, a later promise by adding a row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.kit.tally import Tally
from tests.kit.trials import bad_recipes, bad_rows, damage, fuzz, golden, hostile_names, no_code, strict_loading


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
    return [
        Row(
            3,
            "Every bit is watched: 1,000 bit flips and 300 truncations over all checkpoint files",
            "1,300 refused, the file named",
            "payload flips load silently, 300/300",
            damage.run,
        ),
        Row(
            8,
            "Bad rows are named: 500 generated files",
            "500 with `file:line` and reason, or set aside and written down; no good row changed",
            "names the file 0/12, silent 7/12",
            bad_rows.run,
        ),
        Row(
            9,
            "Bad recipes are named, all faults at once: 300 mutants",
            "300 with `file:line: key` of each fault; nothing loaded or written before",
            "not measured",
            bad_recipes.run,
        ),
        Row(
            15,
            "Strict loading: drop, rename, reshape and recast each tensor of checkpoints and bases",
            "all refused, the nearest name given",
            "warning only; missing weight becomes random",
            strict_loading.run,
        ),
        Row(
            16,
            "No code from files: pickles in every slot, code by config, YAML tags, the source itself",
            "0 executed, 0 found",
            "not measured",
            no_code.run,
        ),
        Row(
            17,
            "No path leaves the folder: 52 hostile names in manifests, indexes and recipes, and links",
            "all refused",
            "`../` in a weight index is followed",
            hostile_names.run,
        ),
        Row(
            19,
            "Old work opens: golden folders of every format version, and versions of the future",
            "opens with equal logits, or a message with what to do",
            "not measured",
            golden.run,
        ),
        Row(
            20,
            "Fuzz finds no traceback: 10,000 spoilt manifests, headers, configs, tokenizers, rows, recipes, command lines",
            "0 tracebacks, 0 hangs over 5 s, none opens as another function",
            "14/300 header flips load wrong names",
            fuzz.run,
        ),
    ]
