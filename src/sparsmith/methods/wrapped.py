"""A causal LM inside another: what the model types of our own share. The dense model is the child `base`, its config is nested under
`base_config`; forward and generate are the base's own.

This file is part of full checkpoints: it imports torch and transformers only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel

# copied from the base's config, because trainers and servers read them on the outer one
_SHARED = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


class WrappedConfig(PreTrainedConfig):
    """The base's config, nested and whole."""

    sub_configs = {"base_config": AutoConfig}
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(self, base_config: Any = None, **kwargs: Any) -> None:
        if isinstance(base_config, dict):
            values = dict(base_config)
            base_config = AutoConfig.for_model(values.pop("model_type"), **values)
        self.base_config = base_config
        if base_config is not None:
            for name in (*_SHARED, *_TOKENS, "use_cache"):
                if hasattr(base_config, name):
                    kwargs[name] = getattr(base_config, name)
            # the outer model hands its attention implementation down when it is built
            kwargs.setdefault("attn_implementation", base_config._attn_implementation)
        kwargs["tie_word_embeddings"] = False  # tying is the base's own affair
        experts = getattr(base_config, "_experts_implementation", None)
        super().__init__(**kwargs)
        if experts is not None:  # the outer model has none of its own, and its config has just said so to the base's
            base_config._experts_implementation = experts

    def get_text_config(self, *args: Any, **kwargs: Any) -> Any:
        """The base's, so that caches and generation see its layers."""
        return self if self.base_config is None else self.base_config.get_text_config(*args, **kwargs)


class WrappedForCausalLM(PreTrainedModel, GenerationMixin):
    """The outer model. A subclass changes the base in `refit`, and says by `blocks` where its blocks are."""

    base_model_prefix = "base"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    base: Any

    def __init__(self, config: Any, base: Any = None) -> None:
        handed_in = base is not None
        if base is None:
            wanted = {} if config._attn_implementation is None else {"attn_implementation": config._attn_implementation}
            base = AutoModelForCausalLM.from_config(config.base_config, dtype=config.dtype, **wanted)
        # the base has chosen what its family supports; asking for another would be refused or ignored
        config._attn_implementation_internal = base.config._attn_implementation
        super().__init__(config)
        self._handed_in = handed_in
        self.refit(base)
        self.base = base
        self.generation_config = base.generation_config
        self.post_init()

    def refit(self, base: Any) -> None:
        """Change the base's structure, in place, as the config says."""
        raise NotImplementedError

    @property
    def blocks(self) -> str:
        """Dotted path of the blocks in the base."""
        raise NotImplementedError

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
        return getattr(self.base, self.blocks.split(".")[0])

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


class Opener:
    """A hook before the decoder's forward that opens a route context, by whichever way the decoder is called (model, generate, a loss
    that calls it alone)."""

    def __init__(self, context: Any) -> None:
        self.context = context

    def __call__(self, decoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        embeds = kwargs.get("inputs_embeds")
        given = ids if ids is not None else embeds
        if given is None:
            return
        cache = kwargs.get("past_key_values")
        past = int(cache.get_seq_length()) if cache is not None else 0
        self.context.begin(ids, kwargs.get("attention_mask"), kwargs.get("position_ids"), tuple(given.shape[:2]), past)


class RoutedForCausalLM(WrappedForCausalLM):
    """An outer model whose blocks route tokens, and share a context that is opened for every forward."""

    def open_with_decoder(self, base: Any, context: Any) -> None:
        """Open `context` whenever the base's decoder is called."""
        decoder = getattr(base, self.blocks.split(".")[0])
        decoder.register_forward_pre_hook(Opener(context), with_kwargs=True)

    def _set_gradient_checkpointing(  # type: ignore[override]
        self, enable: bool = True, gradient_checkpointing_func: Any = None, **kwargs: Any
    ) -> None:
        """Non-reentrant only: the reentrant form cuts the gradient of the routing losses."""
        if enable and getattr(gradient_checkpointing_func, "keywords", {}).get("use_reentrant"):
            raise ValueError(f"{type(self).__name__} needs gradient checkpointing with use_reentrant=False.")
        if gradient_checkpointing_func is not None:
            kwargs["gradient_checkpointing_func"] = gradient_checkpointing_func
        super()._set_gradient_checkpointing(enable=enable, **kwargs)
