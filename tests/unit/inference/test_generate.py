"""The one call: its ways, what it refuses, what it returns, and that it leaves the model as it found it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

import sparsmith as sm
from sparsmith.crafting.slices import at_depth
from sparsmith.errors import MethodError, UnsupportedAnatomy, UsageError
from sparsmith.inference import Generated, stream_text
from sparsmith.inference.faults import ModeConflict
from tests.kit.pico import FAMILIES, pico_ids
from tests.unit.inference.models import answers_of, deep, elastic, naive_greedy, padded, prompts_of, snapshot

WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "depth": {"depth": 3},
    "depths": {"depth": [2, 4]},
    "budget": {"budget": 0.9},
    "exits": {"exit_threshold": 0.1},
    "speculation": {"self_speculative": {"exit": 2, "draft_len": 3}},
    "transformers' speculation": {"self_speculative": {"exit": 2}, "engine": "hf"},
}


class Recorder:
    """A streamer that keeps what it is given."""

    def __init__(self) -> None:
        self.given: list[list[int]] = []
        self.ended = 0

    def put(self, value: torch.Tensor) -> None:
        self.given.append(value.reshape(-1).tolist())

    def end(self) -> None:
        self.ended += 1


def rows_for(way: str) -> int:
    return 1 if way == "transformers' speculation" else 2


# by depth


@pytest.mark.parametrize("family", FAMILIES)
def test_a_depth_is_its_slice(family: str):
    model, (ids, mask) = elastic(family, sharp=6.0), padded(2)
    out = sm.generate(model, ids, depth=3, attention_mask=mask, max_new_tokens=8, eos_token_id=None, pad_token_id=0)
    expected = [naive_greedy(at_depth(model, 3), prompt, 8) for prompt in prompts_of(ids, mask)]
    assert answers_of(out, ids.shape[1]) == expected


@pytest.mark.parametrize("drawn", [False, True])
def test_requests_of_several_depths_do_not_depend_on_their_grouping(drawn: bool):
    model, (ids, mask) = elastic(sharp=6.0), padded(5)
    depths = [3, 2, 4, 3, 2]
    options: dict[str, Any] = {"max_new_tokens": 8, "pad_token_id": 0, "eos_token_id": None}
    if drawn:
        options |= {"do_sample": True, "temperature": 1.5, "top_p": 0.9, "seed": 3}
    out = sm.generate(model, ids, depth=depths, attention_mask=mask, return_stats=True, **options)
    assert out.stats.depths == tuple(depths)
    for depth in (2, 3, 4):
        alone = sm.generate(model, ids, depth=depth, attention_mask=mask, **options)
        for row, own in enumerate(depths):
            if own == depth:
                assert torch.equal(out.ids[row], alone[row])


def test_rows_that_end_early_are_padded_on_the_right():
    model, ids = elastic(sharp=6.0), pico_ids(3, 8)
    free = sm.generate(model, ids, depth=[2, 3, 4], max_new_tokens=8, eos_token_id=None, pad_token_id=0)
    eos = int(free[1, 10])
    out = sm.generate(model, ids, depth=[2, 3, 4], max_new_tokens=8, eos_token_id=eos, pad_token_id=0)
    expected = [row[: row.index(eos) + 1] if eos in row else row for row in free[:, 8:].tolist()]
    assert answers_of(out, 8, eos) == expected


def test_by_depth_takes_transformers_own_options():
    model, ids = elastic(), pico_ids(1, 6)
    out = sm.generate(model, ids, depth=3, max_new_tokens=8, repetition_penalty=5.0, eos_token_id=None, pad_token_id=0)
    assert len(set(out[0, 6:].tolist())) == 8


# what is returned


@pytest.mark.parametrize("way", WAYS)
def test_ids_alone_or_with_statistics(way: str):
    model, ids = elastic(), pico_ids(rows_for(way), 7)
    options = {"max_new_tokens": 5, "eos_token_id": None, "pad_token_id": 0, **WAYS[way]}
    bare, full = sm.generate(model, ids, **options), sm.generate(model, ids, return_stats=True, **options)
    assert isinstance(full, Generated)
    assert torch.equal(bare, full.ids) and bare.shape == (len(ids), 12) and torch.equal(bare[:, :7], ids)
    assert (full.stats is None) == (way in ("plain", "transformers' speculation"))


@pytest.mark.parametrize("way", WAYS)
def test_a_tokenizers_output_is_an_input(way: str):
    model, (ids, mask) = elastic(), padded(rows_for(way), 8)
    options = {"max_new_tokens": 4, "pad_token_id": 0, **WAYS[way]}
    batch = {"input_ids": ids, "attention_mask": mask}
    assert torch.equal(sm.generate(model, batch, **options), sm.generate(model, ids, attention_mask=mask, **options))


@pytest.mark.parametrize("way", [way for way in WAYS if way != "depths"])
def test_every_way_streams_its_tokens(way: str):
    model, ids, recorder = elastic(sharp=6.0), pico_ids(1, 7), Recorder()
    options = {"max_new_tokens": 9, "eos_token_id": None, "pad_token_id": 0, **WAYS[way]}
    out = sm.generate(model, ids, streamer=recorder, **options)
    assert recorder.given[0] == ids[0].tolist()
    assert [token for piece in recorder.given[1:] for token in piece] == out[0, 7:].tolist()
    assert recorder.ended == 1


def test_plain_text_is_what_it_was():
    model, (ids, mask) = deep(), padded(2)
    out = sm.generate(model, ids, max_new_tokens=6, attention_mask=mask, pad_token_id=0)
    assert torch.equal(out, model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0))


class Letters:
    """As much of a tokenizer as streaming asks for."""

    pad_token_id = 0

    def decode(self, ids: Any, **options: Any) -> str:
        return "".join(chr(32 + int(token)) + " " for token in ids)


@pytest.mark.parametrize("way", [way for way in WAYS if way != "depths"])
def test_streamed_text_and_its_statistics(way: str):
    model, ids = elastic(sharp=6.0), pico_ids(1, 7)
    found: list[Any] = []
    options = {"eos_token_id": None, **WAYS[way]}
    pieces = stream_text(model, Letters(), ids[0].tolist(), max_new_tokens=6, on_done=found.append, **options)  # type: ignore[arg-type]
    out = sm.generate(model, ids, max_new_tokens=6, pad_token_id=0, return_stats=True, **options)
    assert "".join(pieces) == Letters().decode(out.ids[0, 7:])
    assert torch.equal(found[0].ids, out.ids) and found[0].stats == out.stats


# what is refused


@pytest.mark.parametrize(
    "options",
    [
        {"depth": 2, "budget": 0.5},
        {"exit_threshold": 0.5, "self_speculative": 2},
        {"depth": 4, "exit_threshold": 2.0},
        {"visit": [2]},
        {"depth": 2, "max_waiting": 3},
        {"exit_threshold": 0.5, "engine": "hf"},
        {"depth": 2, "profile": "file.json"},
        {"self_speculative": 2, "agreement": True},
    ],
)
def test_more_than_one_way(options: dict[str, Any]):
    with pytest.raises(ModeConflict):
        sm.generate(elastic(), pico_ids(1, 4), **options)


@pytest.mark.parametrize(
    ("options", "fault", "text"),
    [
        ({"depth": 0}, MethodError, "one of 2, 3, 4"),
        ({"depth": 1}, MethodError, "one of 2, 3, 4"),
        ({"depth": 5}, MethodError, "one of 2, 3, 4"),
        ({"depth": [2, 3, 4]}, UsageError, "3 values"),
        ({"budget": [0.5]}, UsageError, "1 values"),
        ({"self_speculative": 4}, MethodError, "1 to 3"),
        ({"self_speculative": 2, "engine": "vllm"}, UsageError, "vllm"),
        ({"self_speculative": 2, "engine": "hf"}, UsageError, "one prompt"),
        ({"self_speculative": 2, "num_beams": 4}, UsageError, "num_beams"),
        ({"exit_threshold": 0.5, "repetition_penalty": 1.1}, UsageError, "repetition_penalty"),
        ({"depth": 2, "max_new_tokens": 0}, UsageError, "at least 1"),
        ({"depth": 2, "streamer": Recorder()}, UsageError, "one prompt"),
        ({"self_speculative": 2, "do_sample": True, "temperature": 0.0}, UsageError, "above 0"),
        ({"depth": 2, "attention_mask": torch.tensor([[1, 1, 1, 0], [1] * 4])}, UsageError, "padding_side"),
        ({"depth": 2, "attention_mask": torch.tensor([[1, 0, 1, 1], [1] * 4])}, UsageError, "padding_side"),
        ({"depth": 2, "attention_mask": torch.ones(2, 3)}, UsageError, "attention_mask"),
    ],
)
def test_what_cannot_be_meant(options: dict[str, Any], fault: type[Exception], text: str):
    with pytest.raises(fault, match=text):
        sm.generate(elastic(), pico_ids(2, 4), **options)


def test_a_generation_config_that_would_be_passed_over():
    model = elastic()
    model.generation_config.repetition_penalty = 1.2
    for options in ({"self_speculative": 2}, {"exit_threshold": 0.5}):
        with pytest.raises(UsageError, match=r"generation_config\.repetition_penalty"):
            sm.generate(model, pico_ids(1, 4), **options)
    sm.generate(model, pico_ids(1, 4), depth=2, max_new_tokens=2, pad_token_id=0)


def test_a_model_without_exits_has_its_full_depth_alone():
    model, ids = deep(), pico_ids(1, 5)
    options: dict[str, Any] = {"max_new_tokens": 4, "pad_token_id": 0}
    assert torch.equal(sm.generate(model, ids, depth=4, **options), sm.generate(model, ids, **options))
    assert torch.equal(sm.generate(model, ids, budget=1.0, **options), sm.generate(model, ids, **options))
    assert torch.equal(sm.generate(model, ids, exit_threshold=0.5, **options), sm.generate(model, ids, **options))
    with pytest.raises(MethodError, match="method: soft"):
        sm.generate(model, ids, depth=2, **options)


# what stays as it was


class Broken(Exception):
    pass


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("way", WAYS)
def test_an_exception_leaves_nothing_behind(way: str, family: str):
    """The last block fails in its third pass, or a streamer in the midst; training flags are mixed on purpose."""
    model = elastic(family, trunk="shared" if "transformers" in way else "frozen")
    model.train()
    model.model.layers[1].eval()
    before, calls = snapshot(model), 0
    norm = model.model.norm
    whole = norm.forward

    def fail(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > 4:
            raise Broken
        return whole(*args, **kwargs)

    norm.forward = fail
    with pytest.raises(Broken):
        sm.generate(
            model, pico_ids(rows_for(way), 6), max_new_tokens=12, pad_token_id=0, eos_token_id=None, **WAYS[way]
        )
    del norm.forward
    assert snapshot(model) == before
    sm.generate(model, pico_ids(rows_for(way), 6), max_new_tokens=3, pad_token_id=0, **WAYS[way])
    assert snapshot(model) == before


def test_the_config_is_whole_after_a_draft_of_transformers_fails():
    model = deep()

    class Fails(Recorder):
        def put(self, value: torch.Tensor) -> None:
            if self.given:
                raise Broken
            super().put(value)

    forward = model.model.layers[0].forward

    def fail(*args: Any, **kwargs: Any) -> Any:
        if model.config.num_hidden_layers == 2:
            raise Broken
        return forward(*args, **kwargs)

    model.model.layers[0].forward = fail
    with pytest.raises(Broken):
        sm.generate(model, pico_ids(1, 6), self_speculative=2, engine="hf")
    assert model.config.num_hidden_layers == 4
    assert model.generation_config.assistant_early_exit is None
    del model.model.layers[0].forward
    with pytest.raises(Broken):
        sm.generate(model, pico_ids(1, 6), self_speculative=2, engine="hf", streamer=Fails())
    assert model.config.num_hidden_layers == 4


def test_threads_of_transformers_engine_take_turns():
    """Each call changes the one config while it drafts; without the lock a full pass would run cut."""
    model = deep(agree=0.1, sharp=8.0)
    prompts = [pico_ids(1, 8, seed=seed) for seed in range(6)]
    expected = [naive_greedy(model, prompt, 10) for prompt in prompts]

    def work(prompt: torch.Tensor) -> list[int]:
        settings = {"exit": 2, "draft_len": 3}
        options: dict[str, Any] = {"max_new_tokens": 10, "eos_token_id": None, "pad_token_id": 0}
        return sm.generate(model, prompt, self_speculative=settings, engine="hf", **options)[0, 8:].tolist()

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(work, prompts)) == expected


def test_threads_of_our_engine_run_at_once():
    model = elastic(agree=0.1, sharp=8.0)
    prompts = [pico_ids(1, 8, seed=seed) for seed in range(4)]
    ways: list[dict[str, Any]] = [
        {"self_speculative": 2},
        {"exit_threshold": 2.0},
        {"depth": 4},
        {"self_speculative": 3},
    ]

    def work(place: int) -> list[int]:
        options: dict[str, Any] = {"max_new_tokens": 10, "eos_token_id": None, "pad_token_id": 0}
        return sm.generate(model, prompts[place], **ways[place], **options)[0, 8:].tolist()

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(work, range(4))) == [naive_greedy(model, prompt, 10) for prompt in prompts]


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])
def test_transformers_engine_says_which_families_it_cannot_cut(family: str):
    with pytest.raises(UnsupportedAnatomy, match=family):
        sm.generate(deep(family), pico_ids(1, 5), self_speculative=2, engine="hf")


def test_transformers_engine_does_not_know_blocks_of_an_exit():
    with pytest.raises(UsageError, match="block of its own"):
        sm.generate(elastic(trunk="frozen"), pico_ids(1, 5), self_speculative=2, engine="hf")
