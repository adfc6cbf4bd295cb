"""Random numbers of the training steps."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback

from sparsmith.seeds import stream_seed


class Streams(TrainerCallback):
    """Starts every step at its own place: the seed of (run, step, rank).

    What a step draws (dropout, stochastic gates) then depends on nothing that went before: an evaluation, a log line or a save shifts no
    number, and a resumed run needs no saved generator.
    """

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        seed_step(args.seed, state.global_step, args.process_index)


def seed_step(seed: int, step: int, rank: int = 0) -> None:
    """Set the generators of Python, numpy and torch (every device) to the start of a step."""
    start = stream_seed(seed, "step", step, rank)
    random.seed(start)
    np.random.seed(start % 2**32)
    torch.manual_seed(start)
