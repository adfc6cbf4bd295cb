"""Weights of somebody else's folder: safetensors or safe pickles, sharded or not, every name checked before it is
opened."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from sparsmith import durable
from sparsmith.crafting import tensors as strict
from sparsmith.errors import CheckpointError, CheckpointMismatch

_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


def read_weights(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every weight of the folder, one file in memory at a time.

    Raises:
        CheckpointError: no weights; a shard's name that leads out of the folder; a pickle that wants to run code.
        CheckpointMismatch: a shard lacks what its index promises, or two hold the same tensor.
    """
    seen: set[str] = set()
    for file, promised in _shards(folder):
        tensors = strict.read_tensors(file) if file.suffix == ".safetensors" else _read_pickle(file)
        lacking = sorted(promised - tensors.keys()) or sorted(seen & tensors.keys())
        if lacking:
            raise CheckpointMismatch(
                f"{file}: {lacking[0]}",
                "not here, or in two shards",
                "each tensor where the index says",
                "Fetch it again.",
            )
        seen |= tensors.keys()
        yield from tensors.items()


def _shards(folder: Path) -> Iterator[tuple[Path, set[str]]]:
    for index in _INDEXES:
        if (folder / index).is_file():
            data = durable.read_json(durable.inside(folder, index))
            weight_map = data.get("weight_map") if isinstance(data, dict) else None
            if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
                raise CheckpointError(str(folder / index), "no weight_map", "an index of shards", "Fetch it again.")
            for name in sorted(set(weight_map.values())):
                file = durable.inside(folder, name)
                if not file.is_file():
                    raise CheckpointError(
                        str(file), "no such file", "the shard that the index names", "Fetch it again."
                    )
                yield file, {key for key, value in weight_map.items() if value == name}
            return
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    if not files:
        raise CheckpointError(str(folder), "no weights", "*.safetensors or *.bin", "Check the path.")
    for file in files:
        yield durable.inside(folder, file.name), set()


def _read_pickle(file: Path) -> dict[str, Tensor]:
    """A `.bin` holds a pickle, which could run code; only one made of tensors and plain containers is read."""
    try:
        data = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError, OSError) as fault:
        raise CheckpointError(
            str(file),
            f"a pickle that is not tensors alone ({' '.join(str(fault).split())[:200]})",
            "safetensors, or a pickle of tensors",
            "It could run code when opened. Convert it to safetensors on a machine that you can lose.",
        ) from fault
    if not isinstance(data, dict) or not all(isinstance(v, Tensor) for v in data.values()):
        raise CheckpointError(str(file), type(data).__name__, "a table of tensors", "Convert it to safetensors.")
    return data
