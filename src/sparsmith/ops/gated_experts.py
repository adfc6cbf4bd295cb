"""Gated FFN experts on the CPU: y_t = sum over the K experts e of token t of w_te * down_e (silu(gate_e x_t) * up_e x_t).

One expert's rows after the other, with the backward by hand. A grouped product serves all experts in one call, but on the CPU its (S, 2W)
results are larger than what the allocator keeps, so that each is paged in anew; and the plain loop, left to autograd, fills a gradient of
all experts' size once per expert. `benchmarks/upcycle_layer.py` measures the three side by side.

Shapes: T tokens, D hidden, E experts, W their width, K experts per token, S = T * K slots, R rows of one expert.
gate_up (E, 2W, D), down (E, D, W).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def gated_experts(x_TD: Tensor, gate_up: Tensor, down: Tensor, indices_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """(T, D), of x's number type; summed in the wider one of x's and the weights', expert by expert, so in one order."""
    return _GatedExperts.apply(x_TD, gate_up, down, weights_TK, indices_TK)


class _GatedExperts(torch.autograd.Function):
    """Kept for the backward: x and each expert's (R, 2W) rows before the activation; the rest is computed again."""

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, gate_up: Tensor, down: Tensor, weights_TK: Tensor, indices_TK: Tensor
    ) -> Tensor:
        slots_S = indices_TK.reshape(-1)
        order_S, counts = slots_S.argsort(stable=True), torch.bincount(slots_S, minlength=len(down)).tolist()
        weights_S = weights_TK.reshape(-1)
        out_TD = x_TD.new_zeros(x_TD.shape, dtype=torch.promote_types(x_TD.dtype, weights_TK.dtype))
        kept = []
        for expert, slots_R in enumerate(order_S.split(counts)):
            token_R = slots_R // indices_TK.shape[1]
            pre = F.linear(x_TD[token_R], gate_up[expert])
            gate_RW, up_RW = pre.chunk(2, dim=-1)
            y_RD = F.linear(F.silu(gate_RW).mul_(up_RW), down[expert])
            out_TD.index_add_(0, token_R, (y_RD * weights_S[slots_R, None]).to(out_TD.dtype))
            kept.append(pre)
        ctx.save_for_backward(x_TD, gate_up, down, weights_TK, order_S, *kept)
        ctx.counts = counts
        return out_TD.to(x_TD.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, gate_up, down, weights_TK, order_S, *kept = ctx.saved_tensors
        wants_x, wants_gate_up, wants_down, wants_weights = ctx.needs_input_grad[:4]
        weights_S = weights_TK.reshape(-1)
        grad_x = torch.zeros_like(x_TD) if wants_x else None
        grad_gate_up = torch.empty_like(gate_up) if wants_gate_up else None
        grad_down = torch.empty_like(down) if wants_down else None
        grad_weights = torch.zeros_like(weights_S) if wants_weights else None
        for expert, (slots_R, pre) in enumerate(zip(order_S.split(ctx.counts), kept, strict=True)):
            token_R = slots_R // weights_TK.shape[1]
            gate_RW, up_RW = pre.chunk(2, dim=-1)
            grad_RD, weight_R1 = grad_TD[token_R], weights_S[slots_R, None].to(x_TD.dtype)
            act_RW = F.silu(gate_RW)
            inner_RW, grad_inner = act_RW * up_RW, grad_RD @ down[expert]
            if grad_weights is not None:
                grad_weights[slots_R] = (grad_inner * inner_RW).sum(dim=-1, dtype=weights_S.dtype)
            if grad_down is not None:
                torch.mm((grad_RD * weight_R1).t(), inner_RW, out=grad_down[expert])
            if grad_gate_up is None and grad_x is None:
                continue
            grad_inner *= weight_R1
            grad_pre = torch.empty_like(pre)
            grad_gate, grad_up = grad_pre.chunk(2, dim=-1)
            torch.mul(grad_inner, act_RW, out=grad_up)
            torch.ops.aten.silu_backward.grad_input(grad_inner * up_RW, gate_RW, grad_input=grad_gate)
            if grad_gate_up is not None:
                torch.mm(grad_pre.t(), x_TD[token_R], out=grad_gate_up[expert])
            if grad_x is not None:
                grad_x.index_add_(0, token_R, grad_pre @ gate_up[expert])
        grad_weights_TK = None if grad_weights is None else grad_weights.view_as(weights_TK)
        return grad_x, grad_gate_up, grad_down, grad_weights_TK, None
