"""Token choice against plain loops: weights, capacity with its order, the second expert's chance, the router's noise."""

from __future__ import annotations

import math

import pytest
import torch

from sparsmith.ops.balance import balance_loss, z_loss
from sparsmith.ops.token_choice import capacity_of, jitter, keep_second, route_tokens, within_capacity


def logits(tokens=40, experts=8, dtype=torch.float64):
    return torch.randn(tokens, experts, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize(
    ("combine", "k"), [("renorm", 2), ("renorm", 3), ("straight_through", 1), ("switch", 1), ("switch", 2)]
)
def test_weights_are_those_of_a_loop(combine, k):
    z_TE = logits()
    routing = route_tokens(z_TE, k, combine)
    for z_E, indices, weights in zip(z_TE, routing.indices, routing.gates):
        p = [math.exp(z) for z in z_E.tolist()]
        p = [one / sum(p) for one in p]
        chosen = sorted(range(len(p)), key=lambda i: -p[i])[:k]
        total = {"renorm": sum(p[i] for i in chosen), "straight_through": p[chosen[0]], "switch": 1.0}[combine]
        assert indices.tolist() == chosen
        assert weights.tolist() == pytest.approx([p[i] / total for i in chosen], abs=1e-12)


def test_straight_through_is_one_and_passes_a_gradient():
    z_TE = logits(dtype=torch.float32).requires_grad_()
    weights = route_tokens(z_TE, 1, "straight_through").gates
    assert torch.equal(weights, torch.ones_like(weights))
    weights.sum().backward()
    assert z_TE.grad.abs().max() > 0.1
    z_TE.grad = None
    route_tokens(z_TE, 1, "renorm").gates.sum().backward()
    assert z_TE.grad.abs().max() < 1e-6, "one weight over itself is a constant"


def test_capacity_drops_the_lowest_priority_slots_of_a_case_by_hand():
    """One row of 4 tokens, 2 experts, k 2, room for 3: all first choices come before the second ones, each from left to right."""
    indices = torch.tensor([[0, 1], [0, 1], [0, 1], [1, 0]])
    kept = within_capacity(indices, 2, rows=1, capacity=3)
    # expert 0: first choices of tokens 0, 1, 2 fill it; token 3's second choice is dropped
    # expert 1: the first choice of token 3, then the second ones of 0 and 1; token 2's is dropped
    assert kept.tolist() == [[True, True], [True, True], [True, False], [True, False]]


def naive_capacity(indices, experts, rows, capacity, wanted):
    kept = torch.zeros_like(indices, dtype=torch.bool)
    length = len(indices) // rows
    for row in range(rows):
        room = [capacity] * experts
        for choice in range(indices.shape[1]):
            for token in range(row * length, (row + 1) * length):
                expert = int(indices[token, choice])
                if wanted[token, choice] and room[expert]:
                    room[expert] -= 1
                    kept[token, choice] = True
    return kept


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("factor", [0.5, 1.0, 1.25, 8.0])
def test_capacity_is_that_of_a_loop(k, factor):
    indices = route_tokens(logits(36), k, "switch").indices
    wanted = torch.rand(indices.shape, generator=torch.Generator().manual_seed(1)) < 0.8
    capacity = capacity_of(factor, 12, k, 8)
    assert capacity == math.ceil(factor * k * 12 / 8)
    kept = within_capacity(indices, 8, 3, capacity, wanted)
    assert torch.equal(kept, naive_capacity(indices, 8, 3, capacity, wanted))
    if factor == 8.0:
        assert torch.equal(kept, wanted), "room for all"


def test_the_second_expert_is_kept_as_often_as_its_weight_says():
    torch.manual_seed(0)
    weights = torch.tensor([[0.9, 0.1]]).expand(20_000, 2)
    kept = keep_second(weights)
    assert kept[:, 0].all() and abs(kept[:, 1].float().mean() - 0.2) < 0.01
    assert keep_second(torch.tensor([[0.5, 0.5]]).expand(100, 2)).all()


def test_jitter_leaves_its_input_and_stays_in_its_bounds():
    torch.manual_seed(0)
    x = torch.randn(500, 16)
    before = x.clone()
    ratio = jitter(x, 0.1) / x
    assert torch.equal(x, before)
    assert 0.9 <= ratio.min() < 0.905 and 1.095 < ratio.max() <= 1.1
    assert jitter(x.bfloat16(), 0.1).dtype == torch.float32


def test_balance_per_layer_reads_k_when_even_and_e_when_collapsed():
    """Spec test 6: also of four layers that collapsed on different experts, which pooled counts call even (spec F1)."""
    experts, k, tokens = 8, 2, 64
    even = torch.stack([torch.arange(tokens) % experts, (torch.arange(tokens) + 1) % experts], 1)
    flat = torch.zeros(tokens, experts, dtype=torch.float64)
    assert balance_loss(flat, even, norm="tokens").item() == pytest.approx(k, abs=1e-6)
    layers = []
    for layer in range(4):
        z_TE = torch.full((tokens, experts), -60.0, dtype=torch.float64)
        z_TE[:, layer] = 60.0
        layers.append(balance_loss(z_TE, torch.full((tokens, 1), layer), norm="tokens"))
    assert torch.stack(layers).mean().item() == pytest.approx(experts, abs=1e-6)
    z_TE, mask = logits(tokens), torch.arange(tokens) < 50
    indices = route_tokens(z_TE, 2, "renorm").indices
    assert balance_loss(z_TE, indices, mask, norm="tokens").item() == pytest.approx(
        balance_loss(z_TE[:50], indices[:50], norm="tokens").item(), abs=1e-6
    )
    by_hand = sum(math.log(sum(math.exp(z) for z in row)) ** 2 for row in z_TE[:50].tolist()) / 50
    assert z_loss(z_TE, mask).item() == pytest.approx(by_hand, abs=1e-6)
