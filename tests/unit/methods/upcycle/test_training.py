"""What happens while a mixture trains: gradients of routers, noise that only they see, freezes, terms counted once.

Spec tests 5, 7, 9 and 10.
"""

from __future__ import annotations

import copy
import hashlib

import pytest
import torch
from torch.nn import functional

import sparsmith as sm
from sparsmith.crafting.apply import trained_roles
from sparsmith.methods.upcycle.layers import context_of, sparse_blocks
from sparsmith.methods.upcycle.method import UPCYCLE
from sparsmith.training.objective import Objective
from tests.kit.depths import deep_model, labelled_batch
from tests.kit.pico import pico_ids, pico_model

QUIET = {"balance_coef": 0.0, "z_coef": 0.0}


def crafted(base=None, **settings):
    return sm.craft(base if base is not None else pico_model(), sm.UpcycleConfig(experts=4, **settings), proof=False)


def router_gradient(model):
    """Largest gradient of the language-model loss on any router."""
    model.zero_grad()
    Objective(model.train())(**labelled_batch())["loss"].backward()
    return max(ffn.gate.weight.grad.abs().max().item() for _, ffn in sparse_blocks(model))


@torch.no_grad()
def apart(model, share=0.01):
    """Move the experts apart."""
    generator = torch.Generator().manual_seed(1)
    for _, ffn in sparse_blocks(model):
        for weight in ffn.experts.parameters():
            weight.add_(share * weight.std() * torch.randn(weight.shape, generator=generator))
    return model


def test_top1_gets_a_gradient_at_once():
    model = crafted(top_k=1, moe={"router": "top1", **QUIET})
    assert router_gradient(model) > 1e-4
    base = pico_model()
    with torch.no_grad():
        gap = crafted(base, top_k=1, moe={"router": "top1"}).eval()(pico_ids()).logits - base(pico_ids()).logits
    assert gap.abs().max() <= 1e-5


def test_top2_gets_one_when_the_experts_differ():
    model = crafted(moe=QUIET)
    start = router_gradient(model)
    assert start < 1e-6, "identical experts: whichever is taken, the sum is the same"
    assert router_gradient(apart(model)) > 1e3 * max(start, 1e-9)


def test_terms_are_counted_once_and_are_the_closed_forms():
    model, batch = crafted(moe={"balance_coef": 0.5, "z_coef": 0.25}), labelled_batch()
    objective = Objective(model.train())
    seen = {}
    for index, ffn in sparse_blocks(model):
        ffn.gate.register_forward_hook(lambda m, a, out, i=index: seen.__setitem__(i, out))
    out = objective(**batch)
    mask = batch["attention_mask"].bool().flatten()
    balance, z = [], []
    for logits, _, indices in seen.values():
        p, taken = logits[mask].softmax(-1), functional.one_hot(indices[mask], 4).sum(1).float()
        balance.append(4 * (taken.mean(0) * p.mean(0)).sum())
        z.append(logits[mask].logsumexp(-1).square().mean())
    balance, z = torch.stack(balance).mean(), torch.stack(z).mean()
    assert out["terms"]["upcycle.balance"] == pytest.approx(balance.item(), abs=1e-6)
    assert out["terms"]["upcycle.router_z"] == pytest.approx(z.item(), abs=1e-6)
    with torch.no_grad():
        logits = model.eval()(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    plain = functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())
    assert out["loss"].item() == pytest.approx((plain + 0.5 * balance + 0.25 * z).item(), abs=1e-5)


