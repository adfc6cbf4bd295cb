"""Promise 15: each tensor of each file is asked for by its name, its shape and its number type.

The folders are sealed again after every change, as a careful forger would: hashes alone do not refuse these. A base has no list of its
number types (a float tensor of another precision is legal there, and cast); it is recast to whole numbers instead.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, safe_open, save_file

import sparsmith as sm
from sparsmith import durable
from sparsmith.crafting.base_model import load_base
from sparsmith.crafting.tensors import read_rows
from sparsmith.errors import CheckpointError, CheckpointMismatch
from sparsmith.exporting import verify
from sparsmith.recipe.schema import ModelSettings
from tests.kit.checkpoints import DELTA, IDENTITY, LORA_FILE, edit_tensors, make_home
from tests.kit.refusals import unlike_refusal
from tests.kit.tally import Tally

Tensors = dict[str, torch.Tensor]
Change = Callable[[Tensors, str], None]
FILES = (f"delta/{DELTA}", f"delta/{LORA_FILE}", "full/model.safetensors", "base/model.safetensors")


def drop(tensors: Tensors, name: str) -> None:
    del tensors[name]


def rename(tensors: Tensors, name: str) -> None:
    tensors[name.replace("weight", "wieght") if "weight" in name else name + "s"] = tensors.pop(name)


def reshape(tensors: Tensors, name: str) -> None:
    tensors[name] = tensors[name].reshape(1, -1).clone()


def recast(tensors: Tensors, name: str) -> None:
    tensors[name] = tensors[name].to(torch.bfloat16)


def to_whole_numbers(tensors: Tensors, name: str) -> None:
    tensors[name] = tensors[name].to(torch.int32)


def open_base(folder: Path) -> Any:
    """A base as `plan`, `tune` and `load` open it."""
    return load_base(ModelSettings(path=str(folder)))


def every_tensor(home: Path, every: int = 1) -> Tally:
    """Drop, rename, reshape and recast each tensor of `FILES` (each `every`-th case)."""
    tally = Tally()
    for number, (file, name, change) in enumerate(_cases(home)):
        if number % every:
            continue
        path, base = home / file, file.startswith("base")
        whole, manifest = path.read_bytes(), path.parent / durable.MANIFEST
        sealed = None if base else manifest.read_bytes()
        edit_tensors(path, partial(change, name=name), sealed=not base)
        names = (name, "Did you mean") if change is rename else (name,)
        way = partial(open_base if base else sm.load, path.parent)
        fault = unlike_refusal(way, CheckpointMismatch, names)
        if not fault and not base:
            fault = unlike_refusal(partial(verify, path.parent), CheckpointMismatch, names)
        tally.case(not fault, f"{change.__name__} {name} of {file}: {fault}")
        path.write_bytes(whole)
        if sealed is not None:
            manifest.write_bytes(sealed)
    return tally


def forged_lists(home: Path) -> Tally:
    """The same where the list in sparsmith.json was forged too: the crafted model itself says what must be there."""
    tally, folder = Tally(), home / "delta"
    kept = {file: file.read_bytes() for file in (folder / DELTA, folder / IDENTITY, folder / durable.MANIFEST)}
    for name in sorted(read_rows(folder / DELTA)):
        for change in (drop, rename, reshape, recast):
            edit_tensors(folder / DELTA, partial(change, name=name))
            forged = json.loads(kept[folder / IDENTITY])
            rows = {n: r for n, r in forged["tensors"].items() if r["role"] == "lora"}
            for found, (shape, dtype) in read_rows(folder / DELTA).items():
                rows[found] = {"shape": list(shape), "dtype": dtype, "role": "adapter"}
            (folder / IDENTITY).write_text(json.dumps({**forged, "tensors": rows}))
            durable.seal(folder)
            fault = unlike_refusal(lambda: sm.load(folder), CheckpointMismatch, (name,))
            tally.case(not fault, f"forged list, {change.__name__} {name}: {fault}")
            for file, data in kept.items():
                file.write_bytes(data)
    sm.load(folder)
    return tally


def odd_bases(home: Path, work: Path) -> Tally:
    """Bases that are not whole, or not safe to open: each refused by name, none filled with random weights."""
    tally = Tally()
    for what, (change, names) in ODD_BASES.items():
        folder = work / "odd"
        shutil.copytree(home / "base", folder)
        change(folder)
        fault = unlike_refusal(partial(open_base, folder), CheckpointError, names)
        tally.case(not fault, f"base, {what}: {fault}")
        shutil.rmtree(folder)
    return tally


def run(folder: Path) -> Tally:
    """All cases."""
    home = make_home(folder / "home")
    tally = every_tensor(home)
    tally.add(forged_lists(home))
    tally.add(odd_bases(home, folder))
    return tally


def _cases(home: Path) -> Iterator[tuple[str, str, Change]]:
    for file in FILES:
        last = to_whole_numbers if file.startswith("base") else recast
        for name in sorted(read_rows(home / file)):
            yield from ((file, name, change) for change in (drop, rename, reshape, last))


def _split(folder: Path, change: Callable[[dict[str, str]], None]) -> None:
    """Two shards with an index, then `change` of its weight map."""
    whole = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for number, name in enumerate(whole):
        weight_map[name] = f"model-0000{number % 2 + 1}-of-00002.safetensors"
    for shard in set(weight_map.values()):
        save_file({name: whole[name] for name in whole if weight_map[name] == shard}, folder / shard, {"format": "pt"})
    change(weight_map)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _lose_shard(folder: Path) -> None:
    _split(folder, lambda weight_map: None)
    (folder / "model-00002-of-00002.safetensors").unlink()


def _promise_elsewhere(weight_map: dict[str, str]) -> None:
    name = "model.norm.weight"
    others = {shard for shard in weight_map.values() if shard != weight_map[name]}
    weight_map[name] = others.pop()


def _forget(weight_map: dict[str, str]) -> None:
    shard = weight_map["model.norm.weight"]
    for name in [name for name, kept in weight_map.items() if kept == shard]:
        del weight_map[name]


def _pickle_only(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def _change_config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **changes}))

    return change


def _cut(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def _extra(folder: Path) -> None:
    with safe_open(folder / "model.safetensors", "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.experts.weight"] = torch.zeros(3)
    save_file(tensors, folder / "model.safetensors", metadata)


ODD_BASES: dict[str, tuple[Callable[[Path], Any], tuple[str, ...]]] = {
    "a tensor too many": (_extra, ("model.layers.0.mlp.experts.weight",)),
    "half a file": (_cut, ("model.safetensors",)),
    "a missing shard": (_lose_shard, ("model-00002-of-00002.safetensors",)),
    "an index that promises a tensor elsewhere": (lambda f: _split(f, _promise_elsewhere), ("model.norm.weight",)),
    "an index that forgets a shard": (lambda f: _split(f, _forget), ("no such tensor",)),
    "an empty index": (lambda f: _split(f, dict.clear), ("model.safetensors.index.json",)),
    "a pickle alone": (_pickle_only, ("pytorch_model.bin",)),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), ("odd",)),
    "no config": (lambda folder: (folder / "config.json").unlink(), ("config.json",)),
    "a block more in config.json": (_change_config(num_hidden_layers=3), ("model.layers.2.",)),
    "a block less in config.json": (_change_config(num_hidden_layers=1), ("model.layers.1.",)),
    "another width in config.json": (_change_config(hidden_size=128), ("weight", "128")),
    "another vocabulary in config.json": (_change_config(vocab_size=130), ("weight", "130")),
    "a quantisation that nobody knows": (_change_config(quantization_config={"quant_method": "own"}), ("own",)),
    "another weight file in config.json": (_change_config(transformers_weights="x.safetensors"), ("x.safetensors",)),
    "an adapter beside it": (lambda folder: (folder / "adapter_config.json").write_text("{}"), ("adapter_config.json",)),
}  # fmt: skip
