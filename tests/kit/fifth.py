"""A fifth method, written in the test folder alone: every FFN gets a learned shift of its output.

It is what a plug-in would be: a config, a class that answers the contract, one `register` call.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn

from sparsmith import anatomy
from sparsmith.methods.base import LossTerm, Method, MethodConfig, MethodPlan, ModuleChange


class ShiftConfig(MethodConfig):
    method: Literal["shift"] = "shift"
    decay: float = 0.01
    """Weight of the loss term mean(shift^2)."""


class ShiftedFFN(nn.Module):
    """ffn(x) + shift, shift = 0 at the start."""

    def __init__(self, ffn: nn.Module, hidden: int) -> None:
        super().__init__()
        self.ffn = ffn
        self.shift = nn.Parameter(torch.zeros(hidden))

    def forward(self, x_BSD: torch.Tensor) -> torch.Tensor:
        return self.ffn(x_BSD) + self.shift.to(x_BSD.dtype)


class ShiftMethod(Method):
    name = "shift"
    title = "Shifted FFN"
    paper = "https://example.org/shift"
    config_class = ShiftConfig

    def plan(self, config: Any, anatomy: Any, shape: Any) -> MethodPlan:
        count = shape.layers * shape.hidden
        return MethodPlan(
            changes=(
                ModuleChange(f"{anatomy.blocks}.{{0..{shape.layers - 1}}}.{anatomy.ffn}", "FFN + shift", shape.layers),
            ),
            added={"shift": count},
            trained={"shift": count},
            flops_forward=count,
        )

    def craft(self, model: Any, config: Any, context: Any) -> Any:
        for block in anatomy.blocks(model):
            ffn = anatomy.ffn_of(block)
            anatomy.set_ffn(block, ShiftedFFN(ffn, model.config.hidden_size))
        return model

    def roles(self, model: Any, config: Any) -> dict[str, list[tuple[str, nn.Parameter]]]:
        return {"shift": [(name, p) for name, p in model.named_parameters() if name.endswith(".shift")]}

    def wanted_roles(self, config: Any) -> tuple[str, ...]:
        return ("shift",)

    def wanted_terms(self, config: Any) -> tuple[str, ...]:
        return ("decay",)

    def loss_terms(self, model: Any, config: Any, batch: Any) -> dict[str, LossTerm]:
        squares = [p.square().mean() for _, p in self.roles(model, config)["shift"]]
        return {"decay": LossTerm(torch.stack(squares).mean(), config.decay)}

    def metrics(self, model: Any, config: Any) -> dict[str, Any]:
        norms = [p.norm().item() for _, p in self.roles(model, config)["shift"]]
        return {"norm": sum(norms), "table/norms": norms}

    def health(self, metrics: Any) -> str:
        return f"shift {metrics['norm']:.3f}"


SHIFT = ShiftMethod()
