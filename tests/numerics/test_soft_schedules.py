"""Which exits are computed and what they weigh: the expectation is Eq. 1, and blocks that are not needed are not run."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import sparsmith as sm
from sparsmith import anatomy
from sparsmith.methods.soft import parts
from sparsmith.methods.soft import schedule as schedules
from sparsmith.methods.soft.config import SoftConfig
from sparsmith.training.objective import Objective
from tests.kit.depths import LAYERS, deep_model, labelled_batch

EXITS = (1, 2, 3, 4)


def gradients(
    draw: int | None = None, monkeypatch: Any = None, **settings: Any
) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of one micro-batch; `draw` is what the stream gives."""
    if draw is not None:
        monkeypatch.setattr("sparsmith.methods.soft.method.draw_index", lambda count, *key: draw)
    model = sm.craft(deep_model(), SoftConfig(exits=EXITS, **settings), proof=False).train()
    loss = Objective(model)(**labelled_batch())["loss"]
    loss.backward()
    zero = torch.zeros(())
    return loss.item(), {n: zero if p.grad is None else p.grad for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("weights", ["uniform", "linear"])
@pytest.mark.parametrize("schedule, draws", [("sampled", 4), ("sandwich", 3)])
def test_the_mean_over_all_draws_is_all(schedule, draws, weights, monkeypatch):
    """Spec test 5: enumerated, not sampled."""
    loss, wanted = gradients(weights=weights)
    found = [gradients(draw, monkeypatch, schedule=schedule, weights=weights) for draw in range(draws)]
    assert sum(one[0] for one in found) / draws == pytest.approx(loss, abs=1e-5)
    for name, grad in wanted.items():
        mean = sum(one[1][name] for one in found) / draws
        assert (mean - grad).norm() <= 1e-5 * max(grad.norm().item(), 1e-3), name


def test_a_frozen_trunks_sandwich_is_unbiased_too(monkeypatch):
    loss, wanted = gradients(trunk="frozen", weights="linear")
    found = [gradients(draw, monkeypatch, trunk="frozen", weights="linear", schedule="sandwich") for draw in range(3)]
    assert sum(one[0] for one in found) / 3 == pytest.approx(loss, abs=1e-5)
    for name, grad in wanted.items():
        mean = sum(one[1][name] for one in found) / 3
        assert (mean - grad).norm() <= 1e-5 * max(grad.norm().item(), 1e-3), name


@pytest.mark.parametrize("kind", ["uniform", "linear", "sum_l", "full_boost"])
@pytest.mark.parametrize("exits", [(1,), (4, 8), (3, 4, 8, 12), (12, 16, 20, 24, 28, 32, 36, 40)])
def test_weights_sum_to_one(kind, exits):
    omega = schedules.exit_weights(kind, exits)
    assert sum(omega.values()) == pytest.approx(1) and tuple(omega) == exits and min(omega.values()) > 0
    for schedule in ("all", "rotational"):
        for step in range(5):
            active = schedules.active_weights(omega, schedule, draw=0, step=step, rotation=3)
            assert sum(active.values()) == pytest.approx(1) and exits[-1] in active


def test_sum_l_leaves_an_exit_after_the_first_block_without_weight():
    assert schedules.exit_weights("sum_l", (1, 2, 4))[1] == 0


def test_sum_l_by_its_formula():
    e, n = 0.3, 8
    raw = {d: e * sum(range(1, d)) for d in (3, 5)} | {n: (n - 1) + e * sum(range(1, n - 1))}
    total = sum(raw.values())
    assert schedules.exit_weights("sum_l", (3, 5, n), e_scale=e) == pytest.approx(
        {d: v / total for d, v in raw.items()}
    )


def test_the_other_rules_by_their_formulas():
    assert schedules.exit_weights("linear", (1, 3, 4)) == pytest.approx({1: 1 / 8, 3: 3 / 8, 4: 4 / 8})
    assert schedules.exit_weights("full_boost", (1, 3, 4), boost=0.6) == pytest.approx({1: 0.2, 3: 0.2, 4: 0.6})
    omega = schedules.exit_weights("uniform", EXITS)
    half = schedules.active_weights(omega, "sandwich", draw=1, step=0, half=True)
    assert half == {2: 0.5, 4: 0.5}
    on = [set(schedules.active_weights(omega, "rotational", draw=0, step=step, rotation=2)) for step in range(2)]
    assert on == [{1, 3, 4}, {2, 4}]


def test_the_sets_of_exits():
    assert schedules.auto_exits(40) == (10, 15, 20, 25, 30, 35, 40)
    assert schedules.paper_exits(40) == (12, 16, 20, 24, 28, 32, 36, 40)
    for layers in range(1, 100):
        for made in (schedules.auto_exits(layers), schedules.paper_exits(layers)):
            assert made[-1] == layers and made[0] >= 1 and list(made) == sorted(set(made))


def test_draws_are_a_function_of_the_place_in_the_run():
    first = [schedules.draw_index(5, 7, step, micro) for step in range(40) for micro in range(2)]
    assert first == [schedules.draw_index(5, 7, step, micro) for step in range(40) for micro in range(2)]
    assert set(first) == set(range(5))
    assert first != [schedules.draw_index(5, 8, step, micro) for step in range(40) for micro in range(2)]


def counted(model: Any, **settings: Any) -> list[int]:
    """How often each block is called in one micro-batch."""
    crafted = sm.craft(model, SoftConfig(exits=EXITS, **settings), proof=False).train()
    calls = [0] * LAYERS
    for index, block in enumerate(anatomy.blocks(crafted)):

        def count(module: Any, args: Any, index: int = index) -> None:
            calls[index] += 1

        block.register_forward_pre_hook(count)
    Objective(crafted)(**labelled_batch())
    return calls


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("draw", range(4))
def test_sampled_runs_as_many_blocks_as_it_must(family, draw, monkeypatch):
    """Spec test 6."""
    monkeypatch.setattr("sparsmith.methods.soft.method.draw_index", lambda count, *key: draw)
    monkeypatch.setattr("sparsmith.methods.soft.method.check_shape", lambda config, shape: None)
    assert counted(deep_model(family), schedule="sampled") == [1] * (draw + 1) + [0] * (LAYERS - draw - 1)


def test_all_runs_every_block_once_and_a_frozen_trunk_only_what_the_exits_stand_on():
    assert counted(deep_model()) == [1] * LAYERS
    # the block after the deepest inner exit is called to learn how it is called; with KL all are
    assert counted(deep_model(), trunk="frozen") == [1] * LAYERS


def dropped(recomputed: bool, step: int) -> tuple[float, list[torch.Tensor]]:
    model = sm.craft(deep_model(), SoftConfig(exits=EXITS, layer_dropout=0.9), proof=False).train()
    loss_of = Objective(model)
    if recomputed:
        loss_of.activation_checkpointing_enable()
    state = parts.state_of(model)
    state.step, state.seed = step, 3
    loss = loss_of(**labelled_batch())["loss"]
    loss.backward()
    return loss.item(), [p.grad for p in model.parameters() if p.grad is not None]


def test_layer_dropout_draws_once_whether_or_not_blocks_are_computed_again():
    losses = set()
    for step in range(6):
        plain, again = dropped(False, step), dropped(True, step)
        assert plain[0] == again[0] and len(plain[1]) == len(again[1])
        assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-8) for a, b in zip(plain[1], again[1]))
        losses.add(plain[0])
    assert len(losses) > 1


def test_the_chance_of_a_block_to_be_left_out_is_layerskips():
    assert schedules.drop_probability(0, 8, 0.4) == 0 and schedules.drop_probability(7, 8, 0.4) == pytest.approx(0.4)
    kept = [schedules.kept_layers(8, 0.4, seed=1, step=step, micro=0) for step in range(2000)]
    for layer in range(8):
        share = 1 - sum(layer in one for one in kept) / len(kept)
        assert share == pytest.approx(schedules.drop_probability(layer, 8, 0.4), abs=0.04)
