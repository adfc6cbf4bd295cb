"""Routing: which experts a token takes, and with which gates.

Paper: PESC (arXiv 2401.02731), Eq 7-9: z = x W_r^T, I = top-k(z), g = softmax(z_I). No noise, no capacity, nothing is dropped.
Differs: gates are float32 whatever the model's number type; equal logits take the lowest index; k = 1 can pass a straight-through
gate, because a softmax over one logit is the constant 1 and never trains the router.

Shapes: T tokens, E experts, K experts per token.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Routing(NamedTuple):
    """What a router decided."""

    logits: Tensor | None
    """(T, E) float32; None where no router was asked (random, hash, dense)."""
    indices: Tensor
    """(T, K) int64, distinct in a row."""
    gates: Tensor
    """(T, K) float32, in [0, 1], rows sum to 1."""


def top_k(scores_TE: Tensor, k: int) -> Tensor:
    """(T, K) indices of the k largest, largest first; equal scores take the lowest index (`torch.topk` promises no order)."""
    return scores_TE.sort(dim=-1, descending=True, stable=True).indices[:, :k]


def route_learned(logits_TE: Tensor, k: int, *, straight_through: bool = True) -> Routing:
    """Gates are the softmax over the k chosen logits.

    k = 1 with `straight_through`: gate p / stop_gradient(p) with p the softmax over all logits; exactly 1 forward, while the
    gradient of the loss reaches the router.
    """
    indices_TK = top_k(logits_TE.detach(), k)
    if k == 1 and straight_through:
        p_TK = logits_TE.softmax(dim=-1).gather(-1, indices_TK)
        return Routing(logits_TE, indices_TK, p_TK / p_TK.detach())
    return Routing(logits_TE, indices_TK, logits_TE.gather(-1, indices_TK).softmax(dim=-1))


def _scramble(x):
    """A bijection of 32-bit words (an int, or int64 tensor; products stay below 2**63), so that near inputs look unrelated."""
    for factor in (0x7FEB352D, 0x046CA68B):
        x = ((x ^ (x >> 16)) * factor) & 0xFFFFFFFF
    return x ^ (x >> 15)


def equal_gates(indices_TK: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """(T, K) gates 1/K."""
    return torch.full(indices_TK.shape, 1 / indices_TK.shape[1], dtype=dtype, device=indices_TK.device)


def route_hashed(
    keys_T: Tensor, k: int, num_experts: int, *, seed: int, layer: int, dtype: torch.dtype = torch.float32
) -> Routing:
    """k distinct experts, each equally likely, fixed by (key, seed, layer); gates 1/k.

    With positions as keys it is random routing, with token ids hash routing. It holds no state: a recomputed or cached forward takes
    the same experts.
    """
    start = _scramble(_scramble(_scramble(seed & 0xFFFFFFFF) ^ (seed >> 32 & 0xFFFFFFFF)) ^ layer)
    word_T = _scramble((keys_T.reshape(-1) & 0xFFFFFFFF) ^ start)
    experts_E = _scramble(torch.arange(1, num_experts + 1, device=keys_T.device))
    indices_TK = top_k(_scramble(word_T[:, None] ^ experts_E), k)
    return Routing(None, indices_TK, equal_gates(indices_TK, dtype))


def route_dense(
    tokens: int, num_experts: int, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
) -> Routing:
    """Every token takes every expert with gate 1/E."""
    indices_TE = torch.arange(num_experts, device=device).expand(tokens, num_experts)
    return Routing(None, indices_TE, equal_gates(indices_TE, dtype))
