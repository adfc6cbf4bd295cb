"""The dry step: too little memory is told before anything is trained, and enough memory changes no bit of the run."""

from __future__ import annotations

import copy
import json
import random
import re
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from sparsmith.app import tune
from sparsmith.crafting.memory import Memory
from sparsmith.errors import EnvironmentFault
from sparsmith.training.callbacks.dry_step import DryStep, _undone
from sparsmith.training.out_of_memory import told_in_bytes
from tests.kit.small_run import make_recipe

MEMORY = Memory(weights=1000, gradients=200, optimizer=400, activations={"low": 1, "expected": 2, "high": 3000})


def series(run: Path) -> list[dict]:
    """The lines of the run, without what a clock has measured."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in lines]


def weights(run: Path) -> dict[str, bytes]:
    return {str(file.relative_to(run)): file.read_bytes() for file in sorted((run / "model").rglob("*.safetensors"))}


def test_it_changes_no_bit_of_the_run(tmp_path, monkeypatch):
    tried = []
    real = DryStep._step
    monkeypatch.setattr(DryStep, "_step", lambda self, batch: tried.append(self.shape) or real(self, batch))
    runs = {}
    for dry in (True, False):
        recipe = make_recipe(tmp_path, steps=6, save_every=3, dry_step=dry)
        runs[dry] = tune(recipe, [f"output={tmp_path / str(dry)}"])
    assert len(tried) == 1 and tried[0][0] >= 1
    assert weights(runs[True]) and weights(runs[True]) == weights(runs[False])
    assert series(runs[True]) == series(runs[False])


def test_everything_is_put_back():
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3), torch.nn.Dropout(0.5)).eval()
    model[0].steps, model[0].kind = 5, "a"
    before, states = (
        copy.deepcopy(model.state_dict()),
        (torch.get_rng_state(), random.getstate(), np.random.get_state()),
    )
    counted = model[1].num_batches_tracked
    with pytest.raises(ZeroDivisionError), _undone(model):
        model.train()(torch.randn(4, 3)).sum().backward()
        model[0].steps, model[0].kind = 6, "b"
        model[1].num_batches_tracked = torch.tensor(9)
        random.random(), np.random.rand()
        raise ZeroDivisionError
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model[1].num_batches_tracked is counted and not model.training
    assert (model[0].steps, model[0].kind) == (5, "a")
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), states[2], strict=True))


# Rows of 2,000 tokens, 64 at a time, with attention scores written out: 4 bytes x 64 rows x 4 heads x 2,000^2 = 4.1 GB for one tensor.
LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (4_000_000_000, 4_000_000_000))
from sparsmith.cli import main
sys.exit(main(["tune", sys.argv[1], "--json"]))
"""


def test_too_little_memory_is_told_in_bytes_before_anything_is_trained(tmp_path):
    path = make_recipe(tmp_path, batch_size=64, micro_batch_size=64, steps=3, save_every=1)
    recipe = yaml.safe_load(path.read_text())
    for source in ("sums", "words"):
        file = tmp_path / f"{source}.jsonl"
        short = file.read_text()
        long = "".join(json.dumps({"prompt": "a", "completion": "b" * (1990 - i % 3)}) + "\n" for i in range(70))
        file.write_text(short + long)
    recipe["data"] |= {"max_length": 2048, "packing": False, "eval": []}
    recipe["model"]["attention"] = "eager"
    recipe["train"].pop("eval_every")
    path.write_text(yaml.safe_dump(recipe))
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(path)], capture_output=True, text=True, cwd=tmp_path, timeout=300
    )
    assert done.returncode == 9, done.stderr[-2000:]
    fault = json.loads(done.stdout)["error"]
    assert fault["kind"] == "EnvironmentFault" and fault["where"].startswith("dry step"), fault
    assert re.search(r"out of memory on cpu: [\d.]+ [MG]B more were asked for, and [\d.]+ GB were free", fault["found"])
    assert "activations" in fault["expected"] and "train.micro_batch_size (now 64)" in fault["mend"]
    run = tmp_path / "run"
    assert not list(run.rglob("*.safetensors"))
    assert "Traceback" not in done.stderr


def test_what_is_no_lack_of_memory_passes():
    with pytest.raises(RuntimeError, match="shapes"), told_in_bytes("here", MEMORY, "mend", torch.device("cpu")):
        raise RuntimeError("shapes do not fit")


@pytest.mark.parametrize(
    "fault, asked",
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has"), "2.68 GB"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1500 bytes. Error"), "1.5 KB"),
        (MemoryError(), "the memory ended"),
    ],
)
def test_every_allocator_is_understood(fault, asked):
    with pytest.raises(EnvironmentFault) as told, told_in_bytes("here", MEMORY, "mend", torch.device("cpu")):
        raise fault
    assert asked in told.value.found and "4.6 KB by the plan" in told.value.expected


def test_what_filled_the_memory_is_let_go():
    held = []

    def fill() -> None:
        large = torch.zeros(3)
        held.append(weakref.ref(large))
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(EnvironmentFault) as told, told_in_bytes("here", MEMORY, "mend", torch.device("cpu")):
        fill()
    assert held[0]() is None and told.value.__suppress_context__
