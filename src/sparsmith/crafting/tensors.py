"""Tensors to and from safetensors files, strictly: no tensor is skipped, renamed, reshaped, recast or left as it
was."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sparsmith import durable
from sparsmith.errors import CheckpointError, CheckpointMismatch, nearest
from sparsmith.ops.shards import is_sharded, rows_of, take
from sparsmith.recipe.strict import StrictModel

_SAMPLE = 1 << 20  # bytes of each tensor that `content_hash` reads


class TensorRow(StrictModel):
    """What a checkpoint says of one tensor."""

    shape: tuple[int, ...]
    dtype: str
    role: str


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def table_of(tensors: Mapping[str, Tensor], roles: Mapping[str, str], default: str = "state") -> dict[str, TensorRow]:
    """A row per tensor; `roles` maps names to roles."""
    return {
        name: TensorRow(shape=tuple(t.shape), dtype=dtype_name(t.dtype), role=roles.get(name, default))
        for name, t in tensors.items()
    }


def write_tensors(file: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write finite tensors; one that holds NaN or infinity stops the save before a byte is written.

    `metadata` has one key at most: safetensors writes several in no fixed order, and equal models shall give equal files.
    """
    assert len(metadata) <= 1
    check_finite(str(file), tensors)
    ready = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}
    save_file(ready, file, metadata or {"format": "pt"})


def read_metadata(file: Path) -> dict[str, str]:
    """The free-text part of a safetensors header."""
    try:
        with safe_open(file, "pt") as opened:
            return dict(opened.metadata() or {})
    except (SafetensorError, OSError, ValueError) as fault:
        raise _broken(file, fault) from fault


def read_rows(file: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Name -> (shape, dtype name) from the header alone."""
    try:
        with safe_open(file, "pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 - no mapping
            return {
                name: (tuple(s.get_shape()), _FILE_DTYPES.get(s.get_dtype(), s.get_dtype()))
                for name, s in slices.items()
            }
    except (SafetensorError, OSError, ValueError) as fault:
        raise _broken(file, fault) from fault


def file_rows(folder: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Name -> (shape, dtype) over all weight files of the folder."""
    rows: dict[str, tuple[tuple[int, ...], str]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        for name, row in read_rows(durable.inside(folder, file.name)).items():
            if name in rows:
                raise CheckpointMismatch(
                    f"{file}: {name}", "a tensor that another shard holds too", "each once", "Remove one of the two."
                )
            rows[name] = row
    return rows


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Every tensor of the file, on the CPU."""
    try:
        with safe_open(file, "pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - no mapping
    except (SafetensorError, OSError, ValueError, RuntimeError) as fault:
        raise _broken(file, fault) from fault


def read_rows_of(file: Path, name: str, start: int, stop: int) -> Tensor:
    """Rows [start, stop) of the first dimension of one tensor; a scalar as it is."""
    try:
        with safe_open(file, "pt") as opened:
            piece = opened.get_slice(name)
            return piece[start:stop] if piece.get_shape() else opened.get_tensor(name)
    except (SafetensorError, OSError, ValueError, RuntimeError) as fault:
        raise _broken(file, fault) from fault


def compare_tables(
    where: str, found: Mapping[str, tuple[tuple[int, ...], str]], expected: Mapping[str, tuple[tuple[int, ...], str]]
) -> None:
    """Refuse the first tensor that is missing, unknown, reshaped or recast.

    Raises:
        CheckpointMismatch: with both values and, for a name, the nearest one on the other side.
    """
    compare_names(where, found, expected)
    for name, (shape, dtype) in expected.items():
        for what, ours, theirs in (("shape", shape, found[name][0]), ("dtype", dtype, found[name][1])):
            if ours != theirs:
                raise CheckpointMismatch(
                    f"{where}: {name}",
                    f"{what} {theirs}",
                    f"{what} {ours}",
                    "The file belongs to a model of another build; use the config that it was trained with.",
                )


def compare_folder(folder: Path, where: str, expected: Mapping[str, tuple[tuple[int, ...], str]]) -> None:
    """`compare_tables` of what the weight files hold and what `where` says of them; a refusal names both: either may be wrong."""
    files = [file.name for file in sorted(folder.glob("*.safetensors"))]
    shown = ", ".join(files[:3]) + (f" and {len(files) - 3} more" if files[3:] else "")
    compare_tables(f"{where} against {shown}", file_rows(folder), expected)


def compare_names(where: str, found: Collection[str], expected: Collection[str]) -> None:
    """Refuse the first name that is missing or unknown, with the nearest one on the other side."""
    missing = [name for name in expected if name not in found]
    unknown = [name for name in found if name not in expected]
    if missing:
        mend = nearest(missing[0], unknown) if unknown else "Take the checkpoint as it was saved."
        raise CheckpointMismatch(f"{where}: {missing[0]}", _count("no such tensor", missing), "the tensor", mend)
    if unknown:
        raise CheckpointMismatch(
            f"{where}: {unknown[0]}",
            _count("a tensor that nothing asks for", unknown),
            "only known tensors",
            nearest(unknown[0], list(expected)) if expected else "Remove it.",
        )


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[tuple[int, ...], str]]:
    """Name -> (shape, dtype name), as `compare_tables` wants it."""
    return {name: (tuple(t.shape), dtype_name(t.dtype)) for name, t in tensors.items()}


@torch.no_grad()
def fill(where: str, targets: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Copy whole `tensors` into `targets` of the same names, after holding one table against the other."""
    compare_tables(where, shapes_of(tensors), shapes_of(targets))
    for name, target in targets.items():
        start, stop = rows_of(target)
        take(target, tensors[name][start:stop] if is_sharded(target) else tensors[name])


def check_finite(where: str, tensors: Mapping[str, Tensor]) -> None:
    """Raise `CheckpointError` naming the first tensor with a NaN or an infinity."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise CheckpointError(
                f"{where}: {name}",
                "NaN or infinity",
                "finite numbers",
                "The training has gone wrong before this point; take an earlier checkpoint.",
            )


def check_file_finite(file: Path) -> None:
    """`check_finite` for a file, one tensor in memory at a time."""
    try:
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - no mapping
                check_finite(str(file), {name: opened.get_tensor(name)})
    except (SafetensorError, OSError, ValueError, RuntimeError) as fault:
        raise _broken(file, fault) from fault


def content_hash(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """sha256 over names, shapes, types and the first MiB of each tensor, in order of name."""
    total = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda pair: pair[0]):
        total.update(f"{name}:{tuple(tensor.shape)}:{tensor.dtype}:".encode())
        flat = tensor.detach().reshape(-1)[: _SAMPLE // max(1, tensor.element_size())]
        total.update(flat.contiguous().view(torch.uint8).cpu().numpy().tobytes() if flat.numel() else b"")
    return total.hexdigest()


_FILE_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}


def _count(text: str, names: list[str]) -> str:
    return text if len(names) == 1 else f"{text} (and {len(names) - 1} more)"


def _broken(file: Path, fault: Exception) -> CheckpointError:
    return CheckpointError(
        str(file),
        f"no readable safetensors file ({fault})",
        "a safetensors file",
        "Restore it, or take another checkpoint.",
    )
