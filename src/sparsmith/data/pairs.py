"""Rows of an encoder-decoder: what the encoder reads, then what the decoder writes.

A row is one list of ids, as other tasks have it, and the first trained token parts it: before it stands the prompt in the template (by
default the prompt alone) with what the tokenizer itself puts behind a text (T5's </s>), from it on the last answer with its eos. Earlier
turns of a conversation are read. An answer is encoded on its own, as no token of it continues a text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sparsmith.data.classes import DEFAULT_TEMPLATE, ending_of
from sparsmith.data.messages import Messages
from sparsmith.data.rows import RowFault
from sparsmith.data.tokens import Segment, TemplateEncoder, TokenRow, before_answer


class PairEncoder(TemplateEncoder):
    """Encodes rows that are read up to their last answer."""

    pairs = True

    def __init__(self, tokenizer: Any, template: str | None = None) -> None:
        super().__init__(tokenizer, template or DEFAULT_TEMPLATE, "response")
        self.behind = ending_of(tokenizer)
        """What the tokenizer puts behind a text."""

    def encode(self, rows: list[Messages]) -> list[TokenRow | RowFault]:  # type: ignore[override]
        """Token rows of many conversations; one that has nothing to read comes back as its fault."""
        faults = [self._fault(row) for row in rows]
        good = iter(super().encode([row for row, fault in zip(rows, faults) if fault is None]))
        return [next(good) if fault is None else fault for fault in faults]

    def _fault(self, messages: Messages) -> RowFault | None:
        if messages[0]["role"] == "text":
            mend = "Name them in the recipe: columns: {prompt: ..., completion: ...}."
            return RowFault("a plain text", "a prompt, which is read, and an answer, which is written", mend)
        if not self.prompt_text(messages).strip():
            return RowFault("an empty prompt", "a text that the encoder can read", "Mend the row.", "prompt")
        return None

    def segments(self, messages: Messages) -> list[Segment]:
        """The row as stretches: what is read, a boundary, the last answer."""
        if messages[0]["role"] == "text":
            return super().segments(messages)
        head, answer = before_answer(messages), messages[len(before_answer(messages)) :]
        read = [Segment(one.text, False, one.plain, one.ids) for one in super().segments(head)]
        written = super().segments(answer) if answer else []
        return [*read, Segment(ids=self.behind), *written]

    def prompt_text(self, messages: Messages) -> str:
        """What is read, as text, without what the tokenizer adds."""
        return "".join(part.text for part in self.segments(before_answer(messages)))


def parted(ids: Sequence[int], labels: Sequence[int]) -> tuple[list[int], list[int]]:
    """(what is read, what is written) of a row: the first label parts it."""
    first = next(place for place, label in enumerate(labels) if label >= 0)
    return list(ids[:first]), list(ids[first:])
