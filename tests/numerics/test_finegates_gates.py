"""Gates against closed forms: open probability, expected size, sampled means; and which gates the task's gradient reaches at the start."""

from __future__ import annotations

import math

import pytest
import torch

from sparsmith import anatomy
from sparsmith.methods.finegates.gates import draw_noise, gates_of, sites, state_of
from sparsmith.methods.finegates.method import FINEGATES
from sparsmith.methods.finegates.size import Sizes, expected_share, kept_share
from sparsmith.ops.gates import gate_values, kurtosis_weights, open_probability, paper_penalty
from tests.kit.gates import LAYOUTS, copying, gated, gates_config, put, scatter, steps_of
from tests.kit.pico import FAMILIES, pico_ids


def normal(x: float) -> float:
    """Phi, by the error function."""
    return 0.5 * (1 + math.erf(x / math.sqrt(2)))


def test_open_probability_is_the_closed_form():
    for sigma in (0.1, 0.25, 0.5):
        for mu in (-0.99, -0.5, -0.2, 0.0, 0.5, 0.9):
            logit = torch.tensor([math.atanh(mu)], dtype=torch.float64)
            assert open_probability(logit, sigma).item() == pytest.approx(normal((mu + 0.5) / sigma), abs=1e-9)


@pytest.mark.parametrize("mu", [-0.7, -0.5, -0.45, 0.0, 0.3, 0.48, 0.52, 0.9])
def test_sampled_gates_have_the_mean_of_a_clamped_normal(mu):
    """E[clamp(m + s z, 0, 1)] of a standard normal z, by its closed form."""
    m, s = mu + 0.5, 0.1
    a, b = -m / s, (1 - m) / s
    density = [math.exp(-x * x / 2) / math.sqrt(2 * math.pi) for x in (a, b)]
    wanted = m * (normal(b) - normal(a)) + s * (density[0] - density[1]) + 1 - normal(b)
    noise = s * torch.randn(100_000, generator=torch.Generator().manual_seed(1))
    assert gate_values(torch.full((100_000,), math.atanh(mu)), noise).mean().item() == pytest.approx(wanted, abs=5e-3)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("target_of", ["body", "total"])
def test_the_expected_size_is_the_sum_over_units(family, target_of):
    """R, unit by unit with products over nested gates, from shapes of the live weights."""
    kinds = {"attention": "kv_groups+q_heads", "blocks": True}
    config = gates_config(gates=kinds, target_of=target_of, target=0.9)
    model = scatter(gated(config, family))
    sigma, total, base = 0.4, 0.0, 0.0
    p = {
        (layer, kind): open_probability(gate.logit.double(), sigma).tolist()
        for layer, site in enumerate(sites(model))
        for kind in ("units", "groups", "heads", "attention_block", "ffn_block")
        if (gate := site.gate(kind)) is not None
    }
    shape = anatomy.shape_of(model.config)
    d, h = shape.hidden, shape.head_dim
    inward = 2 if shape.ffn_kind != "plain" else 1
    ffn_bias = any("mlp" in path for path in shape.biases)
    attention_bias = [path for path in shape.attention_linears if path in shape.biases]
    qkv, out = bool(attention_bias), len(attention_bias) == len(shape.attention_linears)
    for layer in range(shape.layers):
        units = sum(p[layer, "units"]) * ((inward + 1) * d + inward * ffn_bias) + d * ffn_bias
        total += p[layer, "ffn_block"][0] * units
        heads = shape.heads // shape.kv_heads
        groups = p.get((layer, "groups"), [1.0] * shape.kv_heads)
        queries = p.get((layer, "heads"), [1.0] * shape.heads)
        inside = sum(
            g * (2 * h * (d + qkv) + sum(queries[i * heads : (i + 1) * heads]) * h * (2 * d + qkv))
            for i, g in enumerate(groups)
        )
        total += p[layer, "attention_block"][0] * (inside + d * out)
    base = shape.attention_params + shape.ffn_params
    if target_of == "total":
        total, base = total + shape.total_params - base, shape.total_params
    assert expected_share(model, config, sigma).item() == pytest.approx(total / base, abs=1e-6)


def test_every_gate_open_is_the_whole_model_and_half_the_units_are_counted():
    config = gates_config(gates={"attention": "none"})
    model = gated(config)
    assert expected_share(model, config, 1e-3).item() == pytest.approx(1.0, abs=1e-6)
    for site in sites(model):
        unit = site.gate("units")
        unit.settle(torch.arange(unit.size) % 2 == 0, reopen=True)
    sizes = Sizes.of(config, model)
    assert kept_share(model, config) == pytest.approx(sizes.plain_share(2, 4, 48), abs=1e-6)


