"""What a finished folder says of itself, and the readers that believe it: manifest, hashes, names, JSON.

Everything read here may come from a stranger: names are checked before they are joined to a path, JSON has no twins and
no NaN, and every fault is a `CheckpointError` that names the file.
"""

from __future__ import annotations

import hashlib
import json
import stat
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from sparsmith.errors import CheckpointError
from sparsmith.fingerprints import file_digest

MANIFEST = "manifest.json"
MANIFEST_FORMAT = 1
_MIB = 1 << 20
_MAX_JSON = 64 * _MIB  # no JSON file of ours comes near; guards the reader against a file that is not ours


class FileEntry(NamedTuple):
    """One row of a manifest."""

    sha256: str
    size: int


def has_manifest(path: str | Path) -> bool:
    """True when `path` is a folder that was written to its end."""
    return (Path(path) / MANIFEST).is_file()


def read_manifest(path: str | Path) -> dict[str, FileEntry]:
    """The rows of a folder's manifest, with every name checked; raises `CheckpointError`."""
    file = Path(path) / MANIFEST
    if not file.is_file():
        raise CheckpointError(
            str(path),
            "no manifest.json",
            "a folder that sparsmith wrote to its end",
            "Take an earlier whole checkpoint.",
        )
    raw = file.read_bytes()
    data = parse_json(raw, str(file))
    refuse_newer(str(file), data.get("format") if isinstance(data, dict) else None, MANIFEST_FORMAT)
    try:
        files = {
            safe_name(name, str(file)): FileEntry(row["sha256"], row["size"]) for name, row in data["files"].items()
        }
        whole = data["format"] == MANIFEST_FORMAT and raw == manifest_bytes(files)
    except (KeyError, TypeError, ValueError, AttributeError):
        whole = False
    if not whole:
        raise _damaged(file, "a manifest that does not match its own sha256")
    return files


def refuse_newer(where: str, version: Any, known: int) -> None:
    """Refuse a format that a later sparsmith wrote, before anything else of the file is believed.

    Raises:
        CheckpointError: says which version was found, which are read, and what to do.
    """
    if isinstance(version, int) and version > known:
        raise CheckpointError(
            where,
            f"format {version}",
            f"format {known}, which this sparsmith reads",
            "Use a newer sparsmith: pip install -U sparsmith. Where none wrote it, the file is damaged.",
        )


def verify_folder(path: str | Path) -> dict[str, FileEntry]:
    """Hold every file of the folder against its manifest and return the manifest; raises `CheckpointError` naming the
    file.

    A file that the manifest does not list is refused too (hidden ones aside): a loader might read it.
    """
    folder = Path(path)
    files = read_manifest(folder)
    for name, entry in files.items():
        file = inside(folder, name)
        if not file.is_file():
            raise _damaged(file, "no such file")
        size = file.stat().st_size
        if size != entry.size:
            raise _damaged(file, f"{size} bytes where the manifest says {entry.size}")
        if entry_of(file).sha256 != entry.sha256:
            raise _damaged(file, "other bytes than the manifest's sha256")
    for name in files_of(folder):
        if name not in files and name != MANIFEST and not name.startswith("."):
            raise CheckpointError(
                str(folder / name),
                "a file that the manifest does not list",
                "only listed files",
                "Move it out of the folder.",
            )
    return files


def read_json(path: str | Path) -> Any:
    """Parse a JSON file; a missing, huge or broken one is a `CheckpointError`."""
    file = Path(path)
    try:
        if file.stat().st_size > _MAX_JSON:
            raise _damaged(file, "a JSON file of more than 64 MiB")
        raw = file.read_bytes()
    except OSError as error:
        raise _damaged(file, f"no readable file ({error.strerror})") from error
    return parse_json(raw, str(file))


def parse_json(raw: bytes, where: str) -> Any:
    """JSON with the two leniencies of the standard reader shut: a key given twice, and NaN."""
    try:
        return json.loads(raw.decode(), object_pairs_hook=_no_twins, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise _damaged(Path(where), f"no valid JSON ({error})") from error


def safe_name(name: str, where: str) -> str:
    """`name` when it is a plain relative path below its folder, else `CheckpointError`."""
    parts = name.split("/") if isinstance(name, str) else []
    bad_part = any(part in ("", ".", "..") or part != part.strip() or part.endswith(".") for part in parts)
    bad_text = not parts or any(ch in '\\:*?"<>|~' or not ch.isprintable() for ch in name) or len(name) > 255
    if bad_part or bad_text or PurePosixPath(name).is_absolute():
        raise CheckpointError(
            where,
            f"the file name {name!r}",
            "a plain name inside the folder",
            "Do not use this folder: it was tampered with.",
        )
    return name


def inside(folder: str | Path, name: str) -> Path:
    """`folder/name`, refused where a link leads out of the folder (the hub cache's own links to its blobs are
    followed)."""
    folder = Path(folder)
    file = folder / safe_name(name, str(folder))
    real, home = file.resolve(), folder.resolve()
    blobs = home.parent.parent / "blobs"
    if home not in real.parents and real.parent != blobs:
        raise CheckpointError(
            str(file),
            f"a link to {real}",
            "a file inside the folder",
            "Copy the file into the folder, or do not use it.",
        )
    if real.exists() and not stat.S_ISREG(real.stat().st_mode):
        raise _damaged(file, "no regular file")
    return file


def json_text(value: Any) -> str:
    return json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def files_of(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())


def entry_of(file: Path) -> FileEntry:
    return FileEntry(file_digest(file).hex(), file.stat().st_size)


def manifest_bytes(files: dict[str, FileEntry]) -> bytes:
    rows = {name: entry._asdict() for name, entry in sorted(files.items())}
    own = hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()
    return json_text({"format": MANIFEST_FORMAT, "files": rows, "sha256": own}).encode()


def _damaged(file: Path, found: str) -> CheckpointError:
    return CheckpointError(
        str(file), found, "the file as it was written", "Restore the file, or take an earlier checkpoint."
    )


def _no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key is given twice")
    return result


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is no number")
