"""Safetensors files written tensor by tensor, so that a model larger than the memory can be written.

The library's own writer wants every tensor of a file at once. The format is a length, a JSON header with each tensor's place, and the
bytes in that order: what is to come is known from shapes alone, so the header is written first and each tensor goes to the disk as it is
made. Files of at most `limit` bytes, with the index that transformers reads; a single tensor above the limit has a file of its own.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, NamedTuple

import torch
from torch import Tensor

from sparsmith.crafting.base_files import INDEX, WEIGHTS
from sparsmith.durable import json_text
from sparsmith.errors import UsageError

DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_ALIGNED = 8  # bytes: where the data of a file begin


class Coming(NamedTuple):
    """A tensor that will be written."""

    name: str
    shape: tuple[int, ...]

    @property
    def numbers(self) -> int:
        return math.prod(self.shape)


def bytes_of(size: int | str) -> int:
    """Bytes that `5GB`, `400MB` or a number of bytes mean.

    Raises:
        UsageError.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]B)?", str(size).strip().upper())
    count = int(float(found[1]) * _UNITS.get(found[2] or "", 1)) if found else 0
    if count < 1:
        raise UsageError("max_shard_size", f"`{size}`", "bytes, or a size such as `5GB`", "Write `5GB`.")
    return count


def grouped(coming: Sequence[Coming], dtype: torch.dtype, limit: int) -> list[list[Coming]]:
    """The tensors of each file, in their order."""
    groups: list[list[Coming]] = []
    room = 0
    for one in coming:
        size = one.numbers * dtype.itemsize
        if not groups or (size > room and size > 0):
            groups.append([])
            room = limit
        groups[-1].append(one)
        room -= size
    return groups


class StreamWriter:
    """Write tensors of one number type in the order in which they were announced.

    Args:
        folder: where the files go. coming: every tensor, in order. dtype: of all of them. limit: bytes of a file.
    """

    def __init__(self, folder: Path, coming: Sequence[Coming], dtype: torch.dtype, limit: int) -> None:
        self.folder, self.dtype = folder, dtype
        groups = grouped(coming, dtype, limit)
        several = len(groups) > 1
        self.files = [_file_name(number, len(groups)) if several else WEIGHTS for number in range(1, len(groups) + 1)]
        self._queue = [(file, group) for file, group in zip(self.files, groups, strict=True)]
        self._waiting: list[Coming] = []
        self._open: IO[bytes] | None = None
        self._index = {one.name: file for file, group in self._queue for one in group} if several else {}
        self._numbers = sum(one.numbers for one in coming)

    def write(self, name: str, tensor: Tensor) -> None:
        """The next tensor."""
        if not self._waiting:
            self._begin()
        due = self._waiting.pop(0)
        assert (name, tuple(tensor.shape), tensor.dtype) == (due.name, due.shape, self.dtype), (name, due)
        if tensor.numel():
            assert self._open is not None
            self._open.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def finish(self) -> None:
        """After the last tensor: the index, where there are several files."""
        assert not self._waiting and not self._queue, self._waiting or self._queue
        self.close()
        if self._index:
            size = self._numbers * self.dtype.itemsize
            metadata = {"total_parameters": self._numbers, "total_size": size}
            index = {"metadata": metadata, "weight_map": dict(sorted(self._index.items()))}
            (self.folder / INDEX).write_text(json_text(index), encoding="utf-8")

    def close(self) -> None:
        if self._open is not None:
            self._open.close()
            self._open = None

    def __enter__(self) -> StreamWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _begin(self) -> None:
        self.close()
        file, group = self._queue.pop(0)
        self._waiting = list(group)
        self._open = (self.folder / file).open("wb")
        self._open.write(header(group, self.dtype))


def header(group: Sequence[Coming], dtype: torch.dtype) -> bytes:
    """Length and JSON of a file that holds these tensors one behind the other."""
    rows: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for one in group:
        start, end = end, end + one.numbers * dtype.itemsize
        rows[one.name] = {"dtype": DTYPES[dtype], "shape": list(one.shape), "data_offsets": [start, end]}
    text = json.dumps(rows, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNED)
    return len(text).to_bytes(8, "little") + text


def _file_name(number: int, count: int) -> str:
    return f"model-{number:05d}-of-{count:05d}.safetensors"
