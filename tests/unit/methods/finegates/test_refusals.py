"""What would be without effect, or choose without knowing, is refused by name."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from pydantic import ValidationError

import sparsmith as sm
from sparsmith.errors import EnvironmentFault, MethodError
from sparsmith.methods.finegates.choose import choose
from sparsmith.methods.finegates.gates import linears_of
from sparsmith.protocols.finegates import rival_of
from sparsmith.training import sharding
from tests.kit.pico import pico_ids, pico_model

WITHOUT_EFFECT = {
    "schedule.warmup": {"baseline": "random", "schedule": {"warmup": 0.1}},
    "schedule.settle_at": {"baseline": "magnitude", "schedule": {"settle_at": 0.4}},
    "settle.survivors": {"baseline": "random", "settle": {"survivors": "keep"}},
    "gates.blocks": {"baseline": "flap_like", "gates": {"blocks": True}},
    "gates.attention": {"baseline": "random", "gates": {"attention": "kv_groups+q_heads"}},
    "gates.lr": {"baseline": "random", "gates": {"lr": 0.1}, "settle": {"train_scales": False}},
    "settle.unit": {"gates": {"ffn": False}, "settle": {"unit": 8}},
    "settle.min_keep": {"gates": {"ffn": False}, "settle": {"min_keep": 2}},
}


@pytest.mark.parametrize("key", WITHOUT_EFFECT)
def test_a_setting_without_effect_is_refused(key):
    with pytest.raises(ValidationError, match=key):
        sm.FineGatesConfig(**WITHOUT_EFFECT[key])


def test_a_late_hold_of_a_rival_is_in_order():
    config = sm.FineGatesConfig(baseline="random", schedule={"hold": 0.3, "warmup": 0.3, "settle_at": 0.3})
    assert config.schedule.hold == 0.3


@pytest.mark.parametrize("name", ["importance", "flap_like"])
def test_a_rival_that_has_seen_nothing_does_not_choose(name):
    config = sm.FineGatesConfig(baseline=name)
    model = sm.craft(pico_model(), config)
    with pytest.raises(MethodError, match="not watched"):
        sm.settle(model)
    for linear in linears_of(model):
        linear.watching = True
    model.train()(pico_ids(), labels=pico_ids()).loss.backward()
    assert sum(p.numel() for p in sm.settle(model).parameters()) < sum(p.numel() for p in pico_model().parameters())


def test_a_rival_cuts_groups_under_a_global_scope_too():
    config = sm.FineGatesConfig(baseline="magnitude", target=0.5, settle={"scope": "global", "unit": 8})
    groups = choose(sm.craft(pico_model(), config), config).groups
    assert {len(kept) for kept in groups} == {1}, "half of the two groups"


def test_gates_are_not_sharded():
    model = sm.craft(pico_model(), sm.FineGatesConfig())
    state = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=SimpleNamespace(fsdp_version=2)))
    with pytest.raises(EnvironmentFault, match="budget reads the gates"):
        sharding.set_up(state, model)


@pytest.mark.parametrize("gates", [{"blocks": True}, {"attention": "kv_groups+q_heads"}])
def test_the_protocol_compares_nothing_that_a_rival_cannot_choose(gates):
    with pytest.raises(MethodError, match="no rival scores"):
        rival_of(sm.FineGatesConfig(gates=gates), "random")


def test_a_rival_without_scales_needs_no_rate():
    config = sm.FineGatesConfig(gates={"lr": 0.2}, settle={"train_scales": False})
    assert not rival_of(config, "random").settle.train_scales
