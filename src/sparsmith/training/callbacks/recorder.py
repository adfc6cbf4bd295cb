"""Writes `metrics.jsonl`: one line per log step, one per evaluation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from sparsmith import durable

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
        durable.append_line(self._path, json.dumps(line))

    def forget_after(self, step: int) -> None:
        """Drop the lines of steps that a resumed run takes again."""
        if self._path.is_file():
            lines = self._path.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if _step(line) <= step]
            durable.write_text(self._path, "".join(f"{line}\n" for line in kept))

    def evaluated(self) -> set[int]:
        """Steps of the evaluations that are written."""
        if not self._path.is_file():
            return set()
        lines = map(json.loads, self._path.read_text(encoding="utf-8").splitlines())
        return {line["step"] for line in lines if "eval_loss" in line}


def _step(line: str) -> float:
    """The step of a line; a line that a crash has cut counts as later than any."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")


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
