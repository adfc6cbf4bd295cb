import torch
from torch.nn import functional as F

from sparsmith.ops.cross_entropy import auto_chunk, token_cross_entropy


def setup():
    torch.manual_seed(0)
    hidden = torch.randn(13, 8, dtype=torch.float64).float().requires_grad_()
    head = torch.randn(8, 31).requires_grad_()
    labels = torch.randint(0, 31, (13,))
    labels[[2, 7]] = -100
    return hidden, head, labels


def test_per_token_losses_ignored_labels_are_zero():
    hidden, head, labels = setup()
    losses = token_cross_entropy(lambda h: h @ head, hidden, labels)
    assert losses.shape == (13,) and losses[2] == losses[7] == 0
    torch.testing.assert_close(losses.sum(), F.cross_entropy(hidden @ head, labels, reduction="sum"))


def test_pieces_give_the_same_losses_and_gradients():
    hidden, head, labels = setup()
    whole = token_cross_entropy(lambda h: h @ head, hidden, labels)
    expected = torch.autograd.grad(whole.sum(), (hidden, head))
    pieces = token_cross_entropy(lambda h: h @ head, hidden, labels, chunk=4)
    torch.testing.assert_close(pieces, whole)
    for a, b in zip(torch.autograd.grad(pieces.sum(), (hidden, head)), expected, strict=True):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        torch.testing.assert_close(token_cross_entropy(lambda h: h @ head, hidden, labels, chunk=5), whole)


def test_rows_and_bf16_hidden_states():
    hidden, head, labels = setup()
    losses = token_cross_entropy(
        lambda h: h @ head.bfloat16(), hidden[:12].bfloat16().view(3, 4, 8), labels[:12].view(3, 4)
    )
    assert losses.dtype == torch.float32 and losses.shape == (12,)


def test_no_tokens_still_reach_the_head():
    hidden, head, labels = setup()
    loss = token_cross_entropy(lambda h: h @ head, hidden[:0], labels[:0]).sum()
    loss.backward()
    assert loss.item() == 0 and head.grad.abs().max() == 0


def test_auto_chunk():
    assert auto_chunk(1000, 32_000) is None
    assert auto_chunk(100_000, 128_000) == 524
