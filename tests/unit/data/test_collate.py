"""Packing loses nothing, keeps rows apart and is tight."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsmith.data.collate import Collator, attention_for, block_mask, pack


def rows_of(lengths: list[int]) -> list[dict]:
    return [
        {
            "input_ids": torch.arange(n) + 100 * i,
            "labels": torch.where(torch.arange(n) < n // 2, -100, torch.arange(n) + 100 * i),
            "domain": torch.full((n,), i % 3),
            "sample_ids": 7 * i,
        }
        for i, n in enumerate(lengths, start=1)
    ]


lengths_of_any = st.lists(st.integers(1, 30), min_size=1, max_size=12)


@settings(max_examples=80, deadline=None)
@given(lengths_of_any, st.integers(30, 64))
def test_packing_holds_every_row_once_in_few_sequences(lengths, limit):
    bins = pack(lengths, limit)
    assert sorted(index for one in bins for index in one) == list(range(len(lengths)))
    sums = [sum(lengths[index] for index in one) for one in bins]
    assert max(sums) <= limit and bins == pack(lengths, limit)
    assert all(a + b > limit for i, a in enumerate(sums) for b in sums[:i])  # no two sequences could have been one


@settings(max_examples=40, deadline=None)
@given(lengths_of_any, st.booleans(), st.sampled_from(["positions", "blocks", "additive"]))
def test_a_batch_holds_the_rows(lengths, packing, attention):
    rows = rows_of(lengths)
    batch = Collator(9, packing, 40, attention)(rows)
    S = batch["input_ids"].shape[1]
    mask = batch["token_mask"]
    assert S % 8 == 0 and mask.sum(1).max() > S - 8
    assert batch["sample_ids"].tolist() == [row["sample_ids"] for row in rows]
    assert ("attention_mask" in batch) == (not packing or attention != "positions")
    assert int(mask.sum()) == sum(lengths)
    assert (
        (batch["input_ids"][~mask] == 9).all()
        and (batch["labels"][~mask] == -100).all()
        and (batch["domain"][~mask] == -1).all()
    )
    starts = (batch["position_ids"] == 0).nonzero().tolist()
    found = []
    for b, s in starts:
        if mask[b, s]:
            n = int(batch["input_ids"][b, s] // 100)
            row = rows[n - 1]
            stop = s + lengths[n - 1]
            assert batch["input_ids"][b, s:stop].tolist() == row["input_ids"].tolist()
            assert (
                batch["labels"][b, s:stop].tolist()[1:] == row["labels"].tolist()[1:] and batch["labels"][b, s] == -100
            )
            assert batch["position_ids"][b, s:stop].tolist() == list(range(lengths[n - 1]))
            found.append(n)
    assert sorted(found) == list(range(1, len(rows) + 1))


def test_padding_is_a_document_of_its_own():
    batch = Collator(0, True, 16)(rows_of([5, 6]))
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4]]


def test_a_row_longer_than_the_limit_stands_alone():
    assert pack([50, 3, 4], 10) == [[0], [1, 2]]


def test_block_mask():
    seen = block_mask(torch.tensor([[0, 0, 1, -1]]))[0, 0]
    assert seen.tolist() == [
        [True, False, False, False],
        [True, True, False, False],
        [False, False, True, False],
        [False, False, False, True],
    ]


def test_families():
    class Config:
        model_type = "llama"

    assert attention_for(Config()) == attention_for(None) == "positions"
    Config.model_type = "opt"
    assert attention_for(Config()) == "blocks"
    Config._attn_implementation = "eager"
    assert attention_for(Config()) == "additive"
    Config.base_config = {"model_type": "qwen2"}
    assert attention_for(Config()) == "positions"
    with pytest.raises(ValueError, match="blocks or additive"):
        Collator(0, attention="flash")
