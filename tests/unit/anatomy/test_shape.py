"""Counts from a config alone equal built models to the unit."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from sparsmith import anatomy
from tests.kit.pico import FAMILIES, pico_config, pico_model

CHANGES = {
    "llama": [{"attention_bias": True, "mlp_bias": True}, {"head_dim": 24}],
    "qwen3": [{"attention_bias": True}],
    "gemma2": [{"attention_bias": True}],
    "olmo2": [{"attention_bias": True}],
    "gpt_neox": [{"attention_bias": False}],
    "gpt2": [{"n_inner": None}],
}
CASES = [(f, c) for f in FAMILIES for c in [{}, {"tie_word_embeddings": f not in ("gemma2", "gemma3_text", "gpt2")}]]
CASES += [(f, c) for f, changes in CHANGES.items() for c in changes]


def parameters(model, *names):
    return sum(p.numel() for n, p in model.named_parameters() if any(part in n for part in names))


@pytest.mark.parametrize(("family", "changes"), CASES)
def test_counts(family, changes):
    model, shape = pico_model(family, **changes), anatomy.shape_of(pico_config(family, **changes))
    assert shape.total_params == sum(p.numel() for p in model.parameters())
    row = anatomy.of(model.config)
    assert shape.ffn_params == sum(
        p.numel() for b in anatomy.blocks(model) for p in anatomy.ffn_of(b, row).parameters()
    )
    attention = sum(p.numel() for b in anatomy.blocks(model) for p in anatomy.attention_of(b, row).parameters())
    norms_inside = parameters(model, "q_norm", "k_norm")
    assert shape.attention_params == attention - norms_inside
    assert shape.embedding_params == parameters(model, "embed", "wte", "wpe")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_of_a_block_is_named_with_its_size(family):
    model, shape = pico_model(family), anatomy.shape_of(pico_config(family))
    row = anatomy.of(model.config)
    block = anatomy.blocks(model)[0]
    for name, (inputs, outputs) in shape.linears.items():
        module = block.get_submodule(name)
        size = (inputs, outputs) if row.conv1d else (outputs, inputs)
        assert tuple(module.weight.shape) == size, name
        assert (getattr(module, "bias", None) is not None) == (name in shape.biases), name
    linears = [m for m in block.modules() if isinstance(m, torch.nn.Linear) or type(m).__name__ == "Conv1D"]
    assert len(linears) == len(shape.linears)


def test_a_7b_on_the_meta_device():
    config = AutoConfig.for_model("llama")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shape = anatomy.shape_of(config)
    assert shape.total_params == sum(p.numel() for p in model.parameters()) == 6_738_415_616


SPARSE = {
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": ("qwen2_moe", {"num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 48}),
    "qwen2_moe, no biases": (
        "qwen2_moe",
        {"num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 0, "qkv_bias": False},
    ),
    "qwen2_moe, every second": ("qwen2_moe", {"num_experts": 4, "decoder_sparse_step": 2, "num_experts_per_tok": 1}),
    "qwen3_moe": ("qwen3_moe", {"num_experts": 8, "moe_intermediate_size": 32, "head_dim": 16, "mlp_only_layers": [1]}),
    "flex_olmo": ("flex_olmo", {"num_experts": 4, "num_experts_per_tok": 3}),
}


@pytest.mark.parametrize("name", SPARSE)
def test_counts_of_mixtures(name):
    family, changes = SPARSE[name]
    common = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = AutoConfig.for_model(
        family,
        **{**common, "num_key_value_heads": 2, "vocab_size": 128, "pad_token_id": 0, "eos_token_id": 2, **changes},
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    row, shape = anatomy.of(config), anatomy.shape_of(config)
    assert shape.total_params == sum(p.numel() for p in model.parameters())
    sparse = shape.sparse
    ffns = [anatomy.ffn_of(block, row) for block in anatomy.blocks(model)]
    assert sparse.blocks == tuple(index for index, ffn in enumerate(ffns) if hasattr(ffn, row.experts))
    mixed = [ffns[index] for index in sparse.blocks]
    assert sparse.total_params == sum(p.numel() for ffn in mixed for p in ffn.parameters())
    assert sparse.router_params == sum(p.numel() for ffn in mixed for p in getattr(ffn, row.router).parameters())
    assert sparse.expert_params == sum(p.numel() for ffn in mixed for p in getattr(ffn, row.experts).parameters())
    per_expert = sparse.expert_params // len(mixed) // sparse.experts
    assert sparse.inactive_params == len(mixed) * per_expert * (sparse.experts - config.num_experts_per_tok)
    assert shape.ffn_params == sum(
        p.numel() for i, f in enumerate(ffns) if i not in sparse.blocks for p in f.parameters()
    )
    assert anatomy.is_sparse(config)
