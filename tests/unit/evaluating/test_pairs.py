"""Loss, rank and answers of an encoder-decoder against loops over the plain model of transformers."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from sparsmith.data.chat import make_encoder
from sparsmith.data.evalsets import load_eval
from sparsmith.evaluating import evaluate
from sparsmith.evaluating.generation import greedy
from sparsmith.evaluating.loss import heldout_loss
from sparsmith.evaluating.rank import Option, score_options
from sparsmith.recipe.schema import DataSettings, EvalSource, TrainSource
from tests.kit.evalsets import char_tokenizer
from tests.kit.switching import START, switch_model

ROWS = [("abcdef", "x"), ("a", "yy"), ("say it", "wxyz"), ("go on and on", "yy"), ("no", "x")]
TOLERANCE = 1e-5  # float32 sums over rows of other widths


@pytest.fixture(scope="module")
def model():
    return switch_model(expert_capacity=1000)


@pytest.fixture(scope="module")
def held(tmp_path_factory):
    folder = tmp_path_factory.mktemp("held")
    lines = "\n".join(f'{{"prompt": "{prompt}", "completion": "{answer}"}}' for prompt, answer in ROWS)
    (folder / "rows.jsonl").write_text(lines + "\n", encoding="utf-8")
    source = EvalSource(
        name="held", domain="d", path="rows.jsonl", options=("x", "yy", "wxyz"), metrics=("loss", "rank")
    )
    settings = DataSettings(train=(TrainSource(name="t", domain="d", path="t"),), template="{prompt}")
    return load_eval(source, 0, settings, make_encoder(char_tokenizer(), None, "response", pairs=True), folder)


def naive(model, read, written):
    """Log-likelihoods of the tokens, one row at a time, the decoder fed by hand."""
    fed = torch.tensor([[START, *written[:-1]]])
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([read]), decoder_input_ids=fed).logits[0]
    return logits.log_softmax(-1).gather(1, torch.tensor(written)[:, None])[:, 0]


def test_held_out_loss(model, held):
    tokenizer, found = char_tokenizer(), heldout_loss(model, held, batch_tokens=40)
    for (prompt, answer), total, count in zip(ROWS, found.total, found.weight):
        read = [1, *tokenizer.encode(prompt, add_special_tokens=False)]
        written = [*tokenizer.encode(answer, add_special_tokens=False), 2]
        assert count == len(written)
        assert total == pytest.approx(-naive(model, read, written).sum().item(), abs=TOLERANCE * count)


def test_rank_by_one_reading_of_each_prompt(model, held):
    tokenizer = char_tokenizer()
    rows = [[Option(tuple(o.input_ids), len(row.prompt_ids)) for o in row.option_rows] for row in held.rows]
    calls = []
    handle = model.encoder.register_forward_pre_hook(
        lambda m, a, k: calls.append(len(k["input_ids"])), with_kwargs=True
    )
    found = score_options(model, rows, batch_tokens=100)
    handle.remove()
    assert sum(calls) == len(ROWS), "each prompt is read once, whatever its options"
    hits = []
    for (prompt, answer), scores in zip(ROWS, found):
        read = [1, *tokenizer.encode(prompt, add_special_tokens=False)]
        wanted = [
            naive(model, read, tokenizer.encode(text, add_special_tokens=False)).sum().item()
            for text in ("x", "yy", "wxyz")
        ]
        assert scores == pytest.approx(wanted, abs=4 * TOLERANCE)
        hits.append(float(("x", "yy", "wxyz")[wanted.index(max(wanted))] == answer))
    result = evaluate(model, tokenizer, [held], resamples=10)
    assert result.sets["held"]["rank"].value == pytest.approx(sum(hits) / len(hits))
    assert result.sets["held"]["loss"].value > 0


def test_greedy_answers(model):
    prompts = [[1, 5, 6, 7, 8, 9], [1, 30], [1, 44, 45, 46]]
    found = greedy(model, prompts, max_new_tokens=5, stop_ids={2})
    for prompt, answer in zip(prompts, found):
        fed = [START]
        for _ in range(5):
            with torch.no_grad():
                given = {"input_ids": torch.tensor([prompt]), "decoder_input_ids": torch.tensor([fed])}
                token = int(model(**given).logits[0, -1].argmax())
            if token == 2:
                break
            fed.append(token)
        assert answer == fed[1:]


def test_the_library_s_loss_is_the_same_mean(model, held):
    found = heldout_loss(model, held)
    row = held.rows[2]
    first = len(row.prompt_ids)
    with torch.no_grad():
        out = model(input_ids=torch.tensor([row.input_ids[:first]]), labels=torch.tensor([row.input_ids[first:]]))
    assert found.total[2] / found.weight[2] == pytest.approx(out.loss.item(), abs=TOLERANCE)
    logits = out.logits[0]
    assert functional.cross_entropy(logits, torch.tensor(row.input_ids[first:])).item() == pytest.approx(
        out.loss.item()
    )
