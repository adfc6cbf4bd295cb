"""Cross-entropies of several exits at the same positions, without holding their logits.

Paper: Sorted LLaMA (arXiv 2309.08968) §3, Eq. 1: L = sum_n omega_n CE(head(norm(h_n)), next token); and, ours, a KL to the full depth:
L_n = (1 - w) CE + w T^2 KL(full || exit), full logits detached, the full depth keeping pure CE.

Shapes: P labelled positions, D hidden size, V vocabulary, C positions of a chunk (C <= P).

Memory beside the states: the logits of one chunk and one exit and their gradient, 2 C V floats (twice that with KL), and the head's
gradient, V D floats, where the head trains. It does not grow with the number of exits or P.

Three ways, one function:

* `fused`: each chunk's gradients are made in the forward, right after its logits, and only multiplied in the backward: no logits are kept
  and none is computed twice.
* `checkpoint`: chunks under non-reentrant checkpointing; autograd sees every product, so hooks of sharded heads work.
* `torch`: the library's chunked `linear_cross_entropy`, for a bare head. It tells sums only, so there are no losses by position.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class Exit:
    """One exit of a micro-batch."""

    depth: int
    weight: float
    """omega_n, times the factor of the schedule; 0 = no loss, the state is only looked at."""
    hidden: Tensor
    """(P, D), after the final norm"""
    logits: Callable[[Tensor], Tensor]
    """(p, D) -> (p, V), softcap included"""
    parameters: tuple[nn.Parameter, ...] = ()
    """Of the head, those that train."""
    weights: tuple[Tensor, ...] = ()
    """The bare head's (V, D) matrix alone, where the head is nothing more; needed by `torch`."""


@dataclass(frozen=True)
class Distillation:
    """KL to the full depth."""

    weight: float
    temperature: float = 1.0


def depth_losses(
    exits: Sequence[Exit],
    labels_P: Tensor,
    *,
    impl: str,
    chunk: int,
    kl: Distillation | None = None,
    full: Exit | None = None,
) -> tuple[Tensor, Tensor]:
    """The weighted sum of the exits' losses over the positions, and each exit's cross-entropies.

    Args:
        exits: with weight > 0, any order.
        labels_P: (P,) int64, all real labels.
        impl: `fused`, `checkpoint` or `torch`.
        chunk: C.
        kl: distil every exit but `full` from `full`.
        full: the full depth; needed with `kl`, may also be one of `exits`.

    Returns:
        sum_n omega_n sum_P L_n, a scalar with a gradient; and the pure cross-entropies (E, P) float32, detached (with `torch` their
        sums (E, 1)).
    """
    if not len(labels_P):  # nothing to predict, yet every parameter must have its gradient
        value = torch.stack([exit.logits(exit.hidden).float().sum() for exit in exits]).sum()
        return value, torch.zeros(len(exits), 0, device=labels_P.device)
    if impl == "torch":
        return _library(exits, labels_P, chunk)
    if impl == "checkpoint":
        return _checkpointed(exits, labels_P, chunk, kl, full)
    if impl != "fused":
        raise ValueError(impl)
    if not torch.is_grad_enabled():
        return _checkpointed(exits, labels_P, chunk, kl, full)
    parameters = list({id(p): p for exit in exits for p in exit.parameters}.values())
    problem = _Problem(tuple(exits), labels_P, chunk, kl, full, parameters)
    value, losses_EP = _Fused.apply(problem, *[exit.hidden for exit in exits], *parameters)
    return value, losses_EP


