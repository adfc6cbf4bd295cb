"""A balance loss from parts: what ranks compute of their own rows, with the counts of all, sums to the loss of one process."""

from __future__ import annotations

import pytest
import torch

from sparsmith.ops.balance import balance_loss, expert_counts, z_loss

EXPERTS, K = 4, 2


def draw(tokens: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, EXPERTS, generator=generator, dtype=torch.float64).requires_grad_()
    mask = torch.rand(tokens, generator=generator) > 0.3
    return logits, logits.detach().topk(K).indices, mask


@pytest.mark.parametrize("norm", ["slots", "tokens"])
@pytest.mark.parametrize("masked", [True, False])
def test_parts_sum_to_the_whole_in_value_and_gradient(norm, masked):
    ranks = [draw(tokens, seed) for seed, tokens in enumerate((5, 12, 3))]
    logits = torch.cat([one[0].detach() for one in ranks]).requires_grad_()
    indices, mask = torch.cat([one[1] for one in ranks]), torch.cat([one[2] for one in ranks])
    counts = sum(expert_counts(i, EXPERTS, m if masked else None) for _, i, m in ranks)
    tokens = counts.sum() / K
    whole = balance_loss(logits, indices, mask if masked else None, norm=norm) + z_loss(
        logits, mask if masked else None
    )
    whole.backward()
    parts = []
    for own, chosen, present in ranks:
        shown = present if masked else None
        part = balance_loss(own, chosen, shown, norm=norm, all_counts_E=counts) + z_loss(own, shown, tokens)
        part.backward()
        parts.append(part.detach())
    assert sum(parts) == pytest.approx(float(whole.detach()), abs=1e-12)
    assert torch.allclose(torch.cat([one[0].grad for one in ranks]), logits.grad, rtol=0, atol=1e-12)
    # without the counts of all, the mean of the ranks' losses is another number
    alone = [balance_loss(own, chosen, present if masked else None, norm=norm).item() for own, chosen, present in ranks]
    together = balance_loss(logits, indices, mask if masked else None, norm=norm).item()
    assert abs(sum(alone) / 3 - together) > 1e-4
