"""Losses and counts that keep a router's experts in use.

Paper: PESC Eq 10 (the Switch loss): L = E * sum_i f_i p_i, p_i the mean over tokens of the softmax over *all* E logits, f_i the share
of dispatched slots, no gradient through f. Differs: padding does not count; the released code takes the softmax over the chosen logits
only, which makes the loss a constant.

Shapes: T tokens, E experts, K experts per token.
"""

from __future__ import annotations

import torch
from torch import Tensor, distributed


def expert_counts(indices_TK: Tensor, num_experts: int, mask_T: Tensor | None = None) -> Tensor:
    """(E,) float32: slots that went to each expert; tokens with mask False do not count."""
    flat = indices_TK.reshape(-1)
    if mask_T is None:
        weight = torch.ones(flat.shape, device=flat.device)
    else:
        weight = mask_T.to(torch.float32)[:, None].expand(indices_TK.shape).reshape(-1)
    # a one-hot sum, because scattered additions are not deterministic on CUDA
    hot = (flat[:, None] == torch.arange(num_experts, device=flat.device)).to(torch.float32)
    return weight @ hot


def masked_mean(values_T: Tensor, mask_T: Tensor | None, tokens: Tensor | None = None) -> Tensor:
    """Mean over the first dimension, over tokens with mask True; 0 where there are none. With `tokens` given, the sum over that number:
    this rank's part of a mean over the tokens of all ranks."""
    if mask_T is None:
        return values_T.mean(dim=0) if tokens is None else values_T.sum(dim=0) / tokens
    weight = mask_T.to(values_T.dtype)
    return (weight @ values_T) / (weight.sum().clamp(min=1) if tokens is None else tokens)


def balance_loss(
    logits_TE: Tensor,
    indices_TK: Tensor,
    mask_T: Tensor | None = None,
    *,
    norm: str = "slots",
    all_counts_E: Tensor | None = None,
) -> Tensor:
    """E * sum_i f_i p_i of one layer, a scalar.

    Args:
        logits_TE: router logits, all E of them.
        indices_TK: the experts taken.
        mask_T: bool, False = padding.
        norm: `slots`: f over T*K slots (1 when uniform, E/k collapsed); `tokens`: f over T tokens (k when uniform, E collapsed).
        all_counts_E: slots per expert over the rows of all ranks. The result is then this rank's part: summed over the ranks, value and
            gradient are those of one process that holds all the rows, because f carries no gradient and p is linear in the tokens.
    """
    num_experts, k = logits_TE.shape[-1], indices_TK.shape[-1]
    counts_E = expert_counts(indices_TK, num_experts, mask_T) if all_counts_E is None else all_counts_E
    tokens = counts_E.sum().clamp(min=1) / k
    p_E = masked_mean(logits_TE.softmax(dim=-1), mask_T, None if all_counts_E is None else tokens)
    counts_E, tokens = counts_E.to(p_E.dtype), tokens.to(p_E.dtype)
    f_E = counts_E / (tokens * k if norm == "slots" else tokens)
    return num_experts * (f_E.detach() * p_E).sum()


def z_loss(logits_TE: Tensor, mask_T: Tensor | None = None, tokens: Tensor | None = None) -> Tensor:
    """Mean over tokens of logsumexp(z)^2: keeps logits small. A scalar; with `tokens` given, this rank's part as in `masked_mean`."""
    return masked_mean(logits_TE.logsumexp(dim=-1) ** 2, mask_T, tokens)


def several_ranks() -> bool:
    """Whether this process is one of several that train together."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def sum_over_ranks(values: Tensor) -> Tensor:
    """The sum of every rank's `values`, without gradient; the tensor itself where there is one process."""
    if not several_ranks():
        return values
    total = values.detach().clone()
    distributed.all_reduce(total)
    return total


def load_entropy(load_E: Tensor) -> Tensor:
    """Entropy of the load over ln E: 1 when every expert has the same share, 0 when one has all. (.., E) -> (..)"""
    share = load_E / load_E.sum(dim=-1, keepdim=True).clamp(min=1e-12)
    logs = share.clamp(min=1e-12).log()
    return -(share * logs).sum(dim=-1) / torch.log(torch.tensor(float(load_E.shape[-1])))
