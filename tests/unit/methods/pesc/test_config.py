import subprocess
import sys

import pytest
import torch
from pydantic import ValidationError
from transformers import AutoConfig, AutoModelForCausalLM

from sparsmith import anatomy
from sparsmith.errors import MethodError
from sparsmith.methods.base import CraftContext, LoraSettings
from sparsmith.methods.pesc.config import PescConfig
from sparsmith.methods.pesc.method import PESC

LLAMA = {
    "7b": {},
    "13b": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
}


def llama(size):
    return AutoConfig.for_model("llama", **LLAMA[size])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"top_k": 9}, "top_k.*at most num_experts"),
        ({"adapter_dim": 60}, "adapter_dim.*multiple of 8"),
        ({"adapter_dropout": 0.1, "path": "masked"}, "path.*adapter_dropout"),
        ({"top1_gate": "none"}, "top1_gate.*top_k 1"),
        ({"router": "random", "top_k": 1, "top1_gate": "none"}, "top1_gate"),
        ({"router": "dense", "top_k": 4}, "top_k.*dense"),
        ({"router": "hash", "router_trainable": False}, "router_trainable"),
        ({"router": "hash", "router_input_norm": "rms"}, "router_input_norm"),
        ({"router": "random", "balance_alpha": 0.1}, "balance_alpha.*trained"),
        ({"router_trainable": False, "balance_alpha": 0.1}, "balance_alpha.*trained"),
        ({"router": "random", "router_z_coef": 0.1}, "router_z_coef.*trained"),
        ({"balance_alpha": 0.0, "balance_norm": "tokens"}, "balance_norm"),
        ({"control": "dense_lora", "lora": {"enabled": False}}, "lora"),
        ({"control": "single_adapter", "router": "hash"}, "router"),
        ({"layers": "every-0"}, "every-n"),
        ({"layers": "some"}, "every-n"),
        ({"layers": [0, 0]}, "each once"),
        ({"layers": []}, "at least one"),
        ({"num_experts": 1}, "num_experts"),
        ({"adapter_scale": 0}, "adapter_scale"),
        ({"num_expert": 8}, "num_expert"),
    ],
)
def test_what_cannot_work_or_has_no_effect_is_refused(settings, words):
    with pytest.raises(ValidationError, match=f"(?s){words}"):
        PescConfig(**settings)


def test_several_faults_are_told_at_once():
    with pytest.raises(ValidationError, match=r"(?s)top_k.*adapter_dim"):
        PescConfig(top_k=9, adapter_dim=60)


@pytest.mark.parametrize("settings", [{}, {"router": "random"}, {"router": "dense"}, {"control": "single_adapter"}])
def test_a_written_config_reads_back(settings):
    config = PescConfig(**settings)
    assert PescConfig(**config.model_dump()) == config


@pytest.mark.parametrize(("hidden", "dim"), [(4096, 512), (768, 96), (64, 16), (512, 64), (8192, 512), (320, 32)])
def test_auto_dim(hidden, dim):
    assert PescConfig(adapter_dim="auto").dim(hidden) == dim


def test_block_choice():
    assert PescConfig().block_indices(3) == (0, 1, 2)
    assert PescConfig(layers="every-2").block_indices(5) == (1, 3)
    assert PescConfig(layers=[4, 0]).block_indices(5) == (0, 4)
    for settings in ({"layers": [5]}, {"layers": [-1]}, {"layers": "every-6"}):
        with pytest.raises(MethodError, match=r"pesc\.layers"):
            PescConfig(**settings).block_indices(5)


@pytest.mark.parametrize(
    ("size", "added", "lora", "total", "active"),
    [
        ("7b", 1_074_790_400, 159_907_840, 7.813, 7.008),
        ("13b", 1_679_360_000, 250_347_520, 14.695, 13.437),
    ],
)
def test_published_sizes(size, added, lora, total, active):
    """Spec test 20, counted from the config and on a crafted model of the meta device."""
    config, shape = PescConfig(), anatomy.shape_of(llama(size))
    assert sum(config.num_params(shape).values()) == added and config.lora_params(shape) == lora
    assert round((shape.total_params + added) / 1e9, 3) == total
    assert round((shape.total_params + config.num_active_params(shape)) / 1e9, 3) == active
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(llama(size))
    crafted = PESC.craft(model, config, CraftContext())
    counts = {role: sum(p.numel() for _, p in ps) for role, ps in PESC.roles(crafted, config).items()}
    assert counts == config.num_params(shape)
    assert sum(p.numel() for p in crafted.parameters()) == shape.total_params + added


def test_flops_follow_the_formula():
    shape = anatomy.shape_of(llama("7b"))
    ffn = 6 * shape.hidden * shape.ffn_width * shape.layers
    share = PescConfig().flops_per_token(shape) / ffn
    assert share == pytest.approx((4 * 2 * 512 + 2 * 8) / (6 * 11008)) and round(share, 3) == 0.062


@pytest.mark.parametrize("size", LLAMA)
def test_equal_lora_meets_the_budget(size):
    shape, config = anatomy.shape_of(llama(size)), PescConfig(control="equal_lora")
    settings = config.lora_for(shape)
    budget = sum(PescConfig().num_params(shape).values()) + PescConfig().lora_params(shape)
    assert abs(config.lora_params(shape, settings.r) / budget - 1) < 0.005
    assert settings.alpha / settings.r == pytest.approx(16 / 64)
    if size == "7b":
        assert settings.r == 494


def test_equal_lora_without_a_shape_is_told():
    with pytest.raises(MethodError, match=r"equal_lora"):
        PescConfig(control="equal_lora").lora_for(None)


def test_single_adapter_is_as_wide_as_k_experts():
    assert PescConfig(control="single_adapter", top_k=2, adapter_dim=64).expert_sizes(768) == (1, 1, 128, 0.125)


def test_no_lora():
    config = PescConfig(lora=LoraSettings(enabled=False))
    assert config.lora_for(None) is None and config.lora_params(anatomy.shape_of(llama("7b"))) == 0


def test_importing_it_imports_no_torch():
    code = "import sys, sparsmith.methods.pesc.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
