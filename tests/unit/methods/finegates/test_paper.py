"""The paper's layout: what its gates count as, what is really dead, and the fold, with the reference's faults 7 to 11."""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError

import sparsmith as sm
from sparsmith import anatomy
from sparsmith.crafting.settle import settle_report
from sparsmith.methods.finegates.gates import draw_noise, gates_of
from sparsmith.methods.finegates.method import FINEGATES
from sparsmith.methods.finegates.paper import penalty
from sparsmith.methods.finegates.paper_cut import counted, deletable, fold, kept, living
from sparsmith.methods.finegates.paper_gates import paper_linears
from tests.kit.cases import largest_difference, logits
from tests.kit.gates import BIASED, copying, gated, gates_config, put, scatter, steps_of
from tests.kit.pico import FAMILIES, FFN, pico_ids, pico_model

CLOSED, OPEN = -0.9, 0.9


def close(gate, mask) -> None:
    put(gate, torch.where(mask, CLOSED, OPEN))


def drawn(size: int, share: float, seed: int) -> torch.Tensor:
    """(size,) bool with exactly round(share * size) True, at random places."""
    mask = torch.zeros(size, dtype=torch.bool)
    mask[torch.randperm(size, generator=torch.Generator().manual_seed(seed))[: round(share * size)]] = True
    return mask


def removed_exactly(model) -> int:
    row, shape = anatomy.anatomy_of(model), anatomy.shape_of(model.config)
    return deletable(kept(living(model), row, shape), row, shape)


@pytest.mark.parametrize("share", [0.125, 0.25, 0.5])
def test_counted_removal_is_not_the_share_of_closed_gates(share):
    """Fault 8: with a share f of rows and of columns closed, 1 - (1 - f)^2 is counted as removed."""
    model = gated("paper")
    for index, (_, linear) in enumerate(paper_linears(model)):
        close(linear.rows, drawn(linear.rows.size, share, 2 * index))
        close(linear.columns, drawn(linear.columns.size, share, 2 * index + 1))
    removed, every = counted(model)
    shape = anatomy.shape_of(model.config)
    assert every == shape.layers * sum(i * o for i, o in shape.linears.values())
    assert removed / every == pytest.approx(1 - (1 - share) ** 2, abs=1e-6)
    assert FINEGATES.metrics(model, gates_config("paper"))["counted"] == pytest.approx(removed / every)


def test_three_loose_vectors_leave_half_of_the_units():
    """Fault 10: gate rows, up rows and down columns that are open to 85, 77 and 81 % leave 53 % of the units alive."""
    model = gated("paper", intermediate_size=960, num_hidden_layers=1)
    mlp = model.model.layers[0].mlp
    for seed, (gate, share) in enumerate(
        ((mlp.gate_proj.rows, 0.85), (mlp.up_proj.rows, 0.77), (mlp.down_proj.columns, 0.81))
    ):
        close(gate, drawn(960, 1 - share, seed))
    alive = len(living(model)[0].units) / 960
    assert abs(alive - 0.53) <= 0.03 and alive == pytest.approx(0.85 * 0.77 * 0.81, abs=0.03)
    # the count saw 19 % of the FFN go, and says nothing of the units
    assert counted(model)[0] / (3 * 960 * 64) == pytest.approx((0.15 + 0.23 + 0.19) / 3, abs=1e-3)


