"""Gates on two gloo ranks: each rank draws from a stream of its own, the parts of the loss add up, and both end with equal weights."""

from __future__ import annotations

import sys

import pytest

from tests.kit.launch import gap
from tests.kit.two_ranks import STEPS, pico_runs, tune

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="gloo is tried on Linux")

NEAR, AFTER_ADAM = 1e-5, 1e-3
"""Sums over two halves are rounded otherwise than one sum, and Adam with a rate of 0.6 magnifies what is near 0."""
NOISY, STILL = (
    ("finegates", "finegates, paper"),
    (
        "finegates, no noise",
        "finegates, by importance",
        "finegates, paper, no noise",
    ),
)
STOP = 7
"""Of 12 steps: gates still learn, so the last noise is there to be seen."""


@pytest.fixture(scope="module")
def figures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    jobs = {f"r{n}": {"run": folder / f"r{n}", "method": name} for n, name in enumerate((*NOISY, *STILL))}
    jobs |= {f"s{n}": {"run": folder / f"s{n}", "method": name, "stop": STOP} for n, name in enumerate(NOISY)}
    jobs["cut"] = {"run": folder / "cut", "method": "finegates", "stop": 4, "save": 4}
    jobs["again"] = {"run": folder / "cut", "method": "finegates", "save": 4}
    return pico_runs(folder, 2, **jobs)


@pytest.mark.parametrize("number, name", list(enumerate((*NOISY, *STILL))), ids=(*NOISY, *STILL))
def test_both_ranks_end_with_equal_weights(figures, number, name):
    first, second = figures[f"r{number}"]
    assert first["weights"] == second["weights"] and first["losses"] == second["losses"]
    assert len(first["losses"]) == STEPS


@pytest.mark.parametrize("number, name", list(enumerate(NOISY)), ids=NOISY)
def test_each_rank_draws_for_itself(figures, number, name):
    first, second = (figures[f"s{number}"][rank]["noise"] for rank in (0, 1))
    assert first.keys() == second.keys() and first
    assert all(any(values) and values != second[gate] for gate, values in first.items())


@pytest.mark.parametrize("number, name", list(enumerate(STILL, len(NOISY))), ids=STILL)
def test_without_noise_two_ranks_are_one_process(figures, tmp_path, number, name):
    two, alone = figures[f"r{number}"][0], tune(str(tmp_path / "run"), method=name)
    assert gap(two["losses"], alone["losses"]) <= NEAR * 100  # budget and penalty have weights of 10 to 50
    assert gap(two["norms"], alone["norms"]) <= AFTER_ADAM
    assert gap(two["weights"], alone["weights"]) <= AFTER_ADAM


def test_a_cut_run_draws_on(figures):
    wanted, again = figures["r0"][0], figures["again"][0]
    assert again["losses"] == wanted["losses"] and again["weights"] == wanted["weights"]
