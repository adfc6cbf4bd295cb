"""Rows of an encoder-decoder -> tensors: prompt and answer padded on the right, each to its own width, never packed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsmith.data.collate import IGNORE, PAD_TO
from sparsmith.errors import DataError


class PairCollator:
    """Makes a batch of B rows, S tokens read and T written (multiples of 8).

    Args:
        pad_id: written at padding of both sides; never seen nor trained.
        start_id: what the decoder is fed before the first token of an answer.

    Returns (by call): input_ids, attention_mask (0 = padding), domain (-1 = padding), (B, S) int64; token_mask (B, S) bool;
        labels (-100 = padding) and decoder_input_ids, the labels shifted right by one, (B, T) int64; sample_ids (B,) int64.
    """

    packing = False

    def __init__(self, pad_id: int, start_id: int) -> None:
        self.pad_id, self.start_id = pad_id, start_id

    @classmethod
    def of(cls, config: Any) -> PairCollator:
        """By a model's config.

        Raises:
            DataError: it does not say with which token an answer starts, or which one fills up.
        """
        for name in ("pad_token_id", "decoder_start_token_id"):
            if getattr(config, name, None) is None:
                mend = f"Set {name} in the checkpoint's config.json; T5 and Switch have 0 for both."
                raise DataError(f"config.{name}", "nothing", "a token id", mend)
        return cls(config.pad_token_id, config.decoder_start_token_id)

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        sides = [_parted(row) for row in rows]
        shapes = [(len(rows), _filled(max(len(side[at]) for side in sides))) for at in (0, 1)]
        batch = {
            "input_ids": torch.full(shapes[0], self.pad_id),
            "domain": torch.full(shapes[0], -1),
            "token_mask": torch.zeros(shapes[0], dtype=torch.bool),
            "labels": torch.full(shapes[1], IGNORE),
        }
        for number, (row, (read, written)) in enumerate(zip(rows, sides)):
            stop = len(read)
            batch["input_ids"][number, :stop] = read
            batch["domain"][number, :stop] = torch.as_tensor(row["domain"])[:stop]
            batch["token_mask"][number, :stop] = True
            batch["labels"][number, : len(written)] = written
        batch["attention_mask"] = batch["token_mask"].long()
        batch["decoder_input_ids"] = shifted(batch["labels"], self.start_id, self.pad_id)
        batch["sample_ids"] = torch.tensor([int(row["sample_ids"]) for row in rows])
        return batch

    def longest(self, tokens: np.ndarray, trained: np.ndarray) -> int:
        """Which of several micro-batches, (micro-batches, rows) tokens and trained ones, is widest on both sides together."""
        return int(np.argmax((tokens - trained).max(axis=1) + trained.max(axis=1)))


def shifted(labels_BT: Tensor, start_id: int, pad_id: int) -> Tensor:
    """(B, T): what the decoder is fed to predict the labels."""
    fed = torch.cat([torch.full_like(labels_BT[:, :1], start_id), labels_BT[:, :-1]], dim=1)
    return fed.masked_fill(fed == IGNORE, pad_id)


def _parted(row: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """(read, written): the first label parts a row."""
    ids, labels = torch.as_tensor(row["input_ids"]), torch.as_tensor(row["labels"])
    first = int((labels != IGNORE).nonzero()[0])
    return ids[:first], ids[first:]


def _filled(width: int) -> int:
    return -(-width // PAD_TO) * PAD_TO
