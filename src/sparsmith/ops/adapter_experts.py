"""Bottleneck experts on the output of a shared FFN: y = h + s * sum_{i in I} g_i U_i act(D_i h).

Paper: PESC (arXiv 2401.02731) Eq 7-9, folded: because gates sum to 1, sum_i g_i (h + a_i) = h + sum_i g_i a_i, and h is added once.
Three paths of one function; they differ only by rounding.

* `masked`: every expert for every token, gate 0 off the top-k. Two wide products, no gather; exact, as zero gates zero the gradients.
  4 T E r d FLOPs forward. One [T, E*r] tensor is kept for the backward.
* `grouped`: slots sorted by expert, `grouped_mm` down and up, the k slots of a token summed in fixed order. 4 T k r d FLOPs.
  No host synchronisation: offsets are counted on the device. On the CPU, where a read costs nothing, the runs are padded to one length
  while that adds few rows, and one `bmm` takes the place of a grouped product.
* `loop`: the literal form, one expert after the other; for tests.

Shapes: T tokens, D hidden (d), E experts, K per token (k), R adapter dim (r), S = T*K slots. down (E, R, D), up (E, D, R).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

ACTIVATIONS = {
    "gelu": lambda x: F.gelu(x),
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": lambda x: F.silu(x),
}
_BACKWARD = {
    "gelu": lambda grad, x: torch.ops.aten.gelu_backward(grad, x),
    "gelu_tanh": lambda grad, x: torch.ops.aten.gelu_backward(grad, x, approximate="tanh"),
    "silu": lambda grad, x: torch.ops.aten.silu_backward(grad, x),
}


def gate_matrix(indices_TK: Tensor, gates_TK: Tensor, num_experts: int) -> Tensor:
    """(T, E) float32: the gate where an expert was taken, else 0."""
    zeros = gates_TK.new_zeros(gates_TK.shape[0], num_experts)
    return zeros.scatter(1, indices_TK, gates_TK)


class _MaskedExperts(torch.autograd.Function):
    """The masked path with its backward by hand: one [T, E*R] tensor kept instead of four, and h added inside the last product."""

    @staticmethod
    def forward(ctx, h_TD, down_ED, up_DE, gates_TE, activation):
        pre_TE = h_TD @ down_ED.t()
        act = ACTIVATIONS[activation](pre_TE).view(*gates_TE.shape, -1)
        ctx.save_for_backward(h_TD, down_ED, up_DE, gates_TE, pre_TE)
        ctx.activation = activation
        weighted = torch.mul(act, gates_TE.unsqueeze(-1), out=act).view_as(pre_TE)
        return torch.addmm(h_TD, weighted, up_DE.t())

    @staticmethod
    def backward(ctx, grad_TD):
        h_TD, down_ED, up_DE, gates_TE, pre_TE = ctx.saved_tensors
        grad_TD = grad_TD.contiguous()
        gates = gates_TE.unsqueeze(-1)
        act = ACTIVATIONS[ctx.activation](pre_TE).view(*gates_TE.shape, -1)
        grad_act = (grad_TD @ up_DE).view_as(act)
        grad_gates = None
        if ctx.needs_input_grad[3]:
            grad_gates = (grad_act * act.to(gates.dtype)).sum(dim=-1)
        grad_up = None
        if ctx.needs_input_grad[2]:
            grad_up = grad_TD.t() @ torch.mul(act, gates, out=act).view_as(pre_TE)
        grad_act = torch.mul(grad_act, gates, out=grad_act).view_as(pre_TE)
        grad_pre = _BACKWARD[ctx.activation](grad_act, pre_TE)
        grad_down = grad_pre.t() @ h_TD if ctx.needs_input_grad[1] else None
        grad_h = torch.addmm(grad_TD, grad_pre, down_ED) if ctx.needs_input_grad[0] else None
        return grad_h, grad_down, grad_up, grad_gates, None


def masked_experts(
    h_TD: Tensor, down: Tensor, up: Tensor, indices_TK: Tensor, gates_TK: Tensor, *, activation: str = "gelu"
) -> Tensor:
    """The `masked` path. `gates_TK` carry the scale."""
    experts, _, hidden = down.shape
    gates_TE = gate_matrix(indices_TK, gates_TK, experts)
    up_DE = up.transpose(0, 1).reshape(hidden, -1)
    return _MaskedExperts.apply(h_TD, down.reshape(-1, hidden), up_DE, gates_TE, activation)


class _Runs(NamedTuple):
    """Rows in the order of their experts: S of them, or E*C where every run is padded to C rows."""

    token_S: Tensor
    """The token of each row; token 0 for padding, whose gate is 0."""
    gate_S: Tensor
    """The gate of each row."""
    slots_TK: Tensor
    """Where a token's k slots went."""
    offsets_E: Tensor | None
    """int32, the end of each expert's run, counted on the device; None where all runs have one length."""


