"""Speculative sampling: a draft's tokens are kept or replaced so that what comes out follows the target's law exactly.

Paper: Leviathan, Kalman, Matias (arXiv 2211.17192) §2.3 and App. A.1. With draft token x ~ q: keep it with probability
min(1, p(x)/q(x)), else draw from (p - q)+ / sum (p - q)+.  P(x) = q min(1, p/q) + (1 - sum min(p, q)) (p - q)+ / sum (p - q)+ = p.

Shapes: any leading dimensions `...`, V vocabulary. Probabilities are >= 0 and sum to 1 over V; uniforms are in [0, 1).
"""

from __future__ import annotations

import torch
from torch import Tensor


def draw(probs: Tensor, uniform: Tensor) -> Tensor:
    """(...,) one token per distribution (..., V): the first whose cumulative probability exceeds `uniform` (...,).

    Sums in float64, so that a token of probability 0 is never drawn and a vocabulary of 10^5 loses nothing."""
    rising = probs.double().cumsum(dim=-1)
    wanted = uniform.double().unsqueeze(-1) * rising[..., -1:]
    found = torch.searchsorted(rising, wanted.contiguous(), right=True).squeeze(-1)
    return found.clamp(max=probs.shape[-1] - 1)


def accepted(target: Tensor, draft: Tensor, tokens: Tensor, uniform: Tensor) -> Tensor:
    """(...,) bool: which draft tokens (...,), drawn from `draft` (..., V), stand under `target` (..., V)."""
    index = tokens.unsqueeze(-1)
    p, q = target.gather(-1, index).squeeze(-1), draft.gather(-1, index).squeeze(-1)
    return uniform.to(p.dtype) * q < p


def residual(target: Tensor, draft: Tensor) -> Tensor:
    """(..., V) the law of the token that takes a rejected one's place; the target's own where the two agree to rounding."""
    rest = (target - draft).clamp(min=0)
    total = rest.sum(dim=-1, keepdim=True)
    return torch.where(total > 0, rest / total, target)


def accept_or_resample(
    target: Tensor, draft: Tensor, tokens: Tensor, uniform: Tensor, redraw: Tensor
) -> tuple[Tensor, Tensor]:
    """(tokens that come out (...,), which drafts were kept (...,) bool), from two uniforms (...,) each."""
    kept = accepted(target, draft, tokens, uniform)
    return torch.where(kept, tokens, draw(residual(target, draft), redraw)), kept


def agreeing_prefix(agree: Tensor) -> Tensor:
    """(B,) how many leading entries of (B, K) bool are True."""
    return agree.long().cumprod(dim=-1).sum(dim=-1)