def test_another_trainers_loss_holds_the_terms_too_and_once():
    """Spec test 7: a loop that calls the model with labels, as trainers of other libraries do, does not train without balance."""
    model, batch = crafted(moe={"balance_coef": 0.5, "z_coef": 0.25}), labelled_batch(padded=False)
    ours = Objective(model.train())(**batch)["loss"]
    theirs = model(**batch).loss
    assert theirs.item() == pytest.approx(ours.item(), abs=1e-6)
    theirs.backward()
    assert all(ffn.gate.weight.grad.abs().max() > 1e-6 for _, ffn in sparse_blocks(model))
    with torch.no_grad():
        plain = functional.cross_entropy(model(**batch).logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
        assert model.eval()(**batch).loss.item() == pytest.approx(plain.item(), abs=1e-6)
    assert ours.item() > plain.item() + 0.5
    settled = sm.settle(copy.deepcopy(model)).train()
    assert settled(**batch).loss.item() == pytest.approx(plain.item(), abs=1e-6)
    twin = copy.deepcopy(model).train()
    assert twin(**batch).loss.item() == pytest.approx(ours.item(), abs=1e-6), (
        "a copy has hooks and a context of its own"
    )


def test_the_librarys_own_loss_stays_out():
    """Spec F2, test 7: a trainer that asks for router logits adds nothing to ours."""
    model, batch = crafted(), labelled_batch()
    model.train()
    own = model(batch["input_ids"], labels=batch["labels"], attention_mask=batch["attention_mask"]).loss
    asked = model(
        batch["input_ids"], labels=batch["labels"], attention_mask=batch["attention_mask"], output_router_logits=True
    ).loss
    assert torch.equal(own, asked)
    settled = sm.settle(copy.deepcopy(model))
    assert settled.config.router_aux_loss_coef == settled.router_aux_loss_coef == 0.01
    stock = type(settled)(settled.config)
    loud = stock(batch["input_ids"], labels=batch["labels"], output_router_logits=True)
    assert loud.aux_loss is not None and loud.aux_loss > 0


def inputs_of_experts(model, seed=0):
    """What every sparse block's experts are fed in one training forward."""
    seen, hooks = [], []
    for _, ffn in sparse_blocks(model):
        hooks.append(ffn.experts.register_forward_pre_hook(lambda m, args: seen.append(args)))
    torch.manual_seed(seed)
    Objective(model.train())(**labelled_batch())
    for hook in hooks:
        hook.remove()
    return seen


def test_jitter_moves_routers_and_not_what_experts_see():
    """Spec F3: the library's own jitter multiplies what the experts see."""
    plain, noisy = (inputs_of_experts(crafted(moe={"jitter": amount})) for amount in (0.0, 0.1))
    assert torch.equal(plain[0][0], noisy[0][0]), "bits of the first block's input"
    assert not torch.equal(plain[0][2], noisy[0][2]), "weights"
    with torch.no_grad():
        quiet = [crafted(moe={"jitter": amount}).eval()(pico_ids()).logits for amount in (0.0, 0.1)]
    assert torch.equal(*quiet)


def test_a_checkpoints_own_jitter_does_not_reach_the_experts():
    """A Mixtral keeps the noise of its config in every block, where it would multiply what the experts see."""
    settled = sm.settle(crafted())
    settled.config.router_jitter_noise = 0.1
    noisy = type(settled)(settled.config)
    noisy.load_state_dict(settled.state_dict())
    assert sparse_blocks(noisy)[0][1].jitter_noise == 0.1
    again = sm.craft(noisy, sm.UpcycleConfig(donor="sparse"))
    assert torch.equal(inputs_of_experts(again, 0)[0][0], inputs_of_experts(again, 1)[0][0])


def test_expert_dropout_thins_the_inner_activations_in_training_alone():
    model = crafted(pico_model(intermediate_size=512), moe={"expert_dropout": 0.2})
    experts = sparse_blocks(model)[0][1].experts
    inner = torch.ones(400, 1024)
    torch.manual_seed(0)
    share = (experts.train()._apply_gate(inner) == 0).float().mean()
    assert abs(share - 0.2) < 0.01
    assert (experts.eval()._apply_gate(inner) != 0).all()
    for way in ("grouped_mm", "batched_mm"):
        one = crafted(moe={"expert_dropout": 0.2, "experts_impl": way}).train()
        x, index, weight = torch.randn(8, 64), torch.zeros(8, 1, dtype=torch.long), torch.ones(8, 1)
        layer = sparse_blocks(one)[0][1].experts
        torch.manual_seed(1)
        first = layer(x, index, weight)
        assert not torch.equal(first, layer(x, index, weight)), way
        layer.eval()
        assert torch.equal(layer(x, index, weight), layer(x, index, weight))


def test_a_capacity_zeroes_the_weights_of_what_does_not_fit():
    model, batch = crafted(moe={"capacity_factor": 0.5}), labelled_batch()
    seen = inputs_of_experts(model)
    weights = seen[0][2].view(3, 14, 2)
    assert (weights == 0).any() and (weights[-1, 9:] == 0).all(), "padding takes no room and gets nothing"
    per_expert = torch.zeros(3, 4)
    index = seen[0][1].view(3, 14, 2)
    for row in range(3):
        per_expert[row] = torch.bincount(index[row][weights[row] > 0].flatten(), minlength=4)
    assert per_expert.max() <= 4  # ceil(0.5 * 2 * 14 / 4)
    assert 0 < UPCYCLE.metrics(model, model.sparsmith.configs[0])["drop_rate"] < 1
    with torch.no_grad():
        ids = batch["input_ids"]
        assert torch.equal(model.eval()(ids).logits, crafted().eval()(ids).logits), "evaluation drops nothing"


def test_the_second_expert_is_dropped_in_training_alone():
    model = crafted(moe={"second_expert_drop": True})
    with torch.no_grad():
        for _, ffn in sparse_blocks(model):
            ffn.gate.weight.mul_(10)  # second weights well below a half
    seen = inputs_of_experts(model)
    weights = seen[0][2]
    assert (weights[:, 0] > 0).all() and 0 < (weights[:, 1] == 0).float().mean() < 0.5


FREEZES = {
    "gate": ({"freeze_gate": True}, {"expert", "dense"}),
    "experts": ({"freeze_experts": True}, {"router", "dense"}),
    "moe": ({"freeze_moe": True}, {"dense"}),
    "dense": ({"freeze_dense": True}, {"router", "expert"}),
    "none": ({}, {"router", "expert", "dense"}),
}


def digest(tensors):
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().numpy().tobytes())
    return found.hexdigest()


