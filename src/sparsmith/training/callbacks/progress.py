"""The progress bar: step, loss, speed, router health, time left; plain lines where there is no terminal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback


class ProgressBar(TrainerCallback):
    """Shows how the tuning goes.

    Args:
        label: what is tuned.
        words: gives the health words of the last log step.
        console: where to draw.
    """

    def __init__(self, label: str, words: Callable[[], str], console: Console | None = None) -> None:
        self._label, self._words = label, words
        self._console = console or Console(stderr=True)
        self._bar: Progress | None = None
        self._task: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not self._console.is_terminal:
            return
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
        )
        self._bar.start()
        self._task = self._bar.add_task(self._label, total=state.max_steps, completed=state.global_step, figures="")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not logs or "loss" not in logs:
            return
        figures = f"loss {logs['loss']:.3f}  {logs['tokens_per_second']:,.0f} tokens/s  {self._words()}"
        if self._bar is not None:
            self._bar.update(self._task, figures=figures)
        else:
            self._console.print(f"{self._label} {state.global_step}/{state.max_steps}  {figures}", highlight=False)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        """Give the terminal back (also after an error)."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
