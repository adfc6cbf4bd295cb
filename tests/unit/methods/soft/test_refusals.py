"""Spec test 14: models whose last blocks cannot be left out, and exits that a model cannot have, are refused by name."""

from __future__ import annotations

import pytest
from pydantic import ValidationError
from transformers import AutoConfig

import sparsmith as sm
from sparsmith import anatomy
from sparsmith.crafting.slices import at_depth
from sparsmith.errors import CrossLayerStateError, MethodError, UnknownAnatomy, UnsupportedAnatomy
from tests.kit.depths import deep_model
from tests.kit.pico import pico_config, pico_model

CROSSING = {
    "gemma3n_text": ({}, "num_kv_shared_layers"),
    "deepseek_v3": ({"num_nextn_predict_layers": 1}, "further tokens"),
    "qwen3_next": ({}, "linear"),
    "bart": ({}, "encoder"),
    "llama": ({"num_kv_shared_layers": 2}, "num_kv_shared_layers"),
    "qwen2": ({"mtp_num_hidden_layers": 1}, "mtp_num_hidden_layers"),
    "mistral": ({"layer_types": ["full_attention", "linear_attention"]}, "linear_attention"),
}


@pytest.mark.parametrize("family", CROSSING)
def test_state_that_crosses_blocks(family):
    changes, said = CROSSING[family]
    known = family in anatomy.families()
    config = pico_config(family) if known else AutoConfig.for_model(family)
    for name, value in changes.items():
        setattr(config, name, value)
    with pytest.raises(CrossLayerStateError, match=said) as told:
        sm.plan(config, sm.SoftConfig())
    assert told.value.found and told.value.expected and told.value.mend


def test_crossing_state_is_seen_by_craft_too():
    model = pico_model("llama")
    model.config.num_kv_shared_layers = 2
    with pytest.raises(CrossLayerStateError):
        sm.craft(model, sm.SoftConfig())


def test_a_family_without_a_row():
    with pytest.raises(UnknownAnatomy, match="stablelm"):
        sm.plan(AutoConfig.for_model("stablelm"), sm.SoftConfig())
    with pytest.raises(UnsupportedAnatomy, match="mixture"):
        sm.plan(AutoConfig.for_model("phimoe"), sm.SoftConfig())


@pytest.mark.parametrize("exits", [(0, 4), (), (2, 2, 4), (-1, 4), (2.5, 4)])
def test_no_such_depths(exits):
    with pytest.raises(ValidationError):
        sm.SoftConfig(exits=exits)


@pytest.mark.parametrize("exits, said", [((2, 5), "4 blocks"), ((1, 2, 3), "full depth 4"), ((8,), "1 to 4")])
def test_depths_that_the_model_does_not_have(exits, said):
    for act in (sm.plan, sm.craft):
        with pytest.raises(MethodError, match=said):
            act(deep_model() if act is sm.craft else deep_model().config, sm.SoftConfig(exits=exits))


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text"])
def test_an_exit_below_the_first_full_attention_block(family):
    with pytest.raises(MethodError, match=r"\[1\], all sliding attention"):
        sm.craft(deep_model(family), sm.SoftConfig(exits=(1, 2, 4)))


def test_a_depth_that_was_not_tuned_is_not_read_out():
    model = sm.craft(deep_model(), sm.SoftConfig(exits=(2, 4)), proof=False)
    with pytest.raises(MethodError, match="one of 2, 4"):
        at_depth(model, 3)
    with pytest.raises(MethodError, match="method: soft"):
        at_depth(deep_model(), 3)


@pytest.mark.parametrize(
    "settings, key",
    [
        ({"e_scale": 0.3}, "e_scale"),
        ({"boost": 0.3}, "boost"),
        ({"sandwich_weights": "half"}, "sandwich_weights"),
        ({"schedule": "sandwich", "sandwich_weights": "half", "weights": "linear"}, "weights"),
        ({"rotation": 3}, "rotation"),
        ({"schedule": "sampled", "kl": {"weight": 0.5}}, "kl"),
        ({"ce": {"impl": "torch"}, "kl": {"weight": 0.5}}, "ce.impl"),
        ({"trunk": "frozen", "tune": "lora"}, "tune"),
        ({"trunk": "frozen", "schedule": "sampled"}, "schedule"),
        ({"trunk": "frozen", "weights": "full_boost"}, "weights"),
        ({"trunk": "frozen", "layer_dropout": 0.1}, "layer_dropout"),
        ({"lora": {"r": 8}}, "lora"),
        ({"train_norm": False}, "train_norm"),
        ({"tune": "lora", "lora": {"enabled": False}}, "lora.enabled"),
        ({"tune": "lora", "untie": True}, "untie"),
        ({"arm": "sft", "schedule": "sampled"}, "schedule"),
    ],
)
def test_a_setting_that_can_have_no_effect_is_an_error(settings, key):
    with pytest.raises(ValidationError) as told:
        sm.SoftConfig(**settings)
    assert key in str(told.value)


def test_no_inner_exit_leaves_a_frozen_trunk_with_nothing_to_train():
    with pytest.raises(MethodError, match="below the full depth"):
        sm.craft(deep_model(), sm.SoftConfig(exits=(4,), trunk="frozen"))
