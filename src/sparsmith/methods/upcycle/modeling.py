"""A mixture whose experts choose their tokens, as a transformers model of its own `model_type`: no stock architecture computes it.

The stock mixture is the child `base`, its config is nested under `base_config`; forward and generate are the base's own. A plain loader
that does not know `sparsmith_ec` refuses the checkpoint, instead of letting the tokens choose in silence.

This file is part of full checkpoints: it imports torch, `expert_choice.py` and `wrapped.py` only.
"""

from __future__ import annotations

from typing import Any

import torch

from sparsmith.methods.upcycle.expert_choice import (
    UNFITTED,
    ChoiceContext,
    ChoiceRouter,
    ChoiceSettings,
    choosers,
    let_experts_choose,
)
from sparsmith.methods.wrapped import RoutedForCausalLM, WrappedConfig


class SparsmithEcConfig(WrappedConfig):
    """The mixture's config, nested and whole, and how its experts choose (`expert_choice`, a plain dict)."""

    model_type = "sparsmith_ec"

    def __init__(self, base_config: Any = None, expert_choice: dict[str, Any] | None = None, **kwargs: Any) -> None:
        self.expert_choice = dict(expert_choice or {})
        super().__init__(base_config, **kwargs)


class SparsmithEcForCausalLM(RoutedForCausalLM):
    """The model. Build it by `sparsmith.craft`, or load it through `AutoModelForCausalLM`."""

    config_class = SparsmithEcConfig
    # thresholds are held against probabilities: rounding a router would move tokens across them
    _keep_in_fp32_modules_strict = {".gate.weight", ".gate.thresholds"}
    settings: ChoiceSettings
    route_context: ChoiceContext

    def refit(self, base: Any) -> None:
        self.settings = ChoiceSettings.from_dict(self.config.expert_choice)
        self.route_context = ChoiceContext()
        let_experts_choose(base, self.settings, self.route_context)
        self.open_with_decoder(base, self.route_context)

    @property
    def blocks(self) -> str:
        return self.settings.blocks

    def initialize_weights(self) -> None:
        """Thresholds that no checkpoint holds are unfitted, so that evaluation refuses them."""
        routers = [] if self._handed_in else [module for module in self.modules() if isinstance(module, ChoiceRouter)]
        for router in routers:
            if not router.thresholds.is_meta and not getattr(router.thresholds, "_is_hf_initialized", False):
                router.thresholds.fill_(UNFITTED)
        super().initialize_weights()

    def forward(self, *args: Any, labels: torch.Tensor | None = None, **kwargs: Any):
        """As the base. With `labels` while training, the loss holds the weighted z-loss of the routers too."""
        output = self.base(*args, labels=labels, **kwargs)
        if labels is not None and self.training and output.loss is not None and self.settings.z_coef:
            for value in self.route_context.losses("tokens").values():
                output.loss = output.loss + self.settings.z_coef * value.to(output.loss.device)
        return output

    def sparse_blocks(self) -> list[tuple[int, Any]]:
        """(index, FFN) of every sparse block."""
        return choosers(self.base, self.settings)
