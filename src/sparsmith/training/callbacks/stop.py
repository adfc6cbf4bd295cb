"""SIGTERM and SIGINT end a run politely: the step is finished, its checkpoint is whole, the same command goes on from it."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import distributed
from transformers import TrainerCallback

from sparsmith.errors import Interrupted

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class PoliteStop(TrainerCallback):
    """Listens for the signals and stops the loop after the step that runs.

    While `training` is set a signal is only noted: the loop asks at the end of each step, saves and ends. Elsewhere nothing would be lost,
    and the signal is raised as `Interrupted` at once. A second signal ends the process at once.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        """The signal that came."""
        self.training = False

    @contextmanager
    def listening(self) -> Iterator[PoliteStop]:
        """Take the signals over for the block. In another thread than the main one they cannot be taken, and stay as they are."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {number: signal.signal(number, self._came) for number in SIGNALS}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _came(self, number: int, frame: FrameType | None) -> None:
        if self.number is not None:
            os._exit(128 + number)
        self.number = number
        if not self.training:
            raise self.fault(
                "before or after the training steps", "the same command starts where the last save left it"
            )

    def fault(self, place: str, mend: str) -> Interrupted:
        """The error that ends the run."""
        number = signal.Signals(self.number or signal.SIGTERM)
        return Interrupted("tune", f"{number.name} {place}", "a run to its end", f"Nothing is lost: {mend}.", number)

    def check(self) -> None:
        """Called inside long side work (an evaluation during training): leave it when a signal has come."""
        if self.number is not None:
            raise self.fault("during an evaluation", "the step's checkpoint is written")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._agreed(args):
            control.should_save = control.should_log = control.should_training_stop = True

    def _agreed(self, args: Any) -> bool:
        """Whether any rank has been told: all must leave after the same step."""
        if args.world_size == 1 or not distributed.is_initialized():
            return self.number is not None
        told = torch.tensor(self.number or 0, device=args.device)
        distributed.all_reduce(told, op=distributed.ReduceOp.MAX)
        self.number = int(told.item()) or None
        return self.number is not None
