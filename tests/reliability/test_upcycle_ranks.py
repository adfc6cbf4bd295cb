"""A mixture on two gloo ranks, DDP and FSDP2: the losses of one process, the balance loss over the rows of both, and equal weights."""

from __future__ import annotations

import sys

import pytest

from tests.kit.launch import gap
from tests.kit.two_ranks import STEPS, pico_runs, tune

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="gloo is tried on Linux")

# sums over two halves are rounded differently from one sum; Adam divides by a gradient's size, so where it is near 0 a weight shows it
NEAR, AFTER_ADAM = 1e-5, 1e-4
NAMES = {"full": "upcycle", "lora": "upcycle, lora"}


@pytest.fixture(scope="module")
def figures(tmp_path_factory):
    """One start of two processes for all cases."""
    folder = tmp_path_factory.mktemp("two")
    jobs = {
        f"{how}-{n}": {"run": folder / f"{how}{n}", "method": name, "sharded": how == "fsdp2"}
        for n, name in NAMES.items()
        for how in ("ddp", "fsdp2")
    }
    return pico_runs(folder, 2, **jobs)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    return {short: tune(str(folder / short), method=name) for short, name in NAMES.items()}


@pytest.mark.parametrize("short", NAMES)
@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_two_ranks_equal_one_process(figures, alone, how, short):
    (first, second), wanted = figures[f"{how}-{short}"], alone[short]
    assert first["weights"] == second["weights"] and first["losses"] == second["losses"]
    assert len(first["losses"]) == len(first["balance"]) == STEPS and first["health"]["1"]
    for figure, limit in (
        ("losses", NEAR),
        ("balance", NEAR),
        ("health", NEAR),
        ("norms", AFTER_ADAM),
        ("weights", AFTER_ADAM),
    ):
        assert gap(first[figure], wanted[figure]) <= limit, figure
