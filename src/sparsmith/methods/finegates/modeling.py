"""A causal LM whose blocks differ in width, as a transformers model of its own `model_type`.

The model of the family is the child `base`, built from `base_config` at full width and then narrowed block by block; forward and generate
are the base's own. A plain loader that does not know `sparsmith_slim` refuses the checkpoint, instead of reading it into wrong shapes.

`slim.per_layer_config` holds, for every block, `intermediate_size`, `num_attention_heads`, `num_key_value_heads`, and `attention` and
`ffn`: False where that half is left out. The list lies in a dictionary of its own because transformers 5.23 keeps the top-level name for
overrides that its own Llama classes cannot load.

This file is part of full checkpoints: it imports torch and transformers only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel

# copied from the base's config, because trainers and servers read them on the outer one
_SHARED = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


class SparsmithSlimConfig(PreTrainedConfig):
    """The base's config, nested and whole, and the sizes of every block (`slim`, a plain dict)."""

    model_type = "sparsmith_slim"
    sub_configs = {"base_config": AutoConfig}
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(self, base_config: Any = None, slim: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if isinstance(base_config, dict):
            values = dict(base_config)
            base_config = AutoConfig.for_model(values.pop("model_type"), **values)
        self.base_config = base_config
        self.slim = dict(slim or {})
        if base_config is not None:
            for name in (*_SHARED, *_TOKENS, "use_cache"):
                if hasattr(base_config, name):
                    kwargs[name] = getattr(base_config, name)
            # the outer model hands its attention implementation down when it is built
            kwargs.setdefault("attn_implementation", base_config._attn_implementation)
        kwargs["tie_word_embeddings"] = False  # tying is the base's own affair
        super().__init__(**kwargs)

    def get_text_config(self, *args: Any, **kwargs: Any) -> Any:
        """The base's, so that caches and generation see its layers."""
        return self if self.base_config is None else self.base_config.get_text_config(*args, **kwargs)


class SparsmithSlimForCausalLM(PreTrainedModel, GenerationMixin):
    """The narrowed model. Settling makes it, or `AutoModelForCausalLM` loads it."""

    config_class = SparsmithSlimConfig
    base_model_prefix = "base"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    base: Any

    def __init__(self, config: SparsmithSlimConfig, base: Any = None) -> None:
        handed_in = base is not None
        if base is None:
            wanted = {} if config._attn_implementation is None else {"attn_implementation": config._attn_implementation}
            base = AutoModelForCausalLM.from_config(config.base_config, dtype=config.dtype, **wanted)
        # the base has chosen what its family supports; asking for another would be refused or ignored
        config._attn_implementation_internal = base.config._attn_implementation
        super().__init__(config)
        self._handed_in = handed_in
        narrow(base, config.slim)
        self.base = base
        self.generation_config = base.generation_config
        self.post_init()

    def initialize_weights(self) -> None:
        """A base that was handed in keeps its weights."""
        if not self._handed_in:
            super().initialize_weights()

    def get_input_embeddings(self) -> nn.Module:
        return self.base.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.base.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.base.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.base.set_output_embeddings(value)

    def get_decoder(self) -> nn.Module:
        return getattr(self.base, self.config.slim["blocks"].split(".")[0])

    def forward(self, *args: Any, **kwargs: Any):
        """As the base."""
        return self.base(*args, **kwargs)

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return self.base.prepare_inputs_for_generation(*args, **kwargs)

    @torch.no_grad()
    def generate(self, *args: Any, **kwargs: Any):
        """The base's own generate, with this model's generation settings."""
        self.base.generation_config = self.generation_config
        return self.base.generate(*args, **kwargs)


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
