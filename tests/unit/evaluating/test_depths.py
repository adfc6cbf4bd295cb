"""Every depth by the same measures: what evaluation by depth tells is what each slice tells alone."""

from __future__ import annotations

import json

import pytest
import torch

import sparsmith as sm
from sparsmith.anatomy import views
from sparsmith.crafting.slices import at_depth
from sparsmith.errors import CheckpointError
from sparsmith.evaluating import DepthResult, elastic_depths, evaluate, evaluate_depths
from sparsmith.methods.soft.config import SoftConfig
from tests.kit.evalsets import char_tokenizer, eval_set
from tests.kit.pico import pico_model

ROWS = [("1+1=", "2", ["2", "5"]), ("2+3=", "5", ["4", "5"]), ("12+30=", "42", ["42", "24"]), ("0+7=", "7", ["7", "8"])]
SETTINGS = {
    "metrics": ("loss", "rank", "exact_match"),
    "options": "options",
    "extractor": "first_line",
    "max_new_tokens": 3,
}
EXITS = (1, 3, 4)


def sets():
    tokenizer = char_tokenizer()
    plain = eval_set(tokenizer, [("ab", "cd"), ("abc", "abcabc")], name="text", domain="words")
    return tokenizer, [eval_set(tokenizer, ROWS, **SETTINGS), plain]


def elastic(**changes):
    return sm.craft(pico_model(num_hidden_layers=4), SoftConfig(exits=EXITS, **changes))


@pytest.fixture(scope="module")
def measured():
    model = elastic()
    tokenizer, data = sets()
    return model, tokenizer, data, evaluate_depths(model, tokenizer, data, resamples=20)


def test_each_depth_equals_its_slice_measured_alone(measured):
    model, tokenizer, data, result = measured
    assert tuple(result.depths) == EXITS
    for depth in EXITS:
        alone = evaluate(at_depth(model, depth), tokenizer, data, resamples=20)
        found = result.depths[depth]
        for name, metrics in alone.rows.items():
            for metric, rows in metrics.items():
                assert found.rows[name][metric] == rows, (depth, name, metric)
        assert found.answers == alone.answers
    assert "agreement" not in result.full.overall, "the full depth stays the result that it is without depths"


def test_agreement_is_the_share_of_equal_tokens_at_labelled_positions(measured):
    model, _, data, result = measured

    def choices(one, row):
        with torch.no_grad():
            logits = one(input_ids=torch.tensor([list(row.input_ids)])).logits[0]
        return [int(logits[i - 1].argmax()) for i, label in enumerate(row.labels) if label != -100]

    for depth in EXITS[:-1]:
        for one in data:
            scores = result.depths[depth].rows[one.name]["agreement"]
            for index, row in enumerate(one.rows):
                pairs = list(zip(choices(model, row), choices(at_depth(model, depth), row)))
                assert scores.total[index] == sum(a == b for a, b in pairs)
                assert scores.weight[index] == len(pairs)
    assert result.agreement(4) == 1.0
    assert result.agreement(1) == result.depths[1].overall["agreement"].value


def test_a_base_is_read_out_anywhere():
    model = pico_model(num_hidden_layers=4)
    tokenizer, data = sets()
    result = evaluate_depths(model, tokenizer, data, depths=[2], resamples=20, metrics=["loss"])
    assert tuple(result.depths) == (2, 4)
    alone = evaluate(views.first_blocks(model, 2), tokenizer, data, resamples=20, metrics=["loss"])
    assert result.depths[2].rows["text"]["loss"] == alone.rows["text"]["loss"]
    assert elastic_depths(model) == ()
    assert elastic_depths(elastic()) == EXITS


def test_a_frozen_trunk_is_measured_with_its_own_blocks():
    model = elastic(trunk="frozen")
    tokenizer, data = sets()
    result = evaluate_depths(model, tokenizer, data, resamples=20, metrics=["loss"])
    base = evaluate(pico_model(num_hidden_layers=4), tokenizer, data, resamples=20, metrics=["loss"])
    assert result.full.rows == base.rows
    # an exit block starts as a copy of the next one
    next_one = evaluate(
        views.first_blocks(pico_model(num_hidden_layers=4), 2), tokenizer, data, resamples=20, metrics=["loss"]
    )
    assert result.depths[1].rows["text"]["loss"] == next_one.rows["text"]["loss"]


def test_json_and_table(measured):
    result = measured[-1]
    plain = json.loads(json.dumps(result.to_json()))
    assert list(plain) == ["1", "3", "4"]
    assert DepthResult.from_json(plain) == result
    whole = result.as_dict()
    assert {key: whole[key] for key in result.full.to_json()} == result.full.to_json(), "the known keys stay"
    assert whole["depths"] == result.to_json()
    heads = [column.header for column in result.table().columns]
    assert heads[-3:] == ["depth 1", "depth 3", "depth 4"]
    for spoilt in ({}, {"x": plain["1"]}, {"1": {}}, []):
        with pytest.raises(CheckpointError):
            DepthResult.from_json(spoilt)
