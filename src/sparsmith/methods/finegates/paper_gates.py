"""The paper layout's modules: a linear between a gate on every input (column) and a gate on every output (row).

    y = omega_r * (W (omega_c * x) + b)

An existing bias is gated with its row, so a closed row is exactly 0; none is created. The linear keeps its own name inside the wrapper, so
a LoRA that is put on it later lies inside both gates and sees the same draw. W itself is untouched and stays a registered parameter.

Shape letters: R outputs (rows of W), C inputs (columns of W), B, S tokens.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn

from sparsmith.methods.finegates.gates import Gate
from sparsmith.methods.finegates.scores import plain_weight
from sparsmith.ops.gates import kurtosis_weights, paper_penalty
from sparsmith.seeds import torch_generator

START, SPREAD = 1.0, 0.1
"""Logits begin at N(START, SPREAD^2): mu near 0.76, so omega = 1 at test time."""
INIT = "finegates.init"


class PaperLinear(nn.Module):
    """y = rows * linear(columns * x).

    Args:
        linear: any linear, quantised or not.
        name: its attribute name, which the wrapper takes over.
        inputs, outputs: C and R.
        stream: (seed, index of this linear), from which the logits are drawn.
    """

    def __init__(self, linear: nn.Module, name: str, inputs: int, outputs: int, stream: tuple[int, int]) -> None:
        super().__init__()
        device = next(linear.parameters()).device
        self.name = name
        self.add_module(name, linear)
        drawn = START + SPREAD * torch.randn(inputs + outputs, generator=torch_generator(stream[0], INIT, stream[1]))
        self.columns = _gate(drawn[:inputs], device)
        self.rows = _gate(drawn[inputs:], device)
        self.register_buffer("input_mean", torch.zeros(inputs, device=device), persistent=False)
        self.watching, self.seen = False, False
        """`watching`: keep the mean input of each training forward; `seen`: there is one."""

    input_mean: Tensor

    @property
    def linear(self) -> nn.Module:
        return cast(nn.Module, self._modules[self.name])

    def forward(self, x_BSC: Tensor) -> Tensor:
        if self.watching and self.training:
            self.input_mean = x_BSC.detach().reshape(-1, x_BSC.shape[-1]).float().mean(0)
            self.seen = True
        y_BSR = self.linear(x_BSC * self.columns.values().to(x_BSC.dtype))
        return y_BSR * self.rows.values().to(y_BSR.dtype)

    def penalty(self, share: float, kurtosis: bool) -> Tensor:
        """Scalar L_s, with a gradient to both gates' logits."""
        weights = self._weights() if kurtosis and self.seen else None
        return paper_penalty(self.rows.logit, self.columns.logit, share, weights=weights)

    @torch.no_grad()
    def _weights(self) -> tuple[Tensor, Tensor]:
        """(R,) and (C,) by the kurtosis of A = mean input * W: heavy-tailed rows and columns count for less."""
        a_RC = plain_weight(self.linear) * self.input_mean
        return kurtosis_weights(a_RC), kurtosis_weights(a_RC.t())


def _gate(logits: Tensor, device: torch.device) -> Gate:
    gate = Gate(len(logits), math.tanh(START), device)
    with torch.no_grad():
        gate.logit.copy_(logits)
    return gate


def paper_linears(model: nn.Module) -> list[tuple[str, PaperLinear]]:
    """(name, module) of every gated linear, in order; none on a settled model."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, PaperLinear)]
