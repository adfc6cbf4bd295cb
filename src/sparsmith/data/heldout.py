"""One file for training and evaluation: a row's side is drawn from its prompt.

The draw is a hash of the prompt's words alone, so that it is the same in every run and on every machine, whatever the order, the limit
or the seed, and rows with equal prompts (several answers to one question) are always on one side.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sparsmith.data.messages import Messages
    from sparsmith.recipe.schema import Source


def is_held_out(messages: Messages, share: float) -> bool:
    """True for about `share` of all prompts; spaces and upper case make no difference."""
    prompt = next(message["content"] for message in messages if message["role"] != "system")
    digest = hashlib.sha256(" ".join(prompt.casefold().split()).encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def belongs(messages: Messages, source: Source) -> bool:
    """Whether the source reads this row, by its `heldout` and `part`."""
    return source.part == "all" or is_held_out(messages, source.heldout) == (source.part == "heldout")
