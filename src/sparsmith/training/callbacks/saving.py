"""When a run saves: every `save_steps`, and at its end whatever the settings, so that what follows the training can be done again."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback


class Saving(TrainerCallback):
    """Asks for a checkpoint after the last step, and for a log line before every checkpoint.

    The line closes the window of figures: a resumed run starts an empty one where the uncut run starts one too, so their lines are equal.
    """

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_save = control.should_save or state.global_step >= state.max_steps
        control.should_log = control.should_log or control.should_save
