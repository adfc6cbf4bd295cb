import copy

import pytest
import torch

from sparsmith import anatomy
from sparsmith.errors import MethodError
from sparsmith.methods.base import Batch, CraftContext
from sparsmith.methods.pesc.config import PescConfig
from sparsmith.methods.pesc.method import PESC
from sparsmith.methods.pesc.modeling import SparsmithPescForCausalLM
from tests.kit.pico import pico_config, pico_ids, pico_model, randomize_adapters

SMALL = {"num_experts": 4, "top_k": 2, "adapter_dim": 16}


def crafted(family="llama", experts=True, dtype=torch.float32, **settings):
    config = PescConfig(**{**SMALL, **settings})
    model = PESC.craft(pico_model(family, dtype=dtype), config, CraftContext(seed=3))
    model.requires_grad_(False)
    for tensors in PESC.roles(model, config).values():
        for _, parameter in tensors:
            parameter.requires_grad_(True)
    if experts:
        randomize_adapters(model)
    return model, config


def batch_of(ids, **given):
    mask = given.pop("token_mask", torch.ones_like(ids, dtype=torch.bool))
    return Batch(ids, ids, mask, **given)


def step(model, config, batch, *, alpha=None):
    """Forward, loss with the method's terms, backward. Returns (loss, terms)."""
    PESC.before_forward(model, config, batch)
    logits = model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, position_ids=batch.position_ids
    ).logits
    keep = batch.token_mask[:, 1:] & batch.token_mask[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits[:, :-1][keep].float(), batch.labels[:, 1:][keep])
    terms = PESC.loss_terms(model, config, batch)
    for term in terms.values():
        loss = loss + (term.weight if alpha is None else alpha) * term.value
    loss.backward()
    PESC.after_forward(model, config)
    return loss.detach(), {name: term.value.detach() for name, term in terms.items()}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"layers": "every-2"},
        {"router": "random"},
        {"router": "dense"},
        {"router_trainable": False},
        {"control": "single_adapter"},
        {"control": "dense_lora"},
        {"adapter_dim": "auto", "path": "grouped"},
    ],
)
def test_the_plan_counts_what_craft_builds(settings):
    config = PescConfig(**{**SMALL, **settings})
    hf_config = pico_config("qwen2")
    shape = anatomy.shape_of(hf_config)
    plan = PESC.plan(config, anatomy.of(hf_config), shape)
    model = PESC.craft(pico_model("qwen2"), config, CraftContext())
    assert sum(p.numel() for p in model.parameters()) == shape.total_params + sum(plan.added.values())
    counts = {role: sum(p.numel() for _, p in tensors) for role, tensors in PESC.roles(model, config).items()}
    assert counts == dict(plan.trained) and set(counts) == set(PESC.wanted_roles(config))
    assert sum(p.numel() for p in PESC.state(model, config).values()) == sum(plan.added.values())
    assert sum(change.count for change in plan.changes) == (len(config.block_indices(2)) if plan.added else 0)


def test_what_the_plan_says():
    plan = PESC.plan(PescConfig(**SMALL), anatomy.of(pico_config()), anatomy.shape_of(pico_config()))
    assert plan.changes[0].where == "model.layers.{0..1}.mlp"
    assert plan.changes[0].what == "FFN -> shared FFN + 4 adapters (r 16, scale 0.25), top-2 learned router"
    assert plan.inactive == 2 * 2 * (2 * 16 * 64)


def test_step_0_gradients():
    """Spec test 3: with U = 0 and no balance loss D and the router wait; after two updates every role has a gradient."""
    model, config = crafted(experts=False)
    model.double()
    batch = batch_of(pico_ids())
    for updates in range(3):
        model.zero_grad()
        step(model, config, batch, alpha=0.0)
        largest = {n: float(p.grad.abs().max()) for n, p in model.named_parameters() if p.requires_grad}
        waiting = [v for n, v in largest.items() if not n.endswith("up")]
        if updates == 0:
            assert max(waiting) <= 1e-12 and min(v for n, v in largest.items() if n.endswith("up")) > 0
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= 0.1 * parameter.grad
    assert min(largest.values()) > 0


