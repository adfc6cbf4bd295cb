"""Expert choice in a model: exact against loops, the donor's function at step 0, causal in evaluation."""

import copy

import pytest
import torch

import sparsmith as sm
from sparsmith.errors import NonCausalRouter
from sparsmith.methods.upcycle.expert_choice import seeing_ahead
from tests.kit.choice import DONORS, choosing_model, fitted, naive_block, naive_takers
from tests.kit.pico import pico_ids, pico_model

# experts that differ, are heard, and share tokens: what another token's choice changes shows in the logits
LEAKY = {"apart": 3.0, "loud": 5.0, "router": 5.0}


def inputs_of_blocks(model, **batch):
    """The FFNs' inputs and outputs of one forward."""
    seen = {}
    hooks = [
        ffn.register_forward_hook(lambda m, args, out, i=index: seen.update({i: (args[0].detach(), out.detach())}))
        for index, ffn in model.sparse_blocks()
    ]
    with torch.no_grad():
        model(**batch)
    for hook in hooks:
        hook.remove()
    return seen


def padded_batch():
    """Two rows, the second with five tokens of padding on the right."""
    ids, mask = pico_ids(2, 14), torch.ones(2, 14, dtype=torch.long)
    mask[1, 9:] = 0
    return {"input_ids": ids, "attention_mask": mask}


# float64, for which the grouped kernel has no form
@pytest.mark.parametrize("how", ["top_c", "threshold", "evaluation"])
@pytest.mark.parametrize("family", DONORS)
def test_blocks_equal_a_loop(family, how):
    select = "top_c" if how == "evaluation" else how
    model = fitted(
        choosing_model(
            family, apart=1.0, router=40.0, ec={"train_select": select, "capacity_factor": 1.0}, experts_impl="eager"
        ).double()
    )
    batch = padded_batch()
    model.train(how != "evaluation")
    mask, several, none = batch["attention_mask"].bool(), 0, 0
    blocks = dict(model.sparse_blocks())
    thresholds = {index: ffn.gate.thresholds.clone() for index, ffn in blocks.items()}
    for index, (x, out) in inputs_of_blocks(model, **batch).items():
        ffn = blocks[index]
        p = (x.reshape(-1, x.shape[-1]) @ ffn.gate.weight.t()).softmax(dim=-1).detach()
        if how == "top_c":
            takers = naive_takers(p, mask, 1.0)
        else:
            takers = [{e for e in range(4) if row[e] >= thresholds[index][e]} for row in p]
        assert (out - naive_block(ffn, x, takers, p).detach()).abs().max() <= 1e-12
        several += sum(len(taken) > 1 for taken in takers)
        none += sum(not taken for t, taken in enumerate(takers) if mask.reshape(-1)[t])
    assert several and none, "the case must hold tokens of several takers and tokens of none"


def test_padding_is_never_taken_and_changes_no_token():
    model = choosing_model(apart=1.0, router=40.0).train()
    batch = padded_batch()
    with torch.no_grad():
        both = model(**batch).logits[1, :9]
        alone = model(input_ids=batch["input_ids"][1:, :9]).logits[0]
    assert (both - alone).abs().max() <= 1e-5


@pytest.mark.parametrize("impl", ["grouped_mm", "batched_mm", "eager"])
@pytest.mark.parametrize("family", DONORS)
def test_step_0_is_the_donor(family, impl):
    dense, batch = pico_model(family), padded_batch()
    model = choosing_model(family, experts_impl=impl, router=40.0)
    with torch.no_grad():
        wanted = dense(**batch).logits
        with seeing_ahead(model):
            assert (model(**batch).logits - wanted).abs().max() <= 1e-5
        assert (model.train()(**batch).logits - wanted).abs().max() <= 1e-5
        assert (fitted(model)(**batch).logits - wanted).abs().max() <= 1e-5


def moved_before(model, place=20, length=32):
    """How far logits before `place` move when every token from there on changes."""
    ids = pico_ids(2, length, seed=3)
    other = ids.clone()
    other[:, place:] = pico_ids(2, length - place, seed=4)
    assert (ids[:, place:] != other[:, place:]).any(dim=1).all()
    with torch.no_grad():
        before, after = (model(input_ids=one).logits for one in (ids, other))
    assert (before[:, place:] - after[:, place:]).abs().max() > 0.1
    return (before[:, :place] - after[:, :place]).abs().max().item()


