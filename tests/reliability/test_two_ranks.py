"""Two gloo ranks on CPU, DDP and FSDP2: the figures of one process, one set of weights, checkpoints that any number of ranks takes up."""

from __future__ import annotations

import sys

import pytest

import sparsmith as sm
from sparsmith import anatomy
from sparsmith.crafting.memory_per_rank import Load, sharded_weights
from tests.kit.launch import gap
from tests.kit.pico import pico_config
from tests.kit.two_ranks import CONFIG, STEPS, pico_runs, tune

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="gloo is tried on Linux")

# sums over two halves are rounded differently from one sum; measured: 1e-6
NEAR = 1e-5


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return tune(str(tmp_path_factory.mktemp("alone") / "run"))


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """One start of two processes for all cases; one case goes on from what one process has left, two leave something for one process."""
    folder = tmp_path_factory.mktemp("two")
    tune(str(folder / "from-one"), stop=4, save=4)
    figures = pico_runs(
        folder,
        2,
        ddp={"run": folder / "ddp"},
        fsdp2={"run": folder / "fsdp2", "sharded": True},
        ddp_cut={"run": folder / "ddp-cut", "stop": 4, "save": 4},
        fsdp2_cut={"run": folder / "fsdp2-cut", "sharded": True, "stop": 4, "save": 4},
        fsdp2_again={"run": folder / "fsdp2-cut", "sharded": True, "stop": 8, "save": 4},
        from_one={"run": folder / "from-one", "sharded": True, "save": 4, "stop": 8},
    )
    return folder, figures


@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_two_ranks_equal_one_process(alone, ranks, how):
    first, second = ranks[1][how]
    assert first["weights"] == second["weights"] and first["losses"] == second["losses"]
    assert len(first["losses"]) == STEPS and first["losses"][str(STEPS)] < first["losses"]["1"]
    for figure in ("losses", "balance", "norms", "health"):
        assert gap(first[figure], alone[figure]) <= NEAR, figure
    assert first["dead"] == alone["dead"] and max(first["dead"].values()) > 0
    assert gap(first["weights"], alone["weights"]) <= NEAR


def test_each_rank_of_a_sharded_model_holds_half(alone, ranks):
    held = [one["parameter_bytes"] for one in ranks[1]["fsdp2"]]
    load = Load(
        shape=anatomy.shape_of(pico_config("llama")),
        added=sm.plan(pico_config("llama"), CONFIG).trained_params,
        trained=0,
        optimizer=0,
        dtype="float32",
        quant="none",
        activation_floats=0,
        lora=None,
        checkpointing=False,
        max_length=12,
        batch_size=4,
        micro_batch=4,
    )
    assert held == [sharded_weights(load, 2)] * 2  # what the plan says
    assert held == [alone["parameter_bytes"] / 2] * 2
    assert [one["parameter_bytes"] for one in ranks[1]["ddp"]] == [alone["parameter_bytes"]] * 2


def test_a_sharded_run_goes_on_bit_for_bit(ranks):
    whole, again = ranks[1]["fsdp2"][0], ranks[1]["fsdp2_again"][0]
    steps = [str(step) for step in range(1, 9)]
    assert [again["losses"][step] for step in steps] == [whole["losses"][step] for step in steps]


@pytest.mark.parametrize("run", ["ddp-cut", "fsdp2-cut"])
def test_one_process_goes_on_with_what_two_ranks_left(alone, ranks, run):
    assert sorted(file.name for file in (ranks[0] / "fsdp2-cut/checkpoint-8/shards").iterdir()) == [
        "model.json",
        "rank-00000-of-00002.safetensors",
        "rank-00001-of-00002.safetensors",
    ]
    figures = tune(str(ranks[0] / run))
    assert gap(figures["losses"], alone["losses"]) <= NEAR and len(figures["losses"]) == STEPS
    assert gap(figures["weights"], alone["weights"]) <= NEAR


def test_two_ranks_go_on_with_what_one_process_left_and_back(alone, ranks):
    assert gap(ranks[1]["from_one"][0]["losses"], alone["losses"]) <= NEAR
    figures = tune(str(ranks[0] / "from-one"))
    assert gap(figures["losses"], alone["losses"]) <= NEAR and len(figures["losses"]) == STEPS
    assert gap(figures["weights"], alone["weights"]) <= NEAR
