"""Data sets of the Hugging Face hub, and folders written by `Dataset.save_to_disk`, through the `datasets` library."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sparsmith.data.rows import Reject, Row
from sparsmith.errors import DataError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.\-]*(/[A-Za-z0-9][\w.\-]*)?")


def is_saved_dataset(path: Path) -> bool:
    """True for a folder that `save_to_disk` wrote."""
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


def looks_like_hub_id(text: str) -> bool:
    """`name` or `owner/name`, not a path."""
    return _HUB_ID.fullmatch(text) is not None


def open_dataset(path: Path, shown: str, split: str | None) -> Any:
    """The rows of a hub data set or saved folder as a `datasets.Dataset`."""
    import datasets

    try:
        if path.is_dir():
            loaded = datasets.load_from_disk(str(path))
        else:
            loaded = datasets.load_dataset(shown, split=split or "train")
    except Exception as fault:  # the library raises many kinds, of many packages
        reason = str(fault).splitlines()[0][:160] if str(fault) else type(fault).__name__
        raise DataError(
            shown,
            f"a data set that cannot be opened ({reason})",
            "a hub data set or a folder of data",
            "Check `path` and `split`.",
        ) from None
    if isinstance(loaded, dict):
        names = ", ".join(loaded)
        if (split or "train") not in loaded:
            raise DataError(shown, f"no split `{split or 'train'}` among {names}", "one of them", "Set `split`.")
        loaded = loaded[split or "train"]
    return loaded


def read_dataset(dataset: Any, shown: str) -> Iterator[Row | Reject]:
    """Rows of a `datasets.Dataset`; the line is the number of the row."""
    for number, values in enumerate(dataset, start=1):
        yield Row(shown, number, dict(values), json.dumps(dict(values), ensure_ascii=False, default=repr))


def fingerprint_rows(dataset: Any) -> str:
    """sha256 over the rows' JSON, since a hub data set is no single file."""
    digest = hashlib.sha256()
    for values in dataset:
        digest.update(json.dumps(values, sort_keys=True, default=repr).encode("utf-8", "backslashreplace") + b"\n")
    return digest.hexdigest()
