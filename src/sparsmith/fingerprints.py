"""The identity of weights: a sha256 over the files that hold them.

`fast` is for a check at every start (headers and the first MiB of each shard, milliseconds for any size); `full` reads
every byte.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from sparsmith.errors import CheckpointError

_MIB = 1 << 20
_MAX_HEADER = 100 * _MIB  # the limit that safetensors itself sets


def fingerprint(target: str | Path | Iterable[str | Path], mode: Literal["fast", "full"] = "fast") -> str:
    """sha256 over weight files: of a folder (its `*.safetensors`, else `*.bin`), of one file, or of several.

    `fast` reads of each file its name, its size, the safetensors header and the first MiB after it; `full` reads every
    byte.
    """
    total = hashlib.sha256()
    for file in weight_files(target):
        total.update(f"{mode}:{file.name}:{file.stat().st_size}:".encode())
        total.update(file_digest(file) if mode == "full" else _fast_digest(file))
    return total.hexdigest()


def weight_files(target: str | Path | Iterable[str | Path]) -> list[Path]:
    """The weight files that `fingerprint` reads, in order of name."""
    if not isinstance(target, (str, Path)):
        files = [Path(file) for file in target]
    elif Path(target).is_dir():
        files = list(Path(target).glob("*.safetensors")) or list(Path(target).glob("*.bin"))
    else:
        files = [Path(target)]
    missing = [file for file in files if not file.is_file()]
    if missing or not files:
        raise CheckpointError(
            str(missing[0] if missing else target),
            "no weight file",
            "*.safetensors files",
            "Check the path of the base.",
        )
    return sorted(files, key=lambda file: file.name)


def file_digest(file: Path) -> bytes:
    """sha256 of a file's bytes."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()


def _fast_digest(file: Path) -> bytes:
    with file.open("rb") as stream:
        head = stream.read(8)
        length = int.from_bytes(head, "little") if file.suffix == ".safetensors" else 0
        return hashlib.sha256(head + stream.read(min(length, _MAX_HEADER) + _MIB)).digest()
