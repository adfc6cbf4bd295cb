"""Self-speculation gives the full model's own text, whatever drafts it."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

import sparsmith as sm
from sparsmith.errors import MethodError, UsageError
from sparsmith.inference.speculative import SelfSpeculation, SpeculationStats, bonus_pays
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

LENGTH, NEW = 24, 12
COMBINATIONS = [(1, 1, True), (1, 3, False), (1, 6, True), (3, 1, False), (3, 3, True), (3, 6, False)]


@cache
def agreeing(family: str) -> Any:
    return deep(family, agree=0.1, sharp=8.0)


@cache
def text_of(family: str) -> tuple[list[int], ...]:
    ids, mask = padded(4, LENGTH)
    return tuple(naive_greedy(agreeing(family), prompt, NEW) for prompt in prompts_of(ids, mask))


def speculate(model: Any, ids: torch.Tensor, exit: int, **options: Any) -> tuple[torch.Tensor, SpeculationStats]:
    names = [name for name in ("draft_len", "bonus", "stop_confidence") if name in options]
    settings = {"exit": exit, **{name: options.pop(name) for name in names}}
    options = {"max_new_tokens": NEW, "eos_token_id": None, "pad_token_id": 0, **options}
    out = sm.generate(model, ids, self_speculative=settings, return_stats=True, **options)
    stats, most = out.stats, settings.get("draft_len", 4)
    assert stats.early_passes <= stats.emitted + stats.rejected + most + 1
    assert stats.accepted + stats.rejected == stats.drafted
    return out.ids, stats


@pytest.mark.parametrize("family", FAMILIES_AND_WINDOWS)
def test_four_padded_rows_are_the_greedy_text(family: str):
    ids, mask = padded(4, LENGTH)
    for exit, draft_len, bonus in COMBINATIONS:
        out, _ = speculate(
            agreeing(family), ids, exit, draft_len=draft_len, bonus=bonus, attention_mask=mask, stop_confidence=0.0
        )
        assert answers_of(out, LENGTH) == list(text_of(family)), (exit, draft_len, bonus)


@pytest.mark.parametrize("family", FAMILIES_AND_WINDOWS)
def test_an_end_token_inside_an_accepted_span(family: str):
    """Each row ends at its own end token, or at the limit; what comes behind is padding."""
    ids, mask = padded(4, LENGTH)
    eos = text_of(family)[0][6]
    expected = [row[: row.index(eos) + 1] if eos in row else row for row in text_of(family)]
    for exit, draft_len, bonus in ((3, 6, True), (1, 3, False)):
        options = {"draft_len": draft_len, "bonus": bonus, "stop_confidence": 0.0, "eos_token_id": eos}
        out, _ = speculate(agreeing(family), ids, exit, attention_mask=mask, **options)
        assert answers_of(out, LENGTH, eos) == expected
        out, stats = speculate(agreeing(family), ids[:1], exit, **options)
        assert out[0, LENGTH:].tolist() == expected[0]
        assert stats.emitted == len(expected[0])


@pytest.mark.parametrize("bonus", [True, False, "auto"])
@pytest.mark.parametrize("draft_len", [1, 3, 6])
@pytest.mark.parametrize("exit", [1, 2, 3])
def test_every_setting_and_length_on_one_family(exit: int, draft_len: int, bonus: Any):
    ids, mask = padded(4, LENGTH)
    for rows, new, sure in ((1, NEW, 0.4), (4, 5, 0.9), (1, 1, 0.0)):
        options = {"attention_mask": mask[:rows]} if rows > 1 else {}
        settings = {"draft_len": draft_len, "bonus": bonus, "stop_confidence": sure}
        out, _ = speculate(agreeing("llama"), ids[:rows], exit, max_new_tokens=new, **settings, **options)
        assert answers_of(out, LENGTH) == [row[:new] for row in text_of("llama")[:rows]]


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_a_draft_that_is_always_wrong_or_always_right(family: str):
    ids = pico_ids(1, LENGTH)
    wrong = deep(family, sharp=8.0)
    assert answers_of(speculate(wrong, ids, 1)[0], LENGTH) == [naive_greedy(wrong, ids, NEW)]
    right = deep(family, agree=0.0, sharp=8.0)
    out, stats = speculate(right, ids, 1, draft_len=5, bonus=True, stop_confidence=0.0)
    assert answers_of(out, LENGTH) == [naive_greedy(right, ids, NEW)]
    assert stats.acceptance == 1.0
    # the prompt's token, a round of 5 + 1, then the five that were left, which leave no room for a bonus
    assert (stats.rounds, stats.full_passes, stats.early_passes) == (2, 3, 1 + 6 + 5)


@pytest.mark.parametrize("kind", ["frozen trunk", "PESC", "PESC by token ids", "PESC and SoFT"])
def test_other_crafted_models(kind: str):
    ids, mask = padded(3, LENGTH)
    router = "hash" if "ids" in kind else "learned"
    pesc = sm.PescConfig(num_experts=4, top_k=2, adapter_dim=8, router=router, lora={"enabled": False})
    if kind == "frozen trunk":
        model = elastic(trunk="frozen", agree=0.1, sharp=8.0)
    else:
        configs = [pesc, sm.SoftConfig(exits=(2, 3, 4))] if kind == "PESC and SoFT" else pesc
        model = sm.craft(deep(agree=0.1, sharp=8.0), configs).eval()
        randomize_adapters(model)
    out, stats = speculate(model, ids, 2, attention_mask=mask, draft_len=3)
    assert answers_of(out, LENGTH) == [naive_greedy(model, prompt, NEW) for prompt in prompts_of(ids, mask)]
    assert stats.drafted > 0


def test_no_wait_for_a_confidence_that_is_not_asked_for(monkeypatch: pytest.MonkeyPatch):
    from sparsmith.inference import speculative

    monkeypatch.setattr(speculative, "confidence", lambda logits: pytest.fail("the device was waited for"))
    speculate(agreeing("llama"), pico_ids(1, LENGTH), 1, stop_confidence=0.0)


def test_drafting_stops_where_the_draft_is_unsure():
    _, stats = speculate(agreeing("llama"), pico_ids(1, LENGTH), 1, draft_len=6, stop_confidence=1.0)
    assert stats.drafted == stats.rounds


def test_the_bonus_token_pays_where_drafts_are_mostly_right():
    assert bonus_pays(0.99, 4, 0.3)
    assert not bonus_pays(0.1, 4, 0.3)
    # (1 - a^5)/(1 - a)/(4c + 1) against (1 - a^4)/(1 - a)/(3c + 1) at a = 0.8, c = 0.5: 1.1205 against 1.1808
    assert not bonus_pays(0.8, 4, 0.5)


def test_sampling_repeats_with_its_seed_and_ends_at_its_end_token():
    model, ids = agreeing("llama"), pico_ids(2, LENGTH)
    options: dict[str, Any] = {"do_sample": True, "temperature": 2.0, "top_p": 0.9}
    first, _ = speculate(model, ids, 2, seed=5, **options)
    again, _ = speculate(model, ids, 2, seed=5, **options)
    other, _ = speculate(model, ids, 2, seed=6, **options)
    assert torch.equal(first, again) and not torch.equal(first, other)
    eos = int(first[0, LENGTH + 5])
    ended, _ = speculate(model, ids[:1], 2, seed=5, eos_token_id=eos, **options)
    assert eos not in ended[0, LENGTH:-1].tolist()


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        ({"exit": 0}, MethodError),
        ({"exit": 4}, MethodError),
        ({"exit": 9}, MethodError),
        ({"draft_len": 3}, UsageError),
        ({"exit": 2, "draft_length": 3}, UsageError),
        ({"exit": 2, "draft_len": 0}, UsageError),
        ({"exit": 2, "bonus": "maybe"}, UsageError),
        ("two", UsageError),
    ],
)
def test_settings_that_cannot_be(given: Any, fault: type[Exception]):
    with pytest.raises(fault):
        SelfSpeculation.of(given, 4)


def test_a_bare_depth_is_enough():
    assert SelfSpeculation.of(2, 4) == SelfSpeculation(exit=2)
