"""The token cache: one file per source and setting, named by the hash of all that decides its content.

A file is the sha256 of its body (32 bytes), then the body (numpy's npz, without pickle). It is written beside its place and moved
there in one step, so that runs at the same time never see half of one; a file whose hash is wrong is encoded anew. A cache that
cannot be written is no fault of the run.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

Stored = tuple[dict[str, np.ndarray], dict[str, Any]]


def default_dir() -> Path:
    """`$SPARSMITH_CACHE`, else the user's cache folder."""
    if own := os.environ.get("SPARSMITH_CACHE"):
        return Path(own) / "tokens"
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "sparsmith" / "tokens"


def key_of(*parts: Any) -> str:
    """The name of an entry."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode("utf-8", "backslashreplace")).hexdigest()


def read(folder: Path, key: str) -> Stored | None:
    """The entry, or None where it is not there or not whole."""
    try:
        data = (folder / f"{key}.npz").read_bytes()
    except OSError:
        return None
    if hashlib.sha256(data[32:]).digest() != data[:32]:
        return None
    with np.load(io.BytesIO(data[32:]), allow_pickle=False) as loaded:
        arrays = {name: loaded[name] for name in loaded.files}
    return arrays, json.loads(arrays.pop("meta").tobytes())


def write(folder: Path, key: str, entry: Stored) -> None:
    """Store an entry in one step."""
    arrays, meta = entry
    body = io.BytesIO()
    np.savez(body, meta=np.frombuffer(json.dumps(meta).encode(), np.uint8), **arrays)  # type: ignore[arg-type]
    view = body.getvalue()
    temporary = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".", suffix=".part", delete=False) as out:
            temporary = Path(out.name)
            out.write(hashlib.sha256(view).digest())
            out.write(view)
            out.flush()
            os.fsync(out.fileno())
        temporary.replace(folder / f"{key}.npz")
    except OSError:
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
