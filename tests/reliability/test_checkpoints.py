"""Promises 3, 15 and 17 in short form: every bit is watched, every tensor is asked for, no name leads out.

The long forms (`python -m benchmarks.reliability`) only raise the counts. A refusal is a `CheckpointError` that names the file; nothing
else may come out of `load`.
"""

from __future__ import annotations

import random
import shutil

import pytest

import sparsmith as sm
from sparsmith.errors import CheckpointError
from tests.kit.checkpoints import DELTA, LORA_FILE, files_of
from tests.kit.pico import pico_ids
from tests.kit.trials import damage, hostile_names, strict_loading


def test_every_bit_is_watched(home):
    """Promise 3."""
    tally = damage.damage(damage.checkpoints(home), flips=150, cuts=40)
    assert tally.whole, tally.failures
    assert tally.tried == 190


def test_a_damaged_checkpoint_of_a_run_is_named_and_the_older_one_offered(tmp_path):
    tally = damage.damage(damage.run_checkpoints(tmp_path), flips=30, cuts=10)
    assert tally.whole, tally.failures


def test_every_tensor_is_asked_for(home):
    """Promise 15: each tensor of each file, and a fifth of the damages to each."""
    tally = strict_loading.every_tensor(home, every=5)
    assert tally.whole, tally.failures
    assert tally.tried > 50


def test_every_tensor_is_asked_for_by_the_model_itself(home):
    tally = strict_loading.forged_lists(home)
    assert tally.whole, tally.failures


def test_a_base_that_is_not_whole_is_refused(home, tmp_path):
    tally = strict_loading.odd_bases(home, tmp_path)
    assert tally.whole, tally.failures


def test_no_name_leads_out(home, tmp_path):
    """Promise 17."""
    tally = hostile_names.names(home, tmp_path, every=6)
    tally.add(hostile_names.links(home, tmp_path))
    assert tally.whole, tally.failures


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
