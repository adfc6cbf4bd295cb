"""Donors and settings that no stock mixture can hold are refused by name, with the alternative, and nothing is changed (spec test 2)."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

import sparsmith as sm
from sparsmith.errors import MethodError, RefusedDonor, UnsupportedAnatomy
from tests.kit.depths import deep_model
from tests.kit.pico import pico_config, pico_model

DONORS = {
    "gemma2": ("gemma2", {}, {}, r"norms around.*pesc"),
    "gemma3": ("gemma3_text", {}, {}, r"GeLU.*pesc"),
    "phi3": ("phi3", {}, {}, r"fused.*pesc"),
    "gpt_neox": ("gpt_neox", {}, {}, r"LayerNorm.*pesc"),
    "gpt2": ("gpt2", {}, {}, r"LayerNorm.*pesc"),
    "ffn biases": ("llama", {"mlp_bias": True}, {}, r"mlp_bias.*pesc"),
    "attention biases": ("llama", {"attention_bias": True}, {}, r"attention_bias.*pesc"),
    "some layers of olmo2": ("olmo2", {}, {"layers": [0]}, r"layers.*pesc"),
    "some layers in mixtral": ("llama", {}, {"layers": [0], "target": "mixtral"}, r"layers.*qwen2_moe"),
    "raw weights in mixtral": ("llama", {}, {"moe": {"combine": "switch"}, "target": "mixtral"}, r"combine.*qwen2_moe"),
    "window in qwen": ("mistral", {"sliding_window": 8}, {"target": "qwen2_moe"}, r"sliding_window.*mixtral"),
    "windows of qwen2": ("qwen2", {"use_sliding_window": True, "max_window_layers": 1}, {}, r"sliding windows"),
    "odd heads": ("llama", {"head_dim": 32}, {"target": "qwen2_moe"}, r"heads of 32.*mixtral"),
    "foreign target": ("qwen3", {}, {"target": "mixtral"}, r"target.*qwen3_moe"),
}


@pytest.mark.parametrize("name", DONORS)
def test_a_donor_is_refused_with_its_reason(name):
    family, changes, settings, match = DONORS[name]
    config = sm.UpcycleConfig(experts=4, **settings)
    base = pico_config(family, **changes)
    with pytest.raises(RefusedDonor, match=match):
        sm.plan(base, config)
    model = pico_model(family, **changes)
    before = {n: p.clone() for n, p in model.named_parameters()}
    with pytest.raises(RefusedDonor, match=match):
        sm.craft(model, config, inplace=True)
    assert all(torch.equal(p, before[n]) and p.requires_grad for n, p in model.named_parameters())


def test_mixtures_go_to_the_method_that_tunes_them():
    sparse = pico_config("llama")
    made = sm.craft(pico_model(), sm.UpcycleConfig(experts=4))
    config = sm.settle(made).config
    with pytest.raises(UnsupportedAnatomy, match=r"mixture of experts already.*donor: sparse"):
        sm.plan(config, sm.UpcycleConfig(experts=4))
    for method in (sm.PescConfig(num_experts=4, adapter_dim=16), sm.FineGatesConfig()):
        with pytest.raises(UnsupportedAnatomy, match=r"mixture of experts already.*donor: sparse"):
            sm.plan(config, method)
    with pytest.raises(MethodError, match=r"routers no method tunes"):
        sm.plan(config, sm.SoftConfig(exits=(1, 2)))
    with pytest.raises(MethodError, match=r"a dense model.*Leave `donor` out"):
        sm.plan(sparse, sm.UpcycleConfig(donor="sparse"))


SETTINGS = {
    "renorm of one": {"top_k": 1, "moe": {"router": "top1", "combine": "renorm"}},
    "straight through of two": {"moe": {"combine": "straight_through"}},
    "router against top_k": {"top_k": 3},
    "topk of one": {"top_k": 1, "moe": {"router": "topk"}},
    "too many": {"experts": 2, "top_k": 3, "moe": {"router": "topk"}},
    "zero router": {"router_init_std": 0.0},
    "everything frozen": {"moe": {"freeze_moe": True, "freeze_dense": True, "balance_coef": 0.0, "z_coef": 0.0}},
    "losses of a frozen router": {"moe": {"freeze_gate": True, "balance_coef": 0.1}},
    "second of one": {"top_k": 1, "moe": {"router": "top1", "second_expert_drop": True}},
    "thinned loop": {"moe": {"expert_dropout": 0.1, "experts_impl": "eager"}},
    "LoRA without": {"lora": {"r": 8}},
    "LoRA dropout": {"tune": "lora", "lora": {"dropout": 0.1}},
    "freezes beside a LoRA": {"tune": "lora", "moe": {"freeze_dense": True}},
    "converting a mixture": {"donor": "sparse", "experts": 4},
    "routers of a dense twin": {"control": "dense", "moe": {"jitter": 0.01}},
    "twice the same layer": {"layers": [0, 0]},
    "no layer": {"layers": []},
    "odd layers": {"layers": "every-x"},
    "jitter": {"moe": {"jitter": 0.5}},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_that_contradict_or_do_nothing_are_refused(name):
    with pytest.raises(ValidationError):
        sm.UpcycleConfig(**SETTINGS[name])


def test_defaults_of_a_frozen_router_are_no_clash():
    config = sm.UpcycleConfig(moe={"freeze_gate": True})
    assert config.moe.loss_weights == {}


def test_a_block_that_is_not_there():
    with pytest.raises(MethodError, match=r"indices from 0 to 3"):
        sm.plan(deep_model(), sm.UpcycleConfig(layers=[7]))


def test_full_tuning_needs_float32():
    with pytest.raises(MethodError, match=r"`full` on a base in bfloat16"):
        sm.craft(pico_model(dtype=torch.bfloat16), sm.UpcycleConfig())


@pytest.mark.parametrize(
    ("changes", "moe", "match"),
    [
        ({}, {"router": "top1"}, r"`top2`, as a token takes 2 experts"),
        ({"norm_topk_prob": False}, {}, r"norm_topk_prob false.*`switch`"),
        ({}, {"combine": "switch"}, r"norm_topk_prob true"),
    ],
)
def test_a_mixtures_settings_must_be_its_own(changes, moe, match):
    made = sm.settle(sm.craft(pico_model("qwen3"), sm.UpcycleConfig(experts=4)))
    for name, value in changes.items():
        setattr(made.config, name, value)
    fresh = type(made)(made.config)
    with pytest.raises(MethodError, match=match):
        sm.craft(fresh, sm.UpcycleConfig(donor="sparse", moe=moe), proof=False)


@pytest.mark.parametrize("other", [sm.PescConfig(num_experts=4, adapter_dim=16), sm.FineGatesConfig()])
def test_pairs_that_cannot_be(other):
    with pytest.raises(MethodError, match="upcycle"):
        sm.plan(pico_model(), [sm.UpcycleConfig(), other])


def test_two_that_train_the_base():
    with pytest.raises(MethodError, match=r"both train the base.*freeze_dense"):
        sm.plan(deep_model(), [sm.UpcycleConfig(), sm.SoftConfig(exits=(2, 4))])
