"""Rows of a classifier -> tensors: padded on the right, one class per row, never packed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparsmith.data.collate import PAD_TO


class ClassCollator:
    """Makes a batch of B rows.

    Args:
        pad_id: the model's `config.pad_token_id`: a decoder reads the class at the last token that is another one.
        max_length: the batch is never wider, so that a table of positions is never left; absent = as wide as the rows.

    Returns (by call): input_ids, attention_mask (0 = padding), domain (-1 = padding), all (B, S) int64; token_mask (B, S) bool;
        labels (B,) int64, the classes; sample_ids (B,) int64.
    """

    packing = False

    def __init__(self, pad_id: int, max_length: int | None = None) -> None:
        self.pad_id, self.max_length = pad_id, max_length

    def shape_of(self, lengths: Sequence[int]) -> tuple[int, int]:
        """(B, S) of a batch of rows of these lengths."""
        longest = max(lengths)
        width = -(-longest // PAD_TO) * PAD_TO
        return len(lengths), max(longest, min(width, self.max_length or width))

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        shape = self.shape_of([len(row["input_ids"]) for row in rows])
        batch = {
            "input_ids": torch.full(shape, self.pad_id),
            "domain": torch.full(shape, -1),
            "token_mask": torch.zeros(shape, dtype=torch.bool),
        }
        for number, row in enumerate(rows):
            stop = len(row["input_ids"])
            for name in ("input_ids", "domain"):
                batch[name][number, :stop] = torch.as_tensor(row[name])
            batch["token_mask"][number, :stop] = True
        batch["attention_mask"] = batch["token_mask"].long()
        for name in ("labels", "sample_ids"):
            batch[name] = torch.tensor([int(row[name]) for row in rows])
        return batch