@pytest.mark.parametrize("layout, least, most", [("structured", 0.30, 1.0), ("paper", 0.0, 0.05)])
def test_how_many_gates_the_task_reaches_at_the_start(layout, least, most):
    """Fault 6: at the paper's start 99 % of the noisy gates lie in the clamp's flat part. The paper layout shows it, and logs it."""
    config = gates_config(layout, schedule={"hold": 0.0}) if layout == "structured" else gates_config(layout)
    model = gated(config).train()
    FINEGATES.on_step(model, config, 0, 10_000)
    FINEGATES.before_forward(model, config, None)  # type: ignore[arg-type]
    ids = pico_ids(4, 12)
    model(ids, labels=ids).loss.backward()
    gradients = torch.cat([gate.logit.grad for _, gate in gates_of(model)])
    share = gradients.ne(0).float().mean().item()
    assert least <= share <= most
    metrics = FINEGATES.metrics(model, config)
    assert metrics["reached"] == pytest.approx(share, abs=0.01)
    if layout == "paper":
        assert f"reached {metrics['reached']:.1%}" in FINEGATES.health(metrics)


@pytest.mark.parametrize("s", [0.1, 0.3, 0.5])
def test_the_papers_penalty_by_hand(s):
    rows, columns = (torch.randn(n, generator=torch.Generator().manual_seed(n), dtype=torch.float64) for n in (7, 5))
    sides = [sum(normal((math.tanh(x) + 0.5) / 0.5) for x in side.tolist()) / len(side) for side in (rows, columns)]
    wanted = 0.5 * sum(abs(mean - (1 - s)) for mean in sides)
    assert paper_penalty(rows, columns, s).item() == pytest.approx(wanted, abs=1e-9)


def test_kurtosis_weights_by_hand():
    values = torch.randn(6, 40, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    values[2] *= torch.linspace(0, 3, 40, dtype=torch.float64) ** 3
    roots = []
    for row in values.tolist():
        mean = sum(row) / len(row)
        second, fourth = (sum((x - mean) ** n for x in row) / len(row) for n in (2, 4))
        roots.append(math.sqrt(fourth / second**2))
    powers = [math.exp(-root / 100) for root in roots]
    weights = kurtosis_weights(values)
    assert weights.tolist() == pytest.approx([x / sum(powers) for x in powers], abs=1e-9)
    assert weights.argmin() == 2 and kurtosis_weights(torch.ones(3, 4)).tolist() == pytest.approx([1 / 3] * 3)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_seed_draws_the_same_noise(layout):
    model, again, other = (gated(layout, seed=seed) for seed in (3, 3, 4))
    for one in (model, again, other):
        state_of(one).step = 5
        draw_noise(one, 0.1)
    first, second, third = (torch.cat([g.noise for _, g in gates_of(m)]) for m in (model, again, other))
    assert torch.equal(first, second) and not torch.equal(first, third)
    assert first.std().item() == pytest.approx(0.1, rel=0.2)
    for field in ("step", "micro", "rank"):
        setattr(state_of(again), field, 7)
        draw_noise(again, 0.1)
        assert not torch.equal(first, torch.cat([g.noise for _, g in gates_of(again)])), field
        setattr(state_of(again), field, {"step": 5}.get(field, 0))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nobody_elses_random_numbers_move(layout):
    config = gates_config(layout, gates={"lr": 0.05})
    before = torch.get_rng_state()
    model = gated(config)
    steps_of(model, 200, copying(rows=2), stop=3)
    draw_noise(model, 0.1)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_recomputed_forward_sees_the_same_draw(layout):
    """Activation checkpointing: gradients as without it."""
    config, found = (
        gates_config(layout, gates={"lr": 0.05}, schedule={"hold": 0.0} if layout == "structured" else {}),
        [],
    )
    for checkpointed in (False, True):
        model = gated(config).train()
        if checkpointed:
            model.activation_checkpointing_enable({"use_reentrant": False})
        scatter(model)
        FINEGATES.on_step(model, config, 0, 1000)
        FINEGATES.before_forward(model, config, None)  # type: ignore[arg-type]
        ids = pico_ids(3, 10)
        model(ids, labels=ids, use_cache=False).loss.backward()
        found.append(torch.cat([gate.logit.grad for _, gate in gates_of(model)]))
    assert found[0].abs().max() > 0 and (found[0] - found[1]).abs().max() <= 1e-6


def test_setting_mu_by_hand_reads_back():
    model = gated("paper")
    _, gate = gates_of(model)[0]
    put(gate, 0.25)
    assert torch.allclose(gate.folded(), torch.tensor(0.75))
