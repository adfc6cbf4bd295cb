import pytest
import torch

from sparsmith.ops.routing import equal_gates, route_dense, route_hashed, route_learned, top_k


def test_equal_logits_take_the_lowest_index_every_time():
    scores = torch.tensor([[1.0, 1.0, 1.0, 1.0], [0.0, 2.0, 2.0, 2.0], [3.0, 0.0, 3.0, 0.0]]).repeat(50, 1)
    for _ in range(3):
        assert torch.equal(top_k(scores, 2)[:3], torch.tensor([[0, 1], [1, 2], [0, 2]]))


def test_gates_are_the_full_softmax_cut_and_renormalised():
    logits = torch.randn(40, 8, dtype=torch.float64)
    routing = route_learned(logits, 3)
    chosen = logits.softmax(-1).gather(-1, routing.indices)
    torch.testing.assert_close(routing.gates, chosen / chosen.sum(-1, keepdim=True), rtol=1e-12, atol=0)


def test_k_equal_to_e_takes_every_expert():
    routing = route_learned(torch.randn(5, 4), 4)
    assert torch.equal(routing.indices.sort(-1).values, torch.arange(4).expand(5, 4))


def test_top_1_straight_through_is_exactly_one_and_trains_the_router():
    logits = (torch.randn(30, 5) * 20).requires_grad_()
    routing = route_learned(logits, 1)
    assert torch.equal(routing.gates, torch.ones(30, 1))
    (routing.gates * torch.randn(30, 1)).sum().backward()
    assert logits.grad.abs().sum() > 0


def test_top_1_without_it_gives_the_router_nothing():
    logits = torch.randn(30, 5, requires_grad=True)
    route_learned(logits, 1, straight_through=False).gates.sum().backward()
    assert logits.grad.abs().max() == 0


def test_hashed_experts_are_distinct_uniform_and_fixed():
    keys = torch.arange(20_000)
    routing = route_hashed(keys, 2, 8, seed=2**62 + 5, layer=3)
    assert torch.equal(routing.indices, route_hashed(keys, 2, 8, seed=2**62 + 5, layer=3).indices)
    assert (routing.indices[:, 0] != routing.indices[:, 1]).all()
    share = torch.bincount(routing.indices.flatten(), minlength=8) / 40_000
    assert (share * 8 - 1).abs().max() < 0.05  # 5000 expected a bin: 5 standard deviations are 0.07
    pairs = torch.bincount(routing.indices[:, 0] * 8 + routing.indices[:, 1], minlength=64)
    assert (pairs[pairs > 0] / (20_000 / 56) - 1).abs().max() < 0.3 and (pairs > 0).sum() == 56


@pytest.mark.parametrize("change", [{"seed": 6}, {"layer": 4}])
def test_hashed_experts_depend_on_seed_and_layer(change):
    keys = torch.arange(1000)
    one = route_hashed(keys, 2, 8, seed=5, layer=3).indices
    other = route_hashed(keys, 2, 8, **{"seed": 5, "layer": 3, **change}).indices
    assert 0.05 < (one == other).float().mean() < 0.25


def test_dense_takes_all_with_equal_gates():
    routing = route_dense(3, 4)
    assert routing.indices.shape == (3, 4) and torch.equal(routing.gates, torch.full((3, 4), 0.25))
    assert equal_gates(routing.indices, torch.float64).dtype == torch.float64
