"""A small mixture: two sub-mixtures with three tasks, as settings and as files beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sparsmith.recipe.schema import DataSettings
from tests.kit.rowfiles import write_jsonl

COLOURS = ["red", "green", "blue", "grey"]


def write_tasks(folder: Path) -> None:
    """24 sums with working, 12 questions with options, 6 wishes."""
    sums = [{"question": f"sum {n} and {n}?", "answer": f"{2 * n}", "rationale": f"{n} twice."} for n in range(24)]
    picks = [{"question": f"pick {n}?", "answer": COLOURS[n % 4], "among": COLOURS} for n in range(12)]
    wishes = [{"nl": f"wish {n}", "cmd": f"do {n}"} for n in range(6)]
    for name, rows in (("sums", sums), ("picks", picks), ("wishes", wishes)):
        write_jsonl(folder / f"{name}.jsonl", rows)


def mixture(**changes: Any) -> dict[str, Any]:
    """The settings of `data.mixture`."""
    tasks = {
        "sums": {"name": "sums", "path": "sums.jsonl", "templates": "maths-rationale"},
        "picks": {"name": "picks", "path": "picks.jsonl", "templates": "choice", "options": "among"},
        "wishes": {
            "name": "wishes",
            "path": "wishes.jsonl",
            "templates": "nl-to-bash",
            "columns": {"description": "nl", "command": "cmd"},
        },
    }
    for name, change in changes.pop("tasks", {}).items():
        tasks[name] |= change
    general = {"name": "general", "rate": 3.0, "cap": 8, "tasks": [tasks["picks"], tasks["wishes"]]}
    return {"submixtures": [{"name": "maths", "rate": 1.0, "tasks": [tasks["sums"]]}, general], **changes}


def task_settings(folder: Path, made: dict[str, Any] | None = None, **changes: Any) -> DataSettings:
    """The settings of `data`, with a mixture."""
    base = {"cache": str(folder / "cache"), "max_length": 512, "template": "{prompt}\n"}
    return DataSettings.model_validate({"mixture": made or mixture(), **base, **changes}, strict=False)
