"""Bottleneck experts on the output of a shared FFN: y = h + s * sum_{i in I} g_i U_i act(D_i h).

Paper: PESC (arXiv 2401.02731) Eq 7-9, folded: because gates sum to 1, sum_i g_i (h + a_i) = h + sum_i g_i a_i, and h is added once.
Three paths of one function; they differ only by rounding.

* `masked`: every expert for every token, gate 0 off the top-k. Two wide products, no gather; exact, as zero gates zero the gradients.
  4 T E r d FLOPs forward. One [T, E*r] tensor is kept for the backward.
* `grouped`: slots sorted by expert, `grouped_mm` down and up, the k slots of a token summed in fixed order. 4 T k r d FLOPs.
  No host synchronisation: offsets are counted on the device.
* `loop`: the literal form, one expert after the other; for tests.

Shapes: T tokens, D hidden (d), E experts, K per token (k), R adapter dim (r), S = T*K slots. down (E, R, D), up (E, D, R).
"""

from __future__ import annotations

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


class _Dispatch(torch.autograd.Function):
    """Rows of tokens in slot order; backward sums a token's k slots in fixed order (an index-add would not be deterministic)."""

    @staticmethod
    def forward(ctx, h_TD, token_S, slots_TK):
        ctx.save_for_backward(slots_TK)
        return h_TD.index_select(0, token_S)

    @staticmethod
    def backward(ctx, grad_SD):
        return _sum_slots(grad_SD, ctx.saved_tensors[0]), None, None


class _Combine(torch.autograd.Function):
    """The sum of a token's k slots; backward hands each slot its token's gradient, contiguous as `grouped_mm` needs it."""

    @staticmethod
    def forward(ctx, rows_SD, token_S, slots_TK):
        ctx.save_for_backward(token_S)
        return _sum_slots(rows_SD, slots_TK)

    @staticmethod
    def backward(ctx, grad_TD):
        return grad_TD.index_select(0, ctx.saved_tensors[0]), None, None


def _sum_slots(rows_SD: Tensor, slots_TK: Tensor) -> Tensor:
    total = rows_SD.index_select(0, slots_TK[:, 0])
    for slot in range(1, slots_TK.shape[1]):
        total += rows_SD.index_select(0, slots_TK[:, slot])
    return total


def _grouped_product(rows_SA: Tensor, weight_EBA: Tensor, offsets_E: Tensor) -> Tensor:
    """rows @ weight[e]^T for each expert's run of rows."""
    if rows_SA.dtype == torch.float64:  # grouped_mm knows no float64; exact and without a sync, at E times the cost
        slot_S = torch.arange(rows_SA.shape[0], device=rows_SA.device)
        expert_S = (slot_S[:, None] >= offsets_E).sum(dim=-1)
        parts = (((expert_S == e)[:, None] * rows_SA) @ weight.t() for e, weight in enumerate(weight_EBA))
        return sum(parts, rows_SA.new_zeros(()))
    return F.grouped_mm(rows_SA, weight_EBA.transpose(1, 2), offs=offsets_E)


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
    tokens, k = indices_TK.shape
    expert_S, order_S = indices_TK.reshape(-1).sort(stable=True)
    token_S = order_S.div(k, rounding_mode="floor")
    slots_TK = order_S.argsort().view(tokens, k)
    boundaries = torch.arange(1, down.shape[0] + 1, device=expert_S.device)
    offsets_E = torch.searchsorted(expert_S, boundaries).to(torch.int32)
    rows_SD = _Dispatch.apply(h_TD, token_S, slots_TK)
    if dropout > 0:
        rows_SD = F.dropout(rows_SD, dropout)
    inner_SR = ACTIVATIONS[activation](_grouped_product(rows_SD, down, offsets_E))
    gate_S1 = gates_TK.reshape(-1).index_select(0, order_S).unsqueeze(-1)
    inner_SR = (inner_SR * gate_S1).to(h_TD.dtype)
    return h_TD + _Combine.apply(_grouped_product(inner_SR, up, offsets_E), token_S, slots_TK)


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
