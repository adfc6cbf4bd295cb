"""Promises 3, 15 and 17 in short form: every bit is watched, every tensor is asked for, no name leads out.

The long forms only raise the counts. A refusal is a `CheckpointError` that names the file; nothing else may come out of `load`.
"""

from __future__ import annotations

import json
import os
import random
import shutil

import pytest
import torch

import sparsmith as sm
from sparsmith import durable
from sparsmith.errors import CheckpointError, CheckpointMismatch
from sparsmith.exporting import verify
from tests.kit.checkpoints import DELTA, IDENTITY, LORA_FILE, crafted, edit_tensors, save_base
from tests.kit.pico import pico_ids

FLIPS, CUTS = int(os.environ.get("SPARSMITH_FLIPS", "150")), int(os.environ.get("SPARSMITH_CUTS", "40"))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    model = crafted(save_base(home / "base"))
    sm.save(model, home / "delta")
    sm.save(model, home / "full", full=True)
    return home


def files_of(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("kind", ["delta", "full"])
def test_every_bit_is_watched(home, kind):
    """Promise 3. Files are drawn evenly, not by size: a flip in a small header matters as much as one in a payload."""
    stream = random.Random(kind)
    folder, base = home / kind, {"base": home / "base"} if kind == "delta" else {}
    files = files_of(folder)
    for trial in range((FLIPS + CUTS) // 2):
        file = files[trial % len(files)]
        data = file.read_bytes()
        if trial < FLIPS // 2:
            place, bit = stream.randrange(len(data)), stream.randrange(8)
            damaged = data[:place] + bytes([data[place] ^ (1 << bit)]) + data[place + 1 :]
        else:
            damaged = data[: stream.randrange(len(data))]
        file.write_bytes(damaged)
        try:
            for open_it in (lambda: sm.load(folder, **base), lambda: verify(folder)):
                with pytest.raises(CheckpointError) as fault:
                    open_it()
                assert file.name in str(fault.value) or folder.name in str(fault.value)
        finally:
            file.write_bytes(data)
    verify(folder)


def test_a_flip_in_the_base_is_seen(home):
    file = next((home / "base").glob("*.safetensors"))
    data = file.read_bytes()
    stream = random.Random(5)
    for _ in range(6):
        place = stream.randrange(len(data))
        file.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(CheckpointError):
            sm.load(home / "delta")
    file.write_bytes(data)
    sm.load(home / "delta")


def drop(tensors, name):
    del tensors[name]


def rename(tensors, name):
    tensors[name.replace("weight", "wieght") if "weight" in name else name + "s"] = tensors.pop(name)


def reshape(tensors, name):
    tensors[name] = tensors[name].reshape(-1).clone()
    if tensors[name].dim() == 1 and tensors[name].shape[0] > 1:
        tensors[name] = tensors[name].reshape(1, -1)


def recast(tensors, name):
    tensors[name] = tensors[name].to(torch.bfloat16)


@pytest.mark.parametrize("change", [drop, rename, reshape, recast])
@pytest.mark.parametrize("file", [f"delta/{DELTA}", f"delta/{LORA_FILE}", "full/model.safetensors"])
def test_every_tensor_is_asked_for(home, file, change):
    """Promise 15: each tensor of each file, once per kind of damage, the folder sealed again by a careful forger."""
    path = home / file
    data, manifest = path.read_bytes(), (path.parent / durable.MANIFEST).read_bytes()
    names = list(json.loads((path.parent / IDENTITY).read_text())["tensors"])
    lora = file.endswith(LORA_FILE)
    names = [name for name in names if "delta" not in file or ("lora_" in name) == lora]
    assert names
    for name in names:
        edit_tensors(path, lambda tensors, name=name: change(tensors, name))
        with pytest.raises(CheckpointMismatch) as fault:
            sm.load(path.parent)
        assert name in str(fault.value)
        if change is rename:
            assert "Did you mean" in fault.value.mend
        path.write_bytes(data)
    (path.parent / durable.MANIFEST).write_bytes(manifest)


def test_every_tensor_is_asked_for_by_the_model_itself(home):
    """The same where the list in sparsmith.json was forged too: the crafted model says what must be there."""
    path = home / "delta" / DELTA
    identity = path.parent / IDENTITY
    data, listed, manifest = path.read_bytes(), identity.read_text(), (path.parent / durable.MANIFEST).read_bytes()
    for name in ("base.model.layers.0.mlp.pesc.up", "base.model.layers.1.mlp.pesc.router.weight"):
        for change in (drop, rename, reshape, recast):
            edit_tensors(path, lambda tensors, name=name, change=change: change(tensors, name))
            forged = json.loads(listed)
            rows = {n: r for n, r in forged["tensors"].items() if r["role"] == "lora"}
            for found, (shape, dtype) in rows_of(path).items():
                rows[found] = {"shape": list(shape), "dtype": dtype, "role": "adapter"}
            identity.write_text(json.dumps({**forged, "tensors": rows}))
            durable.seal(path.parent)
            with pytest.raises(CheckpointMismatch) as fault:
                sm.load(path.parent)
            assert name in str(fault.value)
            path.write_bytes(data)
    identity.write_text(listed)
    (path.parent / durable.MANIFEST).write_bytes(manifest)
    sm.load(path.parent)


def rows_of(path):
    from sparsmith.crafting.tensors import read_rows

    return read_rows(path)


@pytest.mark.parametrize(
    "name", ["../base/model.safetensors", "/etc/passwd", "sub/../../base/config.json", "..\\a", "a\x00b"]
)
def test_a_manifest_or_an_index_that_leads_out_is_refused(home, tmp_path, name):
    """Promise 17 (fifty names against the reader itself are in the unit tests)."""
    folder = tmp_path / "full"
    shutil.copytree(home / "full", folder)
    rows = durable.read_manifest(folder)
    from sparsmith.manifests import manifest_bytes

    (folder / durable.MANIFEST).write_bytes(manifest_bytes({**rows, name: next(iter(rows.values()))}))
    for open_it in (sm.load, verify):
        with pytest.raises(CheckpointError):
            open_it(folder)
    shutil.rmtree(folder)
    shutil.copytree(home / "full", folder)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": {"base.lm_head.weight": name}})
    )
    with pytest.raises(CheckpointError, match="does not list"):
        sm.load(folder)


def test_a_planted_adapter_is_refused(home, tmp_path):
    """transformers would load an adapter_config.json that lies beside the weights."""
    folder = tmp_path / "full"
    shutil.copytree(home / "full", folder)
    shutil.copy(home / "delta" / "adapter_config.json", folder)
    shutil.copy(home / "delta" / LORA_FILE, folder)
    with pytest.raises(CheckpointError):
        sm.load(folder)


def test_two_saves_of_one_model_are_the_same_bytes(home, tmp_path):
    model = sm.load(home / "delta")
    for name in ("a", "b"):
        sm.save(model, tmp_path / name)
    for file in files_of(tmp_path / "a"):
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name
    assert (tmp_path / "a" / DELTA).read_bytes() == (home / "delta" / DELTA).read_bytes()
    assert model(pico_ids()).logits.isfinite().all()
