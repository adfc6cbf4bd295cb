"""Step 0 is the donor: logits of the mixture, before and after save and reload, with every way to compute experts (spec 4.1, test 1, 3)."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import sparsmith as sm
from sparsmith.methods.upcycle.build import build_sparse
from sparsmith.methods.upcycle.layers import RouterSettings, graft, sparse_blocks
from sparsmith.ops.route_context import RouteContext
from tests.kit.depths import deep_model
from tests.kit.pico import pico_ids, pico_model

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
ROWS = {
    "llama": ("llama", {}, {}, "mixtral"),
    "llama, tied": ("llama", {"tie_word_embeddings": True}, {}, "mixtral"),
    "llama 3 positions": ("llama", {"rope_parameters": LLAMA3_ROPE}, {}, "mixtral"),
    "llama, every second": ("llama", {}, {"layers": "every-2"}, "qwen2_moe"),
    "llama, a list": ("llama", {}, {"layers": [0, 3]}, "qwen2_moe"),
    "llama to qwen": ("llama", {}, {"target": "qwen2_moe"}, "qwen2_moe"),
    "llama, top 1": ("llama", {}, {"top_k": 1, "moe": {"router": "top1"}}, "mixtral"),
    "llama, top 3": ("llama", {}, {"top_k": 3, "moe": {"router": "topk"}}, "mixtral"),
    "mistral": ("mistral", {}, {}, "mixtral"),
    "mistral, window": ("mistral", {"sliding_window": 8}, {}, "mixtral"),
    "qwen2": ("qwen2", {}, {}, "qwen2_moe"),
    "qwen2, every second": ("qwen2", {}, {"layers": "every-2"}, "qwen2_moe"),
    "qwen3": ("qwen3", {}, {}, "qwen3_moe"),
    "qwen3, a list": ("qwen3", {}, {"layers": [1, 2]}, "qwen3_moe"),
    "olmo2": ("olmo2", {}, {}, "flex_olmo"),
}
LIMIT = 1e-5  # weights sum to 1 but for float32's rounding, once per block


def made(name, **more):
    family, changes, settings, target = ROWS[name]
    base = deep_model(family, **changes)
    return base, sm.craft(base, sm.UpcycleConfig(experts=4, **settings, **more)), target


@torch.no_grad()
def logits(model, **inputs):
    return model(inputs.pop("ids", pico_ids(2, 24)), use_cache=False, **inputs).logits


@pytest.mark.parametrize("name", ROWS)
def test_the_logits_are_the_donors(name, tmp_path):
    base, model, target = made(name)
    assert model.config.model_type == target and (logits(model) - logits(base)).abs().max() <= LIMIT
    ids, mask = pico_ids(2, 24), torch.ones(2, 24, dtype=torch.long)
    mask[1, :9] = 0
    gap = (logits(model, ids=ids, attention_mask=mask) - logits(base, ids=ids, attention_mask=mask))[mask.bool()]
    assert gap.abs().max() <= LIMIT
    sm.save(model, tmp_path / "full", full=True)
    for way in ("eager", "batched_mm", "grouped_mm"):
        stock = AutoModelForCausalLM.from_pretrained(tmp_path / "full", experts_implementation=way).eval()
        assert type(stock).__module__.startswith("transformers.") and stock.config.model_type == target
        assert (logits(stock) - logits(base)).abs().max() <= LIMIT, way
    assert torch.equal(logits(sm.load(tmp_path / "full")), logits(model))


@pytest.mark.parametrize("name", ["llama", "llama, every second", "qwen3", "olmo2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_number_types(name, dtype):
    family, changes, settings, _ = ROWS[name]
    base = deep_model(family, **changes).to(dtype)
    if dtype == torch.float64:  # it is built and never tuned: what trains is float32
        config = sm.UpcycleConfig(experts=4, **settings)
        model = build_sparse(deep_model(family, **changes).to(dtype), config, 42).eval()
        graft(model, RouterSettings("renorm", False, None, 0.0), 0.0, RouteContext())
        model.config._experts_implementation = "eager"  # grouped products know no float64
        assert (logits(model) - logits(base)).abs().max() <= 1e-12
        return
    model = sm.craft(base, sm.UpcycleConfig(experts=4, **settings, tune="lora"), proof=False).eval()
    # bfloat16 rounds each block's sum to 8 bits: two sums in other orders differ by a few units of the last place
    assert (logits(model) - logits(base)).abs().max() <= 0.05 * logits(base).abs().max()


@pytest.mark.parametrize("name", ["llama, every second", "qwen3", "olmo2", "llama 3 positions"])
def test_both_spellings_stand_in_the_config(name, tmp_path):
    _, model, _ = made(name)
    sm.save(model, tmp_path / "full", full=True)
    data = json.loads((tmp_path / "full" / "config.json").read_text())
    assert data["num_experts"] == data["num_local_experts"] == 4 and data["num_experts_per_tok"] == 2
    assert data["rope_theta"] == data["rope_parameters"]["rope_theta"] == model.config.rope_parameters["rope_theta"]
    scaled = data["rope_parameters"]["rope_type"] != "default"
    assert ("rope_scaling" in data) == scaled
    assert data["router_aux_loss_coef"] == 0.01 and not data["output_router_logits"]


def test_expert_tensors_bear_the_names_that_every_reader_knows(tmp_path):
    from safetensors import safe_open

    for name, one in (("llama", "block_sparse_moe.experts.3.w1.weight"), ("qwen3", "mlp.experts.3.gate_proj.weight")):
        _, model, _ = made(name)
        folder = sm.save(model, tmp_path / name.replace(",", ""), full=True)
        with safe_open(next(folder.glob("*.safetensors")), "pt") as file:
            assert f"model.layers.0.{one}" in file.keys()  # noqa: SIM118


def test_the_copies_and_the_rest_are_the_donors_bits():
    base, model, _ = made("llama")
    for index, ffn in sparse_blocks(model):
        mlp = base.model.layers[index].mlp
        both = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])
        assert all(torch.equal(own, both) for own in ffn.experts.gate_up_proj)
        assert all(torch.equal(own, mlp.down_proj.weight) for own in ffn.experts.down_proj)
    theirs = base.state_dict()
    assert all(torch.equal(t, theirs[n]) for n, t in model.state_dict().items() if ".mlp." not in n)


def test_the_donor_is_left_as_it_was():
    base = deep_model()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = sm.craft(base, sm.UpcycleConfig(experts=4))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())
    assert base.config.model_type == "llama" and type(base).__name__ == "LlamaForCausalLM"


def test_noise_on_the_copies_is_told_and_not_judged():
    base = deep_model()
    model = sm.craft(base, sm.UpcycleConfig(experts=4, copy_noise=0.1))
    proof = model.sparsmith.neutral
    assert proof["value"] > 1e-3 and "copy_noise 0.1" in proof["check"] and proof["limit"] is None
    experts = sparse_blocks(model)[0][1].experts
    mlp = base.model.layers[0].mlp
    own = experts.down_proj - mlp.down_proj.weight
    relative = own.std() / mlp.down_proj.weight.std()
    assert abs(relative - 0.1) < 0.01 and not torch.equal(own[0], own[1])
    again = sm.craft(base, sm.UpcycleConfig(experts=4, copy_noise=0.1))
    assert torch.equal(sparse_blocks(again)[0][1].experts.down_proj, experts.down_proj)


def test_raw_probabilities_shift_the_start():
    base = deep_model("qwen3")
    model = sm.craft(base, sm.UpcycleConfig(experts=4, moe={"combine": "switch"}))
    assert model.sparsmith.neutral["value"] > 1e-3 and "combine switch" in model.sparsmith.neutral["check"]
    assert model.config.norm_topk_prob is False


def test_routers_start_with_the_asked_deviation_and_use_every_expert():
    """Spec test 4: no router starts at zero, and none sends every token to the same two experts."""
    base = pico_model(hidden_size=256, num_attention_heads=4, intermediate_size=64)
    model = sm.craft(base, sm.UpcycleConfig(experts=8))
    x = torch.randn(10_000, 256, generator=torch.Generator().manual_seed(0))
    weights = torch.cat([ffn.gate.weight.flatten() for _, ffn in sparse_blocks(model)])
    assert abs(weights.std() / 0.02 - 1) < 0.05
    for _, ffn in sparse_blocks(model):
        _, _, indices = ffn.gate(x)
        share = torch.bincount(indices.flatten(), minlength=8) / indices.numel()
        assert share.min() > 0.2 / 8
    first, second = (ffn.gate.weight for _, ffn in sparse_blocks(model))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("name", ["llama", "llama, every second", "qwen3", "olmo2"])
def test_the_plan_counts_what_is_built(name):
    base, model, _ = made(name)
    config = model.sparsmith.configs[0]
    plan = sm.plan(base.config, config)
    assert plan.total_params == sum(p.numel() for p in model.parameters())
    from sparsmith.crafting.apply import check_roles

    assert check_roles(model) == plan.trained
    per_expert = 3 * 64 * 96
    assert plan.total_params - plan.active_params == len(sparse_blocks(model)) * 2 * per_expert


def test_flops_of_dense_top1_and_top2_are_the_hand_count():
    """Spec test 15, to 0.1 %: 2 per weight that a token uses, and 4 heads head_dim per attended token and block."""
    base, context = deep_model(), 256
    attention, ffn, head = 64 * 64 * 2 + 2 * 64 * 32, 3 * 64 * 96, 128 * 64
    seen = 4 * 4 * 4 * 16 * context
    for k, router in ((1, "top1"), (2, "top2")):
        plan = sm.plan(base, sm.UpcycleConfig(experts=4, top_k=k, moe={"router": router}), max_length=2 * context)
        by_hand = 2 * (4 * (attention + k * ffn + 4 * 64) + head) + seen
        assert plan.flops.forward == pytest.approx(by_hand, rel=1e-3)
        assert plan.flops.training == pytest.approx(3 * by_hand, rel=1e-3)
    twin = sm.plan(base, sm.UpcycleConfig(control="dense"), max_length=2 * context)
    assert twin.flops.training == pytest.approx(3 * (2 * (4 * (attention + ffn) + head) + seen), rel=1e-3)
