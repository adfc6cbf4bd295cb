"""How well a sequence classifier does on a set: the cross-entropy over its classes, and whether the likeliest is the right one, row by row.

Shape letters: B rows, S tokens, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsmith.bootstrap import RowScores
from sparsmith.errors import DataError, ProofError
from sparsmith.evaluating.batching import BATCH_TOKENS, by_length, evaluation_mode, pad, pad_mask
from sparsmith.evaluating.rows import require_rows, row_name
from sparsmith.methods.base import Batch

if TYPE_CHECKING:
    from sparsmith.data import EvalSet


def class_scores(
    model: nn.Module,
    eval_set: EvalSet,
    *,
    batch_tokens: int = BATCH_TOKENS,
    on_batch: Callable[[Batch], None] | None = None,
    domains: Sequence[str] = (),
) -> dict[str, RowScores]:
    """`loss` (nats) and `accuracy` of every row; each row weighs 1.

    Args:
        model: a sequence classifier; left in the mode it was in.
        eval_set: rows with `input_ids` and `label`.
        batch_tokens, on_batch, domains: as for the held-out loss.

    Raises:
        DataError: rows without a class. ProofError: the loss of a row is not finite; the row is named.
    """
    labels_N = torch.tensor([_label(eval_set, index) for index in range(len(eval_set.rows))])
    logits_NC = class_logits(model, eval_set, batch_tokens=batch_tokens, on_batch=on_batch, domains=domains)
    loss_N = F.cross_entropy(logits_NC, labels_N, reduction="none")
    for index in torch.nonzero(~torch.isfinite(loss_N)).flatten().tolist()[:1]:
        raise ProofError(
            row_name(eval_set, index),
            f"a held-out loss of {loss_N[index].item()}",
            "a finite loss",
            "The model's weights or activations are not finite on this row; look at the last training steps.",
        )
    hits_N = logits_NC.argmax(-1).eq(labels_N)
    ones = (1.0,) * len(labels_N)
    return {
        "loss": RowScores(tuple(loss_N.tolist()), ones),
        "accuracy": RowScores(tuple(hits_N.double().tolist()), ones),
    }


def pooled_scores(model: nn.Module, sets: Iterable[EvalSet], **options: Any) -> dict[str, float]:
    """Mean `accuracy` and `loss` over the rows of all sets together. `options` of `class_scores`."""
    found = [class_scores(model, one, **options) for one in sets]
    pooled = {name: [value for scores in found for value in scores[name].total] for name in ("accuracy", "loss")}
    return {name: math.fsum(values) / len(values) for name, values in pooled.items()}


def class_logits(
    model: nn.Module,
    eval_set: EvalSet,
    *,
    rows: Sequence[int] | None = None,
    batch_tokens: int = BATCH_TOKENS,
    on_batch: Callable[[Batch], None] | None = None,
    domains: Sequence[str] = (),
) -> Tensor:
    """(N, C) float64 logits of the set's rows (or of those numbers of them), on the CPU."""
    require_rows(eval_set)
    chosen = [eval_set.rows[index] for index in (range(len(eval_set.rows)) if rows is None else rows)]
    domain = list(domains).index(eval_set.domain) if eval_set.domain in domains else -1
    found: dict[int, Tensor] = {}
    with evaluation_mode(model) as device:
        for indices in by_length([len(row.input_ids) for row in chosen], batch_tokens):
            batch = _batch(model, [chosen[index] for index in indices], domain, device)
            if on_batch is not None:
                on_batch(batch)
            logits_BC = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
            found |= zip(indices, logits_BC.double().cpu())
    return torch.stack([found[index] for index in range(len(chosen))])


def _label(eval_set: EvalSet, index: int) -> int:
    label = eval_set.rows[index].label
    if label is None:
        raise DataError(
            row_name(eval_set, index),
            "no class",
            "rows read for the task seq_cls",
            "Use a recipe with model.task seq_cls.",
        )
    return label


def _batch(model: Any, rows: list[Any], domain: int, device: torch.device) -> Batch:
    ids = [list(row.input_ids) for row in rows]
    mask = pad_mask(ids, device=device)
    return Batch(
        input_ids=pad(ids, model.config.pad_token_id or 0, device=device),
        labels=torch.tensor([-100 if row.label is None else row.label for row in rows], device=device),
        token_mask=mask.bool(),
        domain=torch.where(mask.bool(), domain, -1),
        attention_mask=mask,
    )


def sample_classes(model: Any, eval_set: EvalSet, chosen: Sequence[int]) -> list[tuple[str, float]]:
    """(name of the likeliest class, its probability) of the chosen rows; names as the set writes them."""
    probability_NC = class_logits(model, eval_set, rows=chosen).softmax(-1)
    names = eval_set.source.label_names or tuple(map(str, range(probability_NC.shape[1])))
    best = probability_NC.max(-1)
    return [(names[index], value) for index, value in zip(best.indices.tolist(), best.values.tolist())]
