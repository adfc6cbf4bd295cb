"""Promises 1 and 2: kill -9 at any moment, and inside a save; only whole checkpoints count; the resumed run has the uncut run's bits."""

from __future__ import annotations

import json
import os
import random
import signal
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import Any

from sparsmith import durable
from sparsmith.errors import CheckpointError
from sparsmith.fingerprints import file_digest
from sparsmith.training.saves import listed
from tests.kit import forks
from tests.kit.small_run import METHODS, make_recipe
from tests.kit.tally import Tally

WRITING = ("entry_of", "_fsync", "_put_in_place")
"""Functions of `durable` that every write goes through; a process is killed before one of their calls."""


RANDOM, AIMED = 60, 60


@cache
def whole_trial() -> tuple[Tally, Tally]:
    """Both promises over every method at full size, once per process."""
    same, whole = Tally(), Tally()
    with tempfile.TemporaryDirectory(prefix="kills-") as folder:
        for method in METHODS:
            tallies = kill_trial(Path(folder) / method, method, kills=RANDOM, aimed=AIMED)
            same.add(tallies[0])
            whole.add(tallies[1])
    return same, whole


def kill_trial(folder: Path, method: str = "pesc", *, kills: int, aimed: int, seed: int = 0) -> tuple[Tally, Tally]:
    """Kill runs at `kills` random moments and at `aimed` calls inside writes, resume each, compare with the uncut run.

    Returns:
        (promise 1: every run resumed to the same bits, promise 2: after each kill only whole checkpoints were listed, and the next start
        left no rest).
    """
    recipe = make_recipe(folder, method)
    uncut = folder / "uncut"
    began = time.perf_counter()
    calls = folder.with_suffix(".calls")
    assert forks.run(["tune", recipe, f"output={uncut}"], folder / "uncut.log", count_writes, calls) == 0
    seconds, writes = time.perf_counter() - began, int(calls.read_text())
    wanted = bits_of(uncut)
    stream = random.Random(seed)
    moments: list[tuple[str, float]] = [("moment", stream.uniform(0.05, 1) * seconds) for _ in range(kills)]
    moments += [("write", 1 + index * (writes - 1) // max(aimed - 1, 1)) for index in range(aimed)]
    same, whole = Tally(), Tally()
    for number, (kind, when) in enumerate(moments):
        run, log = folder / f"run{number}", folder / f"run{number}.log"
        command = ["tune", recipe, f"output={run}"]
        if kind == "moment":
            forks.start(command, log).kill_after(when)
        else:
            forks.run(command, log, die_at_write, int(when))
        what = f"{method}, killed at {kind} {when:.3g}"
        _only_whole(run, whole, what)
        code = 0 if (run / "report.html").is_file() else forks.run(command, log)
        same.case(code == 0 and bits_of(run) == wanted, f"{what}: exit {code}, {_difference(run, wanted)}")
        rests = [path for path in run.rglob(".*") if ".writing-" in path.name or ".replaced-" in path.name]
        whole.case(not rests, f"{what}: left {rests}")
    same.figures = {"uncut_seconds": round(seconds, 2), "writes_in_a_run": writes, "random": kills, "aimed": aimed}
    return same, whole


def bits_of(run: Path) -> dict[str, Any]:
    """sha256 of every weight file, and the text of every loss by step."""
    try:
        weights = {file.name: file_digest(file).hex() for file in sorted((run / "model").glob("*.safetensors"))}
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    except (OSError, ValueError) as error:
        return {"fault": repr(error)}
    losses = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    evaluated = [(line["step"], line["eval_loss"]) for line in lines if "eval_loss" in line]
    return {"weights": weights, "losses": losses, "evaluated": evaluated}


def _difference(run: Path, wanted: dict[str, Any]) -> str:
    found = bits_of(run)
    return ", ".join(f"other {key}" for key in wanted if found.get(key) != wanted[key]) or "equal"


def _only_whole(run: Path, tally: Tally, what: str) -> None:
    """Everything that is listed is whole to the last byte."""
    for checkpoint in listed(run / "checkpoints"):
        try:
            durable.verify_folder(checkpoint)
            durable.verify_folder(checkpoint / "model")
            fault = ""
        except CheckpointError as error:
            fault = str(error)
        tally.case(not fault, f"{what}: {fault}")


def count_writes(path: Path) -> None:
    """In the child: keep the number of calls so far in a file."""
    _before_each_write(lambda number: path.write_text(str(number)))


def die_at_write(at: int) -> None:
    """In the child: kill this process before its `at`-th call."""
    _before_each_write(lambda number: os.kill(os.getpid(), signal.SIGKILL) if number == at else None)


def _before_each_write(act: Any) -> None:
    called = 0

    def wrapped(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal called
            called += 1
            act(called)
            return function(*args, **kwargs)

        return call

    for name in WRITING:
        setattr(durable, name, wrapped(getattr(durable, name)))
