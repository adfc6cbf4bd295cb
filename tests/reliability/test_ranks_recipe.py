"""`sparsmith tune` in several processes (the trial of promise 21, short form), and what is refused or told by whom."""

from __future__ import annotations

import sys

import pytest

from sparsmith import ranks
from sparsmith.cli.entry import run
from sparsmith.errors import MethodError
from tests.kit.trials.ranks import recipe_trial


@pytest.mark.skipif(sys.platform != "linux", reason="gloo under a launcher is tried on Linux")
@pytest.mark.parametrize("way", [("accelerate", "FSDP2"), ("torchrun", "DDP")], ids=lambda way: way[0])
def test_a_recipe_under_a_launcher(tmp_path, way):
    tally = recipe_trial(tmp_path, [way])
    assert tally.whole and tally.tried == 6, tally.failures


def test_a_batch_that_cannot_be_shared_out_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(MethodError, match=r"train.batch_size: found 16 rows per step for 3 processes"):
        ranks.rows_per_rank(16, None)
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert ranks.rows_per_rank(16, None) == (4, 1)
    assert ranks.rows_per_rank(16, 2) == (2, 2)
    assert ranks.rows_per_rank(16, 8) == (4, 1)  # a micro-batch larger than a rank's share is the share
    with pytest.raises(MethodError, match=r"train.micro_batch_size: found 3 rows"):
        ranks.rows_per_rank(16, 3)


@pytest.mark.parametrize("rank", ["0", "1"])
def test_one_process_of_a_machine_tells_a_fault_of_the_input(monkeypatch, capsys, rank):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("LOCAL_RANK", rank)
    assert run(["tune", "nowhere.yaml"]) != 0
    assert bool(capsys.readouterr().err) == (rank == "0")
