"""Both layouts: what crafting leaves as it was, what is gated and trained, what a state holds, and when there is noise."""

from __future__ import annotations

import copy

import pytest
import torch

import sparsmith as sm
from sparsmith.crafting.apply import trained_roles
from sparsmith.crafting.delta import fill_delta
from sparsmith.errors import CheckpointMismatch, EmptyRole, MethodError
from sparsmith.methods.finegates.gates import draw_noise, gates_of
from sparsmith.methods.finegates.method import FINEGATES
from tests.kit.cases import largest_difference, logits
from tests.kit.gates import BIASED, LAYOUTS, copying, gated, gates_config, scatter, steps_of, still
from tests.kit.pico import FAMILIES, pico_ids, pico_model

both = pytest.mark.parametrize("layout", LAYOUTS)


@both
@pytest.mark.parametrize("family", FAMILIES)
def test_crafting_leaves_the_logits_to_the_bit(layout, family):
    """Fault 1: bias-free linears got a random bias, so that the first step was another model."""
    model = pico_model(family)
    crafted = sm.craft(model, gates_config(layout))
    assert largest_difference(logits(model), logits(crafted)) == 0
    assert crafted.sparsmith.neutral["bitwise"]


@both
@pytest.mark.parametrize("name", BIASED)
def test_no_bias_is_added(layout, name):
    """Fault 1, in families without, with some and with all biases."""
    family, changes = name.split()[0], BIASED[name]
    base = pico_model(family, **changes)
    crafted = sm.craft(base, gates_config(layout))
    biases = [[n for n, _ in m.named_parameters() if n.endswith("bias")] for m in (base, crafted)]
    assert len(biases[0]) == len(biases[1])
    assert largest_difference(logits(base), logits(crafted)) == 0


@both
def test_what_trains_is_what_the_plan_counts(layout):
    for family in FAMILIES:
        config = gates_config(layout)
        base = pico_model(family)
        plan = sm.plan(base, config)
        counts = {role: sum(p.numel() for _, p in t) for role, t in trained_roles(sm.craft(base, config)).items()}
        assert plan.trained == counts and set(counts) == {"gate"}, family


def test_the_paper_gates_every_row_and_column_of_every_linear():
    config = gates_config("paper")
    for family in FAMILIES:
        model = gated(config, family)
        base = pico_model(family)
        linears = [m for b in (base.get_submodule(_blocks(family)),) for m in b.modules() if _is_linear(m)]
        assert sum(gate.size for _, gate in gates_of(model)) == sum(sum(m.weight.shape) for m in linears)


def _blocks(family: str) -> str:
    return {"gpt2": "transformer.h", "gpt_neox": "gpt_neox.layers"}.get(family, "model.layers")


def _is_linear(module: torch.nn.Module) -> bool:
    return type(module).__name__ in ("Linear", "Conv1D")


@both
@pytest.mark.parametrize("targets", ["all-linear", ("q_proj",), ("down_proj", "o_proj")])
@pytest.mark.parametrize("family, tied", [("llama", False), ("gemma2", True)])
def test_head_and_embeddings_carry_no_gate(layout, targets, family, tied):
    """Fault 3: the head was gated, which pushes a share of all logits to 0 and breaks tying."""
    config = gates_config(layout, lora={"r": 2, "targets": targets})
    model = gated(config, family)
    homes = [name for name, _ in gates_of(model)]
    assert homes and all(".layers." in name for name in homes)
    assert type(model.lm_head) is torch.nn.Linear and isinstance(model.get_input_embeddings(), torch.nn.Embedding)
    same = model.lm_head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    assert same == tied
    settled = sm.settle(scatter(model))
    assert (settled.lm_head.weight.data_ptr() == settled.get_input_embeddings().weight.data_ptr()) == tied


@both
def test_base_weights_lie_in_the_state_and_follow_the_number_type(layout):
    """Fault 2: the frozen weight was neither parameter nor buffer."""
    base, model = pico_model(), gated(layout)
    held = dict(model.named_parameters())
    for name, weight in base.named_parameters():
        assert any(weight.shape == p.shape and torch.equal(weight, p) for p in held.values()), name
    assert sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in base.parameters()) == 2 * sum(
        gate.size for _, gate in gates_of(model)
    )
    other = gated(layout, seed=8)
    scatter(other)
    other.load_state_dict(model.state_dict(), strict=True)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values()))
    half = model.to(torch.bfloat16)
    out = half(input_ids=pico_ids(), labels=pico_ids())
    out.loss.backward()
    assert out.logits.dtype == torch.bfloat16 and all(p.dtype == torch.bfloat16 for p in half.parameters())
    assert all(gate.logit.grad is not None for _, gate in gates_of(half))


@both
def test_a_bfloat16_base_keeps_float32_gates(layout):
    model = sm.craft(pico_model(dtype=torch.bfloat16), gates_config(layout))
    assert model.sparsmith.neutral["bitwise"]
    assert {p.dtype for tensors in trained_roles(model).values() for _, p in tensors} == {torch.float32}
    assert model(pico_ids()).logits.dtype == torch.bfloat16


