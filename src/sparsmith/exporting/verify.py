"""`sparsmith verify`: every hash, shape and number of a delta checkpoint, a full checkpoint, an export or a run. Loads
no model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sparsmith import durable
from sparsmith.crafting import delta, full
from sparsmith.crafting import tensors as strict
from sparsmith.crafting.identity import FILE, Identity, read_identity
from sparsmith.errors import CheckpointError
from sparsmith.runs import is_run


@dataclass(frozen=True)
class FolderReport:
    """One whole folder."""

    path: str
    kind: str
    """`delta`, `full`, or `files` for a sealed folder that is no checkpoint of itself."""
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


def verify(path: str | Path) -> VerifyReport:
    """Check a folder, and every sealed folder of a run.

    Raises:
        CheckpointError: names the file that differs, or the first number that is not finite.
        CheckpointMismatch: names the setting or tensor that contradicts `sparsmith.json`, with both values.
    """
    root = Path(path)
    if not root.is_dir():
        raise CheckpointError(str(root), "no folder", "a checkpoint, an export or a run", "Check the path.")
    folders = tuple(_check(folder) for folder in _sealed(root))
    if not folders:
        raise CheckpointError(
            str(root), "no finished checkpoint", "manifest.json here, or in a folder of a run", "Check the path."
        )
    return VerifyReport(folders)


def _sealed(root: Path) -> Iterator[Path]:
    """Folders that carry a manifest: `root` itself, or those of a run (checkpoints, model, export)."""
    if durable.has_manifest(root) or not is_run(root):
        yield from [root] if durable.has_manifest(root) or (root / FILE).is_file() else []
        return
    for manifest in sorted(root.rglob(durable.MANIFEST)):
        if not any(part.startswith(".") for part in manifest.relative_to(root).parts):
            yield manifest.parent


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
