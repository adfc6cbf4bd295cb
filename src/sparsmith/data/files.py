"""Files as bytes: which there are, what kind, unpacked, with a fingerprint, split into lines without touching a byte."""

from __future__ import annotations

import gzip
import hashlib
import io
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from sparsmith.errors import DataError

KINDS = ("jsonl", "ndjson", "json", "csv", "tsv", "parquet")
UTF8_BOM = b"\xef\xbb\xbf"
_UTF16_BOMS = (b"\xff\xfe", b"\xfe\xff")


@dataclass(frozen=True)
class DataFile:
    """One file of rows."""

    path: Path
    shown: str
    """The path as messages write it."""
    kind: str
    """One of `KINDS`; `ndjson` is read as `jsonl`."""


def kind_of_name(name: str) -> str | None:
    """The kind of a file by its name (`train.jsonl.gz` -> `jsonl`), or None."""
    ending = name.lower().removesuffix(".gz").rpartition(".")[2]
    return ending if ending in KINDS and "." in name else None


def list_files(path: Path, shown: str, split: str | None = None) -> list[DataFile]:
    """The data files at `path`: itself, or those of a folder in the order of their names.

    In a folder `split` picks the files whose name holds it.
    """
    if path.is_dir():
        return _list_folder(path, shown, split)
    kind = kind_of_name(path.name)
    if kind is None:
        raise DataError(
            shown,
            f"a file ending in `{''.join(path.suffixes) or 'nothing'}`",
            "jsonl, json, csv, tsv or parquet, each also with .gz",
            "Rename or convert the file.",
        )
    return [DataFile(path, shown, kind)]


def _list_folder(path: Path, shown: str, split: str | None) -> list[DataFile]:
    found = sorted(child for child in path.iterdir() if child.is_file() and kind_of_name(child.name))
    if not found:
        raise DataError(
            shown, "a folder without data files", "files of jsonl, json, csv, tsv or parquet", "Check `path`."
        )
    chosen = [child for child in found if split is None or split in child.name]
    if not chosen:
        names = ", ".join(child.name for child in found[:8])
        raise DataError(
            shown, f"no file for the split `{split}` among {names}", "a name that holds it", "Check `split`."
        )
    return [DataFile(child, f"{shown.rstrip('/')}/{child.name}", kind_of_name(child.name) or "") for child in chosen]


def missing_file(path: Path, shown: str) -> DataError:
    """The error for a path at which nothing stands, with the nearest name beside it."""
    try:
        beside = [child.name for child in path.parent.iterdir()]
    except OSError:
        return DataError(
            shown, f"no folder `{path.parent}`", "a file", "Check `path`; it is relative to the recipe's folder."
        )
    near = get_close_matches(path.name, beside, n=1, cutoff=0.6)
    mend = f"Did you mean `{near[0]}`?" if near else "Check `path`; it is relative to the recipe's folder."
    return DataError(shown, "no such file", "a file, a folder or a hub data set", mend)


def read_bytes(file: DataFile) -> tuple[bytes, str]:
    """The unpacked bytes of a file and the sha256 of the file as it lies on disk."""
    try:
        packed = file.path.read_bytes()
    except OSError as fault:
        raise DataError(
            file.shown, f"a file that cannot be read ({fault.strerror})", "a readable file", "Check its rights."
        ) from None
    fingerprint = hashlib.sha256(packed).hexdigest()
    if packed.startswith(b"\x1f\x8b"):
        return _unzip(packed, file.shown), fingerprint
    if file.path.name.lower().endswith(".gz"):
        raise DataError(
            file.shown, "a file ending in .gz that is not gzip", "gzip", "Rename the file, or download it again."
        )
    return packed, fingerprint


def _unzip(packed: bytes, shown: str) -> bytes:
    parts: list[bytes] = []
    stream = gzip.GzipFile(fileobj=io.BytesIO(packed))
    try:
        while part := stream.read(2**20):
            parts.append(part)
    except (EOFError, zlib.error, gzip.BadGzipFile) as fault:
        line = sum(part.count(b"\n") for part in parts) + 1
        what = "gzip data that ends too early" if isinstance(fault, EOFError) else "damaged gzip data"
        raise DataError(f"{shown}:{line}", what, "a whole gzip file", "Download or pack the file again.") from None
    return b"".join(parts)


def without_mark(data: bytes, shown: str) -> bytes:
    """`data` without a UTF-8 byte order mark at its head; UTF-16 is refused by name."""
    if data.startswith(_UTF16_BOMS):
        raise DataError(f"{shown}:1", "UTF-16 text", "UTF-8", "Convert it: iconv -f UTF-16 -t UTF-8.")
    return data.removeprefix(UTF8_BOM)


def lines_of(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(line number, bytes) of each line, split at LF only, one CR before it taken off. Empty lines at the end are left out."""
    end = len(data.rstrip(b"\r\n \t"))
    start, number = 0, 0
    while start < end:
        stop = data.find(b"\n", start)
        stop = len(data) if stop < 0 else stop
        number += 1
        yield number, data[start:stop].removesuffix(b"\r")
        start = stop + 1