def test_top_1_trains_its_router_from_the_task_alone():
    for gate, alive in (("straight_through", True), ("none", False)):
        model, config = crafted(top_k=1, top1_gate=gate, balance_alpha=0.0)
        step(model, config, batch_of(pico_ids()))
        assert all((p.grad.abs().max() > 0) == alive for _, p in PESC.roles(model, config)["router"])


@pytest.mark.parametrize("settings", [{}, {"router_z_coef": 0.1}, {"balance_alpha": 0.0}, {"router": "random"}])
def test_terms_are_those_asked_for_and_carry_a_gradient(settings):
    model, config = crafted(**settings)
    batch = batch_of(pico_ids())
    PESC.before_forward(model, config, batch)
    model(input_ids=batch.input_ids)
    terms = PESC.loss_terms(model, config, batch)
    assert set(terms) == set(PESC.wanted_terms(config))
    assert all(term.value.requires_grad and torch.isfinite(term.value) for term in terms.values())


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_neither_loss_nor_metrics(side):
    """Spec test 7 (F14)."""
    model, config = crafted(router_z_coef=0.1)
    ids = pico_ids(3, 10)
    plain = step(model, config, batch_of(ids, domain=ids % 2))
    expected = PESC.metrics(model, config)
    expected.pop("table/paths")  # words, and a longer batch may take another path
    width = [5, 0] if side == "left" else [0, 5]
    mask = torch.nn.functional.pad(torch.ones_like(ids), width)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    padded = batch_of(
        torch.nn.functional.pad(ids, width),
        token_mask=mask.bool(),
        attention_mask=mask,
        position_ids=positions,
        domain=torch.nn.functional.pad(ids % 2, width, value=-1),
    )
    model.zero_grad()
    loss, terms = step(model, config, padded)
    torch.testing.assert_close((loss, terms), plain, rtol=1e-6, atol=1e-6)
    found = PESC.metrics(model, config)
    for name, value in expected.items():
        torch.testing.assert_close(torch.tensor(found[name]), torch.tensor(value), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox"])
def test_checkpointing_leaves_gradients_and_counts_alone(family):
    """Spec test 18."""
    results = []
    for checkpointing in (False, True):
        model, config = crafted(family, router_z_coef=0.1)
        model.train()
        if checkpointing:
            model.activation_checkpointing_enable()
        terms = step(model, config, batch_of(pico_ids()))
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        results.append((terms, gradients, PESC.metrics(model, config)))
    torch.testing.assert_close(*[r[0] for r in results], rtol=0, atol=1e-6)
    torch.testing.assert_close(*[r[1] for r in results], rtol=0, atol=1e-6)
    assert results[0][2]["table/load"] == results[1][2]["table/load"]
    assert not model.route_context.layers


def test_reentrant_checkpointing_is_refused():
    model, _ = crafted()
    with pytest.raises(ValueError, match=r"use_reentrant=False"):
        model.activation_checkpointing_enable({"use_reentrant": True})


def test_metrics_of_a_window():
    model, config = crafted()
    ids = pico_ids(4, 16)
    for _ in range(2):
        step(model.train(), config, batch_of(ids, domain=torch.where(ids < 60, 0, 1)))
    figures = PESC.metrics(model, config)
    load = torch.tensor(figures["table/load"])
    by_domain = torch.tensor(figures["table/load_by_domain"])
    assert load.shape == (2, 4) and by_domain.shape == (2, 2, 4)
    torch.testing.assert_close(load.sum(-1), torch.ones(2))
    torch.testing.assert_close(by_domain.sum(-1), torch.ones(2, 2))
    assert figures["load_max"] == pytest.approx(float(load.max() * 4))
    assert figures["load_min"] <= 1 <= figures["load_max"] and 0 < figures["load_entropy"] <= 1
    assert figures["router_grad_norm"] > 0 and figures["balance"] >= 0.9
    assert figures["table/paths"] == ["masked", "masked"]
    assert PESC.health(figures).startswith("masked load ")
    assert PESC.metrics(model, config) == {} and PESC.health({}) == ""


def test_dead_experts_are_counted():
    model, config = crafted()
    with torch.no_grad():
        for _, weight in PESC.roles(model, config)["router"]:
            weight.zero_()  # ties: experts 0 and 1 take all
    step(model, config, batch_of(pico_ids()))
    assert PESC.metrics(model, config)["dead_experts"] == 4


def test_an_evaluation_without_a_batch_leaves_the_window_alone():
    model, config = crafted()
    with torch.no_grad():
        model.eval()(input_ids=pico_ids())
    assert PESC.metrics(model, config) == {}


def test_labels_bring_the_routing_losses_in_training_only():
    """F2: a plain Trainer must not switch the balance loss off."""
    model, _ = crafted(balance_alpha=10.0)
    ids = pico_ids()
    plain = model.eval()(input_ids=ids, labels=ids).loss
    trained = model.train()(input_ids=ids, labels=ids).loss
    assert trained > plain + 5


def test_single_adapter_is_k_equal_gate_experts():
    """Spec test 20, in float64."""
    narrow, _ = crafted(num_experts=2, router="dense", top_k=2)
    wide = PESC.craft(pico_model(), PescConfig(**SMALL, control="single_adapter"), CraftContext())
    narrow.double(), wide.double()
    for (_, many), (_, one) in zip(
        *[[(n, m) for n, m in x.named_modules() if n.endswith("pesc")] for x in (narrow, wide)], strict=True
    ):
        one.down.data = many.down.data.reshape(1, -1, 64).clone()
        one.up.data = many.up.data.transpose(0, 1).reshape(1, 64, -1).clone()
    ids = pico_ids()
    with torch.no_grad():
        assert (narrow(input_ids=ids).logits - wide(input_ids=ids).logits).abs().max() <= 1e-12


def test_lora_controls_leave_a_stock_model():
    model = pico_model()
    for control in ("equal_lora", "dense_lora"):
        config = PescConfig(**SMALL, control=control)
        assert PESC.craft(model, config, CraftContext()) is model
        assert not PESC.roles(model, config) and not PESC.wanted_roles(config) and not PESC.wanted_terms(config)
        PESC.before_forward(model, config, batch_of(pico_ids()))
        PESC.after_forward(model, config)
        assert PESC.metrics(model, config) == {}


def test_seeds_decide_the_start_and_layers_differ():
    models = [PESC.craft(pico_model(), PescConfig(**SMALL), CraftContext(seed=s)) for s in (1, 1, 2)]
    first, again, other = ([p for n, p in m.named_parameters() if n.endswith("down")] for m in models)
    assert torch.equal(first[0], again[0]) and not torch.equal(first[0], other[0])
    assert not torch.equal(first[0], first[1])


def test_what_cannot_be_crafted_is_refused():
    model, config = crafted()
    with pytest.raises(MethodError, match=r"experts already"):
        PESC.craft(model, config, CraftContext())
    with pytest.raises(MethodError, match=r"pesc.path"):
        PESC.craft(
            pico_model("llama", hidden_size=60, head_dim=16), PescConfig(**SMALL, path="grouped"), CraftContext()
        )
    headless = pico_model().model
    with pytest.raises(MethodError, match="lm_head"):
        PESC.craft(headless, config, CraftContext())


def test_a_copy_has_a_context_of_its_own():
    model, _ = crafted()
    model.train()(input_ids=pico_ids())
    twin = copy.deepcopy(model)
    model.route_context.clear()
    assert isinstance(twin, SparsmithPescForCausalLM) and twin.route_context is not model.route_context
    contexts = {id(m.context) for m in twin.modules() if hasattr(m, "context") and hasattr(m, "pesc")}
    assert contexts == {id(twin.route_context)}
    twin.train()(input_ids=pico_ids())
    assert twin.route_context.layers and not model.route_context.layers
