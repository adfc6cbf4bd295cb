"""A causal LM whose blocks differ in width, as a transformers model of its own `model_type`.

The model of the family is the child `base`, built from `base_config` at full width and then narrowed block by block; forward and generate
are the base's own. A plain loader that does not know `sparsmith_slim` refuses the checkpoint, instead of reading it into wrong shapes.

`slim.per_layer_config` holds, for every block, `intermediate_size`, `num_attention_heads`, `num_key_value_heads`, and `attention` and
`ffn`: False where that half is left out. The list lies in a dictionary of its own because transformers 5.23 keeps the top-level name for
overrides that its own Llama classes cannot load.

This file is part of full checkpoints: it imports torch and `wrapped.py` only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sparsmith.methods.wrapped import WrappedConfig, WrappedForCausalLM


class SparsmithSlimConfig(WrappedConfig):
    """The base's config, nested and whole, and the sizes of every block (`slim`, a plain dict)."""

    model_type = "sparsmith_slim"

    def __init__(self, base_config: Any = None, slim: dict[str, Any] | None = None, **kwargs: Any) -> None:
        self.slim = dict(slim or {})
        super().__init__(base_config, **kwargs)


class SparsmithSlimForCausalLM(WrappedForCausalLM):
    """The narrowed model. Settling makes it, or `AutoModelForCausalLM` loads it."""

    config_class = SparsmithSlimConfig

    def refit(self, base: Any) -> None:
        narrow(base, self.config.slim)

    @property
    def blocks(self) -> str:
        return self.config.slim["blocks"]


class NoAttention(nn.Module):
    """In the place of an attention that was cut away: adds nothing.

    The cache gets one zero per token, so that the lengths and masks that are read off block 0 stay right.
    """

    def __init__(self, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        cache = kwargs.get("past_key_values", kwargs.get("layer_past"))
        if cache is not None:
            rows, tokens = hidden_states.shape[:2]
            token = hidden_states.new_zeros((rows, 1, tokens, 1))
            cache.update(token, token, self.layer_idx)
        return torch.zeros_like(hidden_states), None


class NoFFN(nn.Module):
    """In the place of an FFN that was cut away: adds nothing."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return torch.zeros_like(hidden_states)


class LayerConfig:
    """A model's config with a block's own head counts, for attention modules that read them from the config.

    Everything else is read from the shared config at the time, so that a change of the attention kernel reaches every block.
    """

    def __init__(self, shared: Any, heads: int, groups: int) -> None:
        self.shared, self.num_attention_heads, self.num_key_value_heads = shared, heads, groups

    def __getattr__(self, name: str) -> Any:
        if name == "shared" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.shared, name)


def narrow(base: Any, slim: dict[str, Any]) -> None:
    """Make every block of `base` as narrow as `slim` says, in place. What is as narrow already stays as it is."""
    blocks = base
    for step in slim["blocks"].split("."):
        blocks = getattr(blocks, step)
    for index, (block, sizes) in enumerate(zip(blocks, slim["per_layer_config"], strict=True)):
        if not sizes["attention"]:
            if not isinstance(getattr(block, slim["attention"]), NoAttention):
                setattr(block, slim["attention"], NoAttention(index))
        else:
            _narrow_attention(getattr(block, slim["attention"]), slim, sizes)
        if not sizes["ffn"]:
            setattr(block, slim["ffn"], NoFFN())
        else:
            _narrow_ffn(getattr(block, slim["ffn"]), slim, sizes["intermediate_size"])


def _narrow_attention(attention: Any, slim: dict[str, Any], sizes: dict[str, Any]) -> None:
    heads, groups, width = sizes["num_attention_heads"], sizes["num_key_value_heads"], slim["head_dim"]
    *inward, outward = slim["attention_linears"]
    split = (heads * width, groups * width, groups * width)
    for name, size in zip(inward, split if len(inward) == 3 else (sum(split),)):
        resize(getattr(attention, name), None, size)
    resize(getattr(attention, outward), heads * width, None)
    set_heads(attention, heads, groups)


def _narrow_ffn(ffn: Any, slim: dict[str, Any], width: int) -> None:
    *inward, outward = slim["ffn_linears"]
    for name in inward:
        resize(getattr(ffn, name), None, 2 * width if slim["fused"] else width)
    resize(getattr(ffn, outward), width, None)
    if hasattr(ffn, "intermediate_size"):
        ffn.intermediate_size = width


def resize(linear: Any, inputs: int | None, outputs: int | None) -> None:
    """Leave a linear (or GPT-2's Conv1D, which holds its weight transposed) this many inputs and outputs; None = as many as it has."""
    transposed = hasattr(linear, "nf")
    rows, columns = (inputs, outputs) if transposed else (outputs, inputs)
    weight = linear.weight[:rows, :columns]
    if weight.shape != linear.weight.shape:
        linear.weight = nn.Parameter(weight.detach().clone(), requires_grad=linear.weight.requires_grad)
        if linear.bias is not None and outputs is not None:
            linear.bias = nn.Parameter(linear.bias[:outputs].detach().clone(), requires_grad=linear.bias.requires_grad)
    for name, size in (
        (("nx", inputs), ("nf", outputs)) if transposed else (("in_features", inputs), ("out_features", outputs))
    ):
        if size is not None:
            setattr(linear, name, size)


def set_heads(attention: Any, heads: int, groups: int) -> None:
    """The counts that an attention module keeps as attributes, and those that it reads from its config."""
    for name, value in (
        ("num_heads", heads),
        ("num_key_value_heads", groups),
        ("num_key_value_groups", heads // groups),
    ):
        if hasattr(attention, name):
            setattr(attention, name, value)
    config = getattr(attention, "config", None)
    if config is not None and config.num_attention_heads != heads:
        attention.config = LayerConfig(getattr(config, "shared", config), heads, groups)
