"""F1: the loss must tell balanced from collapsed routing and have a gradient. F14: padding must not count."""

import pytest
import torch

from sparsmith.ops.balance import balance_loss, expert_counts, load_entropy, z_loss
from sparsmith.ops.routing import top_k

E, K, T = 8, 2, 64


def uniform() -> torch.Tensor:
    """Near-zero logits whose top-2 visits every expert equally often."""
    logits = torch.zeros(T, E, dtype=torch.float64)
    for token in range(T):
        logits[token, [token % E, (token + 1) % E]] = 1e-9
    return logits


def collapsed(first: int = 0) -> torch.Tensor:
    logits = torch.full((T, E), -1e3, dtype=torch.float64)
    logits[:, [first, first + 1]] = 0.0
    return logits


@pytest.mark.parametrize(("norm", "even", "gone"), [("slots", 1, E / K), ("tokens", K, E)])
def test_values_uniform_and_collapsed(norm, even, gone):
    for logits, value in ((uniform(), even), (collapsed(), gone)):
        assert abs(float(balance_loss(logits, top_k(logits, K), norm=norm)) - value) < 1e-6


def test_layers_collapsed_on_different_experts_do_not_read_as_balanced():
    values = [balance_loss(z, top_k(z, K)) for z in map(collapsed, (0, 2, 4, 6))]
    assert abs(float(torch.stack(values).mean()) - E / K) < 1e-6


def test_the_softmax_over_chosen_logits_would_be_blind():
    """What the released code does: always 1/k, so its value is E/k for any routing."""
    for logits in (uniform(), collapsed()):
        chosen = logits.gather(-1, top_k(logits, K)).softmax(-1).mean(0)
        assert abs(float(E * (chosen / K).sum()) - E / K) < 1e-6
    assert abs(float(balance_loss(uniform(), top_k(uniform(), K))) - E / K) > 1


def test_gradient_steps_on_it_alone_raise_the_entropy():
    torch.manual_seed(0)
    x = torch.randn(256, 16)
    weight = (torch.randn(E, 16) * 0.1).requires_grad_()
    bias = torch.tensor([2.0, 1.5, 0, 0, 0, 0, 0, 0])

    def logits():
        return x @ weight.t() + bias * x[:, :1].abs()

    def entropy():
        return float(load_entropy(expert_counts(top_k(logits(), K), E)))

    before = entropy()
    for step in range(50):
        z = logits()
        (gradient,) = torch.autograd.grad(balance_loss(z, top_k(z.detach(), K)), weight)
        assert step or gradient.abs().max() > 1e-3
        weight.data -= 2.0 * gradient
    assert entropy() > before + 0.02


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_count(side):
    torch.manual_seed(1)
    logits, padding = torch.randn(T, E, dtype=torch.float64), torch.full((20, E), 7.0, dtype=torch.float64)
    padding[:, 0] = 50.0
    parts, marks = [logits, padding], [torch.ones(T, dtype=torch.bool), torch.zeros(20, dtype=torch.bool)]
    if side == "left":
        parts.reverse()
        marks.reverse()
    padded, mask = torch.cat(parts), torch.cat(marks)
    for function in (
        lambda z, m: balance_loss(z, top_k(z, K), m),
        lambda z, m: balance_loss(z, top_k(z, K), m, norm="tokens"),
        z_loss,
        lambda z, m: expert_counts(top_k(z, K), E, m),
    ):
        torch.testing.assert_close(function(padded, mask), function(logits, None), rtol=1e-12, atol=0)


def test_all_padding_is_finite():
    logits = torch.randn(4, E)
    nothing = torch.zeros(4, dtype=torch.bool)
    assert float(balance_loss(logits, top_k(logits, K), nothing)) == 0 and float(z_loss(logits, nothing)) == 0


def test_z_loss_is_the_mean_square_of_logsumexp():
    logits = torch.randn(10, E, dtype=torch.float64)
    expected = sum(torch.log(torch.exp(row).sum()) ** 2 for row in logits) / 10
    torch.testing.assert_close(z_loss(logits), expected)
