"""`sparsmith tune` in two processes: the series is that of one process, rank 0 alone writes and prints, one process reads the result."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

import sparsmith as sm
from sparsmith import ranks
from sparsmith.app import tune
from sparsmith.errors import MethodError
from sparsmith.runs import RunFolder
from tests.kit.launch import gap, launched
from tests.kit.small_run import make_recipe

CERTAIN = ["methods.0.adapter_dropout=0", "methods.0.lora.dropout=0"]
ACCELERATE = """\
distributed_type: FSDP
fsdp_config: {fsdp_version: 2}
num_machines: 1
num_processes: 2
mixed_precision: 'no'
use_cpu: true
"""


def series(run: Path) -> list[dict]:
    """The lines of metrics.jsonl, speed left out."""
    lines = [json.loads(line) for line in RunFolder(run).metrics.read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "tokens_per_second"} for line in lines]


@pytest.mark.skipif(sys.platform != "linux", reason="gloo under a launcher is tried on Linux")
def test_a_recipe_under_accelerate_launch_sharded(tmp_path):
    recipe = make_recipe(tmp_path)
    # one process takes two rows per forward, each of two ranks one: what is computed together is the same
    one = tune(recipe, [*CERTAIN, f"output={tmp_path / 'one'}", "train.micro_batch_size=2"])
    config = tmp_path / "accelerate.yaml"
    config.write_text(ACCELERATE)
    two = tmp_path / "two"
    words = [*CERTAIN, f"output={two}", "train.micro_batch_size=1"]
    done = launched(["sparsmith", "tune", str(recipe), *words], 2, by=config, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("run: ") == 1
    assert done.stderr.count("two 12/12") == 1
    mine, theirs = series(one), series(two)
    assert [line["step"] for line in mine] == [line["step"] for line in theirs]
    for a, b in zip(mine, theirs, strict=True):
        assert gap(a, b) <= 1e-5, a["step"]
    files = {str(path.relative_to(one)) for path in one.rglob("*") if path.is_file() and "checkpoint" not in str(path)}
    assert files == {
        str(path.relative_to(two)) for path in two.rglob("*") if path.is_file() and "checkpoint" not in str(path)
    }
    assert (two / "checkpoints/checkpoint-12/shards/rank-00001-of-00002.safetensors").is_file()
    tuned, same = sm.load(one), sm.load(two)
    assert all((p - q).abs().max() <= 1e-5 for p, q in zip(tuned.parameters(), same.parameters(), strict=True))


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


def test_one_process_of_a_machine_tells_a_fault_of_the_input(monkeypatch, capsys):
    from sparsmith.cli.entry import run

    for rank in ("0", "1"):
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert run(["tune", "nowhere.yaml"]) != 0
        assert bool(capsys.readouterr().err) == (rank == "0")
