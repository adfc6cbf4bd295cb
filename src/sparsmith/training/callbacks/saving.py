"""When a run saves: as the Trainer's settings say, and at its end where asked, so that what follows the training can be done again."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback


class Saving(TrainerCallback):
    """Asks for a log line before every checkpoint, and with `at_end` for a checkpoint after the last step.

    The line closes the window of figures: a resumed run starts an empty one where the uncut run starts one too, so their lines are equal.
    """

    def __init__(self, at_end: bool) -> None:
        self._at_end = at_end

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_save = control.should_save or (self._at_end and state.global_step >= state.max_steps)
        control.should_log = control.should_log or control.should_save
