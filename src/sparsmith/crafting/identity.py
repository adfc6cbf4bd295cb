"""`sparsmith.json`: what a checkpoint is, and the comparison of two of them field by field."""

from __future__ import annotations

import json
import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from pydantic import ValidationError

from sparsmith import durable
from sparsmith.crafting.record import BaseRecord, CraftRecord, SliceRecord
from sparsmith.crafting.tensors import TensorRow
from sparsmith.errors import CheckpointError, CheckpointMismatch
from sparsmith.manifests import refuse_newer
from sparsmith.methods import registry
from sparsmith.methods.base import MethodConfig
from sparsmith.recipe.strict import StrictModel
from sparsmith.runs import same_staged_root

if TYPE_CHECKING:
    from torch import nn

FILE = "sparsmith.json"
FORMAT_VERSION: Literal[1] = 1
# of a model's config: what does not change its function, or differs between library versions
_VOLATILE = frozenset(
    {"transformers_version", "_name_or_path", "name_or_path", "dtype", "torch_dtype", "architectures", "use_cache"}
    | {"quantization_config", "_attn_implementation", "attn_implementation", "auto_map"}
)


class BaseIdentity(StrictModel):
    """The base that a checkpoint belongs to."""

    id: str
    """Folder or hub id as the user named it."""
    folder: str | None
    """Delta: the folder that was read, absolute; relative to the checkpoint's where both lie in one run of several stages."""
    revision: str | None
    quant: str
    dtype: str
    attention: str | None
    config: dict[str, Any]
    fast_hash: str | None
    """sha256 over the headers and the first MiB of the weight files; None for a base that lay in no file."""
    full_hash: str | None
    task: Literal["causal_lm", "seq_cls", "seq2seq"] = "causal_lm"
    labels: tuple[str, ...] = ()
    """Of a classifier the names of its classes."""


class _Slice(StrictModel):
    """`crafting.record.SliceRecord` as it lies in the file."""

    depth: int
    of: int
    exits: tuple[int, ...]
    parent: str
    configs: tuple[dict[str, Any], ...]


