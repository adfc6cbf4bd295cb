"""The three paths are one function, equal to the paper's unfolded form written naively (F10: what unfolding costs in bf16)."""

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sparsmith.ops.adapter_experts import grouped_experts, loop_experts, masked_experts
from sparsmith.ops.routing import route_learned

FOLDED = {"masked": masked_experts, "grouped": grouped_experts, "loop": loop_experts}
SCALE = 0.25
ACTIVATION = {"gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "silu": F.silu}


def paper(h: Tensor, down: Tensor, up: Tensor, logits: Tensor, k: int, activation: str) -> Tensor:
    """PESC Eq 7-9 as printed: y = sum_i R(x)_i (h + a_i(h)), token by token."""
    rows = []
    for token in range(h.shape[0]):
        chosen = sorted(range(logits.shape[1]), key=lambda e: -logits[token, e].item())[:k]
        gates = logits[token, chosen].softmax(0)
        parts = (h[token] + SCALE * up[e] @ ACTIVATION[activation](down[e] @ h[token]) for e in chosen)
        rows.append(sum(g * part for g, part in zip(gates, parts, strict=True)))
    return torch.stack(rows)


def inputs(tokens: int, experts: int, dtype=torch.float64, hidden: int = 16, dim: int = 8, std: float = 0.3):
    generator = torch.Generator().manual_seed(tokens + 31 * experts)

    def draw(*shape, scale=1.0):
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype).requires_grad_()

    return draw(tokens, hidden), draw(experts, dim, hidden, scale=std), draw(experts, hidden, dim, scale=std)


def run(path: str, h, down, up, logits, k, activation="gelu") -> Tensor:
    routing = route_learned(logits, k, straight_through=False)
    return FOLDED[path](h, down, up, routing.indices, routing.gates * SCALE, activation=activation)


def output_and_gradients(function, tensors):
    y = function(*tensors)
    weight = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    return [y.detach(), *torch.autograd.grad((y * weight).sum(), tensors)]


CASES = [(1, 4, 1), (1, 4, 2), (7, 4, 2), (33, 8, 2), (9, 4, 4), (16, 5, 3)]


@pytest.mark.parametrize("activation", ACTIVATION)
@pytest.mark.parametrize(("tokens", "experts", "k"), CASES)
def test_float64_equals_the_paper(tokens, experts, k, activation):
    h, down, up = inputs(tokens, experts)
    logits = torch.randn(tokens, experts, dtype=torch.float64, requires_grad=True)
    tensors = (h, down, up, logits)
    expected = output_and_gradients(lambda *t: paper(*t, k, activation), tensors)
    for path in FOLDED:
        found = output_and_gradients(lambda *t, path=path: run(path, *t, k, activation), tensors)
        for a, b in zip(found, expected, strict=True):
            assert (a - b).abs().max() <= 1e-12 * max(1.0, b.abs().max().item()), path


@pytest.mark.parametrize(("tokens", "experts", "k"), CASES)
def test_float32_agrees_between_paths(tokens, experts, k):
    h, down, up = inputs(tokens, experts, torch.float32)
    logits = torch.randn(tokens, experts, requires_grad=True)
    results = [output_and_gradients(lambda *t, p=p: run(p, *t, k), (h, down, up, logits)) for p in FOLDED]
    for one, other in itertools.combinations(results, 2):
        for a, b in zip(one, other, strict=True):
            assert (a - b).norm() <= 1e-5 * b.norm() + 1e-12


def test_bfloat16_error_is_alike_on_every_path():
    h, down, up = inputs(256, 8, torch.bfloat16, hidden=64, dim=16)
    logits = torch.randn(256, 8)
    exact = run("loop", h.double(), down.double(), up.double(), logits.double(), 2)
    errors = {path: (run(path, h, down, up, logits, 2).double() - exact).norm().item() for path in FOLDED}
    assert max(errors.values()) <= 1.5 * min(errors.values()), errors


