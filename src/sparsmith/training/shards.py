"""A sharded run's checkpoint: every rank writes the rows that it holds, and any number of ranks, one too, reads them back.

    shards/rank-00000-of-00002.safetensors   this rank's rows of every trained tensor and of the optimiser's moments; the header says of
                                             each where its rows begin and what the whole shape is
    shards/model.json                        the methods' configs, held against the model's when it is read

No tensor is ever whole on one rank, neither when it is written nor when a sharded run reads it. Tensors that every rank holds (the
optimiser's step counts) are written by the first. Price of the manifest: the first rank reads every file once, for its hash.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsmith import durable, ranks
from sparsmith.crafting import tensors as strict
from sparsmith.crafting.delta import lora_state, method_state
from sparsmith.crafting.identity import compare, plain
from sparsmith.crafting.record import record_of
from sparsmith.errors import CheckpointError, CheckpointMismatch
from sparsmith.ops.shards import is_owner, is_sharded, like, part, rows_of, take

FOLDER, RECORD = "shards", "model.json"
_MODEL = "model."
_HEADER = "sparsmith"


def is_sharded_checkpoint(checkpoint: Path) -> bool:
    """Whether a checkpoint of a run was written by the ranks of a sharded one."""
    return (checkpoint / FOLDER / RECORD).is_file()


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint keeps of the model, under its names in the files."""
    return {_MODEL + name: tensor for name, tensor in {**method_state(model), **lora_state(model)}.items()}


