"""Spec test 18: a tiny random SwitchTransformers trains, routes and reports; its capacity is recomputed from the length."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForSeq2SeqLM

import sparsmith as sm
from sparsmith.crafting.apply import trained_roles
from sparsmith.data import PairCollator
from sparsmith.errors import MethodError, RefusedDonor, UnsupportedAnatomy
from sparsmith.methods.upcycle.layers import sparse_blocks
from sparsmith.methods.upcycle.method import UPCYCLE
from sparsmith.methods.upcycle.switch import UNBOUNDED, routes_of
from sparsmith.training.objective import Objective
from tests.kit.switching import MOE, switch_model, switch_rows, t5_model

LENGTHS = ((5, 3), (9, 4), (3, 6), (12, 2))


def config(**settings):
    return sm.UpcycleConfig(**{"donor": "sparse", **settings, "moe": {**MOE, **settings.get("moe", {})}})


def crafted(base=None, **settings):
    return sm.craft(base if base is not None else switch_model(), config(**settings))


def batch_of(model, lengths=LENGTHS, seed=3):
    return PairCollator.of(model.config)(switch_rows(*lengths, seed=seed))


def steps(model, count, batch=None):
    batch = batch if batch is not None else batch_of(model)
    objective, settings = Objective(model.train()), model.sparsmith.configs[0]
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(count):
        optimizer.zero_grad()
        loss = objective(**batch)["loss"]
        loss.backward()
        UPCYCLE.after_forward(model, settings)
        optimizer.step()
        losses.append(loss.item())
    return losses


def routed(model, batch):
    """Block -> what its router answered."""
    seen, handles = {}, []
    for index, ffn in sparse_blocks(model):
        keep = lambda m, a, out, i=index: seen.__setitem__(i, out)  # noqa: E731
        handles.append(ffn.router.register_forward_hook(keep))
    with torch.no_grad():
        out = Objective(model)(**batch)
    for handle in handles:
        handle.remove()
    return seen, out


def test_it_trains_routes_and_reports():
    model = crafted()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = steps(model, 25)
    assert losses[-1] < 0.75 * losses[0]
    figures = UPCYCLE.metrics(model, model.sparsmith.configs[0])
    assert figures["table/layers"] == [1, 3, 5], "the encoder's blocks 0 and 1 are counted first"
    load = torch.tensor(figures["table/load"])
    assert load.shape == (3, 4)
    assert torch.allclose(load.sum(1), torch.ones(3))
    assert len(figures["table/router_grad_norm"]) == 3
    assert {"balance", "router_z"} <= figures.keys()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    places = {1: "encoder.block.1.layer.1.mlp", 3: "decoder.block.1.layer.2.mlp", 5: "decoder.block.3.layer.2.mlp"}
    for row, home in zip(load, places.values()):
        assert f"{home}.router.classifier.weight" in moved
        for expert, share in enumerate(row.tolist()):
            assert share == 0 or f"{home}.experts.expert_{expert}.wi.weight" in moved


def test_counts_are_the_plan_s():
    model = switch_model()
    plan = sm.plan(model, config())
    assert plan.total_params == sum(p.numel() for p in model.parameters())
    made = sm.craft(model, config())
    held = {role: sum(p.numel() for _, p in tensors) for role, tensors in trained_roles(made).items()}
    assert plan.trained == held
    idle = 3 * 3 * 2 * 32 * 48  # three sparse blocks, three experts that a token does not take, two matrices of each
    assert plan.active_params == plan.total_params - idle


def test_terms_are_counted_once_over_both_stacks_and_without_padding():
    model = crafted(moe={"balance_coef": 0.5, "z_coef": 0.25})
    batch = batch_of(model)
    seen, out = routed(model.train(), batch)
    masks = {1: batch["token_mask"], 3: batch["labels"].ne(-100), 5: batch["labels"].ne(-100)}
    balance, z = [], []
    for index, (_, _, logits) in seen.items():
        kept = logits[masks[index]]
        p, taken = kept.softmax(-1), functional.one_hot(kept.argmax(-1), 4).float()
        balance.append(4 * (taken.mean(0) * p.mean(0)).sum())
        z.append(kept.logsumexp(-1).square().mean())
    balance, z = torch.stack(balance).mean(), torch.stack(z).mean()
    assert out["terms"]["upcycle.balance"] == pytest.approx(balance.item(), rel=1e-6)
    assert out["terms"]["upcycle.router_z"] == pytest.approx(z.item(), rel=1e-6)
    whole = out["terms"]["task"] + 0.5 * balance + 0.25 * z
    assert out["loss"].item() == pytest.approx(whole.item(), rel=1e-6)
    # a loop that calls the model with labels, and even asks for the library's own losses, gets the same
    UPCYCLE.after_forward(model, model.sparsmith.configs[0])
    given = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    theirs = model(**given, output_router_logits=True).loss
    assert theirs.item() == pytest.approx(whole.item(), rel=1e-6)


def test_the_loss_is_the_library_s_and_padding_does_not_change_it():
    model = switch_model(expert_capacity=1000)
    batch, made = batch_of(model), crafted(switch_model(expert_capacity=1000), moe={"balance_coef": 0, "z_coef": 0})
    plain = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    with torch.no_grad():
        wanted = model(**plain).loss
        found = Objective(made.train())(**batch)["loss"]
        assert found.item() == pytest.approx(wanted.item(), rel=1e-6)
        alone = [Objective(made)(**batch_of(model, (one,), seed=7)) for one in LENGTHS]
        assert len({round(one["loss"].item(), 6) for one in alone}) == len(LENGTHS)
    terms = crafted()
    wide = dict(batch)
    for name, fill in (("input_ids", 0), ("attention_mask", 0), ("token_mask", False), ("domain", -1)):
        wide[name] = functional.pad(batch[name], (0, 11), value=fill)
    for name, fill in (("labels", -100), ("decoder_input_ids", 0)):
        wide[name] = functional.pad(batch[name], (0, 5), value=fill)
    with torch.no_grad():
        one, other = (Objective(terms.train())(**rows) for rows in (batch, wide))
    assert one["loss"].item() == pytest.approx(other["loss"].item(), rel=1e-6)  # sums of other widths


@pytest.mark.parametrize("read, written", [(5, 3), (16, 3), (20, 10)])
def test_capacity_is_recomputed_from_the_length(read, written):
    model = crafted(moe={"capacity_factor": 1.0})
    with torch.no_grad():
        for _, ffn in sparse_blocks(model):
            ffn.router.classifier.weight.zero_()  # all experts tie: every token asks for the first
    batch = batch_of(model, ((read, written), (2, 1)))
    seen, _ = routed(model.train(), batch)
    for index, (hot, _, _) in seen.items():
        mask = batch["token_mask"] if index == 1 else batch["labels"].ne(-100)
        room = -(-mask.shape[1] // 4)  # ceil(1.0 * 1 * T / 4), T tokens of a row, padded as it came
        served = hot[..., 0].bool()
        wanted = mask & (mask.cumsum(1) <= room)
        assert torch.equal(served & mask, wanted)
        assert not hot[..., 1:].any()
    settings = model.sparsmith.configs[0]
    UPCYCLE.after_forward(model, settings)
    assert UPCYCLE.metrics(model, settings)["drop_rate"] > 0
    seen, _ = routed(model.eval(), batch)
    assert all(hot[..., 0].all() for hot, _, _ in seen.values()), "evaluation drops nothing"


def test_nothing_is_dropped_without_a_capacity():
    model = crafted(switch_model(expert_capacity=1))
    for mode in (True, False):
        seen, _ = routed(model.train(mode), batch_of(model))
        assert all((hot.sum(-1) == 1).all() for hot, _, _ in seen.values())


def test_jitter_is_seen_by_the_router_alone():
    still, loud = crafted(), crafted(moe={"jitter": 0.1})
    batch, inputs = batch_of(still), []
    for model in (still, loud):
        first = sparse_blocks(model)[0][1]
        first.experts.register_forward_hook(lambda m, args, out: inputs.append(args[0].clone()))
    (quiet, _), (noisy, _) = routed(still.train(), batch), routed(loud.train(), batch)
    assert torch.equal(*inputs), "the experts of the first sparse block read what they read without noise"
    assert not torch.equal(quiet[1][2], noisy[1][2])
    assert torch.equal(routed(still.eval(), batch)[0][5][2], routed(loud.eval(), batch)[0][5][2])
    assert sm.settle(loud).config.router_jitter_noise == switch_model().config.router_jitter_noise


def test_expert_dropout_is_on_the_inner_activations():
    model = crafted(switch_model(d_ff=4000), moe={"expert_dropout": 0.2})
    expert = sparse_blocks(model)[0][1].experts["expert_0"]
    inner = []
    expert.wo.register_forward_hook(lambda m, args, out: inner.append(args[0]))
    with torch.no_grad():
        expert.wi.weight.abs_()
        for mode in (True, False):
            expert.train(mode)(torch.ones(1, 32))
    assert (inner[0] == 0).float().mean() == pytest.approx(0.2, abs=0.02)
    assert not (inner[1] == 0).any()
    assert sparse_blocks(sm.settle(model))[0][1].experts["expert_0"].dropout.p == 0.0


@pytest.mark.parametrize(
    "freeze, still",
    [
        ("freeze_gate", {"router"}),
        ("freeze_experts", {"expert"}),
        ("freeze_moe", {"router", "expert"}),
        ("freeze_dense", {"dense"}),
    ],
)
def test_what_is_frozen_stays(freeze, still):
    everything = {role: [name for name, _ in tensors] for role, tensors in trained_roles(crafted()).items()}
    off = {"balance_coef": 0.0, "z_coef": 0.0} if "router" in still else {}
    model = crafted(moe={freeze: True, **off})
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    steps(model, 3)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    for role, names in everything.items():
        assert bool(moved & set(names)) == (role not in still)


def test_an_export_is_stock_and_is_the_tuned_model(tmp_path):
    model = crafted(switch_model(expert_capacity=2))
    assert model.sparsmith.neutral["bitwise"], "held against the checkpoint with its own capacity"
    steps(model, 4)
    model.eval()
    batch = batch_of(model, ((20, 9), (11, 3)))
    given = {name: batch[name] for name in ("input_ids", "attention_mask", "decoder_input_ids")}
    with torch.no_grad():
        wanted = model(**given).logits
        report = sm.export(model, tmp_path / "out")
        stock = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out")
        assert type(stock).__module__.startswith("transformers.")
        gap = (stock(**given).logits - wanted).abs().max()
        assert gap <= 1e-6, "weights that lie elsewhere in memory may meet another kernel: rounding alone"
        for _, ffn in sparse_blocks(stock):
            ffn.router.expert_capacity = 2
        dropped = (stock(**given).logits - wanted).abs().max()
        assert dropped > 1e-3, "the checkpoint's own capacity would have dropped tokens"
    assert report.proof["passed"]
    assert any("expert_capacity" in text for text in report.cautions)
    assert stock.config.expert_capacity == UNBOUNDED
    assert (stock.config.router_aux_loss_coef, stock.config.router_z_loss_coef) == (0.01, 0.001)


def test_a_delta_comes_back(tmp_path):
    base = switch_model()
    base.save_pretrained(tmp_path / "base")
    made = crafted(AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "base"))
    steps(made, 2)
    sm.save(made, tmp_path / "delta")
    again = sm.load(tmp_path / "delta", base=tmp_path / "base")
    held = dict(made.named_parameters())
    assert all(torch.equal(p, held[name]) for name, p in again.named_parameters())


def test_a_copy_has_routes_of_its_own():
    model = crafted()
    twin = copy.deepcopy(model)
    steps(twin, 1)
    assert routes_of(twin) is not routes_of(model)
    assert sorted(routes_of(twin).counts) == [1, 3, 5], "its routers write into its own contexts"
    assert not routes_of(model).counts


def test_gradient_checkpointing_changes_nothing():
    losses = []
    for on in (False, True):
        model = crafted()
        objective = Objective(model.train())
        if on:
            objective.activation_checkpointing_enable()
        loss = objective(**batch_of(model))["loss"]
        loss.backward()
        losses.append((loss.item(), model.encoder.block[1].layer[1].mlp.router.classifier.weight.grad.clone()))
    assert losses[0][0] == losses[1][0]
    assert torch.allclose(losses[0][1], losses[1][1], rtol=1e-5, atol=1e-8)  # sums in another order


REFUSED = {
    "two experts": ({"moe": {"router": "top2", "combine": "renorm"}}, "top1"),
    "renormalised": ({"moe": {"combine": "straight_through"}}, "raw probability"),
    "experts choose": ({"moe": {"router": "expert_choice", "combine": "auto"}}, "top1"),
    "lora": ({"tune": "lora"}, "linears of their own"),
    "kernels": ({"moe": {"experts_impl": "eager"}}, "one expert after the other"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_family_cannot_do_is_refused(name):
    settings, said = REFUSED[name]
    for verb in (sm.plan, sm.craft):
        with pytest.raises(MethodError, match=said) as told:
            verb(switch_model(), config(**settings))
        assert told.value.mend


def test_other_methods_and_dense_donors_are_refused():
    model = switch_model()
    for method in (sm.SoftConfig(), sm.PescConfig(), sm.FineGatesConfig()):
        with pytest.raises(MethodError, match=r"for the task seq2seq.*upcycle"):
            sm.plan(model, method)
    with pytest.raises(UnsupportedAnatomy, match="mixture of experts already"):
        sm.plan(model, sm.UpcycleConfig(experts=4))
    for verb in (sm.plan, sm.craft):
        with pytest.raises(RefusedDonor, match=r"dense encoder-decoder.*control: dense"):
            verb(t5_model(), sm.UpcycleConfig(experts=4))
    with pytest.raises(MethodError, match="a mixture of experts, as donor is sparse"):
        sm.plan(t5_model(), config())


def test_the_dense_twin_is_matched_and_trains():
    model, twin = switch_model(), sm.UpcycleConfig(control="dense")
    plan = sm.plan(t5_model(), twin)
    assert plan.trained_params == plan.total_params == sum(p.numel() for p in t5_model().parameters())
    # a token of one expert costs what the dense FFN costs, and the router on top: 3 sparse blocks of 4 experts
    routers = [32 * 4 * 2 * blocks for blocks in (1, 2)]
    gap = sm.plan(model, config()).flops.forward - plan.flops.forward
    assert gap == sum(routers) // 2
    made = sm.craft(t5_model(), twin)
    objective, batch = Objective(made.train()), batch_of(made)
    with torch.no_grad():
        plain = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
        wanted = t5_model()(**plain).loss
    out = objective(**batch)
    assert out["terms"].keys() == {"task"}
    assert out["loss"].item() == pytest.approx(wanted.item(), rel=1e-6)
    losses = steps(made, 10)
    assert losses[-1] < losses[0]