# Padded rows that one batched product may cost, as a share of the slots: its gain over the grouped product is of that size.
_PADDING = 0.25


def _runs(indices_TK: Tensor, gates_TK: Tensor, num_experts: int) -> _Runs:
    """The sort is stable, so equal input gives equal order."""
    (tokens, k), device = indices_TK.shape, indices_TK.device
    slots = tokens * k
    expert_S, order_S = indices_TK.reshape(-1).sort(stable=True)
    ends_E = torch.searchsorted(expert_S, torch.arange(1, num_experts + 1, device=device))
    token_S, gate_S = order_S.div(k, rounding_mode="floor"), gates_TK.reshape(-1).index_select(0, order_S)
    rank_S = torch.arange(slots, device=device)
    if device.type == "cpu":
        starts_E = F.pad(ends_E[:-1], (1, 0))
        length = int((ends_E - starts_E).max()) if slots else 0
        rows = num_experts * length
        if 0 < rows <= (1 + _PADDING) * slots:
            rank_S = rank_S + (torch.arange(num_experts) * length - starts_E).index_select(0, expert_S)
            token_S = torch.zeros(rows, dtype=token_S.dtype).scatter_(0, rank_S, token_S)
            gate_S = gate_S.new_zeros(rows).scatter(0, rank_S, gate_S)
            slots_TK = torch.empty_like(order_S).scatter_(0, order_S, rank_S).view_as(indices_TK)
            return _Runs(token_S, gate_S, slots_TK, None)
    slots_TK = torch.empty_like(order_S).scatter_(0, order_S, rank_S).view_as(indices_TK)
    return _Runs(token_S, gate_S, slots_TK, ends_E.to(torch.int32))


def _product(rows_SA: Tensor, weight_EAB: Tensor, offsets_E: Tensor | None) -> Tensor:
    """(S, B): rows @ weight[e] for each expert's run of rows."""
    if offsets_E is None:
        return torch.bmm(rows_SA.view(weight_EAB.shape[0], -1, rows_SA.shape[1]), weight_EAB).flatten(0, 1)
    if rows_SA.dtype != torch.float64:
        return F.grouped_mm(rows_SA, weight_EAB, offs=offsets_E)
    hot_SE = _membership(rows_SA, offsets_E)  # grouped_mm knows no float64: the same sums at E times the cost
    return torch.einsum("se,sa,eab->sb", hot_SE, rows_SA, weight_EAB)


def _weight_gradient(left_SA: Tensor, right_SB: Tensor, offsets_E: Tensor | None, num_experts: int) -> Tensor:
    """(E, A, B): left^T @ right over each expert's run; zero for an expert without rows."""
    if offsets_E is None:
        left, right = (x.view(num_experts, -1, x.shape[1]) for x in (left_SA, right_SB))
        return torch.bmm(left.transpose(1, 2), right)
    if left_SA.dtype != torch.float64:
        return F.grouped_mm(left_SA.t(), right_SB, offs=offsets_E)
    return torch.einsum("se,sa,sb->eab", _membership(left_SA, offsets_E), left_SA, right_SB)


def _membership(rows_SA: Tensor, offsets_E: Tensor) -> Tensor:
    slot_S1 = torch.arange(rows_SA.shape[0], device=rows_SA.device)[:, None]
    return ((slot_S1 < offsets_E) & (slot_S1 >= F.pad(offsets_E[:-1], (1, 0)))).to(rows_SA.dtype)


def _sum_slots(rows_SD: Tensor, slots_TK: Tensor, start_TD: Tensor) -> Tensor:
    """start + the sum of each token's k rows, in fixed order; the start is added last, so that it is rounded once."""
    return F.embedding_bag(slots_TK, rows_SD, mode="sum").add_(start_TD)


