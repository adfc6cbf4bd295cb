"""Confidence exits: a token is read where it should be, and what it skipped is made up for exactly."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import sparsmith as sm
from sparsmith.crafting.slices import at_depth
from sparsmith.errors import MethodError, UsageError
from sparsmith.inference.early_exit import EarlyExit
from sparsmith.inference.request import Request
from sparsmith.inference.runner import DepthRunner
from sparsmith.inference.sampling import Sampling
from tests.kit.pico import pico_ids, randomize_adapters
from tests.unit.inference.models import (
    FAMILIES_AND_WINDOWS,
    answers_of,
    deep,
    elastic,
    naive_greedy,
    padded,
    prompts_of,
)

LENGTH, NEW = 14, 20


@torch.no_grad()
def naive_exits(model: Any, prompt: Tensor, new: int, thresholds: dict[int, float]) -> tuple[list[int], list[int]]:
    """(tokens, depths): every token from whole forwards of the slices, without a cache; the first at full depth."""
    views = {depth: at_depth(model, depth) for depth in (*sorted(thresholds), 4)}
    ids, tokens, depths = prompt, [], []
    for step in range(new):
        for depth, view in views.items():
            probs = view(input_ids=ids, use_cache=False).logits[0, -1].softmax(dim=-1)
            if depth == 4 or (step > 0 and probs.max() >= thresholds[depth]):
                break
        tokens.append(int(probs.argmax()))
        depths.append(depth)
        ids = torch.cat([ids, torch.tensor([[tokens[-1]]])], dim=1)
    return tokens, depths


@cache
def sure(family: str, trunk: str = "shared") -> Any:
    return elastic(family, trunk=trunk, agree=0.3, sharp=10.0)


def middling(model: Any, ids: Tensor) -> dict[int, float]:
    """Thresholds that some tokens pass and others do not: the median confidence at each exit."""
    with torch.no_grad():
        probs = {n: at_depth(model, n)(input_ids=ids).logits.softmax(dim=-1).amax(dim=-1) for n in (2, 3)}
    return {depth: float(values.median()) for depth, values in probs.items()}


def run(model: Any, ids: Tensor, thresholds: Any, **options: Any) -> Any:
    options = {"max_new_tokens": NEW, "eos_token_id": None, "pad_token_id": 0, **options}
    return sm.generate(model, ids, exit_threshold=thresholds, return_stats=True, **options)


@pytest.mark.parametrize("trunk", ["shared", "frozen"])
@pytest.mark.parametrize("family", FAMILIES_AND_WINDOWS)
def test_padded_rows_are_the_naive_text_of_each_alone(family: str, trunk: str):
    """Four rows of unequal length; each leaves where its own slices say, over windows and all."""
    model, (ids, mask) = sure(family, trunk), padded(4, LENGTH)
    thresholds = middling(model, pico_ids(4, 30))
    out = run(model, ids, thresholds, attention_mask=mask, max_waiting=7)
    checked = range(4) if family == "llama" else (1,)  # the naive texts take the time of this test
    for row in checked:
        prompt = prompts_of(ids, mask)[row]
        tokens, depths = naive_exits(model, prompt, NEW, thresholds)
        assert out.ids[row, LENGTH:].tolist() == tokens
        assert out.stats.depths[row] == tuple(depths)
    histogram = out.stats.histogram
    assert sum(histogram.values()) == 4 * NEW
    assert out.stats.mean_depth == sum(n * count for n, count in histogram.items()) / (4 * NEW)


def test_tokens_do_leave_at_every_depth_in_these_tests():
    counts: dict[int, int] = {2: 0, 3: 0, 4: 0}
    for family in ("llama", "gpt_neox"):
        model, (ids, mask) = sure(family), padded(4, LENGTH)
        out = run(model, ids, middling(model, pico_ids(4, 30)), attention_mask=mask)
        for depth, count in out.stats.histogram.items():
            counts[depth] += count
    assert min(counts.values()) > 8


@pytest.mark.parametrize("trunk", ["shared", "frozen"])
@pytest.mark.parametrize("family", FAMILIES_AND_WINDOWS)
def test_a_threshold_above_one_is_greedy(family: str, trunk: str):
    model, (ids, mask) = sure(family, trunk), padded(3, LENGTH)
    out = run(model, ids, 1.5, attention_mask=mask)
    expected = model.generate(
        ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert torch.equal(out.ids, expected)
    assert out.stats.histogram == {4: 3 * NEW} and out.stats.mean_depth == 4.0


@pytest.mark.parametrize(
    ("family", "trunk", "max_waiting"),
    [
        ("llama", "frozen", 64),
        *((family, trunk, 4) for family in FAMILIES_AND_WINDOWS for trunk in ("shared", "frozen")),
    ],
)
@torch.no_grad()
def test_completed_keys_and_values_are_a_full_prefill(
    family: str, trunk: str, max_waiting: int, monkeypatch: pytest.MonkeyPatch
):
    """Exits are drawn at random, so that waiting tokens pile up in every pattern."""
    from sparsmith.inference import early_exit

    generator = torch.Generator().manual_seed(max_waiting)
    monkeypatch.setattr(early_exit, "confidence", lambda logits: torch.rand(len(logits), generator=generator))
    model = elastic(family, trunk=trunk, exact=True)
    request = Request(pico_ids(2, LENGTH), None, NEW, (), 0, Sampling())
    thresholds = {2: torch.tensor([0.4, 0.4]), 3: torch.tensor([0.3, 0.3])}
    engine = EarlyExit(model, request, thresholds, max_waiting)
    ids, stats = engine.run()
    assert stats.histogram[2] > 0 and stats.passes[4] < NEW
    engine.complete()
    whole = DepthRunner(model, (2, 3, 4), mask=None, room=ids.shape[1])
    whole.prefill(ids[:, :-1])
    exact = next(model.parameters()).dtype == torch.float64
    for ours, theirs in zip(engine.runner.keys_and_values(), whole.keys_and_values(), strict=True):
        for found, expected in zip(ours, theirs, strict=True):
            assert found.shape == expected.shape
            assert (found - expected).abs().max() <= (1e-12 if exact else 1e-5)  # Gemma 2 runs in float32


def test_waiting_never_exceeds_its_limit():
    model = sure("llama")
    request = Request(pico_ids(1, LENGTH), None, NEW, (), 0, Sampling())
    engine = EarlyExit(model, request, {2: torch.tensor([1e-9]), 3: torch.tensor([1e-9])}, 5)
    seen = []
    step = engine._step
    engine._step = lambda: (seen.append(max(w.tokens for w in engine.waiting)), step())[1]  # type: ignore[method-assign]
    _, stats = engine.run()
    assert max(seen) == 5
    assert stats.passes == {2: NEW, 3: 1 + (NEW - 1) // 6, 4: 1 + (NEW - 1) // 6}
    assert stats.histogram == {2: NEW - 1, 3: 0, 4: 1}


@pytest.mark.parametrize("drawn", [False, True])
def test_a_row_does_not_depend_on_its_neighbours(drawn: bool):
    """Thresholds of their own for each row; four rows together are the four alone, drawn tokens included."""
    model, (ids, mask) = sure("llama"), padded(4, LENGTH)
    each = [2.0, {2: 0.2}, 0.1, {2: 0.5, 3: 0.3}]
    if drawn:
        # a row's stream is named by its place: every row alone is given the place 0, so all four are the same prompt
        ids, mask, each = ids[:1].repeat(4, 1), mask[:1].repeat(4, 1), [0.2] * 4
    options: dict[str, Any] = {"do_sample": True, "seed": 3, "temperature": 1.5} if drawn else {}
    together = run(model, ids, each, attention_mask=mask, **options)
    for row in range(1 if drawn else 4):
        alone = run(model, ids[row : row + 1], each[row], attention_mask=mask[row : row + 1], **options)
        assert torch.equal(alone.ids[0], together.ids[row])
        assert alone.stats.depths[0] == together.stats.depths[row]
    if drawn:
        assert len({tuple(row) for row in together.ids.tolist()}) == 4


def test_drawn_tokens_at_full_depth_are_those_of_a_plain_draw():
    model, ids = sure("llama"), pico_ids(3, LENGTH)
    options: dict[str, Any] = {"do_sample": True, "seed": 7, "temperature": 1.3, "top_k": 20, "max_new_tokens": NEW}
    closed = sm.generate(model, ids, exit_threshold=1.1, eos_token_id=None, **options)
    assert torch.equal(closed, sm.generate(model, ids, depth=4, eos_token_id=None, pad_token_id=0, **options))


def test_end_tokens_stop_a_row_and_no_longer_hold_the_batch():
    model, ids = sure("llama"), pico_ids(3, LENGTH)
    free = run(model, ids, 0.2)
    eos = int(free.ids[0, LENGTH + 5])
    ended = run(model, ids, 0.2, eos_token_id=eos)
    for row, answer in enumerate(answers_of(ended.ids, LENGTH, eos)):
        whole = free.ids[row, LENGTH:].tolist()
        assert answer == (whole[: whole.index(eos) + 1] if eos in whole else whole)
        assert len(ended.stats.depths[row]) == len(answer)


@pytest.mark.parametrize("router", ["learned", "hash"])
def test_a_pesc_model_with_exits(router: Any):
    pesc = sm.PescConfig(num_experts=4, top_k=2, adapter_dim=8, router=router, lora={"enabled": False})
    model = sm.craft(deep(agree=0.3, sharp=10.0), [pesc, sm.SoftConfig(exits=(2, 3, 4))], proof=False).eval()
    randomize_adapters(model)
    ids, mask = padded(2, LENGTH)
    thresholds = middling(model, pico_ids(4, 30))
    out = run(model, ids, thresholds, attention_mask=mask)
    for row, prompt in enumerate(prompts_of(ids, mask)):
        assert (out.ids[row, LENGTH:].tolist(), list(out.stats.depths[row])) == naive_exits(
            model, prompt, NEW, thresholds
        )


def test_agreement_is_counted_on_the_same_text():
    model, ids = sure("llama"), pico_ids(2, LENGTH)
    assert run(model, ids, 2.0, agreement=True).stats.agreement == 1.0
    out = run(model, ids, 0.1, agreement=True)
    same = [
        naive_greedy(model, out.ids[row : row + 1, :stop], 1)[0] == int(out.ids[row, stop])
        for row in range(2)
        for stop in range(LENGTH, LENGTH + NEW)
    ]
    assert out.stats.agreement == pytest.approx(sum(same) / len(same))
    assert out.stats.agreement < 1


def test_which_depths_are_visited():
    model = sm.craft(deep(), sm.SoftConfig(exits=(1, 2, 3, 4)), proof=False)
    ids = pico_ids(1, 6)
    assert set(run(model, ids, 1e-6, max_new_tokens=3).stats.passes) == {1, 2, 3, 4}
    assert set(run(model, ids, 1e-6, max_new_tokens=3, visit=[2, 4]).stats.passes) == {2, 4}
    assert set(run(model, ids, {3: 1e-6}, max_new_tokens=3).stats.passes) == {3, 4}
    assert set(run(model, ids, {1: 2.0, 3: 1e-6}, max_new_tokens=3).stats.passes) == {3, 4}
    with pytest.raises(MethodError, match="`7`"):
        run(model, ids, 0.5, visit=[7])
    with pytest.raises(MethodError, match="tuned with exits"):
        run(deep(), ids, {2: 0.5})


@pytest.mark.parametrize("given", [0, -0.5, "missing", [0.5], [0.5, 0.5, 0.5], True])
def test_thresholds_that_cannot_be(given: Any):
    with pytest.raises(UsageError if given != "missing" else Exception, match=r"exit_threshold|missing"):
        run(sure("llama"), pico_ids(2, 6), given, max_new_tokens=2)
