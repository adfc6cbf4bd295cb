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


def paper_penalty(rows_R: Tensor, columns_C: Tensor, share: float, sigma: float = 0.5) -> Tensor:
    """L_s of one linear: half of |mean P(rows) - (1 - s)| + |mean P(columns) - (1 - s)|, s the target sparsity."""
    parts = [(open_probability(side, sigma).mean() - (1 - share)).abs() for side in (rows_R, columns_C)]
    return 0.5 * (parts[0] + parts[1])