def groups(model):
    everything = {"router": [], "expert": [], "dense": []}
    for name, parameter in model.named_parameters():
        role = "router" if name.endswith("gate.weight") else "expert" if ".experts." in name else "dense"
        everything[role].append(parameter)
    return {role: digest(tensors) for role, tensors in everything.items()}


@pytest.mark.parametrize("name", FREEZES)
def test_frozen_groups_keep_their_bits_and_the_others_move(name):
    flags, trained = FREEZES[name]
    model = apart(crafted(moe=flags))
    before = groups(model)
    assert set(trained_roles(model)) == trained == set(UPCYCLE.wanted_roles(model.sparsmith.configs[0]))
    objective = Objective(model.train())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for step in range(5):
        objective(**labelled_batch(seed=step))["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        UPCYCLE.after_forward(model, model.sparsmith.configs[0])
    after = groups(model)
    assert {role for role in after if after[role] != before[role]} == trained


def test_biases_that_only_the_target_has_never_train():
    model = crafted(deep_model(), layers="every-2")
    roles = {name for rows in trained_roles(model).values() for name, _ in rows}
    idle = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert idle and all(
        name.endswith((".bias", "shared_expert_gate.weight")) or ".shared_expert." in name for name in idle
    )
    assert not roles & idle
    settled = sm.settle(copy.deepcopy(model))
    fresh = type(settled)(settled.config)
    fresh.load_state_dict(settled.state_dict())
    again = sm.craft(fresh, sm.UpcycleConfig(donor="sparse"))
    assert {name for name, p in again.named_parameters() if not p.requires_grad} == idle


def test_a_mixture_is_tuned_as_it_is():
    first = sm.settle(apart(crafted()))
    again = sm.craft(first, sm.UpcycleConfig(donor="sparse"))
    assert again.sparsmith.neutral["value"] <= 1e-6 and type(again) is type(first)
    assert set(trained_roles(again)) == {"router", "expert", "dense"}
    plan = sm.plan(first.config, sm.UpcycleConfig(donor="sparse"))
    assert plan.total_params == plan.base_params == plan.trained_params == sum(p.numel() for p in first.parameters())
    assert plan.active_params < plan.total_params
    Objective(again.train())(**labelled_batch())["loss"].backward()
    assert all(ffn.gate.weight.grad.abs().max() > 0 for _, ffn in sparse_blocks(again))


def test_the_dense_twin_trains_whole():
    base = pico_model()
    twin = sm.craft(base, sm.UpcycleConfig(control="dense"))
    assert type(twin) is type(base) and twin.sparsmith.neutral["bitwise"]
    assert sum(p.numel() for rows in trained_roles(twin).values() for _, p in rows) == sum(
        p.numel() for p in base.parameters()
    )
    out = Objective(twin.train())(**labelled_batch())
    assert set(out["terms"]) == {"task"}


def test_health_tells_load_by_domain_and_block():
    model = crafted()
    batch = labelled_batch()
    batch["domain"] = torch.tensor([0, 0, 1])[:, None].expand(3, 14).contiguous()
    Objective(model.train(), domains=2)(**batch)
    figures = UPCYCLE.metrics(model, model.sparsmith.configs[0])
    assert len(figures["table/load"]) == 2 and len(figures["table/load_by_domain"]) == 2
    assert sum(figures["table/load"][0]) == pytest.approx(1.0)
    assert context_of(model).counts == {}


@pytest.mark.parametrize("router", ["top1", "top2", "topk"])
def test_evaluation_is_causal(router):
    """Spec test 8: what comes later moves nothing before it."""
    k = {"top1": 1, "top2": 2, "topk": 3}[router]
    model = apart(crafted(deep_model(), top_k=k, moe={"router": router}), 0.3).eval()
    ids = pico_ids(2, 24)
    other = ids.clone()
    other[:, 12:] = pico_ids(2, 12, seed=9)
    with torch.no_grad():
        gap = (model(ids).logits - model(other).logits).abs()
    assert gap[:, :12].max() <= 1e-5 and gap[:, 12:].max() > 1e-2
