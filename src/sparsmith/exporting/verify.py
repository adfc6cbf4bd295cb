"""`sparsmith verify`: every hash, shape and number of a delta checkpoint, a full checkpoint, an export, a run or a base.

Loads no weights, but reads each once. A base has no hashes: it is held against its own config, and its numbers must be finite.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sparsmith import anatomy, durable
from sparsmith.crafting import base_files, delta, full
from sparsmith.crafting import tensors as strict
from sparsmith.crafting.base_model import open_base, own_task
from sparsmith.crafting.class_head import ClassHead
from sparsmith.crafting.identity import FILE, Identity, read_identity
from sparsmith.errors import CheckpointError
from sparsmith.methods import registry
from sparsmith.recipe import load_recipe
from sparsmith.runs import StagesFolder, is_run, is_staged

RECIPE = "recipe.yaml"


@dataclass(frozen=True)
class FolderReport:
    """One whole folder."""

    path: str
    kind: str
    """`delta`, `full`, `base`; `run` for the figures of a run; `files` for a sealed folder that is no checkpoint of itself."""
    files: int
    bytes: int
    tensors: int
    parameters: int


@dataclass(frozen=True)
class VerifyReport:
    """All folders that were found, each whole. A fault is raised, not reported."""

    folders: tuple[FolderReport, ...]

    def as_dict(self) -> dict[str, Any]:
        return {"passed": True, "folders": [asdict(folder) for folder in self.folders]}

    def __str__(self) -> str:
        return "\n".join(
            f"whole: {row.path} ({row.kind}, {row.files} files, {row.bytes:,} bytes, {row.tensors} tensors)"
            for row in self.folders
        )

    def __rich__(self) -> str:
        from rich.markup import escape

        return escape(str(self))


def verify(path: str | Path) -> VerifyReport:
    """Check a folder; of a run also every stage and every sealed folder inside.

    Raises:
        CheckpointError: names the file that differs, or the first number that is not finite.
        RecipeErrors: the recipe of a run was edited into one that is none.
        CheckpointMismatch: names the setting or tensor that contradicts `sparsmith.json`, with both values.
    """
    root = Path(path)
    if not root.is_dir():
        raise CheckpointError(str(root), "no folder", "a checkpoint, an export, a run or a base", "Check the path.")
    if durable.has_manifest(root) or (root / FILE).is_file():
        return VerifyReport((_check(root),))
    if is_run(root):
        stages = StagesFolder(root).stages() if is_staged(root) else []
        runs = [root, *(stage.root for stage in stages if is_run(stage.root))]
        return VerifyReport((*map(_check_run, runs), *(_check(folder) for folder in _sealed(root))))
    if (root / base_files.CONFIG).is_file():
        return VerifyReport((_check_base(root),))
    raise CheckpointError(
        str(root),
        "neither manifest.json nor recipe.yaml nor config.json",
        "a checkpoint, an export, a run or a base",
        "Check the path.",
    )


def _sealed(root: Path) -> Iterator[Path]:
    """The folders of a run that carry a manifest (checkpoints, model, export)."""
    for manifest in sorted(root.rglob(durable.MANIFEST)):
        if not any(part.startswith(".") for part in manifest.relative_to(root).parts):
            yield manifest.parent


def _check_run(root: Path) -> FolderReport:
    """The recipe of a run and its figures can be read. A last line that a crash has cut off is no fault: a resume drops it."""
    load_recipe(root / RECIPE, method_configs=registry.config_classes(), check_paths=False)
    files = [root / RECIPE, *sorted(root.glob("*.json")), *sorted(root.glob("*.jsonl"))]
    for file in files[1:]:
        if file.suffix == ".json":
            durable.read_json(file)
            continue
        for number, line in enumerate(file.read_bytes().split(b"\n")[:-1], start=1):
            durable.parse_json(line, f"{file}:{number}")
    return FolderReport(str(root), "run", len(files), sum(file.stat().st_size for file in files), 0, 0)


def _check_base(folder: Path) -> FolderReport:
    """Every tensor that config.json asks for is in the files, in its shape, and no other; every number is finite."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    rows = base_files.check_base_folder(folder)
    files = [file for file, _ in base_files.shards(folder)]
    for file in files:
        strict.check_file_finite(file)
    own = own_task(str(folder))
    classes, task = own.get("num_labels"), own.get("task", anatomy.CAUSAL_LM)
    open_base(folder, task=task, head=ClassHead(classes) if classes else None, device_map="meta", dtype="auto")
    return FolderReport(
        path=str(folder),
        kind="base",
        files=len(files) + 1,
        bytes=sum(file.stat().st_size for file in files),
        tensors=len(rows),
        parameters=sum(_count(shape) for shape, _ in rows.values()),
    )


def _check(folder: Path) -> FolderReport:
    identity = _identity_of(folder)
    entries = durable.verify_folder(folder)
    for name in entries:
        if name.endswith(".json"):
            durable.read_json(folder / name)
    rows = _check_tensors(folder)
    if identity is not None:
        identity.method_configs(str(folder / FILE))
    return FolderReport(
        path=str(folder),
        kind=identity.kind if identity else "files",
        files=len(entries),
        bytes=sum(entry.size for entry in entries.values()),
        tensors=len(rows),
        parameters=sum(_count(shape) for shape, _ in rows.values()),
    )


def _identity_of(folder: Path) -> Identity | None:
    """`sparsmith.json`, held against what repeats it; before the hashes, so that an edit is told with both values."""
    if not (folder / FILE).is_file():
        return None
    identity = read_identity(folder)
    if identity.kind == "delta":
        return delta.read_delta_identity(folder)
    full.check_identity(folder, identity)
    return identity


def _check_tensors(folder: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    rows = strict.file_rows(folder)
    for file in sorted(folder.glob("*.safetensors")):
        strict.check_file_finite(file)
    return rows


def _count(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