def chunk_losses(
    logits_CV: Tensor, labels_C: Tensor, kl: Distillation | None, full_CV: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The loss of each position of a chunk and its pure cross-entropy, (C,) float32 each. `full_CV` are detached logits."""
    logits_CV = wide(logits_CV)
    entropy_C = F.cross_entropy(logits_CV, labels_C, reduction="none")
    if kl is None or full_CV is None:
        return entropy_C, entropy_C
    log_q = F.log_softmax(logits_CV / kl.temperature, -1)
    log_p = F.log_softmax(wide(full_CV) / kl.temperature, -1)
    divergence_C = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    return (1 - kl.weight) * entropy_C + kl.weight * kl.temperature**2 * divergence_C, entropy_C


def wide(values: Tensor) -> Tensor:
    """At least float32."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _row_products(a_CV: Tensor, b_CV: Tensor) -> Tensor:
    """sum_V a b, (C,), without the elementwise product."""
    return torch.bmm(a_CV[:, None, :], b_CV[:, :, None])[:, 0, 0]


@dataclass(frozen=True)
class Target:
    """The full depth's distribution over a chunk, at the temperature."""

    p_CV: Tensor
    entropy_C: Tensor


def losses_and_gradient(
    logits_CV: Tensor, labels_C: Tensor, kl: Distillation | None, target: Target | None
) -> tuple[Tensor, Tensor, Tensor]:
    """`chunk_losses` and the gradient of its first result by the logits, written over `logits_CV` (detached, at least float32).

    CE: softmax(z) - onehot. KL: w T (softmax(z / T) - p), from w T^2 KL by the chain rule through z / T.
    """
    rows = labels_C[:, None]
    picked_C, lse_C = logits_CV.gather(1, rows)[:, 0], logits_CV.logsumexp(-1)
    entropy_C = lse_C - picked_C
    if kl is None or target is None:
        gradient_CV = logits_CV.sub_(lse_C[:, None]).exp_()
        return entropy_C, entropy_C, gradient_CV.scatter_add_(1, rows, -torch.ones_like(entropy_C)[:, None])
    w, heat = kl.weight, kl.temperature
    if heat == 1.0:
        cross_C = lse_C - _row_products(target.p_CV, logits_CV)
        gradient_CV = logits_CV.sub_(lse_C[:, None]).exp_().sub_(target.p_CV, alpha=w)
    else:
        hot_CV = logits_CV / heat
        hot_lse_C = hot_CV.logsumexp(-1)
        cross_C = hot_lse_C - _row_products(target.p_CV, hot_CV)
        hot_CV.sub_(hot_lse_C[:, None]).exp_().sub_(target.p_CV)
        gradient_CV = logits_CV.sub_(lse_C[:, None]).exp_().mul_(1 - w).add_(hot_CV, alpha=w * heat)
    gradient_CV.scatter_add_(1, rows, torch.full_like(entropy_C, w - 1)[:, None])
    loss_C = (1 - w) * entropy_C + w * heat**2 * (cross_C - target.entropy_C)
    return loss_C, entropy_C, gradient_CV


@torch.no_grad()
def _target(full: Exit | None, kl: Distillation | None, part: slice) -> Target | None:
    if full is None or kl is None:
        return None
    log_p = F.log_softmax(wide(full.logits(full.hidden[part])) / kl.temperature, -1)
    p = log_p.exp()
    return Target(p, -_row_products(p, log_p))


@torch.no_grad()
def _full_logits(full: Exit | None, kl: Distillation | None, part: slice) -> Tensor | None:
    return full.logits(full.hidden[part]) if full is not None and kl is not None else None


def _distilled(exit: Exit, kl: Distillation | None, full: Exit | None) -> Distillation | None:
    return None if full is None or exit.depth == full.depth else kl


def _parts(count: int, chunk: int) -> list[slice]:
    return [slice(start, min(start + chunk, count)) for start in range(0, count, chunk)]


def _checkpointed(
    exits: Sequence[Exit], labels_P: Tensor, chunk: int, kl: Distillation | None, full: Exit | None
) -> tuple[Tensor, Tensor]:
    kind = torch.promote_types(exits[0].hidden.dtype, torch.float32)
    losses_EP = torch.zeros(len(exits), len(labels_P), device=labels_P.device, dtype=kind)
    sums = []
    for part in _parts(len(labels_P), chunk):
        full_CV = _full_logits(full, kl, part)
        for row, exit in enumerate(exits):
            own = _distilled(exit, kl, full)

            def piece(
                hidden: Tensor, exit: Exit = exit, own: Any = own, full_CV: Any = full_CV, part: slice = part
            ) -> Any:
                return chunk_losses(exit.logits(hidden), labels_P[part], own, full_CV)

            hidden_CD = exit.hidden[part]
            if torch.is_grad_enabled():
                loss_C, entropy_C = checkpoint(piece, hidden_CD, use_reentrant=False)
            else:
                loss_C, entropy_C = piece(hidden_CD)
            losses_EP[row, part] = entropy_C.detach()
            sums.append(exit.weight * loss_C.sum())
    return torch.stack(sums).sum(), losses_EP


def _library(exits: Sequence[Exit], labels_P: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """One call an exit: called once over all exits, it would not tell their losses apart."""
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=min(chunk, len(labels_P)), chunking_method=None)
    sums = [
        F.linear_cross_entropy(exit.hidden, exit.weights[0], labels_P, reduction="sum", options=options)
        for exit in exits
    ]
    value = torch.stack([exit.weight * total for exit, total in zip(exits, sums)]).sum()
    return value, torch.stack(sums).detach().float()[:, None]


@dataclass(frozen=True)
class _Problem:
    exits: tuple[Exit, ...]
    labels_P: Tensor
    chunk: int
    kl: Distillation | None
    full: Exit | None
    parameters: list[nn.Parameter]


class _Fused(torch.autograd.Function):
    """Gradients are made in the forward; the inputs are the exits' hidden states, then the head's trained parameters."""

    @staticmethod
    def forward(ctx: Any, problem: _Problem, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        exits, labels_P = problem.exits, problem.labels_P
        hidden, parameters = tensors[: len(exits)], tensors[len(exits) :]
        kind = torch.promote_types(hidden[0].dtype, torch.float32)
        losses_EP = torch.zeros(len(exits), len(labels_P), device=labels_P.device, dtype=kind)
        grads = [torch.zeros_like(h) if h.requires_grad else None for h in hidden]
        own = [torch.zeros_like(p) for p in parameters]
        value = torch.zeros((), device=labels_P.device, dtype=kind)
        for part in _parts(len(labels_P), problem.chunk):
            target = _target(problem.full, problem.kl, part)
            for row, exit in enumerate(exits):
                kl = _distilled(exit, problem.kl, problem.full)
                with torch.enable_grad():
                    leaf = hidden[row][part].detach().requires_grad_()
                    logits_CV = exit.logits(leaf)
                loss_C, losses_EP[row, part], gradient = losses_and_gradient(
                    wide(logits_CV.detach()), labels_P[part], kl, target
                )
                wanted = [(i, p) for i, p in enumerate(parameters) if any(p is q for q in exit.parameters)]
                outputs = gradient.mul_(exit.weight).to(logits_CV.dtype)
                found = torch.autograd.grad(logits_CV, [leaf, *[p for _, p in wanted]], outputs)
                del logits_CV, gradient, outputs
                kept = grads[row]
                if kept is not None:
                    kept[part] = found[0]
                for (i, _), grad in zip(wanted, found[1:]):
                    own[i].add_(grad)
                value = value + exit.weight * loss_C.sum()
        ctx.save_for_backward(*[g for g in (*grads, *own) if g is not None])
        ctx.present = [g is not None for g in (*grads, *own)]
        ctx.mark_non_differentiable(losses_EP)
        return value, losses_EP

    @staticmethod
    def backward(ctx: Any, *outputs: Any) -> Any:
        scale, saved = outputs[0], list(ctx.saved_tensors)
        return (None, *[saved.pop(0) * scale if present else None for present in ctx.present])
