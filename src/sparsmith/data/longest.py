"""The micro-batch that will ask for the most memory, found before the first step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from sparsmith.data.collate import IGNORE
from sparsmith.data.collate_pairs import PairCollator

if TYPE_CHECKING:
    from sparsmith.data.collate import Collator
    from sparsmith.data.collate_classes import ClassCollator
    from sparsmith.data.load import TrainRows

_CANDIDATES = 64  # micro-batches with the most tokens whose packing is tried; the largest tensor is among them


def longest_batch(rows: TrainRows, collate: Collator | ClassCollator | PairCollator, micro: int) -> dict[str, Tensor]:
    """The micro-batch of the stream whose tensors are the largest, with as many labels as the micro-batch that has the most.

    The head works on labelled tokens alone, and with a large vocabulary they weigh more than the rows' length; so further tokens are
    labelled, up to the largest number of labels that any micro-batch brings. Of an encoder-decoder, whose rows are half read and half
    written, the micro-batch that is widest on both sides together, as it is.

    Args:
        rows: the training stream; micro-batches are its rows in order.
        collate: the run's collator.
        micro: rows per forward.
    """
    tokens, trained = (_by_batch(sizes, micro) for sizes in rows.sizes())
    if isinstance(collate, PairCollator):
        number = collate.longest(tokens, trained)
        stop = min((number + 1) * micro, len(rows))
        return collate([rows[index] for index in range(number * micro, stop)])
    count = min(_CANDIDATES, len(tokens))
    # unpacked, every row is as wide as the longest: that one decides
    order = np.argsort(-(tokens.sum(axis=1) if collate.packing else tokens.max(axis=1)), kind="stable")[:count]
    shapes = {int(number): collate.shape_of([int(n) for n in tokens[number] if n]) for number in order}
    number = max(shapes, key=lambda one: (shapes[one][0] * shapes[one][1], shapes[one][1]))
    stop = min((number + 1) * micro, len(rows))
    batch = collate([rows[index] for index in range(number * micro, stop)])
    if batch["labels"].dim() > 1:  # a classifier's head works on one token per row
        _label(batch, int(trained.sum(axis=1).max()))
    return batch


def _by_batch(sizes: np.ndarray, micro: int) -> np.ndarray:
    """(micro-batches, micro), the last filled with 0."""
    padded = np.zeros(-(-len(sizes) // micro) * micro, np.int64)
    padded[: len(sizes)] = sizes
    return padded.reshape(-1, micro)


def _label(batch: dict[str, Tensor], wanted: int) -> None:
    """Label tokens from the first on until `wanted` are."""
    labels = batch["labels"].view(-1)
    free = torch.nonzero(batch["token_mask"].view(-1) & labels.eq(IGNORE)).view(-1)
    chosen = free[: max(0, wanted - int(labels.ne(IGNORE).sum()))]
    labels[chosen] = batch["input_ids"].view(-1)[chosen]
