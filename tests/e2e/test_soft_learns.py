"""SoFT learns what it promises: every inner depth better than that of plain fine-tuning, the full depth as good."""

from __future__ import annotations

import statistics

import pytest
import torch
from torch.nn import functional as F

import sparsmith as sm
from sparsmith.crafting.slices import at_depth
from sparsmith.methods.base import Batch
from sparsmith.methods.soft.config import SoftConfig
from sparsmith.methods.soft.method import SOFT
from tests.kit.pico import pico_model

SYMBOLS, WORD, STEPS, ROWS, RATE = 6, 3, 140, 32, 4e-3
EXITS = (1, 2, 4)
SEEDS = (0, 1, 2)


def batch_of(rows: int, generator: torch.Generator) -> Batch:
    """Words of `WORD` symbols and, after a mark, the same word backwards, which alone is scored. (B, 2 WORD + 1)"""
    word = torch.randint(3, 3 + SYMBOLS, (rows, WORD), generator=generator)
    ids = torch.cat([word, torch.full((rows, 1), 2), word.flip(1)], dim=1)
    labels = ids.clone()
    labels[:, : WORD + 1] = -100
    return Batch(ids, labels, torch.ones_like(ids, dtype=torch.bool))


def tuned(config: SoftConfig, seed: int):
    """The model after `STEPS` steps on rows that depend on the seed alone."""
    torch.manual_seed(seed)
    model = sm.craft(pico_model(seed=seed, num_hidden_layers=EXITS[-1]), config, seed=seed).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    rows = torch.Generator().manual_seed(100 + seed)
    for step in range(STEPS):
        batch = batch_of(ROWS, rows)
        SOFT.on_step(model, config, step, STEPS)
        SOFT.task_loss(model, config, batch, ROWS * WORD).value.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.eval()


def losses(model) -> dict[int, float]:
    """Held-out loss at every exit, nats per label."""
    batch = batch_of(256, torch.Generator().manual_seed(7))
    found = {}
    for depth in EXITS:
        with torch.no_grad():
            logits = at_depth(model, depth)(input_ids=batch.input_ids).logits[:, :-1]
        found[depth] = F.cross_entropy(logits.flatten(0, 1), batch.labels[:, 1:].flatten()).item()
    return found


@pytest.fixture(scope="module")
def measured():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield {arm: [losses(tuned(SoftConfig(exits=EXITS, arm=arm), seed)) for seed in SEEDS] for arm in ("sft", "soft")}
    torch.set_num_threads(threads)


def test_plain_fine_tuning_learns_the_task(measured):
    """Else a small gap would say nothing: guessing costs ln 6 = 1.79 nats."""
    assert statistics.fmean(one[EXITS[-1]] for one in measured["sft"]) < 0.5


@pytest.mark.parametrize("depth", EXITS[:-1])
def test_every_inner_depth_is_better_than_that_of_plain_fine_tuning(measured, depth):
    ours, theirs = ([one[depth] for one in measured[arm]] for arm in ("soft", "sft"))
    assert statistics.fmean(ours) < statistics.fmean(theirs)
    assert all(a < b for a, b in zip(ours, theirs)), "with every seed"


def test_the_full_depth_keeps_up_with_the_control(measured):
    ours, theirs = (statistics.fmean(one[EXITS[-1]] for one in measured[arm]) for arm in ("soft", "sft"))
    assert ours - theirs <= 0.05
