"""Stochastic gates: a clamped Gaussian per unit, its open probability, and the budget that they share.

Paper: FineGates (arXiv 2412.12951) with the formulas of its released code: mu = tanh(l), omega = clamp(mu + eps + 1/2, 0, 1) with
eps ~ N(0, sigma_n^2) while training and eps = 0 otherwise; P(open) = Phi((mu + 1/2) / sigma_r).

Shapes: N gates; l is the trained logit.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

SHIFT = 0.5
"""omega = mu + SHIFT inside the clamp: closed at mu <= -1/2, open at mu >= 1/2."""


def logit_of(mu: float) -> float:
    """l with tanh(l) = mu."""
    return math.atanh(mu)


def gate_values(logit_N: Tensor, noise_N: Tensor | None = None) -> Tensor:
    """(N,) omega in [0, 1]; without noise the value at test time."""
    mean = torch.tanh(logit_N) + SHIFT
    return (mean if noise_N is None else mean + noise_N).clamp(0, 1)


def open_probability(logit_N: Tensor, sigma: float | Tensor) -> Tensor:
    """(N,) Phi((mu + 1/2) / sigma)."""
    return torch.special.ndtr((torch.tanh(logit_N) + SHIFT) / sigma)


def straight_clamp(value_N: Tensor, low: float, high: float) -> Tensor:
    """clamp(value) with the gradient of the identity, so that a value at the edge can come back."""
    return value_N + (value_N.clamp(low, high) - value_N).detach()


def soft_share(values_N: Tensor) -> Tensor:
    """Mean of omega (1 - omega): 0 where every gate is open or closed, 1/4 at most."""
    return (values_N * (1 - values_N)).mean()


def budget_loss(excess: Tensor, dual: Tensor | float, quad: float) -> Tensor:
    """lambda * Delta + quad / 2 * max(Delta, 0)^2 with Delta = expected size - target (augmented Lagrangian)."""
    return dual * excess + 0.5 * quad * excess.clamp(min=0).square()


def dual_step(dual: float, excess: float, rate: float, largest: float) -> float:
    """lambda after one optimiser step: clip(lambda + rate * Delta, 0, largest)."""
    return min(max(dual + rate * excess, 0.0), largest)


def ramp(progress: float, start: float, end: float) -> float:
    """0 up to `start`, 1 from `end` on, linear between; all are fractions of the steps."""
    if progress >= end:
        return 1.0
    return 0.0 if progress <= start else (progress - start) / (end - start)


def paper_penalty(
    rows_R: Tensor,
    columns_C: Tensor,
    share: float,
    sigma: float = 0.5,
    weights: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """L_s of one linear: half of |mean P(rows) - (1 - s)| + |mean P(columns) - (1 - s)|, s the target sparsity.

    Args:
        rows_R, columns_C: logits of the linear's outputs and inputs.
        share: s, in (0, 1).
        sigma: of the open probability.
        weights: (R,) and (C,) that sum to 1, in place of plain means.
    """
    opened = [open_probability(side, sigma) for side in (rows_R, columns_C)]
    means = [p.mean() for p in opened] if weights is None else [(w * p).sum() for w, p in zip(weights, opened)]
    return 0.5 * sum((mean - (1 - share)).abs() for mean in means)  # type: ignore[return-value]


def kurtosis_weights(values_NM: Tensor, temperature: float = 100.0) -> Tensor:
    """(N,) softmax(-sqrt(kurtosis) / temperature), where kurtosis is the fourth standardised moment of each row of M values.

    A row without spread counts as a normal one (3).
    """
    centred = values_NM - values_NM.mean(1, keepdim=True)
    variance = centred.square().mean(1)
    flat = variance <= torch.finfo(variance.dtype).tiny
    kurtosis = centred.pow(4).mean(1) / variance.square().clamp(min=torch.finfo(variance.dtype).tiny)
    return torch.softmax(-torch.where(flat, 3.0, kurtosis).sqrt() / temperature, 0)
