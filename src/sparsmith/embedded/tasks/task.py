"""What a kind of task is, and how its questions are split into training and held-out ones.

The split is a property of the question: a hash of its canonical content (`3 + 5` and `5 + 3` are one content) says on
which side it lies, whatever the seed, the number of rows or the wording. No question can therefore stand on both sides.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import NamedTuple

TRAIN, HELD_OUT = "train", "held_out"
SPLITS = (TRAIN, HELD_OUT)
LEVELS = (1, 2, 3)
HELD_OUT_PERCENT = 20  # of each task's questions


class Question(NamedTuple):
    """One question with its only right answer."""

    content: str  # canonical: equal for questions that differ in wording or in an order that does not matter
    prompt: str
    completion: str


@dataclass(frozen=True, kw_only=True)
class Task:
    """A kind of question. `ask(random, level)` draws one; all of its randomness comes from the first argument."""

    name: str
    domain: str
    ask: Callable[[Random, int], Question]


def split_of(task: str, content: str) -> str:
    """The side on which a question lies."""
    digest = hashlib.sha256(f"{task}|{content}".encode()).digest()
    return HELD_OUT if int.from_bytes(digest[:8], "big") % 100 < HELD_OUT_PERCENT else TRAIN
