"""Every batched measure against a loop over single rows, options and tokens."""

from __future__ import annotations

import pytest
import torch

from sparsmith.evaluating import heldout_loss, rank_classification
from sparsmith.evaluating.generation import greedy
from sparsmith.evaluating.rank import Option, score_options
from tests.kit.evalsets import EOS, char_tokenizer, eval_set
from tests.kit.pico import FAMILIES, pico_model

ROWS = [
    ("2+2=", "4"),
    ("what is the sum of 10 and 20? ", "it is 30"),
    ("a", "bcdefghij klm"),
    ("the quick brown fox jumps over the lazy ", "dog"),
    ("x:", "yz"),
]
CHOICES = [
    ("is it red? ", "yes", ["yes", "no", "perhaps so"]),
    ("a very much longer question with more words in it: ", "beta", ["alpha", "beta"]),
    ("z", "c", ["a", "b", "c", "dd"]),
]


def naive_nll(model, ids: list[int], start: int) -> float:
    """Summed -log p of ids[start:], one row alone."""
    with torch.no_grad():
        logits_SV = model(input_ids=torch.tensor([ids])).logits[0].double()
    logp_SV = logits_SV.log_softmax(-1)
    return -sum(logp_SV[t - 1, ids[t]].item() for t in range(start, len(ids)))


@pytest.mark.parametrize("family", FAMILIES)
def test_heldout_loss_is_the_row_by_row_loss(family):
    model, data = pico_model(family), eval_set(char_tokenizer(), ROWS)
    scores = heldout_loss(model, data, batch_tokens=64)
    for row, total, weight in zip(data.rows, scores.total, scores.weight):
        start = row.labels.index(next(x for x in row.labels if x != -100))
        assert weight == len(row.labels) - start
        assert total == pytest.approx(naive_nll(model, row.input_ids, start), rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("batch_tokens", [1, 40, 4096])
def test_heldout_loss_does_not_hang_on_the_batching(batch_tokens):
    model, data = pico_model(), eval_set(char_tokenizer(), ROWS)
    whole = heldout_loss(model, data)
    assert heldout_loss(model, data, batch_tokens=batch_tokens).total == pytest.approx(whole.total, abs=1e-5)


def test_heldout_loss_in_slices_of_the_head(monkeypatch):
    model, data = pico_model("gemma2", final_logit_softcapping=5.0), eval_set(char_tokenizer(), ROWS)
    whole = heldout_loss(model, data)
    monkeypatch.setattr("sparsmith.evaluating.loss.HEAD_FLOATS", 3 * 128)
    assert heldout_loss(model, data).total == pytest.approx(whole.total, abs=1e-5)
    assert whole.total[0] == pytest.approx(naive_nll(model, data.rows[0].input_ids, 5), abs=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_option_scores_are_the_option_by_option_sums(family):
    model, tokenizer = pico_model(family), char_tokenizer()
    data = eval_set(tokenizer, CHOICES, metrics=("rank",), options="options")
    options = [
        [Option((*row.prompt_ids, *tokenizer(option)["input_ids"]), len(row.prompt_ids)) for option in row.options]
        for row in data.rows
    ]
    for row, scores in zip(options, score_options(model, options)):
        for option, score in zip(row, scores):
            assert score == pytest.approx(-naive_nll(model, list(option.ids), option.start), rel=1e-5, abs=1e-5)


def test_options_that_bend_the_prompts_last_token_are_scored_whole():
    """Tokens that differ before the option's first character: the shared beginning ends earlier."""
    model = pico_model()
    rows = [[Option((1, 10, 11, 12, 13), 3), Option((1, 10, 20, 21), 2)], [Option((1, 5), 1), Option((1, 6, 7), 1)]]
    for row, scores in zip(rows, score_options(model, rows)):
        naive = [-naive_nll(model, list(option.ids), option.start) for option in row]
        assert scores == pytest.approx(naive, abs=1e-5)


def test_rank_accuracies_from_naive_scores():
    model, tokenizer = pico_model(), char_tokenizer()
    data = eval_set(tokenizer, CHOICES, metrics=("rank",), options="options")
    found = rank_classification(model, data)
    for index, row in enumerate(data.rows):
        head, right = row.prompt_ids, row.options.index(row.completion)
        raw = [-naive_nll(model, head + tokenizer(option)["input_ids"], len(head)) for option in row.options]
        by_token = [s / len(o) for s, o in zip(raw, row.options)]  # one token per character here
        assert found["rank"].total[index] == float(max(range(len(raw)), key=raw.__getitem__) == right)
        assert found["rank_by_token"].total[index] == float(max(range(len(raw)), key=by_token.__getitem__) == right)
        assert found["rank_by_byte"].total[index] == found["rank_by_token"].total[index]
        rest = max(score for option, score in enumerate(raw) if option != right)
        assert found["rank_margin"].total[index] == pytest.approx(raw[right] - rest, abs=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_in_batches_writes_the_tokens_of_generation_alone(family):
    model = pico_model(family)
    prompts = [[1, 5, 6], [1, *range(10, 40)], [1, 7], [1, *range(60, 80)]]
    together = greedy(model, prompts, max_new_tokens=12, stop_ids={EOS})
    for prompt, written in zip(prompts, together):
        ids, alone = list(prompt), []
        for _ in range(12):
            with torch.no_grad():
                token = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax().item()
            if token == EOS:
                break
            ids.append(token)
            alone.append(token)
        assert written == alone
