"""The only writer: what it leaves on disk is either whole or not there.

A folder is written beside its place under a temporary name, every file is flushed to the disk, `manifest.json` (sha256
and size of each file, and of itself) is written last, and one rename puts the folder in place. A reader believes the
manifest, never the name. A small file is replaced the same way: temporary sibling, fsync, rename. The price is one
extra read of every byte, for the hash.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sparsmith.errors import CheckpointError, EnvironmentFault
from sparsmith.fingerprints import file_digest, fingerprint, weight_files
from sparsmith.manifests import (
    MANIFEST,
    FileEntry,
    entry_of,
    files_of,
    has_manifest,
    inside,
    json_text,
    manifest_bytes,
    parse_json,
    read_json,
    read_manifest,
    safe_name,
    verify_folder,
)

__all__ = [
    "MANIFEST",
    "FileEntry",
    "append_line",
    "claimed",
    "clean_leftovers",
    "durable_folder",
    "file_digest",
    "fingerprint",
    "free_bytes",
    "has_manifest",
    "inside",
    "json_text",
    "parse_json",
    "read_json",
    "read_manifest",
    "require_space",
    "safe_name",
    "seal",
    "verify_folder",
    "weight_files",
    "write_bytes",
    "write_json",
    "write_text",
]

try:
    import fcntl
except ImportError:  # not a POSIX system: leftovers are then told by their process id alone
    fcntl = None  # type: ignore[assignment]

_TEMP, _OLD = ".writing-", ".replaced-"
_FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
_REFUSED_DISK = (errno.EACCES, errno.EPERM, errno.EROFS)


# ---------------------------------------------------------------- writing


@contextmanager
def durable_folder(path: str | Path, *, replace: bool = False, needed: int = 0) -> Iterator[Path]:
    """Yield an empty temporary folder; when the block ends well, seal it and rename it to `path`.

    Args:
        path: the folder to make. It must not exist, or be empty, unless `replace`.
        replace: put the new folder in the place of an old one; a kill in between is mended by `clean_leftovers`.
        needed: bytes that will be written; checked against the free space before anything is written (0 = not known).
    """
    target = Path(path).absolute()
    if not replace:
        _refuse_taken(target)
    with _disk_faults(target, needed):
        target.parent.mkdir(parents=True, exist_ok=True)
        require_space(target.parent, needed)
        temp = target.with_name(f".{target.name}{_TEMP}{secrets.token_hex(6)}")
        temp.mkdir()
    with _held(temp):
        try:
            with _disk_faults(target, needed):
                yield temp
                seal(temp)
                _put_in_place(temp, target)
        except BaseException:
            shutil.rmtree(temp, ignore_errors=True)
            raise


def seal(folder: str | Path) -> None:
    """Flush every file of `folder` to the disk and write its manifest."""
    folder = Path(folder)
    files = {}
    for name in files_of(folder):
        if name == MANIFEST:
            continue
        files[name] = entry_of(inside(folder, name))
        _fsync(folder / name)
    (folder / MANIFEST).write_bytes(manifest_bytes(files))
    usual = stat.S_IMODE((folder / MANIFEST).stat().st_mode)
    for name in files:  # safetensors writes files that nobody else may read
        (folder / name).chmod(usual)
    _fsync(folder / MANIFEST)
    for sub in {folder, *(folder / name for name in files)}:
        _fsync(sub if sub.is_dir() else sub.parent)


def write_bytes(path: str | Path, data: bytes) -> None:
    """Replace the file `path` by `data`: at any moment it is the old one or the new one."""
    target = Path(path).absolute()
    with _disk_faults(target, len(data)):
        target.parent.mkdir(parents=True, exist_ok=True)
        temp = target.with_name(f".{target.name}{_TEMP}{secrets.token_hex(6)}")
        try:
            temp.write_bytes(data)
            _fsync(temp)
            temp.replace(target)
        except BaseException:
            temp.unlink(missing_ok=True)
            raise
        _fsync(target.parent)


def write_text(path: str | Path, text: str) -> None:
    """`write_bytes` of UTF-8 text."""
    write_bytes(path, text.encode())


def write_json(path: str | Path, value: Any) -> None:
    """`write_bytes` of indented JSON. NaN and infinity are no JSON and are refused."""
    write_text(path, json_text(value))


def append_line(path: str | Path, line: str, *, sync: bool = False) -> None:
    """Add one line to a growing file (the metrics). A last line that a crash has cut off is dropped first."""
    target = Path(path)
    with _disk_faults(target, len(line)):
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("a+b") as file:
            _drop_cut_line(file)
            file.write(line.rstrip("\n").encode() + b"\n")
            file.flush()
            if sync:
                os.fsync(file.fileno())


def clean_leftovers(parent: str | Path) -> list[Path]:
    """Remove what earlier crashed writes have left in `parent`; returns the paths removed.

    What a live process is writing now is left alone. A folder that was moved aside and whose successor never came is
    put back.
    """
    removed = []
    for path in sorted(Path(parent).glob(".*")):
        kind = next((kind for kind in (_TEMP, _OLD) if kind in path.name), None)
        if kind is None or _is_held(path):
            continue
        target = path.with_name(path.name[1:].rpartition(kind)[0])
        if kind == _OLD and not target.exists():
            path.rename(target)
            continue
        _remove(path)
        removed.append(path)
    return removed


@contextmanager
def claimed(folder: str | Path) -> Iterator[bool]:
    """Hold `folder` for the block; False where another process holds it. A dead process holds nothing."""
    if fcntl is None:
        yield True
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = True
        except BlockingIOError:
            free = False
        except OSError:  # a file system without locks
            free = True
        yield free
    finally:
        os.close(handle)


def require_space(path: str | Path, needed: int) -> None:
    """Raise `EnvironmentFault` with the figures when fewer than `needed` bytes are free where `path` lies."""
    free = free_bytes(path)
    if needed > free:
        raise _no_space(Path(path), needed, free)


def free_bytes(path: str | Path) -> int:
    """Free bytes on the file system of `path`, which need not exist yet."""
    place = Path(path).absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


# ---------------------------------------------------------------- inside


def _refuse_taken(target: Path) -> None:
    if target.is_dir() and not any(target.iterdir()):
        return
    if target.exists() or target.is_symlink():
        raise CheckpointError(
            str(target),
            "something that is already there",
            "a new folder",
            "Choose another folder, or remove this one first.",
        )


def _put_in_place(temp: Path, target: Path) -> None:
    aside = None
    if target.is_dir() and any(target.iterdir()):
        aside = target.with_name(f".{target.name}{_OLD}{secrets.token_hex(6)}")
        target.rename(aside)
    temp.rename(target)
    _fsync(target.parent)
    if aside is not None:
        shutil.rmtree(aside, ignore_errors=True)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Lock `folder` for the life of the writer, so that no other process takes it for a leftover."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # file systems without locks
            if fcntl is not None:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


def _is_held(path: Path) -> bool:
    if fcntl is None:
        return False
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(handle)
    return False


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _drop_cut_line(file: Any) -> None:
    """Cut the file after its last newline."""
    end = file.seek(0, os.SEEK_END)
    start = end
    while start:
        start = max(0, end - 4096)
        file.seek(start)
        cut = file.read(end - start).rfind(b"\n")
        if cut >= 0:
            file.truncate(start + cut + 1)
            return
        end = start
    file.truncate(0)


@contextmanager
def _disk_faults(path: Path, needed: int) -> Iterator[None]:
    """Say 'disk full' and 'not allowed' in one sentence with the figures, whichever library met it."""
    try:
        yield
    except EnvironmentFault:
        raise
    except Exception as error:
        number = getattr(error, "errno", None)
        if number in _FULL_DISK or "os error 28" in str(error) or "No space left" in str(error):
            raise _no_space(path, needed, free_bytes(path)) from error
        if number in _REFUSED_DISK:
            raise EnvironmentFault(
                str(path), f"{error}", "a place that can be written", "Choose another folder, or change its rights."
            ) from error
        raise


def _no_space(path: Path, needed: int, free: int) -> EnvironmentFault:
    wanted = f"{needed:,} bytes" if needed else "more space"
    return EnvironmentFault(
        str(path),
        f"{free:,} bytes free on the disk",
        wanted,
        "Free some space or choose another folder, then start again.",
    )
