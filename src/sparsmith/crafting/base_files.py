"""The files of a base, looked at before a library opens them.

transformers follows names in a weight index out of the folder, opens pickles where there is no safetensors file, hands the model to the
adapter that lies beside it, and fetches attention kernels (code) that a config names. Each of these is refused here by name; what the
file holds against what the architecture asks for is compared after the load, because only the library knows its renamings.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sparsmith import anatomy, durable
from sparsmith.crafting import tensors as strict
from sparsmith.errors import CheckpointError, CheckpointMismatch, UnsupportedAnatomy, nearest

WEIGHTS, INDEX, CONFIG, ADAPTER = (
    "model.safetensors",
    "model.safetensors.index.json",
    "config.json",
    "adapter_config.json",
)
_CODE_KEYS = ("attn_implementation", "experts_implementation")
_SMALL = 10_000_000  # parameters that any machine can hold
_NUMBERS = ("float", "bfloat")
Rows = dict[str, tuple[tuple[int, ...], str]]


def check_base_folder(folder: Path) -> Rows:
    """Name -> (shape, dtype) of every tensor of a base's folder, from the headers.

    Raises:
        CheckpointError: no safetensors weights, a damaged or missing shard, a name that leads out of the folder, an adapter beside the
            weights, or a config that names code.
        CheckpointMismatch: a shard lacks what the index promises.
    """
    check_config(str(folder / CONFIG), durable.read_json(durable.inside(folder, CONFIG)))
    if (folder / ADAPTER).exists():
        raise CheckpointError(
            str(folder / ADAPTER),
            "an adapter, which transformers would load with the base named in it",
            "a base alone",
            "Move the adapter out of the folder, or merge it into the base first.",
        )
    rows: Rows = {}
    for file, promised in shards(folder):
        held = strict.read_rows(file)
        if lacking := sorted(promised - held.keys()):
            found = f"no tensor {lacking[0]}" + (f" (and {len(lacking) - 1} more)" if lacking[1:] else "")
            raise CheckpointMismatch(str(file), found, f"what {INDEX} promises", nearest(lacking[0], list(held)))
        rows |= held
    return rows


def shards(folder: Path) -> Iterator[tuple[Path, set[str]]]:
    """(file, names that the index promises in it) of each weight file, every name checked."""
    if (folder / WEIGHTS).exists():  # transformers, too, prefers the one file to an index
        yield durable.inside(folder, WEIGHTS), set()
        return
    if not (folder / INDEX).exists():
        pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
        raise CheckpointError(
            str(folder / pickles[0] if pickles else folder),
            "a pickle, which could run code when opened" if pickles else "no weights",
            f"{WEIGHTS}, or shards with {INDEX}",
            "Convert it to safetensors, or fetch the safetensors files of this model.",
        )
    data = durable.read_json(durable.inside(folder, INDEX))
    weight_map = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(str(folder / INDEX), "no weight_map", "an index of shards", "Fetch it again.")
    for name in sorted({durable.safe_name(name, str(folder / INDEX)) for name in weight_map.values()}):
        file = durable.inside(folder, name)
        if not file.is_file() or file.suffix != ".safetensors":
            found = "no safetensors file" if file.is_file() else "no such file"
            raise CheckpointError(str(file), found, f"the shard that {INDEX} names", "Fetch it again.")
        yield file, {tensor for tensor, shard in weight_map.items() if shard == name}


def check_config(where: str, config: Any) -> None:
    """Refuse a config that names code to fetch or another weight file."""
    if not isinstance(config, dict):
        raise CheckpointError(where, type(config).__name__, "an object", "Fetch the base again.")
    for key, value in config.items():
        names = value.values() if isinstance(value, dict) else [value]
        if str(key).removeprefix("_").removesuffix("_internal") in _CODE_KEYS and any(
            "/" in str(name) for name in names
        ):
            found, expected = f"{value!r}, a kernel to be fetched and run", "the name of a built-in implementation"
            raise CheckpointError(f"{where}: {key}", found, expected, f"Remove `{key}` from config.json.")
        if key == "transformers_weights":
            raise CheckpointError(f"{where}: {key}", f"{value!r}", f"weights in {WEIGHTS}", f"Remove `{key}`.")
        if isinstance(value, dict):
            check_config(f"{where}: {key}", value)


def refuse_other_size(where: str, config: Any, rows: Rows) -> None:
    """A config that describes a far larger model than the files hold would fill the memory before any tensor is missed."""
    try:
        total = anatomy.shape_of(config).total_params
    except UnsupportedAnatomy:  # a family that a plug-in knows
        return
    held = sum(math.prod(shape) for shape, _ in rows.values())
    if not 0 < total <= 4 * held + _SMALL:  # smaller differences are told by the tensor's name
        raise CheckpointMismatch(
            where,
            f"a model of {total:,} parameters",
            f"{held:,}, as the files hold",
            "One of the two was edited or is of another model; restore the file.",
        )


def refuse_recast(where: str, rows: Rows, floats: set[str]) -> None:
    """Refuse whole numbers or truth values where the architecture has real numbers: a cast would make other weights of them.

    Args:
        floats: names of the model's floating-point tensors.
    """
    for name, (_, dtype) in rows.items():
        if name in floats and not dtype.startswith(_NUMBERS):
            raise CheckpointMismatch(
                f"{where}: {name}", f"dtype {dtype}", "floating-point numbers", "Fetch the base again."
            )
