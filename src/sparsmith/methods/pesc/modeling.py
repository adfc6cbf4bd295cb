"""A dense causal LM whose FFNs carry experts, as a transformers model of its own `model_type`.

The dense model is the child `base`, its config is nested under `base_config`; forward and generate are the base's own. A plain loader
that does not know `sparsmith_pesc` refuses the checkpoint, instead of dropping the experts in silence.

This file is part of full checkpoints: it imports torch, `layers.py` and `wrapped.py` only.
"""

from __future__ import annotations

from typing import Any

import torch

from sparsmith.methods.pesc.layers import PescFFN, PescSettings
from sparsmith.methods.wrapped import RoutedForCausalLM, WrappedConfig
from sparsmith.ops.route_context import RouteContext


class SparsmithPescConfig(WrappedConfig):
    """The base's config, nested and whole, and the resolved settings of the experts (a plain dict)."""

    model_type = "sparsmith_pesc"

    def __init__(self, base_config: Any = None, pesc: dict[str, Any] | None = None, **kwargs: Any) -> None:
        self.pesc = dict(pesc or {})
        super().__init__(base_config, **kwargs)


class SparsmithPescForCausalLM(RoutedForCausalLM):
    """The crafted model. Build it by `sparsmith.craft`, or load it through `AutoModelForCausalLM`."""

    config_class = SparsmithPescConfig
    _keep_in_fp32_modules_strict = {"pesc"}
    settings: PescSettings
    route_context: RouteContext

    def refit(self, base: Any) -> None:
        self.settings = PescSettings.from_dict(self.config.pesc)
        self.route_context = RouteContext()
        graft(base, self.settings, self.route_context)
        self.open_with_decoder(base, self.route_context)

    @property
    def blocks(self) -> str:
        return self.settings.blocks

    def initialize_weights(self) -> None:
        """Experts start neutral (U = 0) wherever they are made; a base that was handed in keeps its weights."""
        for module in self.modules():
            if isinstance(module, PescFFN):
                adapters = module.pesc
                if not all(getattr(p, "_is_hf_initialized", False) for p in adapters.parameters()):
                    adapters.reset(module.layer)
                for part in adapters.modules():
                    part._is_hf_initialized = True  # type: ignore[assignment]
        super().initialize_weights()

    def forward(self, *args: Any, labels: torch.Tensor | None = None, **kwargs: Any):
        """As the base. With `labels` while training, the loss holds the weighted routing losses too."""
        output = self.base(*args, labels=labels, **kwargs)
        if labels is not None and self.training and output.loss is not None:
            losses = self.route_context.losses(self.settings.balance_norm)
            weights = {"balance": self.settings.balance_alpha, "router_z": self.settings.router_z_coef}
            for name, value in losses.items():
                if weights[name] and self.settings.router_trainable:
                    output.loss = output.loss + weights[name] * value.to(output.loss.device)
        return output


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
