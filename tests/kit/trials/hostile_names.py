"""Promise 17: no name of a manifest, an index, a recipe or a link leads out of the folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

import sparsmith as sm
from sparsmith import durable
from sparsmith.errors import CheckpointError, RecipeErrors, SparsmithError
from sparsmith.exporting import verify
from sparsmith.exporting.foreign import read_weights
from sparsmith.manifests import manifest_bytes
from sparsmith.methods import registry
from sparsmith.recipe import load_text
from sparsmith.recipe.yaml_tree import dump_yaml, parse
from tests.kit.checkpoints import make_home
from tests.kit.hostile import HOSTILE
from tests.kit.recipes import GOOD
from tests.kit.refusals import unlike_refusal
from tests.kit.tally import Tally
from tests.kit.trials.strict_loading import open_base

INDEX = "model.safetensors.index.json"


def names(home: Path, work: Path, every: int = 1) -> Tally:
    """Each hostile name (each `every`-th) in a manifest, three kinds of index, and the two names of a recipe that become parts of paths."""
    tally = Tally()
    for name in HOSTILE[::every]:
        for what, trial in TRIALS.items():
            folder = work / "try"
            shutil.rmtree(folder, ignore_errors=True)
            faults = trial(home, folder, name)
            tally.case(not any(faults), f"{name!r} in {what}: {' / '.join(faults)}")
    return tally


def links(home: Path, work: Path) -> Tally:
    """A file replaced by a link to the same bytes outside, as an archive could unpack it."""
    tally = Tally()
    for file, open_it in (
        ("full/model.safetensors", sm.load),
        ("full/sparsmith.json", verify),
        ("full/generation_config.json", sm.load),
        ("base/model.safetensors", open_base),
        ("base/config.json", open_base),
        ("base/model.safetensors", _read_foreign),
    ):
        folder = work / "linked"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(home / Path(file).parent, folder)
        place, outside = folder / Path(file).name, work / "outside"
        place.replace(outside)
        place.symlink_to(outside)
        fault = unlike_refusal(partial(open_it, folder), CheckpointError, (place.name,))
        tally.case(not fault, f"{file} as a link outward: {fault}")
    return tally


def run(folder: Path) -> Tally:
    """All names, and links."""
    home = make_home(folder / "home")
    tally = names(home, folder)
    tally.figures = {"names": len(HOSTILE), "places": list(TRIALS)}
    tally.add(links(home, folder))
    return tally


def _manifest(home: Path, folder: Path, name: str) -> list[str]:
    shutil.copytree(home / "full", folder)
    rows = durable.read_manifest(folder)
    forged = {**rows, name: next(iter(rows.values()))}
    try:
        (folder / durable.MANIFEST).write_bytes(manifest_bytes(forged))
    except UnicodeEncodeError:  # half a surrogate cannot be written as it is, only escaped
        (folder / durable.MANIFEST).write_text(json.dumps({"format": 1, "files": {name: {}}, "sha256": ""}))
    return _refusals(folder, sm.load, verify)


def _index_of_ours(home: Path, folder: Path, name: str) -> list[str]:
    shutil.copytree(home / "full", folder)
    _write_index(folder, name)
    durable.seal(folder)
    return _refusals(folder, sm.load)


def _index_of_a_base(home: Path, folder: Path, name: str) -> list[str]:
    shutil.copytree(home / "base", folder)
    _write_index(folder, name)
    return _refusals(folder, open_base, _read_foreign)


def _name_in_a_recipe(key: str) -> Callable[[Path, Path, str], list[str]]:
    def trial(home: Path, folder: Path, name: str) -> list[str]:
        data = parse(GOOD, "good").data
        data["data"]["train"][0][key] = name
        try:
            text = dump_yaml(data)
        except UnicodeEncodeError:
            text = GOOD
        load = partial(load_text, text, "r.yaml", (), registry.config_classes(), check_paths=False)
        return [unlike_refusal(load, RecipeErrors, (f"data.train.0.{key}",))]

    return trial


def _write_index(folder: Path, name: str) -> None:
    """The weights outside, where an index that is followed would find them."""
    weights = folder / "model.safetensors"
    weight_map = dict.fromkeys(load_file(weights), name)
    weights.replace(folder.parent / "a")
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def _read_foreign(folder: Path) -> list[Any]:
    return list(read_weights(folder))


def _refusals(folder: Path, *ways: Callable[[Path], Any]) -> list[str]:
    return [unlike_refusal(partial(way, folder), SparsmithError) for way in ways]


TRIALS: dict[str, Callable[[Path, Path, str], list[str]]] = {
    "a manifest": _manifest,
    "the index of our checkpoint": _index_of_ours,
    "the index of a base": _index_of_a_base,
    "the name of a source": _name_in_a_recipe("name"),
    "the domain of a source": _name_in_a_recipe("domain"),
}