class _GroupedExperts(torch.autograd.Function):
    """The grouped path with its backward by hand: h and the inner (S, R) tensor are kept, the gathered rows are gathered again.

    Every gradient that reaches `grouped_mm` is freshly gathered, so contiguous: an expanded one would be refused. Scattered additions
    would not be deterministic on CUDA; the k rows of a token are summed in order instead.
    """

    @staticmethod
    def forward(ctx, h_TD, down, up, gate_S, keep_SD, token_S, slots_TK, offsets_E, activation):
        rows_SD = h_TD.index_select(0, token_S)
        if keep_SD is not None:
            rows_SD *= keep_SD
        pre_SR = _product(rows_SD, down.transpose(1, 2), offsets_E)
        del rows_SD  # the next product of this size takes its memory
        ctx.save_for_backward(h_TD, down, up, gate_S, keep_SD, pre_SR, token_S, slots_TK, offsets_E)
        ctx.activation = activation
        inner_SR = ACTIVATIONS[activation](pre_SR)
        torch.mul(inner_SR, gate_S[:, None], out=inner_SR)
        return _sum_slots(_product(inner_SR, up.transpose(1, 2), offsets_E), slots_TK, h_TD)

    @staticmethod
    def backward(ctx, grad_TD):
        h_TD, down, up, gate_S, keep_SD, pre_SR, token_S, slots_TK, offsets_E = ctx.saved_tensors
        wants_h, wants_down, wants_up, wants_gate = ctx.needs_input_grad[:4]
        grad_SD = grad_TD.index_select(0, token_S)
        act_SR = ACTIVATIONS[ctx.activation](pre_SR)
        grad_act_SR = _product(grad_SD, up, offsets_E)
        grad_gate_S = (grad_act_SR * act_SR.to(gate_S.dtype)).sum(dim=-1) if wants_gate else None
        grad_up = None
        if wants_up:
            grad_up = _weight_gradient(grad_SD, torch.mul(act_SR, gate_S[:, None], out=act_SR), offsets_E, len(up))
        torch.mul(grad_act_SR, gate_S[:, None], out=grad_act_SR)
        grad_pre_SR = _BACKWARD[ctx.activation](grad_act_SR, pre_SR)
        grad_h_TD = grad_down = None
        if wants_down:
            rows_SD = torch.index_select(h_TD, 0, token_S, out=grad_SD)  # large and no longer needed
            if keep_SD is not None:
                rows_SD *= keep_SD
            grad_down = _weight_gradient(grad_pre_SR, rows_SD, offsets_E, len(down))
            del rows_SD
        del grad_SD
        if wants_h:
            grad_rows_SD = _product(grad_pre_SR, down, offsets_E)
            grad_h_TD = _sum_slots(grad_rows_SD if keep_SD is None else grad_rows_SD * keep_SD, slots_TK, grad_TD)
        return grad_h_TD, grad_down, grad_up, grad_gate_S, None, None, None, None, None


def grouped_experts(
    h_TD: Tensor,
    down: Tensor,
    up: Tensor,
    indices_TK: Tensor,
    gates_TK: Tensor,
    *,
    activation: str = "gelu",
    dropout: float = 0.0,
) -> Tensor:
    """The `grouped` path. `gates_TK` carry the scale; `dropout` is applied to h for each (token, expert) on its own."""
    runs = _runs(indices_TK, gates_TK, down.shape[0])
    keep_SD = None
    if dropout > 0:
        keep_SD = F.dropout(h_TD.new_ones(runs.token_S.shape[0], h_TD.shape[1]), dropout)
    return _GroupedExperts.apply(
        h_TD, down, up, runs.gate_S, keep_SD, runs.token_S, runs.slots_TK, runs.offsets_E, activation
    )


def loop_experts(
    h_TD: Tensor,
    down: Tensor,
    up: Tensor,
    indices_TK: Tensor,
    gates_TK: Tensor,
    *,
    activation: str = "gelu",
    dropout: float = 0.0,
) -> Tensor:
    """The `loop` path: expert by expert, as written. The reference of the others."""
    added_TD = torch.zeros_like(h_TD)
    for expert in range(down.shape[0]):
        token, slot = torch.where(indices_TK == expert)
        rows = h_TD[token]
        if dropout > 0:
            rows = F.dropout(rows, dropout)
        inner = ACTIVATIONS[activation](rows @ down[expert].t())
        inner = (inner * gates_TK[token, slot].unsqueeze(-1)).to(h_TD.dtype)
        added_TD = added_TD.index_add(0, token, inner @ up[expert].t())
    return h_TD + added_TD


def grouped_supported(hidden: int, adapter_dim: int) -> bool:
    """Whether `grouped_mm` takes these widths (rows must be whole multiples of 16 bytes) and this torch has it."""
    return hasattr(F, "grouped_mm") and hidden % 8 == 0 and adapter_dim % 8 == 0
