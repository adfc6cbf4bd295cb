"""A method that only the test folder knows goes through plan, craft, tune, save and load."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from transformers import TrainingArguments

import sparsmith as sm
from sparsmith.crafting.apply import trained_roles
from sparsmith.errors import MethodError, ProofError
from sparsmith.methods import registry
from tests.kit.fifth import SHIFT, ShiftConfig
from tests.kit.pico import LAYERS, pico_ids, pico_model
from tests.kit.rows import RowDataset, pad_rows


@pytest.fixture(autouse=True)
def registered():
    registry.register(SHIFT)
    yield
    registry.unregister("shift")


def tuned(tmp_path, steps=25, **changes):
    model = sm.craft(pico_model("llama"), ShiftConfig())
    args = TrainingArguments(
        output_dir=str(tmp_path / "run"),
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        use_cpu=True,
        **changes,
    )
    tuner = sm.Tuner(model=model, args=args, train_dataset=RowDataset(40), data_collator=pad_rows)
    tuner.train()
    return model, tuner


def test_plan_counts_what_is_built():
    plan = sm.plan(pico_model("llama").config, ShiftConfig())
    model = sm.craft(pico_model("llama"), ShiftConfig())
    assert plan.total_params == sum(p.numel() for p in model.parameters())
    assert plan.trained == {"shift": sum(p.numel() for p in model.parameters() if p.requires_grad)}
    assert "FFN + shift" in str(plan) and json.dumps(plan.as_dict())


def test_craft_is_neutral_and_leaves_the_base_alone():
    base = pico_model("llama")
    names = [name for name, _ in base.named_parameters()]
    model = sm.craft(base, ShiftConfig())
    ids = pico_ids()
    assert torch.equal(model(ids).logits, base(ids).logits)
    assert [name for name, _ in base.named_parameters()] == names
    assert model.sparsmith.neutral["bitwise"] is True


def test_tune_save_load(tmp_path):
    model, tuner = tuned(tmp_path)
    assert tuner.roles_move.result["value"]["shift"] > 0
    assert len(trained_roles(model)["shift"]) == LAYERS
    sm.save(model.eval(), tmp_path / "delta")
    again = sm.load(tmp_path / "delta", base=pico_model("llama"))
    ids = pico_ids()
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_half_made_craft_leaves_no_trace(monkeypatch):
    base = pico_model("llama")
    before = {name: p.clone() for name, p in base.named_parameters()}
    real = SHIFT.roles

    def fails(model, config):
        raise RuntimeError("half-way")

    monkeypatch.setattr(type(SHIFT), "roles", lambda self, model, config: fails(model, config))
    with pytest.raises(RuntimeError, match="half-way"):
        sm.craft(base, ShiftConfig(), inplace=True)
    monkeypatch.undo()
    assert real(base, ShiftConfig())["shift"] == []
    after = dict(base.named_parameters())
    assert after.keys() == before.keys() and all(torch.equal(after[n], before[n]) for n in before)
    assert all(p.requires_grad for p in base.parameters())


def test_a_method_that_changes_the_function_is_stopped(monkeypatch):
    def shifts_at_once(self, ffn, hidden):
        torch.nn.Module.__init__(self)
        self.ffn = ffn
        self.shift = torch.nn.Parameter(torch.ones(hidden))

    monkeypatch.setattr("tests.kit.fifth.ShiftedFFN.__init__", shifts_at_once)
    with pytest.raises(ProofError, match="differ from the base"):
        sm.craft(pico_model("llama"), ShiftConfig())


def test_a_term_without_gradient_is_stopped(monkeypatch, tmp_path):
    from sparsmith.methods.base import LossTerm

    monkeypatch.setattr(
        type(SHIFT), "loss_terms", lambda self, model, config, batch: {"decay": LossTerm(torch.tensor(1.0), 0.01)}
    )
    with pytest.raises(ProofError, match=r"shift\.decay: found a constant"):
        tuned(tmp_path, steps=1)


def test_a_term_asked_for_and_absent_is_stopped(monkeypatch, tmp_path):
    monkeypatch.setattr(type(SHIFT), "loss_terms", lambda self, model, config, batch: {})
    with pytest.raises(ProofError, match=r"shift\.decay: found nothing"):
        tuned(tmp_path, steps=1)


def test_names_that_are_taken_or_unknown():
    with pytest.raises(MethodError, match="taken"):
        registry.register(type("Other", (type(SHIFT),), {})())
    with pytest.raises(MethodError, match="Did you mean `shift`"):
        registry.get("shft")


def test_nothing_outside_the_test_folder_names_it():
    found = subprocess.run(
        [sys.executable, "-c", "import sparsmith.methods.registry as r; print(r.names())"],
        capture_output=True,
        text=True,
    )
    assert "shift" not in found.stdout and "pesc" in found.stdout
