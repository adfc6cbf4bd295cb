"""Evaluation during the run, by a function that a higher floor hands in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback

Measure = Callable[[], dict[str, Any]]


class Evaluation(TrainerCallback):
    """Calls `measure` every `every` steps and hands the figures to `write`; the end is measured by the caller."""

    def __init__(self, measure: Measure, write: Callable[[dict[str, Any]], None], every: int) -> None:
        self._measure, self._write, self._every = measure, write, every

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero and state.global_step % self._every == 0:
            self._write({"step": state.global_step, **self._measure()})
