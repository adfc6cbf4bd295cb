"""A dense causal LM whose FFNs carry experts, as a transformers model of its own `model_type`.

The dense model is the child `base`, its config is nested under `base_config`; forward and generate are the base's own. A plain loader
that does not know `sparsmith_pesc` refuses the checkpoint, instead of dropping the experts in silence.

This file is part of full checkpoints: it imports torch, transformers and `layers.py` only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel

from sparsmith.methods.pesc.layers import PescFFN, PescSettings, RouteContext

# copied from the base's config, because trainers and servers read them on the outer one
_SHARED = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


class SparsmithPescConfig(PreTrainedConfig):
    """The base's config, nested and whole, and the resolved settings of the experts (a plain dict)."""

    model_type = "sparsmith_pesc"
    sub_configs = {"base_config": AutoConfig}
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(self, base_config: Any = None, pesc: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if isinstance(base_config, dict):
            values = dict(base_config)
            base_config = AutoConfig.for_model(values.pop("model_type"), **values)
        self.base_config = base_config
        self.pesc = dict(pesc or {})
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


class SparsmithPescForCausalLM(PreTrainedModel, GenerationMixin):
    """The crafted model. Build it by `sparsmith.craft`, or load it through `AutoModelForCausalLM`."""

    config_class = SparsmithPescConfig
    base_model_prefix = "base"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _keep_in_fp32_modules_strict = {"pesc"}
    base: Any
    settings: PescSettings
    route_context: RouteContext

    def __init__(self, config: SparsmithPescConfig, base: Any = None) -> None:
        grafting = base is not None
        if base is None:
            wanted = {} if config._attn_implementation is None else {"attn_implementation": config._attn_implementation}
            base = AutoModelForCausalLM.from_config(config.base_config, dtype=config.dtype, **wanted)
        # the base has chosen what its family supports; asking for another would be refused or ignored
        config._attn_implementation_internal = base.config._attn_implementation
        super().__init__(config)
        self._grafting = grafting
        self.settings = PescSettings.from_dict(config.pesc)
        self.route_context = RouteContext()
        graft(base, self.settings, self.route_context)
        self.base = base
        self.generation_config = base.generation_config
        decoder = getattr(base, self.settings.blocks.split(".")[0])
        decoder.register_forward_pre_hook(_Opener(self.route_context), with_kwargs=True)
        self.post_init()

    def initialize_weights(self) -> None:
        """Experts start neutral (U = 0) wherever they are made; a base that was handed in keeps its weights."""
        for module in self.modules():
            if isinstance(module, PescFFN):
                adapters = module.pesc
                if not all(getattr(p, "_is_hf_initialized", False) for p in adapters.parameters()):
                    adapters.reset(module.layer)
                for part in adapters.modules():
                    part._is_hf_initialized = True  # type: ignore[assignment]
        if not self._grafting:
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
        return getattr(self.base, self.settings.blocks.split(".")[0])

    def _set_gradient_checkpointing(  # type: ignore[override]
        self, enable: bool = True, gradient_checkpointing_func: Any = None, **kwargs: Any
    ) -> None:
        """Non-reentrant only: the reentrant form cuts the gradient of the routing losses."""
        if enable and getattr(gradient_checkpointing_func, "keywords", {}).get("use_reentrant"):
            raise ValueError("PESC needs gradient checkpointing with use_reentrant=False.")
        if gradient_checkpointing_func is not None:
            kwargs["gradient_checkpointing_func"] = gradient_checkpointing_func
        super()._set_gradient_checkpointing(enable=enable, **kwargs)

    def forward(self, *args: Any, labels: torch.Tensor | None = None, **kwargs: Any):
        """As the base. With `labels` while training, the loss holds the weighted routing losses too."""
        output = self.base(*args, labels=labels, **kwargs)
        if labels is not None and self.training and output.loss is not None:
            losses = self.route_context.losses(self.settings)
            weights = {"balance": self.settings.balance_alpha, "router_z": self.settings.router_z_coef}
            for name, value in losses.items():
                if weights[name] and self.settings.router_trainable:
                    output.loss = output.loss + weights[name] * value.to(output.loss.device)
        return output

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return self.base.prepare_inputs_for_generation(*args, **kwargs)

    @torch.no_grad()
    def generate(self, *args: Any, **kwargs: Any):
        """The base's own generate, with this model's generation settings."""
        self.base.generation_config = self.generation_config
        return self.base.generate(*args, **kwargs)


class _Opener:
    """Opens the route context when the decoder is called, by whichever way (model, generate, a loss that calls the decoder alone)."""

    def __init__(self, context: RouteContext) -> None:
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


def graft(base: Any, settings: PescSettings, context: RouteContext) -> None:
    """Put a `PescFFN` around the FFN of every chosen block of `base`, in place."""
    blocks: Any = base
    for step in settings.blocks.split("."):
        blocks = getattr(blocks, step)
    hidden = base.config.hidden_size
    for layer in settings.layers:
        ffn = getattr(blocks[layer], settings.ffn)
        wrapped = PescFFN(ffn, settings, layer, hidden, context)
        wrapped.train(ffn.training)
        setattr(blocks[layer], settings.ffn, wrapped)
