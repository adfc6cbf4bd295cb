"""Thresholds hold on other prompts what they were asked to, and belong to one model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import sparsmith as sm
from sparsmith.errors import CheckpointError, CheckpointMismatch, MethodError, UsageError
from sparsmith.inference.calibrate import CLOSED, FILE, GRID, calibrate, choose, load, save, weights_hash
from sparsmith.inference.early_exit import exit_early
from sparsmith.inference.request import make_request
from sparsmith.inference.sampling import Sampling
from sparsmith.inference.thresholds import thresholds_of
from sparsmith.ops.binomial import lower_bound
from tests.kit.pico import pico_ids
from tests.unit.inference.models import deep, elastic

ASKED = 0.9


@pytest.fixture(scope="module")
def model() -> Any:
    found = elastic(agree=0.25, sharp=25.0)
    found.generation_config.eos_token_id = None
    return found


def prompts(count: int, seed: int) -> list[list[int]]:
    """Of unequal length."""
    return [row[: 4 + place % 5] for place, row in enumerate(pico_ids(count, 8, seed=seed).tolist())]


@pytest.fixture(scope="module")
def calibrated(model: Any) -> Any:
    return calibrate(model, prompts(32, 1), agreement=ASKED, max_new_tokens=24, batch=16)


@torch.no_grad()
def test_agreement_holds_on_a_disjoint_split(model: Any, calibrated: Any):
    """Tokens that left, against the full model on the same text before: at least what was asked, less 0.02."""
    assert any(row.threshold <= 1 for row in calibrated.exits)
    ids = pico_ids(40, 6, seed=77)
    request = make_request(model, ids, max_new_tokens=24, sampling=Sampling(), streamer=None, options={})
    out, stats = exit_early(model, request, thresholds_of(model, calibrated, None, 40))
    right = model(input_ids=out).logits[:, 5:-1].argmax(dim=-1) == out[:, 6:]
    depths = torch.tensor(stats.depths)
    early = depths < 4
    assert right[~early].all()
    left, agreed = int(early.sum()), int((right & early).sum())
    assert left > 150
    assert agreed / left >= ASKED - 0.02
    assert float(depths.double().mean()) == pytest.approx(calibrated.mean_depth, abs=0.35)


def test_the_rows_say_how_it_came_out(calibrated: Any):
    first, second = calibrated.exits
    assert (first.depth, second.depth) == (2, 3)
    assert calibrated.prompts == 32 and calibrated.tokens == 32 * 24
    assert first.tokens == 32 * 23 and second.tokens == first.tokens - first.left
    for row in calibrated.exits:
        if row.threshold <= 1:
            assert row.threshold in GRID
            assert row.bound == pytest.approx(lower_bound(row.agreed, row.left), abs=1e-6)
            assert row.bound >= ASKED
    full = 32 * 24 - first.left - second.left
    assert calibrated.mean_depth == pytest.approx((2 * first.left + 3 * second.left + 4 * full) / (32 * 24), abs=1e-3)


def test_the_same_seed_gives_the_same_file(model: Any, calibrated: Any, tmp_path: Path):
    one, two = save(calibrated, tmp_path / "one.json"), tmp_path / "folder"
    two.mkdir()
    again = calibrate(model, prompts(32, 1), agreement=ASKED, max_new_tokens=24, batch=16)
    assert save(again, two) == two / FILE
    assert one.read_bytes() == (two / FILE).read_bytes()
    assert load(two, model) == calibrated
    held = json.loads(one.read_text())
    assert {"format_version", "model_hash", "agreement", "level", "exits", "mean_depth"} <= set(held)


def test_a_file_or_a_folder_is_a_threshold(model: Any, calibrated: Any, tmp_path: Path):
    save(calibrated, tmp_path)
    ids = pico_ids(2, 6)
    options = {"max_new_tokens": 12, "return_stats": True}
    by_file = sm.generate(model, ids, exit_threshold=tmp_path / FILE, **options)
    by_folder = sm.generate(model, ids, exit_threshold=[str(tmp_path), calibrated], **options)
    by_hand = sm.generate(model, ids, exit_threshold=calibrated.thresholds, **options)
    assert torch.equal(by_file.ids, by_hand.ids) and torch.equal(by_folder.ids, by_hand.ids)
    assert by_file.stats == by_hand.stats == by_folder.stats


def test_thresholds_of_another_model_are_refused(calibrated: Any, tmp_path: Path):
    other = elastic(agree=0.26, sharp=25.0)
    save(calibrated, tmp_path)
    with pytest.raises(CheckpointMismatch, match="thresholds of the model"):
        sm.generate(other, pico_ids(1, 6), exit_threshold=tmp_path / FILE)
    assert weights_hash(other) != calibrated.model_hash
    assert weights_hash(elastic(agree=0.25, sharp=25.0)) == calibrated.model_hash


@pytest.mark.parametrize("text", ["{", "[]", '{"format_version": 1}', '{"format_version": 99}', None])
def test_a_file_that_is_none_is_refused(model: Any, text: str | None, tmp_path: Path):
    file = tmp_path / FILE
    if text is not None:
        file.write_text(text)
    with pytest.raises(CheckpointError):
        load(file, model)


def test_the_rule_by_hand():
    """200 tokens; the first exit is right wherever it is sure, the second on what is left nowhere."""
    sure = torch.cat([torch.full((160,), 0.95), torch.full((40,), 0.5)])
    agrees = torch.cat([torch.ones(160, dtype=torch.bool), torch.zeros(40, dtype=torch.bool)])
    rows, left_at = choose([(2, sure, agrees), (3, sure, agrees)], 4, 0.98)
    assert (rows[0].threshold, rows[0].tokens, rows[0].left, rows[0].agreed) == (0.51, 200, 160, 160)
    assert rows[0].bound == pytest.approx(0.05 ** (1 / 160), abs=1e-6)
    assert (rows[1].threshold, rows[1].tokens, rows[1].left) == (CLOSED, 40, 0)
    assert left_at.tolist() == [2] * 160 + [4] * 40


def test_too_few_tokens_close_an_exit():
    """148 of 148 do not prove 0.98; 149 do."""
    for tokens, closed in ((148, True), (149, False)):
        rows, _ = choose([(2, torch.full((tokens,), 0.9), torch.ones(tokens, dtype=torch.bool))], 4, 0.98)
        assert (rows[0].threshold > 1) == closed


def test_calibrating_leaves_the_model_as_it_was(model: Any):
    model.train()
    calibrate(model, prompts(3, 5), max_new_tokens=3)
    assert all(module.training for module in model.modules())
    model.eval()


def test_what_cannot_be_calibrated(model: Any):
    with pytest.raises(UsageError, match="prompts"):
        calibrate(model, [])
    with pytest.raises(UsageError, match="agreement"):
        calibrate(model, prompts(2, 1), agreement=1.0)
    with pytest.raises(UsageError, match="visit"):
        calibrate(deep(), prompts(2, 1))
    with pytest.raises(MethodError):
        calibrate(model, prompts(2, 1), visit=[1])
