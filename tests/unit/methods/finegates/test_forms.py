"""Spec 5, tests 8 and 15 of FineGates: the forms of a settled model, and the refusals with the number to change."""

from __future__ import annotations

import copy

import pytest
import torch

import sparsmith as sm
from sparsmith import anatomy
from sparsmith.crafting.settle import settle_report
from sparsmith.errors import LayoutMismatch, MethodError, TargetUnreachable, UsageError
from sparsmith.methods.finegates.choose import choose
from sparsmith.methods.finegates.config import FineGatesConfig
from sparsmith.methods.finegates.deci import deci_config
from sparsmith.methods.finegates.forms import layout_of
from sparsmith.methods.finegates.modeling import LayerConfig, NoAttention, NoFFN
from tests.kit.gated import UNEVEN, WHOLE, gated, logits, tokens
from tests.kit.pico import pico_model

PLAIN = FineGatesConfig(target=0.7, settle={"unit": 16})


def test_a_llama_whose_heads_do_not_divide_the_width_becomes_a_mistral():
    """8 heads become 6 at width 64: Llama's class refuses the number, Mistral's computes the same to the bit."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = FineGatesConfig(target=0.8, settle={"unit": 16})
    model = gated(
        units=(96,) * 4, groups=(3,) * 4, soft=False, config=config, num_attention_heads=8, num_key_value_heads=4
    )
    settled = sm.settle(copy.deepcopy(model))
    assert type(settled).__name__ == "MistralForCausalLM" and settled.sparsmith.form == "uniform"
    assert (logits(settled) - logits(model)).abs().max() == 0.0
    read = AutoConfig.for_model(**settled.config.to_dict())  # stock validation
    assert (read.num_attention_heads, read.num_key_value_heads, read.head_dim, read.sliding_window) == (6, 3, 8, None)
    assert read.rope_parameters == model.config.rope_parameters
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(read)
    shapes = {name: tensor.shape for name, tensor in built.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in settled.state_dict().items()}
    assert tokens(settled) == tokens(model)


def test_a_block_that_is_closed_as_a_whole_goes_and_the_kinds_of_the_rest_stay():
    model = gated("gemma2", **WHOLE)
    kinds = list(model.config.layer_types)
    settled = sm.settle(copy.deepcopy(model), form="uniform")
    assert settled.config.num_hidden_layers == 3 and settled.config.layer_types == [kinds[0], *kinds[2:]]
    assert [anatomy.attention_of(block).layer_idx for block in anatomy.blocks(settled)] == [0, 1, 2]
    assert tokens(settled) == tokens(model)


def test_a_block_of_which_a_half_is_closed_is_no_uniform_model_and_nothing_is_cut():
    model = gated(closed=((2, "ffn_block"),))
    before = logits(model)
    with pytest.raises(LayoutMismatch, match="block 2, of which the FFN alone is closed"):
        sm.settle(model, form="uniform")
    assert torch.equal(logits(model), before) and layout_of(model).form == "per-layer"


@pytest.mark.parametrize(
    "changes, words",
    [({"units": (48, 48, 64, 96)}, "FFN widths from 48 to 96"), ({"groups": (1, 2, 1, 1)}, "groups from 1 to 2")],
)
def test_unequal_blocks_are_named_with_their_numbers(changes, words):
    with pytest.raises(LayoutMismatch, match=words):
        layout_of(gated(**changes), "uniform")


def test_gemma2_tells_the_head_counts_that_its_class_takes():
    model = gated("gemma2", groups=(3,) * 4, heads=None, num_attention_heads=8, num_key_value_heads=4, head_dim=8)
    with pytest.raises(LayoutMismatch, match=r"6 of 8 query heads in gemma2; expected .* 64: 1, 2, 4, 8") as fault:
        layout_of(model, "uniform")
    assert "per-layer or padded" in fault.value.mend
    assert layout_of(model).form == "per-layer"
    padded = layout_of(model, "padded").present[0]
    assert len(padded.groups) == 4 and len(padded.heads) == 8
    settled = sm.settle(copy.deepcopy(model), form="padded")
    assert settled.config.num_attention_heads == 8
    assert (logits(settled) - logits(model)).abs().max() <= 1e-4


def test_unknown_forms_and_models_that_are_not_pruned_are_refused():
    with pytest.raises(UsageError, match="zeros"):
        sm.settle(gated(), form="zeroes")
    model = sm.craft(pico_model(), sm.PescConfig(num_experts=2, top_k=1, adapter_dim=8))
    with pytest.raises(LayoutMismatch, match="pesc, which deletes nothing"):
        sm.settle(model, form="zeros")


def test_a_settled_model_keeps_its_form():
    model = sm.settle(gated())
    assert sm.settle(model, form="uniform") is model is sm.settle(model)
    with pytest.raises(LayoutMismatch, match="settled into the form uniform"):
        sm.settle(model, form="zeros")


def test_halves_that_are_closed_are_not_there():
    slim = sm.settle(gated(**UNEVEN))
    blocks = list(anatomy.blocks(slim))
    assert isinstance(anatomy.attention_of(blocks[0]), NoAttention) and isinstance(anatomy.ffn_of(blocks[2]), NoFFN)
    assert slim.config.slim["per_layer_config"] == [
        {"intermediate_size": 48, "num_attention_heads": 0, "num_key_value_heads": 0, "attention": False, "ffn": True},
        {"intermediate_size": 64, "num_attention_heads": 1, "num_key_value_heads": 1, "attention": True, "ffn": True},
        {"intermediate_size": 0, "num_attention_heads": 1, "num_key_value_heads": 1, "attention": True, "ffn": False},
    ]
    with pytest.raises(MethodError, match="per-layer model"):
        sm.craft(slim, PLAIN)


def test_a_fused_attention_reads_its_own_head_counts_and_the_shared_rest():
    slim = sm.settle(gated("phi3", **UNEVEN))
    config = anatomy.attention_of(anatomy.blocks(slim)[1]).config
    assert isinstance(config, LayerConfig) and config.num_attention_heads == 1
    assert config._attn_implementation == "eager"
    slim.set_attn_implementation("sdpa")
    assert config._attn_implementation == "sdpa"
    before = logits(slim)
    slim.set_attn_implementation("eager")
    assert (logits(slim) - before).abs().max() <= 1e-5


def test_zeros_equals_uniform_and_holds_zeros():
    model = gated("phi3")
    uniform, zeros = (sm.settle(copy.deepcopy(model), form=form) for form in ("uniform", "zeros"))
    assert (logits(uniform) - logits(zeros)).abs().max() <= 1e-4
    ffn = anatomy.ffn_of(anatomy.blocks(zeros)[0])
    closed = ffn.down_proj.weight.abs().sum(0) == 0
    assert closed.sum() == 48 and not ffn.gate_up_proj.weight[closed.repeat(2)].any()
    assert sum(p.numel() for p in zeros.parameters()) == sum(
        p.numel() for p in pico_model("phi3", num_hidden_layers=4).parameters()
    )


def test_a_global_choice_goes_from_craft_to_uneven_blocks():
    config = FineGatesConfig(target=0.7, settle={"scope": "global", "unit": 8})
    model = sm.craft(pico_model(num_hidden_layers=4), config)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if name.endswith("units.logit"):
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    widths = {len(part) for part in choose(model, config).units}
    assert len(widths) > 1
    settled = sm.settle(copy.deepcopy(model))
    assert settled.sparsmith.form == "per-layer"
    account = settle_report(settled).tables["finegates"]["accounting"]
    assert account["deletable"]["removed"] >= 0.3 * account["counted"]["total"] - 8 * 3 * 64


def test_a_target_out_of_reach_tells_the_interval():
    with pytest.raises(TargetUnreachable, match=r"between 0\.\d+ and"):
        sm.craft(pico_model("gpt2"), FineGatesConfig(target=0.1, settle={"unit": 16}))


WIDE = {"intermediate_size": 768, "num_attention_heads": 4, "num_key_value_heads": 2}


def test_deci_describes_widths_and_left_out_halves_of_a_llama():
    config = FineGatesConfig(target=0.7, gates={"attention": "none", "blocks": True}, settle={"unit": 256})
    changes = {"units": (256, 512, 768, 256), "closed": ((0, "attention_block"), (3, "ffn_block")), "config": config}
    data = deci_config(sm.settle(gated(**changes, **WIDE)))
    blocks = data["block_configs"]
    assert [block["attention"]["no_op"] for block in blocks] == [True, False, False, False]
    assert [block["ffn"]["no_op"] for block in blocks] == [False, False, False, True]
    assert [block["ffn"]["ffn_mult"] for block in blocks] == [3 * k / 128 for k in (256, 512, 768)] + [None]
    assert blocks[1]["attention"]["n_heads_in_group"] == 2 and data["num_attention_heads"] == 4
    for mult, width in ((blocks[1]["ffn"]["ffn_mult"], 512), (blocks[2]["ffn"]["ffn_mult"], 768)):
        assert int(2 * mult * 64 / 3) == width  # how the format reads it


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"units": (256, 512, 256, 256), "groups": (2, 1, 2, 2), "heads": None, **WIDE}, "block 1 with 2 query heads"),
        ({"units": (256, 300, 256, 256), "groups": (2,) * 4, "heads": None, **WIDE}, "FFN width 300.* as 256"),
        ({"family": "qwen2", "units": (48, 64, 48, 48)}, "of qwen2"),
        ({}, "LlamaForCausalLM"),
    ],
)
def test_deci_refuses_what_it_cannot_say(changes, words):
    with pytest.raises(LayoutMismatch, match=words):
        deci_config(sm.settle(gated(**changes)))
