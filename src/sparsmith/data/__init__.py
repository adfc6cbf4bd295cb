"""Instruction data: files of many formats -> messages -> tokens and masks -> one seeded stream of rows.

The way of a row: `files` (bytes, gzip, fingerprints) -> `read_json` / `read_table` / `hub` (rows with file and line) ->
`columns` and `messages` (what the row says, or why it is bad) -> `tokens` / `chat` (ids, and which of them are trained) ->
`prepare` (parallel, cached) -> `mixture` (order) -> `load` (the data set) -> `collate` (packed tensors). Rows of a mixture's task take
`fields` (what templates are filled with) and `render` (question and answer) in place of `messages`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparsmith.data.collate import Collator
    from sparsmith.data.collate_classes import ClassCollator
    from sparsmith.data.collate_pairs import PairCollator
    from sparsmith.data.evalsets import EvalRow, EvalSet
    from sparsmith.data.load import LoadedData, load_data, render_prompt
    from sparsmith.data.overlap_report import OverlapReport
    from sparsmith.data.overlap_search import find_overlap
    from sparsmith.data.sources import RowSet, read_rows
    from sparsmith.data.view import DataView, show

_HOMES = {
    "ClassCollator": "collate_classes",
    "Collator": "collate",
    "EvalRow": "evalsets",
    "EvalSet": "evalsets",
    "LoadedData": "load",
    "load_data": "load",
    "OverlapReport": "overlap_report",
    "PairCollator": "collate_pairs",
    "find_overlap": "overlap_search",
    "RowSet": "sources",
    "read_rows": "sources",
    "render_prompt": "load",
    "DataView": "view",
    "show": "view",
}

__all__ = [
    "ClassCollator",
    "Collator",
    "DataView",
    "EvalRow",
    "EvalSet",
    "LoadedData",
    "OverlapReport",
    "PairCollator",
    "RowSet",
    "find_overlap",
    "load_data",
    "read_rows",
    "render_prompt",
    "show",
]


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name in _HOMES:
        return getattr(import_module(f"sparsmith.data.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
