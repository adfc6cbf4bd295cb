"""Segments compute what the model and its slices compute, may lag, forget exactly, and leave nothing behind."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers.cache_utils import DynamicLayer

import sparsmith as sm
from sparsmith.crafting.slices import at_depth
from sparsmith.inference.cache import GrowingLayer
from sparsmith.inference.runner import DepthRunner
from tests.kit.pico import pico_ids, randomize_adapters
from tests.unit.inference.models import FAMILIES_AND_WINDOWS, deep, elastic, padded, prompts_of, snapshot


@pytest.mark.parametrize("trunk", ["shared", "frozen"])
@pytest.mark.parametrize("family", FAMILIES_AND_WINDOWS)
@torch.no_grad()
def test_a_live_exit_is_its_slice_to_the_bit(family: str, trunk: str):
    model, ids = elastic(family, trunk=trunk), pico_ids(2, 40)
    runner = DepthRunner(model, (2, 3, 4), mask=None, room=40)
    for index, readable in enumerate(runner.prefill(ids)):
        slice_logits = at_depth(model, runner.depths[index])(input_ids=ids).logits
        assert torch.equal(runner.logits(index, readable), slice_logits)


@pytest.mark.parametrize("trunk", ["shared", "frozen"])
@pytest.mark.parametrize("family", FAMILIES_AND_WINDOWS)
@torch.no_grad()
def test_tokens_one_by_one_and_in_late_groups_with_padding(family: str, trunk: str):
    """The second segment gets its tokens in groups of other sizes than the first; rows are padded; windows are outgrown."""
    model = elastic(family, trunk=trunk, exact=True)
    ids, mask = padded(3, 12)
    ids = torch.cat([ids, pico_ids(3, 30, seed=5)], dim=1)
    runner = DepthRunner(model, (2, 4), mask=mask, room=42)
    first = [runner.advance(0, piece) for piece in (ids[:, :12], *ids[:, 12:].split(1, dim=1))]
    hidden = torch.cat([arrived.hidden for arrived in first], dim=1)
    second = [runner.advance(1, piece) for piece in hidden.split([12, 7, 1, 22], dim=1)]
    for index, found in enumerate((first, second)):
        live = runner.logits(index, torch.cat([arrived.readable for arrived in found], dim=1))
        whole = torch.cat([mask, torch.ones(3, 30, dtype=torch.long)], dim=1)
        for row, prompt in enumerate(prompts_of(ids, whole)):
            expected = at_depth(model, runner.depths[index])(input_ids=prompt).logits[0]
            tolerance = 1e-12 if live.dtype == torch.float64 else 1e-5  # Gemma 2 runs in float32
            assert (live[row, -prompt.shape[1] :] - expected).abs().max() <= tolerance


@torch.no_grad()
def test_forgetting_is_exact():
    model, ids = elastic(trunk="frozen"), pico_ids(1, 20)
    runner, fresh = (DepthRunner(model, (2, 4), mask=None, room=40) for _ in range(2))
    for one in (runner, fresh):
        one.prefill(ids[:, :12])
    runner.prefill(pico_ids(1, 5, seed=9))
    runner.cut_to(12)
    assert [runner.length(0), runner.length(1)] == [12, 12]
    again, expected = runner.prefill(ids[:, 12:]), fresh.prefill(ids[:, 12:])
    assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))
    assert all(
        torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
        for a, b in zip(runner.keys_and_values(), fresh.keys_and_values(), strict=True)
    )


@torch.no_grad()
def test_a_crafted_wrapper_and_a_depth_that_was_never_tuned():
    config = sm.PescConfig(num_experts=4, top_k=2, adapter_dim=8)
    model = sm.craft(deep(), config).eval()
    randomize_adapters(model)
    ids = pico_ids(2, 10)
    runner = DepthRunner(model, (1, 4), mask=None, room=10)
    shallow, full = runner.prefill(ids)
    assert torch.equal(runner.logits(1, full), model(input_ids=ids).logits)
    assert runner.logits(0, shallow).shape == (*full.shape[:2], 128)


@torch.no_grad()
def test_nothing_of_the_model_is_touched():
    model = elastic("gemma2", trunk="frozen")
    before = snapshot(model)
    runner = DepthRunner(model, (2, 3, 4), mask=None, room=10)
    runner.prefill(pico_ids(1, 6))
    assert snapshot(model) == before


def test_two_threads_share_one_model():
    model = elastic("gemma3_text")

    @torch.no_grad()
    def work(seed: int) -> torch.Tensor:
        runner, ids = DepthRunner(model, (2, 4), mask=None, room=30), pico_ids(1, 30, seed=seed)
        return torch.cat([runner.prefill(piece)[-1] for piece in ids.split(1, dim=1)], dim=1)

    alone = [work(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(work, range(4)))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_the_growing_layer_holds_what_a_dynamic_one_holds():
    ours, theirs = GrowingLayer(), DynamicLayer()
    generator = torch.Generator().manual_seed(0)
    for step, (new, dropped) in enumerate([(3, 0), (90, 2), (1, 0), (1, 1), (200, 150), (5, 0)]):
        keys, values = (torch.randn(2, 3, new, 4, generator=generator) for _ in range(2))
        found, expected = ours.update(keys, values), theirs.update(keys, values)
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1]), step
        for layer in (ours, theirs):
            layer.crop(-dropped)
        assert ours.get_seq_length() == theirs.get_seq_length()
        assert ours.get_mask_sizes(2) == theirs.get_mask_sizes(2)
