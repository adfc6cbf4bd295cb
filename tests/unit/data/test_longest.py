"""The longest micro-batch, against all micro-batches made one by one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sparsmith.data.collate import Collator
from sparsmith.data.load import TrainRows
from sparsmith.data.longest import longest_batch
from sparsmith.data.prepare import TokenSet


def rows_of(lengths, trained, max_length=40):
    """A stream of one source in file order; the last `trained` tokens of a row are trained."""
    marks = [np.arange(n) >= n - t for n, t in zip(lengths, trained, strict=True)]
    one = TokenSet(
        name="a",
        ids=np.arange(sum(lengths), dtype=np.int32) % 50 + 3,
        trained=np.concatenate(marks),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        lines=np.arange(1, len(lengths) + 1),
        file_index=np.zeros(len(lengths), np.int32),
        files=["a.jsonl"],
        rejects=[],
        counts={},
        fingerprints={},
    )
    one.fit(max_length, "truncate")
    assert len(one) == len(lengths)
    return TrainRows([one], [0], np.zeros(len(lengths), np.int64), np.arange(len(lengths)))


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("seed", range(6))
def test_no_micro_batch_is_larger_nor_has_more_labels(packing, seed):
    stream = np.random.default_rng(seed)
    lengths = stream.integers(2, 60, 50)
    rows = rows_of(
        lengths, np.minimum(stream.integers(1, 60, 50), np.minimum(lengths, 40)) + np.maximum(lengths - 40, 0)
    )
    collate, micro = Collator(0, packing, 40), 4
    all_batches = [collate([rows[i] for i in range(s, min(s + micro, 50))]) for s in range(0, 50, micro)]
    longest = longest_batch(rows, collate, micro)
    assert longest["input_ids"].numel() == max(b["input_ids"].numel() for b in all_batches)
    most = max(int(b["labels"].ne(-100).sum()) for b in all_batches)
    kept = longest["labels"].ne(-100)
    # the collator takes the label off the first token of a row, which has nothing to be told from
    assert min(most, int(longest["token_mask"].sum())) <= int(kept.sum()) <= most + micro
    assert torch.equal(longest["labels"][kept], longest["input_ids"][kept])
    assert longest["token_mask"][kept].all()


def test_the_rows_themselves_stay_as_they_are():
    rows = rows_of([8, 30, 9, 4], [1, 1, 8, 1])
    longest_batch(rows, Collator(0, False, 40), 2)
    assert [int(rows[i]["labels"].ne(-100).sum()) for i in range(4)] == [1, 1, 8, 1]
