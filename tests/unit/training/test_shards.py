"""Shards of a checkpoint read by rows, and every way in which they might not make a whole refused."""

from __future__ import annotations

import json

import pytest
import torch

import sparsmith as sm
from sparsmith.crafting.tensors import write_tensors
from sparsmith.errors import CheckpointError, CheckpointMismatch
from sparsmith.methods.base import LoraSettings
from sparsmith.training import shards
from tests.kit.pico import pico_model

WHOLE = torch.arange(15.0).reshape(5, 3)
CONFIG = sm.PescConfig(num_experts=4, top_k=2, adapter_dim=8, lora=LoraSettings(r=4))


def write(folder, rank, ranks, pieces):
    """`pieces`: name -> (first row, rows, whole shape)."""
    header = {name: {"start": start, "shape": shape} for name, (start, _, shape) in pieces.items()}
    write_tensors(
        folder / f"rank-{rank:05d}-of-{ranks:05d}.safetensors",
        {name: rows for name, (_, rows, _) in pieces.items()},
        {"sparsmith": json.dumps(header)},
    )


def three(folder, cuts=((0, 2), (2, 4), (4, 5))):
    for rank, (start, stop) in enumerate(cuts):
        pieces = {"a": (start, WHOLE[start:stop], [5, 3])}
        if rank == 0:
            pieces["step"] = (0, torch.tensor(7.0), [])
        write(folder, rank, len(cuts), pieces)


def test_any_rows_come_back_from_any_number_of_files(tmp_path):
    three(tmp_path)
    found = shards.Shards(tmp_path)
    assert found.rows() == {"a": ((5, 3), "float32"), "step": ((), "float32")}
    for start in range(6):
        for stop in range(start, 6):
            assert torch.equal(found.read("a", start, stop), WHOLE[start:stop])
    assert found.read("step", 0, 1) == 7


@pytest.mark.parametrize("cuts", [((0, 2), (3, 5)), ((0, 2), (2, 4)), ((0, 3), (2, 5)), ((1, 3), (3, 5))])
def test_rows_that_make_no_whole_are_refused(tmp_path, cuts):
    three(tmp_path, cuts)
    with pytest.raises(CheckpointError, match="a: found rows"):
        shards.Shards(tmp_path)


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_a_missing_shard_is_refused(tmp_path, lost):
    three(tmp_path)
    (tmp_path / f"rank-{lost:05d}-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match="one shard of every rank"):
        shards.Shards(tmp_path)


@pytest.mark.parametrize("place", [None, 5, {}, {"start": -1, "shape": [5, 3]}, {"start": 0, "shape": [True, 3]}])
def test_a_header_without_a_place_is_refused(tmp_path, place):
    file = tmp_path / "rank-00000-of-00001.safetensors"
    write_tensors(file, {"a": WHOLE}, {"sparsmith": json.dumps({"a": place})})
    with pytest.raises(CheckpointError, match="a first row and a shape"):
        shards.Shards(tmp_path)


def test_shards_of_other_shapes_or_names_are_refused(tmp_path):
    write(tmp_path, 0, 2, {"a": (0, WHOLE[:2], [5, 3])})
    write(tmp_path, 1, 2, {"a": (2, WHOLE[2:, :2].contiguous(), [5, 2])})
    with pytest.raises(CheckpointMismatch):
        shards.Shards(tmp_path)
    file = tmp_path / "rank-00001-of-00002.safetensors"
    write_tensors(file, {"b": WHOLE[2:]}, {"sparsmith": "{}"})
    with pytest.raises(CheckpointError, match="other names"):
        shards.Shards(tmp_path)


def test_a_model_comes_back_and_another_is_refused(tmp_path):
    model = sm.craft(pico_model(), CONFIG, seed=1)
    shards.write_checkpoint(tmp_path, model, {})
    other = sm.craft(pico_model(), CONFIG, seed=2)
    wanted = shards.trained_tensors(model)
    assert any(not torch.equal(tensor, wanted[name]) for name, tensor in shards.trained_tensors(other).items())
    shards.fill_model(other, tmp_path)
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in shards.trained_tensors(other).items())
    with pytest.raises(CheckpointMismatch, match="top_k"):
        shards.fill_model(sm.craft(pico_model(), CONFIG.model_copy(update={"top_k": 1})), tmp_path)
