"""Evaluation during the run, by a function that a higher floor hands in."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

from transformers import TrainerCallback

from sparsmith.errors import Interrupted

Measure = Callable[[], dict[str, Any]]


class Evaluation(TrainerCallback):
    """Calls `measure` every `every` steps and hands the figures to `write`; the end is measured by the caller.

    `written` gives the steps whose evaluation stands already. Every rank measures, because a sharded model answers only when all its ranks
    ask; `write` is told by its maker who writes.
    """

    def __init__(
        self,
        measure: Measure,
        write: Callable[[dict[str, Any]], None],
        every: int,
        written: Callable[[], set[int]] = set,
    ) -> None:
        self._measure, self._write, self._every, self._written = measure, write, every, written

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A run that was stopped in the middle of this step's evaluation makes up for it."""
        if state.global_step and state.global_step not in self._written():
            self.on_step_end(args, state, control)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self._every == 0:
            with suppress(Interrupted):  # the stop callback hears of it right after
                self._write({"step": state.global_step, **self._measure()})
