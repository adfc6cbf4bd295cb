import pytest
import torch

from sparsmith.ops.adapter_experts import (
    _runs,
    gate_matrix,
    grouped_experts,
    grouped_supported,
    loop_experts,
    masked_experts,
)

PATHS = {"masked": masked_experts, "grouped": grouped_experts, "loop": loop_experts}


def test_gate_matrix_is_zero_off_the_chosen():
    gates = gate_matrix(torch.tensor([[1, 3]]), torch.tensor([[0.25, 0.75]]), 4)
    assert torch.equal(gates, torch.tensor([[0.0, 0.25, 0.0, 0.75]]))


def test_grouped_support_needs_widths_of_eights():
    assert grouped_supported(64, 16) and not grouped_supported(60, 16) and not grouped_supported(64, 12)


@pytest.mark.parametrize("path", PATHS)
def test_an_expanded_gradient_is_taken(path):
    """`y.sum().backward()` sends a gradient of strides 0, which grouped_mm alone refuses."""
    h = torch.randn(6, 16, requires_grad=True)
    down, up = torch.randn(4, 8, 16, requires_grad=True), torch.randn(4, 16, 8, requires_grad=True)
    indices, gates = torch.tensor([[0, 2]] * 6), torch.full((6, 2), 0.5)
    PATHS[path](h, down, up, indices, gates).sum().backward()
    assert all(torch.isfinite(t.grad).all() for t in (h, down, up))


def test_dropout_draws_for_each_token_and_expert():
    """Two experts with the same weights: with one mask shared by the k copies their parts would be equal."""
    torch.manual_seed(0)
    h = torch.randn(50, 16)
    down, up = torch.randn(1, 8, 16).repeat(2, 1, 1), torch.randn(1, 16, 8).repeat(2, 1, 1)
    indices = torch.tensor([[0, 1]] * 50)
    for compute in (grouped_experts, loop_experts):
        difference = compute(h, down, up, indices, torch.tensor([[1.0, -1.0]] * 50), dropout=0.5) - h
        assert difference.abs().max() > 0.1
        same = compute(h, down, up, indices, torch.tensor([[1.0, -1.0]] * 50)) - h
        assert same.abs().max() < 1e-4


def test_dropout_keeps_the_mean_and_its_gradient():
    torch.manual_seed(0)
    h = torch.randn(3, 16, dtype=torch.float64, requires_grad=True)
    down, up = torch.randn(2, 8, 16, dtype=torch.float64), torch.randn(2, 16, 8, dtype=torch.float64)
    indices, gates = torch.tensor([[0], [1], [0]]), torch.ones(3, 1, dtype=torch.float64)

    def compute(h):
        torch.manual_seed(7)
        return grouped_experts(h, down, up, indices, gates, dropout=0.3)

    assert torch.autograd.gradcheck(compute, (h,))


@pytest.mark.parametrize("balanced", [True, False])
def test_runs_padded_to_one_length_or_not(balanced):
    """Even routing is padded and takes one batched product, skewed routing takes the grouped one; both equal the loop."""
    torch.manual_seed(0)
    tokens, experts = 40, 4
    first = torch.arange(tokens) % experts if balanced else torch.zeros(tokens, dtype=torch.long)
    indices = torch.stack([first, (first + 1 + torch.arange(tokens) // experts % 3) % experts], dim=1)
    gates = torch.rand(tokens, 2)
    assert (_runs(indices, gates, experts).offsets_E is None) == balanced
    inputs = [torch.randn(tokens, 16), torch.randn(experts, 8, 16), torch.randn(experts, 16, 8), gates]
    results = []
    for compute in (grouped_experts, loop_experts):
        h, down, up, drawn = (x.clone().requires_grad_() for x in inputs)
        out = compute(h, down, up, indices, drawn)
        out.backward(torch.ones_like(out))
        results.append([out.detach(), h.grad, down.grad, up.grad, drawn.grad])
    for mine, naive in zip(*results, strict=True):
        torch.testing.assert_close(mine, naive, rtol=1e-5, atol=1e-4)  # sums of up to 80 products in another order


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("path", ["masked", "grouped"])
def test_no_host_synchronisation(path):
    h = torch.randn(256, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    down = torch.randn(8, 16, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    up = torch.randn(8, 64, 16, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    indices = torch.randn(256, 8, device="cuda").topk(2).indices
    gates = torch.full((256, 2), 0.5, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        PATHS[path](h, down, up, indices, gates).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