@pytest.mark.parametrize("family", DONORS)
def test_evaluation_sees_no_later_token_and_the_test_can_see_a_leak(family):
    model = fitted(choosing_model(family, **LEAKY))
    assert moved_before(model) <= 1e-5
    with seeing_ahead(model):
        assert moved_before(model) > 0.1
    assert moved_before(model) <= 1e-5


def test_threshold_training_is_causal_once_fitted():
    model = fitted(choosing_model(**LEAKY, ec={"train_select": "threshold"})).train()
    model.route_context.begin = lambda *a, **k: None  # hold the thresholds still between the two forwards
    assert moved_before(model) <= 1e-5
    assert moved_before(fitted(choosing_model(**LEAKY)).train()) > 0.1


def test_without_thresholds_evaluation_is_refused(tmp_path):
    model, ids = choosing_model(), pico_ids()
    for use in (
        lambda: model(input_ids=ids),
        lambda: model.generate(ids, max_new_tokens=2, do_sample=False),
        lambda: sm.generate(model, ids, max_new_tokens=2),
        lambda: sm.export(model, tmp_path / "out"),
        lambda: sm.save(model, tmp_path / "full", full=True),
    ):
        with pytest.raises(NonCausalRouter, match="Train the model first"):
            use()
    assert NonCausalRouter.exit_code == 6 and not list(tmp_path.iterdir())
    model.train()(input_ids=ids)
    assert model.eval()(input_ids=ids).logits.shape == (2, 12, 128)


def test_generation_with_a_cache_equals_the_full_forward():
    model = fitted(choosing_model(**LEAKY))
    ids, mask = pico_ids(2, 10), torch.ones(2, 10, dtype=torch.long)
    mask[0, :4] = 0  # padding on the left
    made = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=12,
        do_sample=False,
        eos_token_id=None,
        output_logits=True,
        return_dict_in_generate=True,
    )
    steps = torch.stack(made.logits, dim=1)
    whole_mask = torch.cat([mask, torch.ones(2, 12, dtype=torch.long)], dim=1)
    positions = (whole_mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        whole = model(input_ids=made.sequences, attention_mask=whole_mask, position_ids=positions).logits
    assert (whole[:, 9:-1] - steps).abs().max() <= 1e-5


def router_gradient(model):
    ids = pico_ids(4, 24)
    model.train()(input_ids=ids, labels=ids).loss.backward()
    return max(ffn.gate.weight.grad.norm().item() for _, ffn in model.sparse_blocks())


def test_the_router_learns_once_experts_differ():
    assert router_gradient(choosing_model(z_coef=0.0)) < 1e-6
    assert router_gradient(choosing_model(apart=0.5, z_coef=0.0)) > 1e-3
    assert router_gradient(choosing_model(apart=0.0, z_coef=0.1)) > 1e-3


@pytest.mark.parametrize("select", ["top_c", "threshold"])
def test_gradient_checkpointing_chooses_once(select):
    """The second forward of a block chooses as the first did, and counts and thresholds take in each batch once."""
    plain = choosing_model(apart=1.0, router=40.0, ec={"train_select": select, "ema": 0.5})
    again = copy.deepcopy(plain)
    again.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    ids = pico_ids(3, 16)
    for model in (plain, again):
        for seed in range(3):
            model.zero_grad()
            ids = pico_ids(3, 16, seed=seed)
            model.train()(input_ids=ids, labels=ids).loss.backward()
        model.route_context.settle_thresholds()
    for (name, one), two in zip(plain.named_parameters(), again.parameters(), strict=True):
        assert (one.grad is None) == (two.grad is None) and (one.grad is None or torch.equal(one.grad, two.grad)), name
    for (_, one), (_, two) in zip(plain.sparse_blocks(), again.sparse_blocks(), strict=True):
        assert torch.equal(one.gate.thresholds, two.gate.thresholds)
    assert all(
        torch.equal(plain.route_context.tallies[block], again.route_context.tallies[block]) for block in range(2)
    )


def test_a_copy_has_a_context_of_its_own():
    model = fitted(choosing_model())
    twin = copy.deepcopy(model)
    assert type(twin.route_context) is type(model.route_context) and twin.route_context is not model.route_context
    assert all(ffn.context is twin.route_context for _, ffn in twin.sparse_blocks())
    twin.train()(input_ids=pico_ids(seed=9))
    assert twin.route_context.pending and not model.route_context.pending


def test_expert_dropout_thins_pairs_in_training_alone():
    model = fitted(choosing_model(expert_dropout=0.5))
    ids = pico_ids()
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)
        model.train()
        assert not torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)
