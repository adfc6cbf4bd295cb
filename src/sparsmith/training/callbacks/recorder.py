"""Writes `metrics.jsonl`: one line per log step, one per evaluation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

_GROUPS = {"term/": "terms", "domain/": "domain_loss", "health/": "health"}


class Recorder(TrainerCallback):
    """Appends the run's figures to a file that the report reads.

    Args:
        path: the file; a resumed run goes on appending.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and logs and "loss" in logs:
            self.write(_grouped(state.global_step, logs))

    def write(self, line: dict[str, Any]) -> None:
        """Append one line."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def _grouped(step: int, logs: dict[str, Any]) -> dict[str, Any]:
    line: dict[str, Any] = {"step": step}
    for name, value in logs.items():
        for prefix, group in _GROUPS.items():
            if name.startswith(prefix):
                line.setdefault(group, {})[name.removeprefix(prefix)] = value
                break
        else:
            line[name] = value
    return line