def write_checkpoint(checkpoint: Path, model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Every rank's part of the model and of the optimiser's `tensors`, in a folder that all ranks see."""
    folder = checkpoint / FOLDER
    folder.mkdir(exist_ok=True)
    write_shard(folder, {**trained_tensors(model), **tensors})
    if ranks.is_first():
        write_record(folder, model)


def write_shard(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Write this rank's rows. Every rank calls it with tensors of the same names, in one folder that all see.

    Raises:
        CheckpointError: a tensor holds NaN or infinity.
    """
    mine, places = {}, {}
    for name, tensor in tensors.items():
        start, stop = rows_of(tensor)
        writes = is_owner(tensor) and stop > start if is_sharded(tensor) else ranks.is_first()
        if writes:
            mine[name] = part(tensor)
            places[name] = {"start": start, "shape": list(tensor.shape)}
    file = folder / f"rank-{ranks.rank():05d}-of-{ranks.world():05d}.safetensors"
    strict.write_tensors(file, mine, {_HEADER: json.dumps(places, sort_keys=True)})


def write_record(folder: Path, model: nn.Module) -> None:
    """What the shards belong to; the first rank's part."""
    (folder / RECORD).write_text(durable.json_text({"configs": _configs(model)}), encoding="utf-8")


def fill_model(model: nn.Module, checkpoint: Path) -> None:
    """Load the trained tensors into a model that was crafted in the same way, strictly: each rank what it holds.

    Raises:
        CheckpointMismatch: any difference in settings, names, shapes or number types.
        CheckpointError: a file is damaged or missing.
    """
    folder = checkpoint / FOLDER
    found = durable.read_json(durable.inside(folder, RECORD))
    configs = found.get("configs") if isinstance(found, dict) else None
    compare(f"{folder}: configs", configs, _configs(model), "Craft the model with the checkpoint's configs.")
    shards = Shards(folder)
    targets = trained_tensors(model)
    rows = {name: row for name, row in shards.rows().items() if name.startswith(_MODEL)}
    strict.compare_tables(str(folder), rows, strict.shapes_of(targets))
    for name, target in targets.items():
        take(target, shards.read(name, *rows_of(target)))


def optimizer_reader(parameters: Sequence[Tensor]) -> Callable[[Path], dict[str, Tensor]]:
    """A reader of the optimiser's tensors for `parameters` in its order: moments of a sharded parameter come sharded as it is."""

    def read(checkpoint: Path) -> dict[str, Tensor]:
        source: Any = Shards(checkpoint / FOLDER) if is_sharded_checkpoint(checkpoint) else _WholeFile(checkpoint)
        tensors = {}
        for name, (shape, _) in source.rows().items():
            if name.startswith(_MODEL):
                continue
            parameter = _parameter_of(name, shape, parameters)
            if parameter is None:
                tensors[name] = source.read(name, 0, shape[0] if shape else 1)
            else:
                tensors[name] = like(source.read(name, *rows_of(parameter)), parameter)
        return tensors

    return read


def _parameter_of(name: str, shape: tuple[int, ...], parameters: Sequence[Tensor]) -> Tensor | None:
    """The sharded parameter whose moment this is: `optimizer.state.INDEX.KIND`."""
    head, _, rest = name.partition(".state.")
    index = rest.split(".")[0]
    if head != "optimizer" or not index.isdecimal() or int(index) >= len(parameters):
        return None
    parameter = parameters[int(index)]
    return parameter if is_sharded(parameter) and tuple(parameter.shape) == shape else None


@dataclass
class _WholeFile:
    """The optimiser's file of a checkpoint that one process (or DDP) wrote."""

    checkpoint: Path

    @property
    def file(self) -> Path:
        from sparsmith.training.state import TENSORS

        return durable.inside(self.checkpoint, TENSORS)

    def rows(self) -> dict[str, tuple[tuple[int, ...], str]]:
        return strict.read_rows(self.file)

    def read(self, name: str, start: int, stop: int) -> Tensor:
        return strict.read_rows_of(self.file, name, start, stop)


@dataclass
class _Piece:
    start: int
    stop: int
    file: Path


@dataclass
class Shards:
    """The tensors of all shard files, read by rows.

    Raises:
        CheckpointError: a file is missing, or the pieces of a tensor do not make it whole.
    """

    folder: Path
    pieces: dict[str, list[_Piece]] = field(default_factory=dict)
    shapes: dict[str, tuple[tuple[int, ...], str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        files = sorted(self.folder.glob("rank-*-of-*.safetensors"))
        wanted = [f"rank-{r:05d}-of-{len(files):05d}.safetensors" for r in range(len(files))]
        if not files or [file.name for file in files] != wanted:
            found = ", ".join(file.name for file in files) or "none"
            raise CheckpointError(str(self.folder), found, "one shard of every rank", "Take an earlier checkpoint.")
        for file in files:
            self._add(durable.inside(self.folder, file.name))
        for name, pieces in self.pieces.items():
            pieces.sort(key=lambda piece: piece.start)
            shape = self.shapes[name][0]
            edges = [0, *(piece.stop for piece in pieces)]
            whole = [piece.start for piece in pieces] == edges[:-1] and edges[-1] == (shape[0] if shape else 1)
            if not whole:
                held = ", ".join(f"{piece.start}..{piece.stop}" for piece in pieces)
                raise CheckpointError(f"{self.folder}: {name}", f"rows {held}", f"all of {shape}", "Take another.")

    def _add(self, file: Path) -> None:
        places = durable.parse_json(strict.read_metadata(file).get(_HEADER, "").encode(), f"{file}: header")
        rows = strict.read_rows(file)
        if not isinstance(places, dict) or set(places) != set(rows):
            raise CheckpointError(f"{file}: header", "other names than its tensors", "a row for each", "Take another.")
        for name, (shape, dtype) in rows.items():
            start, whole = _place(places[name], f"{file}: header: {name}")
            if whole[1:] != shape[1:] or self.shapes.setdefault(name, (whole, dtype)) != (whole, dtype):
                raise CheckpointMismatch(f"{file}: {name}", f"{shape} {dtype}", str(self.shapes[name]), "Take another.")
            self.pieces.setdefault(name, []).append(_Piece(start, start + (shape[0] if shape else 1), file))

    def rows(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Name -> (whole shape, number type)."""
        return dict(self.shapes)

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a tensor, from as many files as hold them; a scalar as it is."""
        shape, dtype = self.shapes[name]
        if not shape:
            return strict.read_rows_of(self.pieces[name][0].file, name, 0, 1)
        found = []
        for piece in self.pieces[name]:
            low, high = max(start, piece.start), min(stop, piece.stop)
            if low < high:
                found.append(strict.read_rows_of(piece.file, name, low - piece.start, high - piece.start))
        return torch.cat(found) if found else torch.empty((0, *shape[1:]), dtype=getattr(torch, dtype))


def _place(value: Any, where: str) -> tuple[int, tuple[int, ...]]:
    start, shape = (value.get("start"), value.get("shape")) if isinstance(value, dict) else (None, None)
    numbers = [number for number in (start, *(shape or ())) if type(number) is int and number >= 0]
    if not isinstance(shape, list) or len(numbers) != 1 + len(shape):
        raise CheckpointError(where, str(value)[:80], "a first row and a shape", "Take another checkpoint.")
    return numbers[0], tuple(numbers[1:])


def _configs(model: nn.Module) -> list[Any]:
    return [plain(config.model_dump(mode="json")) for config in record_of(model).configs]
