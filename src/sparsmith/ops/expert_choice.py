"""Expert choice: each expert takes the tokens that suit it best, and a causal rule that stands in for it where nothing may be seen ahead.

Papers: expert choice routing (arXiv 2202.09368); thresholds in its place (arXiv 2603.11535). Differs: a row's capacity counts its own
tokens, so that padding changes nothing; weights are renormalised over a token's takers, and a token that none takes goes to its most
probable expert, so that identical experts leave the function as it was.

Shapes: B rows, S tokens per row, T = B*S tokens, E experts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class TopTokens(NamedTuple):
    """What the experts take of each row."""

    taken: Tensor
    """(T, E) bool; padding is never taken."""
    last: Tensor
    """(B, E) the smallest probability that each expert took in each row; 0 in a row of padding alone."""
    filled: Tensor
    """(B,) bool, False for a row of padding alone."""


def top_tokens(p_TE: Tensor, rows: int, factor: float, mask_T: Tensor | None = None) -> TopTokens:
    """Each expert takes the C = ceil(factor * n / E) most probable tokens of each row, n the row's tokens without padding.

    Equal probabilities go to the earlier token.

    Args:
        p_TE: (T, E) in [0, 1], T = B * S.
        rows: B.
        factor: in (0, E]: experts per token on average.
        mask_T: bool, False = padding.
    """
    experts = p_TE.shape[-1]
    p_BSE = p_TE.detach().view(rows, -1, experts)
    length = p_BSE.shape[1]
    mask_BS = p_BSE.new_ones(rows, length, dtype=torch.bool) if mask_T is None else mask_T.view(rows, length)
    count_B = mask_BS.sum(dim=1)
    slots_B = (factor * count_B.double() / experts).ceil().long()
    ordered = p_BSE.masked_fill(~mask_BS[..., None], -1.0).sort(dim=1, descending=True, stable=True)
    place_S1 = torch.arange(length, device=p_TE.device)[:, None]
    place_BSE = torch.empty_like(ordered.indices).scatter_(1, ordered.indices, place_S1.expand_as(ordered.indices))
    taken_BSE = (place_BSE < slots_B[:, None, None]) & mask_BS[..., None]
    index_B1E = (slots_B - 1).clamp(min=0)[:, None, None].expand(rows, 1, experts)
    last_BE = ordered.values.gather(1, index_B1E)[:, 0].clamp(min=0)
    return TopTokens(taken_BSE.reshape(-1, experts), last_BE, count_B > 0)


def above(p_TE: Tensor, thresholds_E: Tensor) -> Tensor:
    """(T, E) bool: expert e takes a token iff p_e >= tau_e. Each token is judged by itself: causal."""
    return p_TE.detach() >= thresholds_E.to(p_TE.dtype)


def with_a_taker(p_TE: Tensor, taken_TE: Tensor) -> Tensor:
    """(T, E) bool: the takers, and for a token without any its most probable expert."""
    best_TE = torch.zeros_like(taken_TE).scatter_(1, p_TE.detach().argmax(dim=-1, keepdim=True), True)
    return taken_TE | (best_TE & ~taken_TE.any(dim=-1, keepdim=True))


def shares(logits_TE: Tensor, taken_TE: Tensor) -> Tensor:
    """(T, E) combine weights: p over its sum over a token's takers, 0 elsewhere. Every token must have a taker; rows sum to 1."""
    # the softmax over the takers' logits is that quotient, and holds where every p rounds to 0
    return logits_TE.masked_fill(~taken_TE, -torch.inf).softmax(dim=-1)


def row_statistics(top: TopTokens) -> Tensor:
    """(E + 1,) float64: the sum over rows of `last`, and the number of rows that it is over. Sums over micro-batches and ranks add up."""
    filled_B = top.filled.double()
    return torch.cat([filled_B @ top.last.double(), filled_B.sum()[None]])


def followed(thresholds_E: Tensor, statistics: Tensor, ema: float) -> Tensor:
    """The thresholds after a batch: tau <- ema * tau + (1 - ema) * (mean over rows of the smallest probability taken).

    A negative threshold is one that no batch has set yet: it starts as the batch's mean. A batch without rows changes nothing.
    """
    rows = statistics[-1]
    mean_E = (statistics[:-1] / rows.clamp(min=1)).to(thresholds_E.dtype)
    moved_E = torch.where(thresholds_E < 0, mean_E, ema * thresholds_E + (1 - ema) * mean_E)
    return torch.where(rows > 0, moved_E, thresholds_E)


def tally(used_TE: Tensor, other_TE: Tensor | None, first_TE: Tensor, mask_T: Tensor | None) -> Tensor:
    """(5,) float64 counts over tokens that are no padding: tokens; takers of them; tokens that no expert took of itself; (token, expert)
    decisions on which two selections differ; decisions that were compared (0 where there is no other selection).

    Args:
        used_TE: takers that compute. other_TE: takers by the other rule. first_TE: `used_TE` before tokens without a taker got one.
    """
    mask_T = torch.ones_like(used_TE[:, 0]) if mask_T is None else mask_T
    mask_T1 = mask_T[:, None]
    tokens = mask_T.sum()
    differ = torch.zeros_like(tokens) if other_TE is None else ((used_TE != other_TE) & mask_T1).sum()
    compared = torch.zeros_like(tokens) if other_TE is None else tokens * used_TE.shape[-1]
    alone = (~first_TE.any(dim=-1) & mask_T).sum()
    return torch.stack([tokens, (used_TE & mask_T1).sum(), alone, differ, compared]).double()
