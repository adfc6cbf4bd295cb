"""Promise 19: old work opens. Every folder of tests/golden, of each format version, opens with the logits that it had.

The tolerance of 1e-5 is for another build of torch, which may sum in another order; on the build that wrote them they are equal bit by bit.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerState

import sparsmith as sm
from sparsmith.app import load_recipe, report
from sparsmith.crafting.identity import FILE
from sparsmith.errors import CheckpointError, SparsmithError
from sparsmith.exporting import verify
from sparsmith.manifests import MANIFEST
from sparsmith.runs import RunFolder, is_run
from sparsmith.training import saves
from sparsmith.training.state import read_state
from tests.golden.make import GOLDEN, LOGITS, logits_of
from tests.kit.checkpoints import edit_json
from tests.kit.refusals import unlike_refusal
from tests.kit.tally import Tally

TOLERANCE = 1e-5
FUTURE = 99


def opens(work: Path) -> Tally:
    """Each golden folder: verified, loaded, its logits held against those of its making; a run is read, reported, its checkpoint opened."""
    tally, drifts = Tally(), {}
    for version in versions():
        known = json.loads((version / LOGITS).read_text())
        for kind in kinds(version):
            name, folder = f"{version.name}/{kind}", work / version.name / kind
            shutil.copytree(version / kind, folder)
            try:
                drifts[name] = _drift(version, folder, known[kind])
                tally.case(drifts[name] <= TOLERANCE, f"{name}: logits differ by {drifts[name]:.2g}")
            except SparsmithError as fault:
                tally.case(False, f"{name}: {fault}")
    tally.figures = {"largest difference of a logit": drifts}
    return tally


def futures(work: Path) -> Tally:
    """A folder of a version that is not known yet is refused with both versions and what to do; one of no version at all is refused too."""
    tally = Tally()
    for version in versions():
        for kind in kinds(version):
            model = Path("model") if is_run(version / kind) else Path()
            for what, change in CHANGES.items():
                folder = work / "future"
                shutil.copytree(version / kind, folder)
                change(folder / model)
                names = (str(FUTURE), "which this sparsmith reads", "newer sparsmith") if "future" in what else ()
                ways = [partial(sm.load, folder), partial(verify, folder)]
                faults = [unlike_refusal(way, CheckpointError, names) for way in ways]
                tally.case(not any(faults), f"{version.name}/{kind}, {what}: {faults}")
                shutil.rmtree(folder)
    return tally


def run(folder: Path) -> Tally:
    """Both."""
    tally = opens(folder)
    tally.add(futures(folder))
    return tally


def versions() -> list[Path]:
    return sorted(path for path in GOLDEN.glob("v*") if path.is_dir())


def kinds(version: Path) -> list[str]:
    return [kind for kind in json.loads((version / LOGITS).read_text()) if kind != "ids"]


def _drift(version: Path, folder: Path, known: list[float]) -> float:
    """The largest difference of a logit."""
    verify(folder)
    if is_run(folder):
        load_recipe(folder / "recipe.yaml", check_paths=False)
        assert report([folder]).stat().st_size
        for checkpoint in saves.listed(RunFolder(folder).checkpoints):
            TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
            read_state(checkpoint)
    base = {} if folder.name == "export" else {"base": version / "base"}
    found = logits_of(sm.load(folder, **base)).flatten()
    return float((found - torch.tensor(known)).abs().max())


def _manifest_of_the_future(folder: Path) -> None:
    data = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**data, "format": FUTURE}))


def _identity(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / FILE, lambda data: data.update(changes))


def _no_version(folder: Path) -> None:
    edit_json(folder / FILE, lambda data: data.pop("format_version"))


CHANGES: dict[str, Callable[[Path], None]] = {
    "a manifest of the future": _manifest_of_the_future,
    "a checkpoint of the future": _identity(format_version=FUTURE),
    "a checkpoint of the future with keys that are not known": _identity(format_version=FUTURE, novelty=1),
    "a checkpoint of a version that never was": _identity(format_version=0),
    "a checkpoint without a version": _no_version,
}
