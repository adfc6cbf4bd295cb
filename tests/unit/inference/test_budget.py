"""From a share or from milliseconds to a depth."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

import sparsmith as sm
from sparsmith import anatomy
from sparsmith.errors import CheckpointError, UsageError
from sparsmith.inference.budget import (
    depth_for,
    depth_fraction,
    depth_fractions,
    head_flops,
    layer_flops,
    traffic_fractions,
)
from sparsmith.inference.faults import BudgetTooSmall, ProfileMissing
from sparsmith.inference.profile import (
    FILE,
    Profile,
    device_name,
    find_profile,
    write_profile,
)
from tests.kit.pico import FAMILIES, pico_ids
from tests.unit.inference.models import deep, elastic

LLAMA_13B = LlamaConfig(
    hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40, vocab_size=32000
)
DEPTHS = (12, 16, 20, 24, 28, 32, 36, 40)
PAPER = (0.309, 0.408, 0.506, 0.605, 0.704, 0.803, 0.901, 1.0)


@pytest.mark.parametrize("context", [0, 1, 256])
def test_the_fractions_of_the_papers_model(context: int):
    """Weight traffic, and FLOPs with the attention over contexts of the paper's length, both to +-0.001."""
    traffic = traffic_fractions(anatomy.shape_of(LLAMA_13B), DEPTHS)
    flops = depth_fractions(LLAMA_13B, DEPTHS, context)
    for depth, share in zip(DEPTHS, PAPER, strict=True):
        assert traffic[depth] == pytest.approx(share, abs=0.001)
        assert flops[depth] == pytest.approx(share, abs=0.001)


def test_flops_by_hand():
    """d 64, FFN 96, 4 heads of 16, 2 key/value heads, V 128, in a context of 10."""
    linear = 2 * (64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 96)
    config = deep().config
    assert layer_flops(config, 10) == [linear + 2 * 2 * 10 * 64] * 4
    assert head_flops(config) == 2 * 128 * 64
    hybrid = deep("gemma2").config
    near, far = layer_flops(hybrid, 32), layer_flops(hybrid, 100)
    assert [b - a for a, b in zip(near, far, strict=True)] == [0, 4 * 68 * 64] * 2


@pytest.mark.parametrize("family", FAMILIES)
def test_flops_are_those_that_torch_counts(family: str):
    """One token behind an empty context: every product of the blocks and the head, attention's own left to the formula."""
    from torch.utils.flop_counter import FlopCounterMode

    model = deep(family)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model(input_ids=pico_ids(1, 1), use_cache=False)
    assert counter.get_total_flops() == pytest.approx(
        sum(layer_flops(model.config, 1)) + head_flops(model.config), rel=0.002
    )


def test_a_share_takes_the_deepest_depth_that_fits():
    model = elastic()
    shares = {depth: depth_fraction(model, depth, 50) for depth in (2, 3, 4)}
    assert shares[4] == 1.0
    assert depth_for(model, 1.0, context=50) == 4
    taken = [depth_for(model, step / 100, context=50) for step in range(101) if step / 100 >= shares[2]]
    assert taken == sorted(taken) and set(taken) == {2, 3, 4}
    for depth, share in shares.items():
        assert depth_for(model, share, context=50) == depth


def test_the_block_of_a_frozen_trunks_exit_is_paid_for():
    shared, frozen = elastic(), elastic(trunk="frozen")
    assert depth_fraction(frozen, 2, 10) == pytest.approx(depth_fraction(shared, 3, 10))
    assert depth_fraction(frozen, 4, 10) == 1.0


def test_the_cheapest_depth_is_named_and_its_cost_is_enough():
    model = elastic()
    with pytest.raises(BudgetTooSmall, match="depth 2") as caught:
        depth_for(model, 0.1, context=50)
    cost = caught.value.expected.split()[2]
    assert depth_for(model, float(cost), context=50) == 2
    profile = _profile(model, {2: 1.2345, 3: 2.0, 4: 3.0})
    with pytest.raises(BudgetTooSmall, match="depth 2") as caught:
        depth_for(model, "1ms", context=50, profile=profile)
    cost = caught.value.expected.split()[2]
    assert depth_for(model, f"{cost}ms", context=50, profile=profile) == 2


@pytest.mark.parametrize("budget", [0, -1, 1.01, "12", "ms", "0ms", "-3ms", "12 s"])
def test_budgets_that_cannot_be(budget: Any):
    with pytest.raises(UsageError):
        depth_for(elastic(), budget, context=10)


def test_generate_runs_at_the_budgets_depth():
    model, ids = elastic(), pico_ids(3, 8)
    share = depth_fraction(model, 3, 8 + 6)
    profile = _profile(model, {2: 1.0, 3: 2.0, 4: 3.0}, batch=3)
    options: dict[str, Any] = {"max_new_tokens": 6, "return_stats": True, "pad_token_id": 0}
    for budget, depth in ((share, 3), ("2.5ms", 3)):
        out = sm.generate(model, ids, budget=budget, profile=profile if isinstance(budget, str) else None, **options)
        assert out.stats.depths == (depth,) * 3
        assert torch.equal(out.ids, sm.generate(model, ids, depth=depth, max_new_tokens=6, pad_token_id=0))
    out = sm.generate(model, ids, budget=["1ms", 1.0, "2.2ms"], profile=profile, **options)
    assert out.stats.depths == (2, 4, 3)


# profiles


def _profile(model: Any, costs: dict[int, float], batch: int = 1, **changes: Any) -> Profile:
    return Profile(
        **{"device": device_name(model), "dtype": "float32", "batch": batch, "ms_per_token": costs, **changes}
    )


def test_a_profile_holds_for_its_device_type_and_batch(tmp_path: Path):
    model = elastic()
    with pytest.raises(ProfileMissing, match="no profile"):
        depth_for(model, "5ms", context=10)
    with pytest.raises(ProfileMissing, match="no such file"):
        depth_for(model, "5ms", context=10, profile=tmp_path / "none.json")
    for wrong in ({"device": "abacus"}, {"dtype": "bfloat16"}, {"batch": 2}):
        with pytest.raises(ProfileMissing, match="sparsmith bench"):
            find_profile(_profile(model, {4: 1.0}, **wrong), model, 1)


def test_profiles_lie_side_by_side_and_new_ones_replace_old(tmp_path: Path):
    model = elastic()
    file = write_profile(_profile(model, {2: 1.0, 4: 3.0}), tmp_path)
    assert file == tmp_path / FILE
    write_profile(_profile(model, {2: 5.0, 4: 9.0}, batch=4), file)
    write_profile(_profile(model, {2: 2.0, 4: 6.0}, spread={2: (1.5, 2.5)}), file)
    assert len(json.loads(file.read_text())["profiles"]) == 2
    assert find_profile(file, model, 1).ms_per_token == {2: 2.0, 4: 6.0}
    assert find_profile(file, model, 1).spread == {2: (1.5, 2.5)}
    assert depth_for(model, "5.5ms", context=1, batch=4, profile=tmp_path) == 2


@pytest.mark.parametrize("text", ["{", '{"format_version": 1}', '{"format_version": 7, "profiles": []}'])
def test_a_profile_that_is_none(text: str, tmp_path: Path):
    (tmp_path / FILE).write_text(text)
    with pytest.raises(CheckpointError):
        find_profile(tmp_path, elastic(), 1)
