"""Gated experts with the backward by hand, against the naive loop under autograd."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from sparsmith.ops.gated_experts import gated_experts

TOKENS, HIDDEN, WIDTH, EXPERTS = 11, 6, 5, 4


def naive(x_TD, gate_up, down, indices_TK, weights_TK):
    rows = []
    for token, x in enumerate(x_TD):
        y = torch.zeros_like(x)
        for expert, weight in zip(indices_TK[token].tolist(), weights_TK[token]):
            gate, up = (gate_up[expert] @ x).chunk(2)
            y = y + weight * (down[expert] @ (F.silu(gate) * up))
        rows.append(y)
    return torch.stack(rows)


def parts(k: int, dtype=torch.float64, used: int = EXPERTS):
    torch.manual_seed(0)
    x_TD = torch.randn(TOKENS, HIDDEN, dtype=dtype)
    gate_up = torch.randn(EXPERTS, 2 * WIDTH, HIDDEN, dtype=dtype)
    down = torch.randn(EXPERTS, HIDDEN, WIDTH, dtype=dtype)
    indices_TK = torch.stack([torch.randperm(used)[:k] for _ in range(TOKENS)])
    weights_TK = torch.rand(TOKENS, k, dtype=dtype)
    return [x_TD, gate_up, down, weights_TK], indices_TK


@pytest.mark.parametrize(("k", "used"), [(1, 4), (2, 4), (3, 4), (2, 3)])
def test_value_and_every_gradient_are_those_of_the_naive_loop(k, used):
    tensors, indices_TK = parts(k, used=used)
    out_grad = torch.randn(TOKENS, HIDDEN, dtype=torch.float64)
    found = []
    for function in (gated_experts, naive):
        x, gate_up, down, weights = leaves = [one.clone().requires_grad_() for one in tensors]
        y = function(x, gate_up, down, indices_TK, weights)
        y.backward(out_grad)
        found.append([y.detach(), *(one.grad for one in leaves)])
    for ours, theirs in zip(*found, strict=True):
        assert (ours - theirs).abs().max() < 1e-12
    assert used == EXPERTS or not found[0][2][used:].any(), "an expert without rows has a gradient, which is zero"


@pytest.mark.parametrize("trained", range(4))
def test_what_is_frozen_gets_no_gradient(trained):
    tensors, indices_TK = parts(2)
    leaves = [one.requires_grad_(place == trained) for place, one in enumerate(tensors)]
    x, gate_up, down, weights = leaves
    gated_experts(x, gate_up, down, indices_TK, weights).sum().backward()
    assert [one.grad is not None for one in leaves] == [place == trained for place in range(4)]
    alone = leaves[trained].grad.clone()
    again, _ = parts(2)
    x, gate_up, down, weights = (one.requires_grad_() for one in again)
    gated_experts(x, gate_up, down, indices_TK, weights).sum().backward()
    assert torch.equal(alone, again[trained].grad)


def test_weights_in_float32_are_summed_in_float32():
    (x, gate_up, down, weights), indices_TK = parts(2, torch.bfloat16)
    y = gated_experts(x, gate_up, down, indices_TK, weights.float())
    assert y.dtype == torch.bfloat16
    wide = naive(x.double(), gate_up.double(), down.double(), indices_TK, weights.double())
    # bfloat16 keeps 8 bits, and three products are rounded to it on the way
    assert (y.double() - wide).abs().max() < 0.03 * wide.abs().max()