@pytest.mark.parametrize("share", [0.2, 0.5])
def test_no_more_is_deletable_than_counted_where_the_vectors_agree(share):
    """Fault 10: residual-facing gates are counted, and no stock model can be cut there."""
    model = gated("paper")
    for index, (name, linear) in enumerate(paper_linears(model)):
        inner = {"gate_proj": "rows", "up_proj": "rows", "down_proj": "columns"}.get(name.rsplit(".", 1)[-1])
        for side in ("rows", "columns"):
            gate = getattr(linear, side)
            close(gate, drawn(gate.size, share, 99 if side == inner else index))
    removed = removed_exactly(model)
    assert 0 < removed <= counted(model)[0]
    assert {len(block.units) for block in living(model)} == {FFN - round(share * FFN)}
    for _, linear in paper_linears(model):  # with the residual-facing side alone nothing can go
        inner_sized = {"rows": linear.rows.size == FFN, "columns": linear.columns.size == FFN}
        for side, inside in inner_sized.items():
            if inside:
                put(getattr(linear, side), OPEN)
    assert removed_exactly(model) == 0 < counted(model)[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_deleted_is_dead(family):
    """The settled model computes what the gated one did, is smaller by exactly what was told, and is of a stock class."""
    model = scatter(gated("paper", family))
    before, told = logits(model), removed_exactly(model)
    base = pico_model(family)
    size = sum(p.numel() for p in base.parameters())
    settled = sm.settle(model)
    assert told > 0 and settle_report(settled).removed >= told
    assert sum(p.numel() for p in settled.parameters()) == size - told
    assert largest_difference(before, logits(settled)) <= 1e-4
    assert not gates_of(settled) and not paper_linears(settled)
    assert settled.state_dict().keys() == base.state_dict().keys()


def test_dead_heads_go_with_their_group():
    """A group lives by a channel whose value row and some head's column are both open."""
    model = gated("paper", "qwen2", num_attention_heads=4, num_key_value_heads=4, num_hidden_layers=1)
    attention = model.model.layers[0].self_attn
    rows, columns = torch.zeros(64, dtype=torch.bool), torch.zeros(64, dtype=torch.bool)
    rows[:16] = True  # head 0: no value
    columns[16:32] = True  # head 1: no way out
    rows[32:40], columns[40:48] = True, True  # head 2: either, in every channel
    rows[48:56], columns[48:56] = True, True  # head 3: half of the channels are left
    close(attention.v_proj.rows, rows)
    close(attention.o_proj.columns, columns)
    assert living(model)[0].groups == (3,)
    before = logits(model)
    settled = sm.settle(model)
    assert settled.config.num_key_value_heads == settled.config.num_attention_heads == 1
    assert largest_difference(before, logits(settled)) <= 1e-4
    closed = gated("paper", "qwen2", num_hidden_layers=1)
    for name in ("q_proj", "k_proj"):  # flat attention is no silence
        put(getattr(closed.model.layers[0].self_attn, name).rows, CLOSED)
    assert living(closed)[0].groups == (0, 1)


def test_no_activation_that_wakes_at_zero_is_called_dead():
    model = gated("paper", hidden_act="sigmoid", num_hidden_layers=1)
    mlp = model.model.layers[0].mlp
    put(mlp.gate_proj.rows, CLOSED)
    assert len(living(model)[0].units) == FFN
    close(mlp.up_proj.rows, drawn(FFN, 0.5, 0))
    assert len(living(model)[0].units) == FFN // 2


@pytest.mark.parametrize("name", BIASED)
def test_a_closed_row_is_exactly_nothing(name):
    """The row gate multiplies the bias too, live and folded."""
    family, changes = name.split()[0], BIASED[name]
    model = gated("paper", family, **changes)
    for _, linear in paper_linears(model):
        mask = drawn(linear.rows.size, 0.3, 1)
        close(linear.rows, mask)
        out = linear(torch.randn(2, 3, linear.columns.size))
        assert not out[..., mask].any() and out[..., ~mask].any()
    before = logits(model)
    fold(model)
    assert not gates_of(model) and largest_difference(before, logits(model)) <= 1e-5


def test_everything_may_be_soft_and_the_penalty_is_content():
    """Fault 7: mu = Phi^-1(1 - s) / 2 - 1/2 everywhere costs nothing and closes nothing. The log shows it; no soft gate survives."""
    config, model = gates_config("paper", paper={"s": 0.4}), gated("paper")
    mu = 0.5 * torch.special.ndtri(torch.tensor(0.6, dtype=torch.float64)).item() - 0.5
    for _, gate in gates_of(model):
        put(gate, mu)
    assert penalty(model, config).item() == pytest.approx(0, abs=1e-6)
    metrics = FINEGATES.metrics(model, config)
    assert (metrics["soft"], metrics["closed"], metrics["counted"]) == (1.0, 0.0, 0.0)
    assert "soft 100%" in FINEGATES.health(metrics)
    before = logits(model)
    settled = sm.settle(model)
    assert not gates_of(settled) and largest_difference(before, logits(settled)) <= 1e-5


@pytest.mark.parametrize("trained", [False, True])
def test_kurtosis_before_and_after_the_first_forward(trained):
    """Fault 9: it raised before the first forward, and asked the survivors for the target anew."""
    plain, config = gates_config("paper"), gates_config("paper", paper={"kurtosis": True})
    model = scatter(gated(config)).train()
    if not trained:
        assert penalty(model, config).item() == penalty(model, plain).item()
        return
    model(pico_ids())
    value = penalty(model, config)
    assert value.item() != penalty(model, plain).item()
    assert value.item() == pytest.approx(penalty(model, plain).item(), rel=0.05)  # tau = 100 hardly tells gates apart
    # over all gates: closing more of them lowers the mean, so a target that is overshot pushes back
    for _, linear in paper_linears(model):
        close(linear.rows, drawn(linear.rows.size, 0.9, 1))
    penalty(model, config).backward()
    pushed = torch.cat([linear.rows.logit.grad for _, linear in paper_linears(model)])
    assert (pushed < 0).all()  # descent opens


def test_kurtosis_of_a_linear_by_hand():
    config = gates_config("paper", paper={"kurtosis": True})
    model = gated(config).train()
    _, linear = paper_linears(model)[0]
    x = torch.randn(3, 5, 64)
    linear(x)
    a_RC = linear.linear.weight * x.mean((0, 1))
    sides = []
    for side, gate in ((a_RC, linear.rows), (a_RC.t(), linear.columns)):
        z = (side - side.mean(1, keepdim=True)) / side.std(1, keepdim=True, unbiased=False)
        weights = torch.softmax(-z.pow(4).mean(1).sqrt() / 100, 0)
        opened = torch.distributions.Normal(0, 1).cdf((torch.tanh(gate.logit) + 0.5) / 0.5)
        sides.append(((weights * opened).sum() - 0.6).abs())
    assert linear.penalty(0.4, True).item() == pytest.approx(0.5 * sum(sides).item(), abs=1e-5)


def test_folding_reads_no_noise_and_both_sides():
    """Fault 11: inference read the noisy gates of training, and the columns alone."""
    model = scatter(gated("paper"))
    quiet = logits(model)
    draw_noise(model.train(), 0.5)
    settled = sm.settle(model).eval()
    assert largest_difference(quiet, logits(settled)) <= 1e-5
    assert not [name for name in settled.state_dict() if "logit" in name or "rows" in name or "columns" in name]


def test_the_loss_is_the_task_and_lambda_times_the_mean_penalty():
    config = gates_config("paper", paper={"lambda": 7.0}, gates={"lr": 0.05})
    model, seen = gated(config), []
    steps_of(model, 200, copying(rows=2), stop=1, seen=lambda step, out: seen.append(out))
    value = seen[0]["terms"]["finegates.penalty"].item()
    assert seen[0]["loss"].item() == pytest.approx(seen[0]["terms"]["task"].item() + 7.0 * value, abs=1e-5)
    fresh = gated(config)
    parts = [linear.penalty(0.4, False).item() for _, linear in paper_linears(fresh)]
    assert value == pytest.approx(sum(parts) / len(parts), abs=1e-6) and len(parts) == 2 * 7


def test_logits_begin_as_a_normal_of_the_seed():
    values = torch.cat([gate.logit for _, gate in gates_of(gated("paper", intermediate_size=1024))])
    assert values.mean().item() == pytest.approx(1.0, abs=0.01) and values.std().item() == pytest.approx(0.1, rel=0.05)
    first, again, other = (gates_of(gated("paper", seed=s))[3][1].logit for s in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize(
    "settings, key",
    [
        ({"target": 0.5}, "target"),
        ({"dual": {"lr": 0.5}}, "dual"),
        ({"gates": {"reg_sigma": [0.4, 0.4]}}, "gates.reg_sigma"),
        ({"gates": {"noise_sigma": 0.2}}, "gates.noise_sigma"),
        ({"gates": {"polarise": 1.0}}, "gates.polarise"),
        ({"schedule": {"hold": 0.0}}, "schedule.hold"),
        ({"baseline": "random"}, "baseline"),
    ],
)
def test_settings_of_the_other_layout_are_refused(settings, key):
    with pytest.raises(ValidationError, match=key.replace(".", r"\.")):
        gates_config("paper", **settings)


def test_the_papers_settings_are_refused_in_the_structured_layout():
    with pytest.raises(ValidationError, match="paper"):
        gates_config("structured", paper={"s": 0.3})
    assert math.isclose(gates_config("paper", paper={"lambda": 3.0}).paper.weight, 3.0)
