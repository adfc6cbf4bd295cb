"""Held-out loss of a model that reads each token at the first depth that is sure of it.

Deferred completion leaves every block with the keys and values of a full prefill, so one teacher-forced pass gives the very distribution
that such a model draws each token from: the loss is exact, no estimate. The first token of an answer is read at full depth, as there.

Shape letters: B rows, S tokens, P labelled positions of a batch, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsmith import anatomy
from sparsmith.bootstrap import RowScores
from sparsmith.evaluating.batching import BATCH_TOKENS, by_length, evaluation_mode, pad, pad_mask
from sparsmith.evaluating.loss import HEAD_FLOATS
from sparsmith.evaluating.rows import IGNORE, require_rows
from sparsmith.inference import DepthRunner
from sparsmith.inference.sampling import confidence

if TYPE_CHECKING:
    from sparsmith.data import EvalSet

Policy = Mapping[int, float]
"""Depth -> threshold; the full depth takes the rest."""


def exit_losses(
    model: nn.Module, eval_set: EvalSet, policies: Mapping[str, Policy], *, batch_tokens: int = BATCH_TOKENS
) -> dict[str, RowScores]:
    """Summed loss and labelled tokens of every row under each policy, from one pass."""
    require_rows(eval_set)
    layers = len(anatomy.blocks(model))
    inner = sorted({depth for policy in policies.values() for depth, limit in policy.items() if limit <= 1})
    rows, step = eval_set.rows, max(1, HEAD_FLOATS // anatomy.shape_of(model.config).vocab)
    totals = {name: torch.zeros(len(rows), dtype=torch.float64) for name in policies}
    tokens = torch.zeros(len(rows), dtype=torch.float64)
    with evaluation_mode(model) as device:
        for indices in by_length([len(row.input_ids) for row in rows], batch_tokens):
            ids = [list(rows[index].input_ids) for index in indices]
            labels = pad([list(rows[index].labels) for index in indices], IGNORE, left=True, device=device)
            runner = DepthRunner(
                model, (*inner, layers), mask=pad_mask(ids, left=True, device=device), room=labels.shape[1]
            )
            losses = _losses(runner, pad(ids, 0, left=True, device=device), labels, policies, step)
            for name, loss_B in losses.items():
                totals[name][indices] = loss_B.double().cpu()
            tokens[indices] = (labels[:, 1:] != IGNORE).sum(1).double().cpu()
    return {name: RowScores(tuple(total.tolist()), tuple(tokens.tolist())) for name, total in totals.items()}


def _losses(
    runner: DepthRunner, ids: Tensor, labels: Tensor, policies: Mapping[str, Policy], step: int
) -> dict[str, Tensor]:
    """(B,) summed losses under each policy."""
    row_P, at_P = torch.nonzero(labels[:, 1:] != IGNORE, as_tuple=True)
    targets_P = labels[:, 1:][row_P, at_P]
    states = [state[row_P, at_P] for state in runner.prefill(ids)]
    first_P = torch.ones_like(row_P, dtype=torch.bool)
    first_P[1:] = row_P[1:] != row_P[:-1]
    read = [_read(runner, index, state, targets_P, step) for index, state in enumerate(states)]
    found = {}
    for name, policy in policies.items():
        loss_P = _under(policy, runner.depths, read, first_P)
        found[name] = torch.zeros(len(labels), device=ids.device).index_add(0, row_P, loss_P.float())
    return found


def _under(policy: Policy, depths: Sequence[int], read: Sequence[tuple[Tensor, Tensor]], first_P: Tensor) -> Tensor:
    """(P,) losses, each at the first depth whose confidence reaches its threshold."""
    loss_P = read[-1][0]
    for depth, (own_P, sure_P) in reversed(list(zip(depths[:-1], read[:-1]))):
        leaves = (sure_P >= policy.get(depth, 2.0)) & ~first_P
        loss_P = torch.where(leaves, own_P, loss_P)
    return loss_P


def _read(runner: DepthRunner, index: int, states: Tensor, targets_P: Tensor, step: int) -> tuple[Tensor, Tensor]:
    """(loss (P,), confidence (P,)) at the end of a segment, its logits made in slices of `step` rows."""
    losses, sure = [], []
    for part in torch.arange(len(targets_P), device=states.device).split(step):
        logits = runner.logits(index, states[part])
        losses.append(F.cross_entropy(logits, targets_P[part], reduction="none"))
        sure.append(confidence(logits))
    return torch.cat(losses), torch.cat(sure)
