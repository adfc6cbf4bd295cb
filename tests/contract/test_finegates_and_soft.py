"""Slim and depth-elastic at once: every depth is an ordinary, smaller checkpoint."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import TrainingArguments

import sparsmith as sm
from sparsmith.crafting.slices import at_depth, depths_of
from sparsmith.methods.finegates.gates import gates_of
from sparsmith.training.objective import Objective
from tests.kit.cases import METHODS
from tests.kit.depths import deep_model, labelled_batch
from tests.kit.pico import FFN, pico_ids
from tests.kit.rows import RowDataset, pad_rows

NAMES = ["finegates, soft", "finegates, soft LoRA"]


def logits(model):
    with torch.no_grad():
        return model(pico_ids(3, 20, seed=8), use_cache=False).logits


def as_trained(name, seed=3):
    """Every trained tensor moved, and the choice made."""
    model = sm.craft(deep_model(), METHODS[name], proof=False).eval()
    stream = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=stream) * 0.03)
    for method, config in model.sparsmith.parts:
        method.settle(model, config)
    return model


@pytest.mark.parametrize("name", NAMES)
def test_every_depth_is_a_smaller_stock_checkpoint(name, tmp_path):
    model = as_trained(name)
    wanted = {depth: logits(at_depth(model, depth)) for depth in (2, 4)}
    reports = sm.export(model, tmp_path / "out", depths="all", proof=False)
    assert gates_of(model), "the model that was given is left as it is"
    for depth, report in zip((2, 4), reports):
        folder = tmp_path / "out" / f"depth-{depth}"
        config = json.loads((folder / "config.json").read_text())
        assert config["model_type"] == "llama" and config["num_hidden_layers"] == depth
        assert config["intermediate_size"] < FFN and not report.needs_code
        again = sm.load(folder)
        assert not gates_of(again) and depths_of(again) == tuple(n for n in (2, 4) if n <= depth)
        assert (
            logits(again) - wanted[depth]
        ).abs().max() <= 1e-5  # a shorter sum over the kept channels rounds differently


def test_a_slice_opens_without_us(tmp_path):
    report = sm.export(as_trained("finegates, soft"), tmp_path / "out", depth=2)
    assert report.proof["bitwise"] and report.proof["class"] == "LlamaForCausalLM"


def test_both_orders_are_the_same_model():
    pair = METHODS["finegates, soft"]
    first, second = (sm.craft(deep_model(), order, proof=False) for order in (pair, pair[::-1]))
    assert torch.equal(logits(first), logits(second))
    assert sorted(n for n, p in first.named_parameters() if p.requires_grad) == sorted(
        n for n, p in second.named_parameters() if p.requires_grad
    )


def test_the_loss_is_that_of_the_depths_and_of_the_budget():
    model = sm.craft(deep_model(), METHODS["finegates, soft"], proof=False).train()
    for method, config in model.sparsmith.parts:
        method.on_step(model, config, 0, 100)
        method.on_step(model, config, 10, 100)
    batch = labelled_batch()
    told = Objective(model)(**batch)
    alone = [at_depth(model, depth)(**batch, use_cache=False).loss.item() for depth in (2, 4)]
    assert told["terms"]["task"].item() == pytest.approx(sum(alone) / 2, abs=1e-5)
    assert set(told["terms"]) == {"task", "finegates.budget"} and told["terms"]["finegates.budget"].item() > 0
    told["loss"].backward()
    assert all(gate.logit.grad is not None and gate.logit.grad.any() for _, gate in gates_of(model))


@pytest.mark.parametrize("name", NAMES)
def test_they_tune_together(name, tmp_path):
    model = sm.craft(deep_model(), METHODS[name], seed=2)
    args = TrainingArguments(
        output_dir=str(tmp_path / "run"),
        max_steps=40,
        per_device_train_batch_size=4,
        learning_rate=3e-3,
        logging_steps=10,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        use_cpu=True,
    )
    tuner = sm.Tuner(model=model, args=args, train_dataset=RowDataset(160), data_collator=pad_rows, moved_after=15)
    tuner.train()
    lines = [line for line in tuner.state.log_history if "loss" in line]
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert {"health/soft/loss_at_2", "health/finegates/remains"} <= set(lines[-1])
    assert lines[-1]["health/finegates/remains"] <= 0.8 and lines[-1]["health/finegates/soft"] == 0
    model.eval()
    sm.save(model, tmp_path / "delta")
    again = sm.load(tmp_path / "delta", base=deep_model())
    assert torch.equal(logits(again), logits(model))
    dense = sum(p.numel() for p in deep_model().parameters())
    assert sum(p.numel() for p in sm.settle(again).parameters()) < 0.85 * dense
