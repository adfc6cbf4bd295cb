"""Promise 3: every bit of a checkpoint is watched.

Files are drawn evenly and not by their size: a flip in a small header matters as much as one in a payload.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sparsmith as sm
from sparsmith.app import tune
from sparsmith.errors import CheckpointError
from sparsmith.exporting import verify
from sparsmith.runs import RunFolder
from sparsmith.training import saves
from tests.kit.checkpoints import files_of, make_home
from tests.kit.refusals import unlike_refusal
from tests.kit.small_run import make_recipe
from tests.kit.tally import Tally


@dataclass(frozen=True)
class Target:
    """A sealed folder and the ways in which people open it."""

    folder: Path
    ways: dict[str, Callable[[], Any]]


def checkpoints(home: Path) -> list[Target]:
    """The forms of a checkpoint that `make_home` writes, to be loaded and verified."""

    def target(kind: str, **options: Any) -> Target:
        folder = home / kind
        return Target(folder, {"load": lambda: sm.load(folder, **options), "verify": lambda: verify(folder)})

    return [target("delta", base=home / "base"), target("full"), target("export")]


def run_checkpoints(folder: Path) -> list[Target]:
    """The newest of two checkpoints of a run: verified, and as a resume chooses it, which must fall back on the older one."""
    root = RunFolder(tune(make_recipe(folder, steps=4, save_every=2, eval_every=None))).checkpoints
    older, newest = saves.listed(root)

    def resume() -> None:
        faults: list[CheckpointError] = []
        found = saves.latest(root, faults.append)
        if faults and found != older:
            raise AssertionError(f"{found} is offered in place of {older}")
        if faults:
            raise faults[0]

    return [Target(newest, {"resume": resume, "verify": lambda: verify(newest)})]


def damage(targets: Sequence[Target], flips: int, cuts: int, seed: int = 0) -> Tally:
    """`flips` one-bit flips, then `cuts` truncations, over all files of the targets.

    A case holds where every way refuses and names the file. Every file is put back, and at the end each way must open its folder
    again, or the refusals would prove nothing.
    """
    tally, stream = Tally(), random.Random(seed)
    files = [(target, file) for target in targets for file in files_of(target.folder)]
    for trial in range(flips + cuts):
        target, file = files[trial % len(files)]
        data = file.read_bytes()
        place = stream.randrange(len(data))
        what = f"bit flip at byte {place}" if trial < flips else f"cut after {place} bytes"
        flipped = data[:place] + bytes([data[place] ^ (1 << stream.randrange(8))]) + data[place + 1 :]
        file.write_bytes(flipped if trial < flips else data[:place])
        faults = {name: unlike_refusal(way, CheckpointError, (file.name,)) for name, way in target.ways.items()}
        tally.case(not any(faults.values()), f"{target.folder.name}/{file.name}: {what}: {faults}")
        file.write_bytes(data)
    for target in targets:
        for way in target.ways.values():
            way()
    tally.figures = {"flips": flips, "truncations": cuts, "files": len(files)}
    return tally


def run(folder: Path, flips: int = 1000, cuts: int = 300) -> Tally:
    """The trial over every form of a checkpoint."""
    targets = [*checkpoints(make_home(folder / "home")), *run_checkpoints(folder / "run")]
    return damage(targets, flips, cuts)
