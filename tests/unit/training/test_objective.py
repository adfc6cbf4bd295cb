"""The objective against naive sums, on the fifth method (it needs nothing of PESC)."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import sparsmith as sm
from sparsmith.errors import CheckpointError, ProofError
from sparsmith.methods import registry
from sparsmith.training import Objective
from sparsmith.training.window import Window
from tests.kit.fifth import SHIFT, ShiftConfig
from tests.kit.pico import pico_model
from tests.kit.rows import RowDataset, pad_rows


@pytest.fixture(autouse=True)
def registered():
    registry.register(SHIFT)
    yield
    registry.unregister("shift")


@pytest.fixture
def model():
    model = sm.craft(pico_model("llama", dtype=torch.float64), ShiftConfig(decay=0.5))
    for block in model.model.layers:
        torch.nn.init.normal_(block.mlp.shift, generator=torch.Generator().manual_seed(1))
    return model


def batch(start=0, rows=4):
    data = RowDataset(start + rows)
    return pad_rows([data[i] for i in range(start, start + rows)])


def naive(model, inputs):
    """Token by token: (loss, domain) of every kept label."""
    logits = model(inputs["input_ids"]).logits
    found = []
    for b in range(len(logits)):
        for s in range(logits.shape[1] - 1):
            label = inputs["labels"][b, s + 1].item()
            if label != -100:
                loss = -F.log_softmax(logits[b, s].float(), -1)[label]
                found.append((loss, inputs["domain"][b, s + 1].item()))
    return found


def test_loss_and_domains_equal_the_naive_sum(model):
    inputs = batch()
    out = Objective(model, domains=2)(**inputs)
    pairs = naive(model, inputs)
    task = sum(loss for loss, _ in pairs) / len(pairs)
    decay = torch.stack([b.mlp.shift.square().mean() for b in model.model.layers]).mean()
    torch.testing.assert_close(out["loss"].double(), (task + 0.5 * decay).double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(out["terms"]["task"].double(), task.double(), rtol=1e-6, atol=0)
    for domain in (0, 1):
        wanted = sum(loss.item() for loss, d in pairs if d == domain)
        assert out["domain_sum"][domain].item() == pytest.approx(wanted, rel=1e-6)
    assert out["domain_count"].sum() == len(pairs)


def test_accumulation_equals_one_batch(model):
    """Two micro-batches with different numbers of labels give the gradient of the whole batch."""
    whole = batch(0, 4)
    whole["labels"][0, :-1] = -100
    objective = Objective(model)
    items = whole["labels"][:, 1:].ne(-100).sum()
    objective(**whole)["loss"].backward()
    wanted = [b.mlp.shift.grad.clone() for b in model.model.layers]
    model.zero_grad()
    for part in (slice(0, 1), slice(1, 4)):
        objective(**{k: v[part] for k, v in whole.items()}, num_items_in_batch=items)["loss"].backward()
    for block, grad in zip(model.model.layers, wanted, strict=True):
        # the cross-entropy is taken in float32, whatever the model's type
        torch.testing.assert_close(block.mlp.shift.grad, grad, rtol=1e-5, atol=1e-8)


def test_tokens_of_no_domain_are_left_out(model):
    inputs = batch()
    inputs["domain"] = torch.full_like(inputs["domain"], -1)
    out = Objective(model, domains=2)(**inputs)
    assert out["domain_count"].tolist() == [0, 0]


def test_reentrant_checkpointing_is_refused(model):
    with pytest.raises(ProofError, match="reentrant"):
        Objective(model).activation_checkpointing_enable({"use_reentrant": True})


def test_an_uncrafted_model_is_refused():
    with pytest.raises(CheckpointError, match="without a record"):
        Objective(pico_model("llama"))


def test_window_means_over_steps():
    window = Window(("a", "b"))
    for value in (1.0, 3.0):
        window.add(
            {
                "terms": {"task": torch.tensor(value)},
                "tokens": torch.tensor(10),
                "domain_sum": torch.tensor([value, 0.0]),
                "domain_count": torch.tensor([2.0, 0.0]),
            }
        )
    figures = window.take(2)
    assert figures["terms"] == {"task": 2.0}
    assert figures["domain_loss"] == {"a": 1.0}  # b had no token: no figure, not a zero
    assert window.tokens_seen == 20 and figures["tokens_per_second"] > 0
    assert window.take(1)["terms"] == {}
