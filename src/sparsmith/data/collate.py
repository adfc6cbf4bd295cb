"""Rows -> tensors, packed or padded.

Packing happens here, inside a batch, and not in the data set: a batch always consumes its number of rows of the stream, packed or not,
so runs with packing on and off see the same rows at every step, and a resume counts rows. The rows of a batch are put into as few
sequences of at most `max_length` tokens as best fit finds; the tensor is as wide as the fullest of them.

Rows of one sequence must not see each other. transformers builds the block-diagonal mask from `position_ids` that start anew with
each row, under two conditions: no `attention_mask` is passed, and `use_cache=False` is (a cache switches the detection off in
silence). This holds for the families of `TOLD_BY_POSITIONS`, with sdpa and eager; a test compares each with unpacked
rows. For any other family the mask is written out, (B, 1, S, S): `attention="blocks"` as bool for sdpa, `"additive"` as float32
(0 or the lowest number) for eager attention, which adds it.

Shapes: B sequences, S tokens (a multiple of 8), R rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparsmith.recipe.schema import DataSettings

PAD_TO = 8
IGNORE = -100
TOLD_BY_POSITIONS = frozenset(
    ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "olmo2", "phi3", "gpt_neox", "gpt2"]
)
"""Families whose masks a test holds against unpacked rows."""


class Collator:
    """Makes a batch of rows.

    Args:
        pad_id: token id written at padding (any valid id: padding is never seen nor trained).
        packing: put several rows into one sequence.
        max_length: most tokens of a packed sequence; absent = the longest row of the batch.
        attention: when packed, `positions` (no attention_mask at all), `blocks` or `additive` (an explicit block-diagonal
            causal mask). `attention_for(config)` chooses.

    Returns (by call): input_ids, labels (-100 = not trained), position_ids, domain (-1 = padding), all (B, S) int64;
        token_mask (B, S) bool, False = padding;
        sample_ids (R,) int64 in the order of the stream; attention_mask (B, S) int64 where not packed.
    """

    def __init__(
        self, pad_id: int, packing: bool = True, max_length: int | None = None, attention: str = "positions"
    ) -> None:
        if attention not in ("positions", "blocks", "additive"):
            raise ValueError(f"attention is {attention!r}; positions, blocks or additive")
        self.pad_id, self.packing, self.max_length, self.attention = pad_id, packing, max_length, attention

    @classmethod
    def of(cls, settings: DataSettings, tokenizer: Any, config: Any = None) -> Collator:
        """The collator of a recipe. `config`: the model's, whose family decides how packed rows are kept apart."""
        return cls(pad_id_of(tokenizer), settings.packing, settings.max_length, attention_for(config))

    def _layout(self, lengths: Sequence[int]) -> tuple[list[list[int]], int]:
        """The rows of each sequence, and the tokens of the widest, filled up to the next multiple."""
        bins = pack(lengths, self.max_length) if self.packing else [[index] for index in range(len(lengths))]
        width = max(sum(lengths[index] for index in one) for one in bins)
        return bins, -(-width // PAD_TO) * PAD_TO

    def shape_of(self, lengths: Sequence[int]) -> tuple[int, int]:
        """(B, S) of a batch of rows of these lengths."""
        bins, width = self._layout(lengths)
        return len(bins), width

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        lengths = [len(row["input_ids"]) for row in rows]
        bins, width = self._layout(lengths)
        shape = (len(bins), width)
        batch = {
            "input_ids": torch.full(shape, self.pad_id),
            "labels": torch.full(shape, IGNORE),
            "position_ids": torch.zeros(shape, dtype=torch.int64),
            "domain": torch.full(shape, -1),
            "token_mask": torch.zeros(shape, dtype=torch.bool),
        }
        row_of = torch.full(shape, -1)
        for number, members in enumerate(bins):
            start = 0
            for index in members:
                stop = start + lengths[index]
                _write(batch, number, start, stop, rows[index])
                row_of[number, start:stop] = index
                start = stop
            batch["position_ids"][number, start:] = torch.arange(width - start)
        batch["sample_ids"] = torch.tensor([int(row["sample_ids"]) for row in rows])
        if not self.packing:
            batch["attention_mask"] = batch["token_mask"].long()
        elif self.attention != "positions":
            seen = block_mask(row_of)
            lowest = torch.finfo(torch.float32).min
            batch["attention_mask"] = (
                seen if self.attention == "blocks" else torch.zeros(seen.shape).masked_fill_(~seen, lowest)
            )
        return batch


def attention_for(config: Any) -> str:
    """How packed rows of a model are kept apart, from its config (a crafted model's too): by positions where the family is known to
    tell them, else by a written mask in the form that its attention takes."""
    inner = getattr(config, "base_config", None) or config
    facts = (
        inner
        if isinstance(inner, dict)
        else {name: getattr(inner, name, None) for name in ("model_type", "_attn_implementation")}
    )
    if facts.get("model_type") is None or facts["model_type"] in TOLD_BY_POSITIONS:
        return "positions"
    kind = getattr(config, "_attn_implementation", None) or facts.get("_attn_implementation")
    return "additive" if kind == "eager" else "blocks"


def pad_id_of(tokenizer: Any) -> int:
    """The pad token, else eos, else 0: padding is never seen nor trained."""
    return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)


def _write(batch: dict[str, Tensor], number: int, start: int, stop: int, row: dict[str, Any]) -> None:
    for name in ("input_ids", "labels", "domain"):
        batch[name][number, start:stop] = torch.as_tensor(row[name])
    batch["labels"][number, start] = IGNORE  # the first token follows nothing of its own row
    batch["position_ids"][number, start:stop] = torch.arange(stop - start)
    batch["token_mask"][number, start:stop] = True


def pack(lengths: Sequence[int], max_length: int | None = None) -> list[list[int]]:
    """Row numbers by sequence: best fit, longest first; ties in the order of the rows, which also orders each sequence.

    A row longer than `max_length` gets a sequence of its own.
    """
    limit = max(max_length or 0, max(lengths, default=0))
    room: list[int] = []
    bins: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda place: (-lengths[place], place)):
        fitting = [number for number, free in enumerate(room) if free >= lengths[index]]
        if fitting:
            best = min(fitting, key=lambda number: (room[number], number))
            bins[best].append(index)
            room[best] -= lengths[index]
        else:
            bins.append([index])
            room.append(limit - lengths[index])
    return sorted(sorted(members) for members in bins)


def block_mask(row_of: Tensor) -> Tensor:
    """(B, 1, S, S) bool, True = may be seen: the same row, not later. Padding sees padding, so that no query is empty."""
    same = row_of[:, None, :, None] == row_of[:, None, None, :]
    return same & torch.ones(row_of.shape[1], row_of.shape[1], dtype=torch.bool, device=row_of.device).tril()
