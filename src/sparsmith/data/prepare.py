"""A source as token arrays: read, encoded and kept in the cache.

The arrays hold every good row whole; `fit` then applies `max_length`, so that another length needs no new encoding.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sparsmith.data import cache
from sparsmith.data.rows import Reject, RowFault, reject
from sparsmith.data.sources import Example, OpenSource, RowSet, open_source, read_rows
from sparsmith.data.tokens import TokenRow, tokenizer_hash
from sparsmith.data.workers import encode_all
from sparsmith.errors import DataError
from sparsmith.recipe.schema import DataSettings, Source

FORMAT_VERSION = 1
"""Raised whenever reading or encoding gives other tokens, so that no old cache is believed."""


@dataclass
class TokenSet:
    """The rows of a source as flat arrays. Row i is `ids[offsets[i]:offsets[i + 1]]`."""

    name: str
    ids: np.ndarray
    """(tokens,) int32"""
    trained: np.ndarray
    """(tokens,) bool"""
    offsets: np.ndarray
    """(rows + 1,) int64"""
    lines: np.ndarray
    """(rows,) int64, 1-based"""
    file_index: np.ndarray
    """(rows,) int32 into `files`"""
    files: list[str]
    rejects: list[Reject]
    counts: dict[str, Any]
    fingerprints: dict[str, str]
    kept: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    """(kept rows,) int64, the rows that `fit` left."""
    max_length: int = 0
    labels: np.ndarray | None = None
    """(rows,) int32, the class of each row of a classifier."""
    ending: tuple[int, ...] = ()
    """Ids that a row which is cut keeps at its end."""

    def __len__(self) -> int:
        return len(self.kept)

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids, trained) of the kept row `index`, cut to `max_length`."""
        start, stop = self.offsets[self.kept[index]], self.offsets[self.kept[index] + 1]
        whole, stop = stop, min(stop, start + self.max_length)
        ids = self.ids[start:stop]
        if stop < whole and self.ending:
            ids = np.concatenate([ids[: -len(self.ending)], np.array(self.ending, ids.dtype)])
        return ids, self.trained[start:stop]

    def label(self, index: int) -> int:
        """The class of the kept row `index`."""
        assert self.labels is not None
        return int(self.labels[self.kept[index]])

    def take_out(self, indices: np.ndarray, purpose: str) -> None:
        """Leave out kept rows that serve another purpose, and count them."""
        self.kept = np.delete(self.kept, indices)
        tokens, trained = self.sizes()
        self.counts.update(
            {
                purpose: len(indices),
                "kept": len(self),
                "tokens": int(tokens.sum()),
                "trained_tokens": int(trained.sum()),
            }
        )

    def place(self, index: int) -> str:
        """`file:line` of the kept row `index`."""
        raw = self.kept[index]
        return f"{self.files[self.file_index[raw]]}:{self.lines[raw]}"

    def sizes(self) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and trained tokens of each kept row, cut to `max_length`."""
        tokens, trained = self._all_sizes(self.max_length)
        return tokens[self.kept], trained[self.kept]

    def _all_sizes(self, max_length: int) -> tuple[np.ndarray, np.ndarray]:
        """As `sizes`, of rows that are not kept too."""
        running = np.concatenate([[0], np.cumsum(self.trained, dtype=np.int64)])
        stops = np.minimum(self.offsets[1:], self.offsets[:-1] + max_length)
        return stops - self.offsets[:-1], running[stops] - running[self.offsets[:-1]]

    def fit(self, max_length: int, over_long: str) -> None:
        """Apply `max_length`, leave out rows without a trained token, and count both."""
        lengths = np.diff(self.offsets)
        long = lengths > max_length
        if over_long == "stop" and long.any():
            raw = int(np.argmax(long))
            where = f"{self.files[self.file_index[raw]]}:{self.lines[raw]}"
            raise DataError(
                where,
                f"a row of {lengths[raw]} tokens",
                f"at most {max_length}",
                "Raise data.max_length, or set data.over_long.",
            )
        used, trained = self._all_sizes(max_length)
        kept = np.ones(len(lengths), bool) if over_long == "truncate" else ~long
        masked = kept & (trained == 0) & (self.labels is None)
        self.kept, self.max_length = np.flatnonzero(kept & ~masked), max_length
        self.counts.update(
            over_long=int(long.sum()) if over_long != "truncate" else 0,
            truncated=int((long & ~masked).sum()) if over_long == "truncate" else 0,
            all_masked=int(masked.sum()),
            kept=len(self.kept),
            tokens=int(used[self.kept].sum()),
            trained_tokens=int(trained[self.kept].sum()),
        )


def prepare(
    source: Source, domain: str, settings: DataSettings, encoder: Any, base_dir: Path, seed: int, cache_dir: Path | None
) -> TokenSet:
    """The token arrays of a source, from the cache where they are there whole."""
    opened = open_source(source, base_dir)
    key = cache.key_of(
        FORMAT_VERSION,
        opened.fingerprints,
        source.model_dump(mode="json", exclude={"path", "domain", "rate", "cap", "on_bad_row", "family", "licence"}),
        seed if source.limit else None,
        tokenizer_hash(encoder.tokenizer),
        settings.template,
        settings.loss_on,
        *([] if encoder.classes is None else [encoder.classes]),
    )
    stored = cache.read(cache_dir, key) if cache_dir else None
    result = (
        _unpack(source.name, stored, opened) if stored else _encode(source, settings, encoder, base_dir, seed, opened)
    )
    if not stored and cache_dir:
        cache.write(cache_dir, key, _pack(result))
    if result.rejects and (source.on_bad_row or settings.on_bad_row) == "stop":
        raise result.rejects[0].error
    result.counts["domain"] = domain
    result.ending = encoder.ending
    result.fit(settings.max_length, settings.over_long)
    if not len(result):
        raise DataError(
            source.path,
            f"no row left: {result.counts}",
            "a row that can be trained on",
            "Check data.max_length and `columns`.",
        )
    return result


def encode_rows(
    rows: list[Example], rejects: list[Reject], encoder: Any, settings: DataSettings, stop: bool
) -> list[tuple[Example, TokenRow]]:
    """Encode examples; one that the template refuses stops, or joins `rejects`."""
    result = []
    for example, encoded in zip(rows, encode_all(encoder, [row.messages for row in rows], settings.workers)):
        if isinstance(encoded, RowFault):
            bad = reject(encoded, example.file, example.line, json.dumps(example.messages, ensure_ascii=False))
            if stop:
                raise bad.error
            rejects.append(bad)
        else:
            result.append((example, encoded))
    return result


def _encode(
    source: Source, settings: DataSettings, encoder: Any, base_dir: Path, seed: int, opened: OpenSource
) -> TokenSet:
    rows = read_rows(source, settings.on_bad_row, base_dir, seed, opened, encoder.classes)
    stop = (source.on_bad_row or settings.on_bad_row) == "stop"
    encoded = encode_rows(rows.rows, rows.rejects, encoder, settings, stop)
    files = sorted({example.file for example, _ in encoded})
    number = {file: index for index, file in enumerate(files)}
    lengths = [len(row.ids) for _, row in encoded]
    return TokenSet(
        name=source.name,
        ids=np.fromiter((token for _, row in encoded for token in row.ids), np.int32, sum(lengths)),
        trained=np.fromiter((one for _, row in encoded for one in row.trained), np.bool_, sum(lengths)),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        lines=np.array([example.line for example, _ in encoded], np.int64),
        file_index=np.array([number[example.file] for example, _ in encoded], np.int32),
        files=files,
        rejects=rows.rejects,
        counts=read_counts(rows),
        fingerprints=rows.fingerprints,
        labels=None if encoder.classes is None else np.array([example.label for example, _ in encoded], np.int32),
    )


def read_counts(rows: RowSet) -> dict[str, Any]:
    """read = rejected + filtered + limited + over_long + all_masked + kept."""
    return {
        "format": rows.form,
        "read": rows.read,
        "rejected": len(rows.rejects),
        "filtered": rows.filtered,
        "limited": rows.limited,
    }


def _pack(tokens: TokenSet) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    names = ("ids", "trained", "offsets", "lines", "file_index", *(() if tokens.labels is None else ("labels",)))
    arrays = {name: getattr(tokens, name) for name in names}
    rejects = [
        {"file": bad.file, "line": bad.line, "raw": bad.raw, "error": bad.error.as_dict()} for bad in tokens.rejects
    ]
    return arrays, {"files": tokens.files, "counts": tokens.counts, "rejects": rejects}


def _unpack(name: str, stored: tuple[Any, Any], opened: OpenSource) -> TokenSet:
    arrays, meta = stored
    rejects = []
    for bad in meta["rejects"]:
        error = DataError(*(bad["error"][part] for part in ("where", "found", "expected", "mend")))
        rejects.append(Reject(bad["file"], bad["line"], error, bad["raw"]))
    return TokenSet(
        name=name,
        files=meta["files"],
        rejects=rejects,
        counts=meta["counts"],
        fingerprints=opened.fingerprints,
        **arrays,
    )