@both
@pytest.mark.parametrize("lora", [None, {"r": 2, "dropout": 0.0}])
def test_base_weights_stay_through_twenty_steps(layout, lora):
    """Faults 4 and 5: `train()` failed or returned None, and what was said to be frozen was not."""
    config = gates_config(layout, lora=lora, gates={"lr": 0.05})
    model = gated(config)
    assert model.train() is model and model.eval() is model
    trained = {name for tensors in trained_roles(model).values() for name, _ in tensors}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trained
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    steps_of(model, 200, copying(rows=2), stop=20)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved <= trained and any(name.endswith("logit") for name in moved)


@both
def test_a_delta_takes_up_every_gate_and_refuses_less(layout, tmp_path):
    """Fault 13: loading was not strict while the log said it was."""
    config = gates_config(layout, gates={"lr": 0.05})
    model = steps_of(gated(config), 200, copying(rows=2), stop=12)
    sm.save(model, tmp_path / "delta")
    again = gated(config)
    fill_delta(again, tmp_path / "delta")
    ours, theirs = (FINEGATES.state(one, config) for one in (model, again))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert largest_difference(logits(model), logits(again)) == 0
    with pytest.raises(CheckpointMismatch):
        fill_delta(gated(gates_config(layout, gates={"lr": 0.06})), tmp_path / "delta")
    smaller = gated(config)
    state = FINEGATES.state
    try:  # a checkpoint that lacks one tensor of what the model holds
        FINEGATES.state = lambda m, c: {**state(m, c), "one.more": torch.zeros(2)}  # type: ignore[method-assign]
        with pytest.raises(CheckpointMismatch, match=r"one\.more"):
            fill_delta(smaller, tmp_path / "delta")
    finally:
        del FINEGATES.state  # type: ignore[method-assign]


@both
def test_evaluation_knows_no_noise(layout):
    """Fault 12: evaluation ran in training mode."""
    model = scatter(gated(layout))
    quiet = logits(model)
    draw_noise(model, 0.5)
    assert largest_difference(quiet, logits(model)) == 0 == largest_difference(logits(model), logits(model))
    noisy = model.train()(pico_ids()).logits
    assert not torch.equal(noisy, model.eval()(pico_ids()).logits)


@both
def test_the_loss_is_a_mean_over_counted_tokens(layout):
    """Fault 12: the mean was over batches plus one, and budgets were divided by sequences."""
    from sparsmith.evaluating import heldout_loss
    from tests.kit.evalsets import char_tokenizer, eval_set

    data = eval_set(char_tokenizer(), [("2+2=", "4"), ("a", "bcdefghij klm"), ("x:", "yz")])
    model = scatter(gated(layout))
    draw_noise(model, 0.5)
    scores = heldout_loss(model, data, batch_tokens=16)
    again = heldout_loss(model.train(), data, batch_tokens=16)
    assert scores.total == again.total
    for row, total, weight in zip(data.rows, scores.total, scores.weight):
        ids, labels = torch.tensor([row.input_ids]), torch.tensor([row.labels])
        kept = int(labels[:, 1:].ne(-100).sum())
        own = model.eval()(ids, labels=labels).loss.item()
        assert weight == kept and total / kept == pytest.approx(own, abs=1e-5)


@both
@pytest.mark.parametrize("kept", [2, 5])
def test_the_objective_divides_by_its_labels(layout, kept):
    from sparsmith.training.objective import Objective

    config = gates_config(layout, **still(layout))
    model = gated(config)
    ids = pico_ids(2, 8)
    labels = torch.full_like(ids, -100)
    labels[:, -kept:] = ids[:, -kept:]
    FINEGATES.on_step(model, config, 0, 10_000)
    out = Objective(model).train()(ids, labels)
    assert out["terms"]["task"].item() == pytest.approx(model.eval()(ids, labels=labels).loss.item(), abs=1e-6)


@both
def test_biases_train_where_they_are_asked_for(layout):
    config = gates_config(layout, train_bias=True, gates={"lr": 0.05})
    changes = BIASED["llama with biases"]
    model = sm.craft(pico_model(**changes), config)
    assert set(trained_roles(model)) == {"gate", "bias"}
    biases = [p for _, p in trained_roles(model)["bias"]]
    assert len(biases) == 2 * 7
    if layout == "paper":
        assert sm.plan(pico_model(**changes), config).trained["bias"] == sum(p.numel() for p in biases)
    assert {f"{name}" for name, _ in trained_roles(model)["bias"]} <= FINEGATES.state(model, config).keys()
    before = [p.detach().clone() for p in biases]
    steps_of(model, 200, copying(rows=2), stop=10)
    assert sum(not torch.equal(a, b) for a, b in zip(before, biases)) > 7
    with pytest.raises(EmptyRole, match="bias"):
        sm.craft(pico_model(), config)
    with pytest.raises(MethodError, match="float32"):
        sm.craft(pico_model(**changes, dtype=torch.bfloat16), config)


def test_biases_of_a_classifier_train_by_themselves_in_the_paper_layout():
    from transformers import AutoModelForSequenceClassification

    from tests.kit.pico import pico_config

    kind = AutoModelForSequenceClassification.from_config(pico_config("qwen2", num_labels=3))
    for layout, wanted in (("paper", 2 * 3), ("structured", 0)):
        config = gates_config(layout)
        model = copy.deepcopy(kind).requires_grad_(False)
        FINEGATES.craft(model, config, sm.crafting.apply.CraftContext(seed=1))
        assert len(FINEGATES.roles(model, config).get("bias", ())) == wanted
    assert "bias" not in trained_roles(gated("paper", "qwen2"))
