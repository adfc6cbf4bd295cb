"""Expert choice on two gloo ranks: one series of losses, that of one process, and the same thresholds on both."""

from __future__ import annotations

import sys

import pytest

from tests.kit.launch import gap
from tests.kit.two_ranks import STEPS, pico_runs, tune

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="gloo is tried on Linux")

# sums over two halves are rounded differently from one sum; Adam divides by a gradient's size, so where it is near 0 a weight shows it
NEAR, AFTER_ADAM = 1e-5, 1e-4


@pytest.mark.long
def test_two_ranks_equal_one_process(tmp_path):
    jobs = {
        "ddp": {"run": tmp_path / "ddp", "method": "expert choice"},
        "cut": {"run": tmp_path / "cut", "method": "expert choice", "stop": 4, "save": 4},
        "again": {"run": tmp_path / "cut", "method": "expert choice", "save": 4},
    }
    figures = pico_runs(tmp_path, 2, **jobs)
    first, second = figures["ddp"]
    assert first["thresholds"] == second["thresholds"] and len(first["thresholds"]) == 2
    assert first["weights"] == second["weights"] and first["losses"] == second["losses"]
    assert first["health"] == second["health"] and len(first["losses"]) == STEPS
    again = figures["again"][0]
    assert again["thresholds"] == first["thresholds"] and again["weights"] == first["weights"]
    alone = tune(str(tmp_path / "alone"), method="expert choice")
    assert all(value > 0 for row in alone["thresholds"].values() for value in row)
    for figure, limit in (("losses", NEAR), ("thresholds", NEAR), ("norms", AFTER_ADAM), ("weights", AFTER_ADAM)):
        assert gap(first[figure], alone[figure]) <= limit, figure
