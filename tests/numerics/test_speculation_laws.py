"""Speculative sampling follows the target's law: the rule alone over a million draws, and whole generations against exact arithmetic."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from sparsmith.inference import speculative
from sparsmith.inference.request import Request
from sparsmith.inference.runner import Arrived
from sparsmith.inference.sampling import Sampling
from sparsmith.inference.speculative import SelfSpeculation, speculate
from sparsmith.ops.speculation import accept_or_resample, accepted, agreeing_prefix, draw, residual
from tests.unit.inference.models import deep

DRAWS, V = 1_000_000, 16


def _law(generator: torch.Generator, sharp: float) -> torch.Tensor:
    return (sharp * torch.randn(V, generator=generator, dtype=torch.float64)).softmax(dim=-1)


@pytest.mark.parametrize("kind", ["near", "far", "equal", "disjoint"])
def test_what_comes_out_follows_the_target(kind: str):
    generator = torch.Generator().manual_seed(11)
    p, q = _law(generator, 1.5), _law(generator, 1.5)
    if kind == "near":
        q = 0.9 * p + 0.1 * q
    elif kind == "equal":
        q = p
    elif kind == "disjoint":
        p[: V // 2], q[V // 2 :] = 0.0, 0.0
        p, q = p / p.sum(), q / q.sum()
    uniform = [torch.rand(DRAWS, generator=generator, dtype=torch.float64) for _ in range(3)]
    drafts = draw(q.expand(DRAWS, V), uniform[0])
    tokens, kept = accept_or_resample(p.expand(DRAWS, V), q.expand(DRAWS, V), drafts, uniform[1], uniform[2])
    share = torch.bincount(tokens, minlength=V).double() / DRAWS
    assert (share - p).abs().sum() / 2 <= 0.01
    # the rule's own theorem: drafts stand with probability sum min(p, q)
    assert abs(kept.double().mean() - torch.minimum(p, q).sum()) <= 0.003


def test_a_draw_follows_its_law_and_never_takes_what_has_none():
    generator = torch.Generator().manual_seed(1)
    p = _law(generator, 1.0)
    p[[0, 5, V - 1]] = 0.0
    p = p / p.sum()
    found = draw(p.expand(DRAWS, V), torch.rand(DRAWS, generator=generator, dtype=torch.float64))
    share = torch.bincount(found, minlength=V).double() / DRAWS
    assert (share - p).abs().sum() / 2 <= 0.005
    assert share[[0, 5, V - 1]].sum() == 0
    assert draw(p, torch.tensor(0.0)) == 1 and draw(p, torch.tensor(1 - 2**-53, dtype=torch.float64)) == V - 2


def test_the_rule_by_hand():
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.7, 0.1])
    assert torch.allclose(residual(p, q), torch.tensor([0.75, 0.0, 0.25]))
    assert torch.equal(residual(p, p), p)
    three, tokens = (p.expand(3, 3), q.expand(3, 3)), torch.tensor([0, 1, 1])
    assert accepted(*three, tokens, torch.tensor([0.999, 0.42, 0.44])).tolist() == [True, True, False]
    prefix = agreeing_prefix(torch.tensor([[True, False, True], [True, True, True], [False, True, True]]))
    assert prefix.tolist() == [1, 3, 0]


def _chi_square_p(counts: torch.Tensor, law: torch.Tensor) -> float:
    """Upper tail of Pearson's statistic over cells that expect 5 or more, the others in one (Wilson and Hilferty's normal)."""
    expected = law * counts.sum()
    large = expected >= 5
    found = torch.cat([counts[large].double(), counts[~large].double().sum()[None]])
    wanted = torch.cat([expected[large], expected[~large].sum()[None]])
    keep = wanted > 0
    assert found[~keep].sum() == 0
    statistic, freedom = float(((found - wanted)[keep] ** 2 / wanted[keep]).sum()), int(keep.sum()) - 1
    z = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    return 0.5 * math.erfc(z / math.sqrt(2))


class TableModel:
    """In the place of the runner: two blocks whose laws are tables over the last two tokens. Keeps the runner's promises about which
    tokens each segment holds, and refuses what would break them."""

    tables: torch.Tensor
    """(2, 8, 8, 8): logits of the next token by segment, the token before last, and the last."""

    def __init__(self, model: Any, depths: Any, *, mask: Any, room: int) -> None:
        self.device = torch.device("cpu")
        self.seen: list[torch.Tensor] = []
        self.held = [0, 0]

    def advance(self, index: int, given: torch.Tensor) -> Arrived:
        if index == 0:
            before = self.seen[-1] if self.seen else torch.zeros_like(given[:, 0])
            self.seen.extend(given.unbind(dim=1))
            pairs = torch.stack([torch.cat([before[:, None], given[:, :-1]], dim=1), given], dim=-1)
        else:
            start, pairs = self.held[1], given
            assert torch.equal(pairs[..., 1], torch.stack(self.seen[start : start + given.shape[1]], dim=1))
        self.held[index] += given.shape[1]
        assert self.held[1] <= self.held[0]
        return Arrived(pairs, pairs)

    def prefill(self, ids: torch.Tensor) -> list[torch.Tensor]:
        pairs = self.advance(0, ids).hidden
        return [pairs, self.advance(1, pairs).hidden]

    def logits(self, index: int, readable: torch.Tensor) -> torch.Tensor:
        return self.tables[index][readable[..., 0], readable[..., 1]]

    def cut_to(self, length: int) -> None:
        assert self.held[1] >= length
        self.held, self.seen = [length, length], self.seen[:length]


@pytest.mark.parametrize(("batch", "bonus"), [(1, True), (2, False)])
def test_two_drawn_tokens_follow_the_exact_law(batch: int, bonus: bool, monkeypatch: pytest.MonkeyPatch):
    """5,000 texts of three tokens over V = 8 through whole rounds, after temperature 1.2 and top-k 6. The first token is the prompt's
    own, so the two behind it are the ones that are drafted and verified."""
    generator = torch.Generator().manual_seed(2)
    tables = 1.2 * torch.randn(2, 8, 8, 8, generator=generator)
    tables[0] = 0.6 * tables[0] + 0.6 * tables[1]
    monkeypatch.setattr(TableModel, "tables", tables, raising=False)
    monkeypatch.setattr(speculative, "DepthRunner", TableModel)

    def law(before: Any, last: Any) -> torch.Tensor:
        logits = tables[1][before, last].double() / 1.2
        return logits.masked_fill(logits < logits.topk(6).values[..., -1:], -math.inf).softmax(dim=-1)

    first, eight = law(4, 2), torch.arange(8)
    second = law(torch.full((8,), 2), eight)
    third = law(eight[:, None].expand(8, 8), eight.expand(8, 8))
    exact = (first[:, None, None] * second[:, :, None] * third).sum(dim=0).reshape(-1)

    model, counts, drafted, stood = deep("llama"), torch.zeros(64, dtype=torch.long), 0, 0
    settings = SelfSpeculation(exit=1, draft_len=1 if bonus else 2, bonus=bonus, stop_confidence=0.0)
    prompt = torch.tensor([[1, 4, 2]]).repeat(batch, 1)
    for seed in range(5000 // batch):
        sampling = Sampling(do_sample=True, temperature=1.2, top_k=6, seed=seed)
        ids, stats = speculate(model, Request(prompt, None, 3, (), 0, sampling), settings)
        drafted, stood = drafted + stats.drafted, stood + stats.accepted
        counts += torch.bincount(8 * ids[:, 4] + ids[:, 5], minlength=64)
    assert 0.3 < stood / drafted < 0.9
    assert _chi_square_p(counts, exact) > 0.001


def test_the_counting_test_itself_sees_a_wrong_law():
    generator = torch.Generator().manual_seed(4)
    law = (torch.randn(64, generator=generator, dtype=torch.float64)).softmax(dim=-1)
    other = 0.9 * law + 0.1 / 64
    draws = draw(other.expand(5000, 64), torch.rand(5000, generator=generator, dtype=torch.float64))
    counts = torch.bincount(draws, minlength=64)
    assert _chi_square_p(counts, law) < 0.001 < _chi_square_p(counts, other)
