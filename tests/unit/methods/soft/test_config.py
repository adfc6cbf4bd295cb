"""Settings of SoFT: presets, and what they cost."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

import sparsmith as sm
from sparsmith.methods.soft.config import PRESETS
from tests.kit.pico import pico_config, pico_model

EXITS = (1, 3, 4)


def config(**settings):
    return sm.SoftConfig(exits=EXITS, **settings)


def test_a_preset_stands_for_its_settings_and_gives_way_to_those_beside_it():
    kept = config(preset="keep_full")
    assert kept.trunk == "frozen" and kept.kl is not None and kept.kl.weight == 0.5
    assert config(preset="keep_full", kl={"weight": 0.9}).kl.weight == 0.9
    assert sm.SoftConfig(**kept.model_dump()) == kept
    plain = config(preset="paper").model_dump()
    assert {**plain, "preset": None} == config().model_dump() and set(PRESETS) == {"paper", "keep_full"}


@pytest.mark.parametrize("wrong", ["papers", ["paper"], 3])
def test_no_such_preset(wrong):
    with pytest.raises(ValidationError):
        config(preset=wrong)


def test_no_gradient_passes_through_a_frozen_trunk():
    """Training FLOPs per token by hand: the trunk forward alone, what was added three times."""
    base = pico_config(num_hidden_layers=4)
    flops = sm.plan(base, config(trunk="frozen")).flops
    assert flops.training == flops.base_forward + 3 * (flops.forward - flops.base_forward)
    whole = sm.plan(base, config()).flops
    assert whole.training == 3 * whole.base_forward + 3 * (whole.forward - whole.base_forward)
    heads = 2 * 2 * base.vocab_size * base.hidden_size
    assert whole.forward - whole.base_forward == heads
    low_rank = sm.plan(base, config(tune="lora"))
    assert low_rank.flops.training == 2 * whole.base_forward + 3 * heads + 6 * low_rank.trained["lora"]


def test_a_change_of_attention_reaches_the_exits_own_blocks():
    model = sm.craft(pico_model(num_hidden_layers=4), config(trunk="frozen"), inplace=True, proof=False)
    model.set_attn_implementation("sdpa")
    kinds = {m.config._attn_implementation for m in model.modules() if getattr(m, "config", None) is not None}
    assert kinds == {"sdpa"}
