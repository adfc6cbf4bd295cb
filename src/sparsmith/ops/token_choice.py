"""Token choice as sparse models are trained by it: each token takes its k best experts by the softmax over all of them.

Papers: Switch Transformers (arXiv 2101.03961), GShard (2006.16668), as FLAN-MoE (2305.14705) uses them. Differs: nothing is dropped
unless a capacity is asked for; weights are renormalised by default, so that identical experts leave the function as it was.

Shapes: B rows, S tokens per row, T = B*S tokens, E experts, K experts per token.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparsmith.ops.routing import Routing


def route_tokens(logits_TE: Tensor, k: int, combine: str) -> Routing:
    """The k largest probabilities of each token, and the weights by which the experts' outputs are added.

    Args:
        logits_TE: (T, E), float32 or wider.
        combine: `renorm`: p over their sum, so that weights sum to 1; `straight_through` (k 1): p / stop_gradient(p), which is 1
            forward and passes the gradient of p; `switch`: p itself.
    """
    p_TE = logits_TE.softmax(dim=-1)
    p_TK, indices_TK = p_TE.topk(k, dim=-1)
    if combine == "renorm":
        weights_TK = p_TK / p_TK.sum(dim=-1, keepdim=True)
    elif combine == "straight_through":
        weights_TK = p_TK / p_TK.detach()
    else:
        weights_TK = p_TK
    return Routing(logits_TE, indices_TK, weights_TK)


def jitter(x_TD: Tensor, amount: float) -> Tensor:
    """A copy of the router's input times U(1 - amount, 1 + amount), in float32 or wider."""
    wide = x_TD.to(torch.promote_types(x_TD.dtype, torch.float32))
    return wide * torch.empty_like(wide).uniform_(1 - amount, 1 + amount)


def keep_second(weights_TK: Tensor) -> Tensor:
    """(T, K) bool, K >= 2: the second expert of a token is kept with probability min(1, 2 w_2) (GShard §2.2)."""
    kept = torch.ones_like(weights_TK, dtype=torch.bool)
    second = weights_TK[:, 1].detach()
    kept[:, 1] = torch.rand_like(second) < 2 * second
    return kept


def capacity_of(factor: float, tokens: int, k: int, num_experts: int) -> int:
    """C = ceil(factor * k * S / E), slots of one expert in a row of S tokens."""
    return math.ceil(factor * k * tokens / num_experts)


def within_capacity(
    indices_TK: Tensor, num_experts: int, rows: int, capacity: int, wanted_TK: Tensor | None = None
) -> Tensor:
    """(T, K) bool: the slots that an expert has room for. In each row the first choices of all tokens come before all second choices, and
    inside a choice the tokens from left to right.

    Args:
        rows: B; T = B * S.
        capacity: slots of one expert in one row.
        wanted_TK: bool; slots that are False (padding, a second expert that was dropped) take no room.
    """
    k = indices_TK.shape[-1]
    # (B, K * S): the order in which slots are served
    queue_BN = indices_TK.view(rows, -1, k).transpose(1, 2).reshape(rows, -1)
    hot_BNE = queue_BN[..., None] == torch.arange(num_experts, device=indices_TK.device)
    if wanted_TK is not None:
        hot_BNE &= wanted_TK.view(rows, -1, k).transpose(1, 2).reshape(rows, -1)[..., None]
    place_BN = (hot_BNE.cumsum(dim=1) * hot_BNE).sum(dim=-1)  # from 1; 0 where nothing is wanted
    fits_BN = (place_BN > 0) & (place_BN <= capacity)
    return fits_BN.view(rows, k, -1).transpose(1, 2).reshape(-1, k)
