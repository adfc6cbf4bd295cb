"""The maths of expert choice against loops over tokens and experts."""

import math

import pytest
import torch

from sparsmith.ops.expert_choice import (
    above,
    followed,
    row_statistics,
    shares,
    tally,
    top_tokens,
    with_a_taker,
)


def probabilities(rows, length, experts, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(rows * length, experts, generator=generator, dtype=torch.float64)
    return logits, logits.softmax(dim=-1)


def naive_top(p_TE, rows, factor, mask_T):
    """Row by row, expert by expert: sort the row's own tokens, take the first C."""
    length, experts = len(p_TE) // rows, p_TE.shape[1]
    taken, last = torch.zeros_like(p_TE, dtype=torch.bool), torch.zeros(rows, experts, dtype=p_TE.dtype)
    for row in range(rows):
        own = [t for t in range(row * length, (row + 1) * length) if mask_T is None or mask_T[t]]
        slots = math.ceil(factor * len(own) / experts)
        for expert in range(experts):
            best = sorted(own, key=lambda t: (-p_TE[t, expert].item(), t))[:slots]
            for t in best:
                taken[t, expert] = True
            if best:
                last[row, expert] = p_TE[best[-1], expert]
    return taken, last


@pytest.mark.parametrize("factor", [1.0, 1.3, 2.0, 4.0])
@pytest.mark.parametrize("padded", [False, True])
def test_each_expert_takes_its_best_tokens(factor, padded):
    _, p = probabilities(3, 10, 4)
    mask = None
    if padded:
        mask = torch.ones(3, 10, dtype=torch.bool)
        mask[1, 6:], mask[2, :] = False, False
        mask = mask.view(-1)
    top = top_tokens(p, 3, factor, mask)
    taken, last = naive_top(p, 3, factor, mask)
    assert torch.equal(top.taken, taken) and torch.equal(top.last, last)
    assert top.filled.tolist() == [True, True, not padded]


def test_equal_probabilities_go_to_the_earlier_token():
    p = torch.full((6, 2), 0.5)
    assert top_tokens(p, 1, 1.0).taken[:, 0].tolist() == [True, True, True, False, False, False]


def test_padding_changes_nothing():
    _, p = probabilities(1, 7, 4)
    longer = torch.cat([p, torch.ones(5, 4, dtype=p.dtype)])
    mask = torch.arange(12) < 7
    alone, padded = top_tokens(p, 1, 2.0), top_tokens(longer, 1, 2.0, mask)
    assert torch.equal(padded.taken[:7], alone.taken) and not padded.taken[7:].any()
    assert torch.equal(padded.last, alone.last)


def test_shares_are_p_over_its_sum_over_the_takers():
    logits, p = probabilities(1, 40, 4)
    taken = with_a_taker(p, above(p, torch.tensor([0.4, 0.3, 0.5, 0.6], dtype=p.dtype)))
    for t, row in enumerate(shares(logits, taken)):
        takers = [e for e in range(4) if p[t, e] >= [0.4, 0.3, 0.5, 0.6][e]] or [int(p[t].argmax())]
        total = sum(p[t, e] for e in takers)
        for e in range(4):
            wanted = p[t, e] / total if e in takers else 0.0
            assert abs(row[e] - wanted) <= 1e-15
    assert {1} <= set(taken.sum(dim=-1).tolist())


def test_shares_hold_where_every_probability_rounds_to_zero():
    logits = torch.tensor([[0.0, -500.0, -501.0]], requires_grad=True)
    weights = shares(logits, torch.tensor([[False, True, True]]))
    assert torch.allclose(weights, torch.tensor([[0.0, 0.7310586, 0.2689414]]))
    weights[0, 1].backward()
    assert torch.isfinite(logits.grad).all()


def test_thresholds_follow_the_mean_over_rows():
    _, p = probabilities(4, 8, 4)
    first, second = p[:16], p[16:]
    unset = torch.full((4,), -1.0, dtype=torch.float64)
    start = followed(unset, row_statistics(top_tokens(first, 2, 2.0)), 0.9)
    assert (start - naive_top(first, 2, 2.0, None)[1].mean(0)).abs().max() <= 1e-15
    then = followed(start, row_statistics(top_tokens(second, 2, 2.0)), 0.9)
    assert (then - (0.9 * start + 0.1 * naive_top(second, 2, 2.0, None)[1].mean(0))).abs().max() <= 1e-15


def test_two_micro_batches_add_up_and_empty_rows_do_not_count():
    _, p = probabilities(4, 8, 4)
    mask = torch.ones(4, 8, dtype=torch.bool)
    mask[3] = False
    parts = [row_statistics(top_tokens(p[a:b], 2, 2.0, mask.view(-1)[a:b])) for a, b in ((0, 16), (16, 32))]
    assert torch.allclose(sum(parts), row_statistics(top_tokens(p[:24], 3, 2.0)), atol=0, rtol=1e-15)
    nothing = row_statistics(top_tokens(p[24:], 1, 2.0, mask.view(-1)[24:]))
    kept = torch.tensor([0.1, 0.2, 0.3, -1.0], dtype=torch.float64)
    assert torch.equal(followed(kept, nothing, 0.5), kept)


def test_the_tally_counts_what_it_says():
    used = torch.tensor([[True, False], [True, True], [False, True], [True, True]])
    other = torch.tensor([[True, False], [False, True], [True, False], [False, False]])
    first = torch.tensor([[False, False], [True, True], [False, True], [True, True]])
    mask = torch.tensor([True, True, True, False])
    # 3 tokens; 1 + 2 + 1 takers; the first token had none of its own; 0 + 1 + 2 decisions differ of 6
    assert tally(used, other, first, mask).tolist() == [3, 4, 1, 3, 6]
    assert tally(used, None, first, None).tolist() == [4, 6, 1, 0, 0]