class Identity(StrictModel):
    """All of `sparsmith.json`."""

    format_version: Literal[1]
    kind: Literal["delta", "full"]
    sparsmith: str
    seed: int
    configs: tuple[dict[str, Any], ...]
    base: BaseIdentity
    frozen_hash: str | None
    """Delta: sha256 over all tensors of the crafted model that the delta does not hold."""
    model_config_json: dict[str, Any] | None
    """Full: what config.json must say."""
    tensors: dict[str, TensorRow]
    slice: dict[str, Any] | None = None
    """Full: of a model that was cut out of a depth-elastic one, where (`crafting.record.SliceRecord`)."""
    form: str | None = None
    """Full: of a pruned model, its form (`methods.base.FORMS`)."""

    def core(self) -> dict[str, Any]:
        """The part that a delta repeats in the header of its weights, so that an edit of either is seen."""
        return self._dump({"tensors", "model_config_json", "slice", "form"})

    def as_dict(self) -> dict[str, Any]:
        """What the file holds: a key that is absent by default and in fact is left out, as in files of before it was known."""
        return self._dump({name for name in ("slice", "form") if getattr(self, name) is None})

    def _dump(self, without: set[str]) -> dict[str, Any]:
        data = self.model_dump(mode="json", exclude=without)
        if self.base.task == "causal_lm":
            for key in ("task", "labels"):
                del data["base"][key]
        return data

    def rows(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Name -> (shape, dtype name), as `tensors.compare_tables` wants it."""
        return {name: (row.shape, row.dtype) for name, row in self.tensors.items()}

    def method_configs(self, where: str) -> tuple[MethodConfig, ...]:
        """The configs as the methods' own classes."""
        try:
            return tuple(registry.get(row["method"]).config_class.model_validate(row) for row in self.configs)
        except (ValidationError, KeyError) as fault:
            raise CheckpointMismatch(
                f"{where}: configs",
                " ".join(str(fault).split()),
                "configs that this version of sparsmith reads",
                "Use the version that wrote it: " + self.sparsmith + ".",
            ) from fault

    def slice_record(self, where: str) -> SliceRecord | None:
        """Where it was cut out, of a slice."""
        if self.slice is None:
            return None
        try:
            found = _Slice.model_validate(self.slice)
        except ValidationError as fault:
            raise CheckpointMismatch(
                f"{where}: slice", " ".join(str(fault).split()), "where the slice was cut", "Restore the file."
            ) from fault
        return SliceRecord(found.depth, found.of, found.exits, found.parent, found.configs)

    def base_record(self) -> BaseRecord:
        folder = Path(self.base.folder) if self.base.folder else None
        row = self.base
        return BaseRecord(row.id, folder, row.revision, row.quant, row.dtype, row.task, row.labels)


def our_version() -> str:
    try:
        return version("sparsmith")
    except PackageNotFoundError:  # a source tree that is not installed
        return "unknown"


def identify(
    model: nn.Module,
    record: CraftRecord,
    kind: Literal["delta", "full"],
    tensors: dict[str, TensorRow],
    *,
    frozen_hash: str | None = None,
    model_config: dict[str, Any] | None = None,
    place: Path | None = None,
) -> Identity:
    """Everything that must be equal when the checkpoint is opened again.

    Args:
        place: of a delta, the folder that it is written into.
    """
    folder = weights_folder(record.base)
    return Identity(
        format_version=FORMAT_VERSION,
        kind=kind,
        sparsmith=our_version(),
        seed=record.seed,
        configs=tuple(config.model_dump(mode="json") for config in record.configs),
        base=BaseIdentity(
            id=record.base.id,
            folder=_recorded(record.base.folder, place) if record.base.folder and kind == "delta" else None,
            revision=record.base.revision,
            quant=record.base.quant,
            dtype=record.base.dtype,
            attention=getattr(model.config, "_attn_implementation", None),
            config=dense_config(model),
            fast_hash=base_hash(folder, "fast"),
            full_hash=base_hash(folder, "full"),
            task=cast(Any, record.base.task),
            labels=record.base.labels,
        ),
        frozen_hash=frozen_hash,
        model_config_json=model_config,
        tensors=tensors,
        slice=record.slice.as_dict() if record.slice else None,
        form=record.form if kind == "full" else None,
    )


def _recorded(base: Path, place: Path | None) -> str:
    """How the base's folder is written down by a delta that lies at `place`."""
    if place is not None and same_staged_root(base, place) is not None:
        return os.path.relpath(base.resolve(), place.resolve())
    return str(base.absolute())


def dense_config(model: nn.Module) -> dict[str, Any]:
    """The config of the dense-shaped part, as plain JSON data, without what does not change its function."""
    config: Any = model.config
    dense = getattr(config, "base_config", None) or config
    data = dense if isinstance(dense, dict) else dense.to_dict()
    return {key: value for key, value in plain(data).items() if key not in _VOLATILE}


def plain(value: Any) -> Any:
    """`value` after a trip through JSON: tuples are lists, keys are text, anything unknown is its text."""
    return json.loads(json.dumps(value, default=str))


def weights_folder(base: BaseRecord) -> Path | None:
    """Where the base's weight files lie: its folder, or its place in the hub cache; None for a base made in memory."""
    if base.folder is not None:
        return base.folder
    if not base.id or Path(base.id).is_absolute():
        return None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(base.id, "config.json", revision=base.revision)
    except HFValidationError:
        return None
    return Path(found).parent if isinstance(found, str) else None


_HASHES: dict[tuple, str] = {}


def base_hash(folder: Path | None, mode: Literal["fast", "full"]) -> str | None:
    """`fingerprint`, remembered for as long as the files keep their sizes and times."""
    if folder is None:
        return None
    stats = [(str(file), (stat := file.stat()).st_size, stat.st_mtime_ns) for file in durable.weight_files(folder)]
    key = (mode, *stats)
    if key not in _HASHES:
        _HASHES[key] = durable.fingerprint(folder, mode)
    return _HASHES[key]


def write_identity(folder: Path, identity: Identity) -> None:
    (folder / FILE).write_text(durable.json_text(identity.as_dict()), encoding="utf-8")


def read_identity(folder: Path) -> Identity:
    """Parse `sparsmith.json`; anything that is not ours or of a newer format is refused."""
    file = folder / FILE
    if not file.is_file():
        raise CheckpointError(
            str(folder), f"no {FILE}", "a folder that sparsmith.save or sparsmith.export wrote", "Check the path."
        )
    data = durable.read_json(file)
    format_version = data.get("format_version") if isinstance(data, dict) else None
    refuse_newer(str(file), format_version, FORMAT_VERSION)
    try:
        return Identity.model_validate(data)
    except ValidationError as fault:
        first = fault.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise CheckpointMismatch(
            f"{file}: {place}", repr(first["input"])[:200], first["msg"], "Restore the file as it was written."
        ) from fault


def compare(where: str, found: Any, expected: Any, mend: str, path: str = "") -> None:
    """Refuse the first difference of two JSON values, with both.

    Raises:
        CheckpointMismatch: names the field as `configs.0.top_k`.
    """
    if isinstance(found, dict) and isinstance(expected, dict):
        for key in sorted({*found, *expected}):
            step = f"{path}.{key}" if path else key
            compare(where, found.get(key, _ABSENT), expected.get(key, _ABSENT), mend, step)
    elif isinstance(found, list) and isinstance(expected, list) and len(found) == len(expected):
        for index, (left, right) in enumerate(zip(found, expected, strict=True)):
            compare(where, left, right, mend, f"{path}.{index}")
    elif found != expected or isinstance(found, bool) != isinstance(expected, bool):
        raise CheckpointMismatch(f"{where}: {path}", _shown(found), _shown(expected), mend)


class _Absent:
    def __repr__(self) -> str:
        return "nothing"


_ABSENT = _Absent()


def _shown(value: Any) -> str:
    return repr(value)[:200]
