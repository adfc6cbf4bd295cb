"""The checkpoints of a run: folders `checkpoint-STEP`, each whole or not there.

Listing, resuming and retention believe the manifest and never the name: a folder without one, or whose files are not those that it lists,
is neither chosen nor counted nor deleted.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from sparsmith import durable
from sparsmith.errors import CheckpointError

PREFIX = "checkpoint-"


def folder_of(root: Path, step: int) -> Path:
    """Where the checkpoint of that step lies."""
    return root / f"{PREFIX}{step}"


def step_of(folder: Path) -> int:
    """The step in a checkpoint's name, -1 where it has none."""
    number = folder.name.removeprefix(PREFIX)
    return int(number) if folder.name.startswith(PREFIX) and number.isdecimal() else -1


def listed(root: str | Path) -> list[Path]:
    """The whole checkpoints below `root`, oldest first: each has a manifest, and every file of it is there in its size."""
    found = [path for path in Path(root).glob(f"{PREFIX}*") if step_of(path) >= 0]
    return sorted((path for path in found if _looks_whole(path)), key=step_of)


def latest(root: str | Path, damaged: Callable[[CheckpointError], None]) -> Path | None:
    """The newest checkpoint whose every byte is as it was written; `damaged` is told of each newer one that is not."""
    found = [path for path in Path(root).glob(f"{PREFIX}*") if step_of(path) >= 0]
    for path in sorted(found, key=step_of, reverse=True):
        try:
            durable.verify_folder(path)
        except CheckpointError as error:
            damaged(error)
        else:
            return path
    return None


def prune(root: Path, keep: int | None) -> list[Path]:
    """Remove the oldest whole checkpoints beyond `keep` (None: keep all) and return them. The newest whole one always stays."""
    if keep is None:
        return []
    gone = listed(root)[: -max(keep, 1)]
    for path in gone:
        shutil.rmtree(path, ignore_errors=True)
    return gone


def _looks_whole(folder: Path) -> bool:
    try:
        rows = durable.read_manifest(folder)
        return all(durable.inside(folder, name).stat().st_size == row.size for name, row in rows.items())
    except (CheckpointError, OSError):
        return False
