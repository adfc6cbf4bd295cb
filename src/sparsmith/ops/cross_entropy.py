"""Token cross-entropy in float32 that need not hold the logits of a big vocabulary.

Shapes: N tokens, D hidden size, V vocabulary. With `chunk`, logits exist for `chunk` tokens at a time and are computed again in the
backward: memory chunk * V instead of N * V, for one more head product.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

IGNORE = -100
# logits of one piece stay below 64 Mi numbers (256 MiB in float32) in `auto_chunk`
_AUTO_NUMBERS = 2**26


def _losses(logits_fn: Callable[[Tensor], Tensor], hidden_ND: Tensor, labels_N: Tensor) -> Tensor:
    return F.cross_entropy(logits_fn(hidden_ND).float(), labels_N, ignore_index=IGNORE, reduction="none")


def token_cross_entropy(
    logits_fn: Callable[[Tensor], Tensor],
    hidden_ND: Tensor,
    labels_N: Tensor,
    *,
    chunk: int | None = None,
) -> Tensor:
    """-log p(label) of each token, (N,) float32; 0 where the label is -100. The caller sums and divides.

    Args:
        logits_fn: hidden (n, D) -> logits (n, V): the head, with a softcap where the family has one.
        hidden_ND: (N, D), or (B, S, D) with labels (B, S).
        labels_N: already shifted; -100 = no loss.
        chunk: tokens per piece; None = all at once (`auto_chunk` proposes a size).
    """
    hidden_ND, labels_N = hidden_ND.reshape(-1, hidden_ND.shape[-1]), labels_N.reshape(-1)
    tokens = labels_N.shape[0]
    if tokens == 0:
        # an empty batch still reaches the head, so that every parameter has a gradient
        return logits_fn(hidden_ND).float().sum(-1)
    if chunk is None or chunk >= tokens:
        return _losses(logits_fn, hidden_ND, labels_N)
    pieces = []
    for hidden_CD, labels_C in zip(hidden_ND.split(chunk), labels_N.split(chunk), strict=True):
        if torch.is_grad_enabled():
            pieces.append(checkpoint(_losses, logits_fn, hidden_CD, labels_C, use_reentrant=False))
        else:
            pieces.append(_losses(logits_fn, hidden_CD, labels_C))
    return torch.cat(pieces)


def auto_chunk(tokens: int, vocabulary: int) -> int | None:
    """Tokens per piece that keep one piece below 64 Mi logits; None where all fit at once."""
    if tokens * vocabulary <= _AUTO_NUMBERS:
        return None
    return max(1, _AUTO_NUMBERS // vocabulary)
