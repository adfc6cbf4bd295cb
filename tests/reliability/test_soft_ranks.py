"""SoFT on two gloo ranks, DDP and FSDP2: one series of losses, that of one process, and equal weights on both."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

import sparsmith as sm
from sparsmith.errors import EnvironmentFault
from sparsmith.training import sharding
from tests.kit.depths import deep_model
from tests.kit.launch import gap
from tests.kit.two_ranks import METHODS, STEPS, pico_runs, tune

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="gloo is tried on Linux")

# sums over two halves are rounded differently from one sum; Adam divides by a gradient's size, so where it is near 0 a weight shows it
NEAR, AFTER_ADAM = 1e-5, 1e-4
WHOLE = ("soft", "soft, sampled", "soft, frozen trunk")
SHARDED = ("soft", "soft, tied", "soft LoRA", "soft, frozen trunk")


@pytest.fixture(scope="module")
def figures(tmp_path_factory):
    """One start of two processes for all cases."""
    folder = tmp_path_factory.mktemp("two")
    jobs = {f"ddp-{n}": {"run": folder / f"d{n}", "method": name} for n, name in enumerate(WHOLE)}
    jobs |= {f"fsdp-{n}": {"run": folder / f"f{n}", "method": name, "sharded": True} for n, name in enumerate(SHARDED)}
    jobs["cut"] = {"run": folder / "cut", "method": "soft, sampled", "stop": 4, "save": 4}
    jobs["again"] = {"run": folder / "cut", "method": "soft, sampled", "save": 4}
    return pico_runs(folder, 2, **jobs), folder


CASES = [("ddp", n, name) for n, name in enumerate(WHOLE)] + [("fsdp", n, name) for n, name in enumerate(SHARDED)]


@pytest.mark.parametrize("how, number, name", CASES, ids=[f"{how}, {name}" for how, _, name in CASES])
def test_two_ranks_equal_one_process(figures, tmp_path, how, number, name):
    first, second = figures[0][f"{how}-{number}"]
    assert first["weights"] == second["weights"] and first["losses"] == second["losses"]
    assert first["health"] == second["health"] and len(first["losses"]) == STEPS
    alone = tune(str(tmp_path / "run"), method=name)
    for figure, limit in (("losses", NEAR), ("health", NEAR), ("norms", AFTER_ADAM), ("weights", AFTER_ADAM)):
        assert gap(first[figure], alone[figure]) <= limit, figure


def test_a_run_goes_on_with_the_same_draws(figures):
    wanted, again = figures[0]["ddp-1"][0], figures[0]["again"][0]
    assert again["losses"] == wanted["losses"] and again["weights"] == wanted["weights"]
    assert again["health"] == wanted["health"]


@pytest.mark.parametrize("name", ["soft, sampled", "soft, layer dropout"])
def test_what_leaves_a_tensor_idle_is_not_sharded(name, monkeypatch):
    model = sm.craft(deep_model(), METHODS[name], proof=False)
    with pytest.raises(EnvironmentFault, match="settings of `soft` that leave blocks out"):
        sharding.set_up(SimpleNamespace(state=SimpleNamespace(fsdp_plugin=SimpleNamespace(fsdp_version=2))), model)