def test_bfloat16_router_gradient():
    """Spec test 4: U std 0.002, d 512: within 10 % of float64 on every path; unfolding loses far more (F10)."""
    torch.manual_seed(0)
    tokens, hidden, dim, experts = 256, 512, 64, 8
    h = torch.randn(tokens, hidden).bfloat16()
    down = (torch.rand(experts, dim, hidden) * 2 - 1) / hidden**0.5
    up = torch.randn(experts, hidden, dim) * 0.002
    logits, cotangent = torch.randn(tokens, experts) * 0.3, torch.randn(tokens, hidden).bfloat16()

    def gradient(path, dtype):
        z = logits.to(torch.promote_types(dtype, torch.float32)).requires_grad_()
        y = run(path, h.to(dtype), down.to(dtype), up.to(dtype), z, 2)
        (found,) = torch.autograd.grad((y * cotangent.to(dtype)).sum(), z)
        return found.double()

    exact = gradient("loop", torch.float64)
    for path in ("masked", "grouped", "loop"):
        assert (gradient(path, torch.bfloat16) - exact).norm() <= 0.10 * exact.norm(), path
    z = logits.bfloat16().requires_grad_()
    gates, indices = z.topk(2)
    gates = gates.softmax(-1)
    parts = [
        torch.einsum("tr,tdr->td", F.gelu(torch.einsum("td,trd->tr", h, down.bfloat16()[i])), up.bfloat16()[i])
        for i in indices.t()
    ]
    unfolded = sum(gates[:, n : n + 1] * (h + SCALE * part) for n, part in enumerate(parts))
    (found,) = torch.autograd.grad((unfolded * cotangent).sum(), z)
    assert (found.double() - exact).norm() > 0.5 * exact.norm()


@pytest.mark.parametrize("path", FOLDED)
def test_an_expert_without_tokens_has_a_zero_gradient(path):
    h, down, up = inputs(6, 4, torch.float32)
    indices, gates = torch.tensor([[0, 2]] * 6), torch.full((6, 2), 0.5)
    FOLDED[path](h, down, up, indices, gates).square().sum().backward()
    for tensor in (down, up):
        assert tensor.grad is not None and tensor.grad[[1, 3]].abs().max() == 0 and tensor.grad[[0, 2]].abs().max() > 0


@pytest.mark.parametrize("path", ["masked", "grouped"])
def test_the_backward_by_hand_is_right(path):
    h, down, up = inputs(5, 3, hidden=8, dim=8)
    gates = torch.rand(5, 2, dtype=torch.float64, requires_grad=True)
    indices = torch.tensor([[0, 1], [1, 0], [1, 0], [0, 1], [0, 1]])
    for activation in ACTIVATION:
        assert torch.autograd.gradcheck(
            lambda *t, a=activation: FOLDED[path](*t[:3], indices, t[3], activation=a), (h, down, up, gates)
        )


@pytest.mark.parametrize("path", FOLDED)
def test_repeats_are_bitwise_equal(path):
    h, down, up = inputs(64, 8, torch.float32)
    logits = torch.zeros(64, 8, requires_grad=True)
    first = output_and_gradients(lambda *t: run(path, *t, 2), (h, down, up, logits))
    again = output_and_gradients(lambda *t: run(path, *t, 2), (h, down, up, logits))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_small_updates_are_not_rounded_away():
    """Spec test 16 (F12): 1000 updates of 1e-5 move a float32 master by 1 %; a bf16 weight would stay."""
    from sparsmith.methods.pesc.layers import PescAdapters, PescSettings

    adapters = PescAdapters(PescSettings(2, 1, 8, 0.25, (0,)), 16)
    adapters.reset(0)
    start, low = adapters.down.detach().clone(), adapters.down.detach().bfloat16()
    for _ in range(1000):
        with torch.no_grad():
            adapters.down.mul_(1 + 1e-5)
            low = low * (1 + 1e-5)
    moved = (adapters.down / start - 1)[start.abs() > 1e-4]
    assert (moved - 0.01).abs().max() < 0.001
    assert (low.float() / start.bfloat16().float() - 1)[start.abs() > 1e-4].abs().max() == 0
