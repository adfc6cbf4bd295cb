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
from sparsmith.data.render import Rendering, encode_task
from sparsmith.data.rows import Reject, RowFault, reject
from sparsmith.data.sources import Example, OpenSource, RowSet, open_source, read_rows
from sparsmith.data.tokens import TokenRow, tokenizer_hash
from sparsmith.data.workers import encode_all
from sparsmith.errors import DataError
from sparsmith.recipe.mixture import TaskSource
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
    stops: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    """(rows,) int64, where each row ends once it is cut; `fit` sets it."""
    labels: np.ndarray | None = None
    """(rows,) int32, the class of each row of a classifier."""
    ending: tuple[int, ...] = ()
    """Ids that a row which is cut keeps at its end."""

    def __len__(self) -> int:
        return len(self.kept)

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids, trained) of the kept row `index`, cut as `fit` says."""
        start, whole = self.offsets[self.kept[index]], self.offsets[self.kept[index] + 1]
        stop = self.stops[self.kept[index]]
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
        """Tokens and trained tokens of each kept row, cut as `fit` says."""
        tokens, trained = self._all_sizes()
        return tokens[self.kept], trained[self.kept]

    def _all_sizes(self) -> tuple[np.ndarray, np.ndarray]:
        """As `sizes`, of rows that are not kept too."""
        running = np.concatenate([[0], np.cumsum(self.trained, dtype=np.int64)])
        return self.stops - self.offsets[:-1], running[self.stops] - running[self.offsets[:-1]]

    def inputs(self) -> np.ndarray:
        """(rows,) int64: tokens before the first trained one."""
        first = np.searchsorted(np.flatnonzero(self.trained), self.offsets[:-1])
        places = np.append(np.flatnonzero(self.trained), len(self.trained))
        return np.minimum(places[first], self.offsets[1:]) - self.offsets[:-1]

    def fit(self, max_length: int, over_long: str, max_input: int | None = None, max_target: int | None = None) -> None:
        """Apply the limits, leave out rows without a trained token, and count both.

        Args:
            max_input, max_target: tokens before and from the first trained one; None = no such limit.
        """
        lengths, inputs = np.diff(self.offsets), self.inputs()
        room = np.full(len(lengths), max_length, np.int64)
        if max_target is not None:
            room = np.minimum(room, inputs + max_target)
        if max_input is not None:  # an input that is cut leaves no answer
            room = np.where(inputs > max_input, np.minimum(room, max_input), room)
        long = lengths > room
        if over_long == "stop" and long.any():
            self._stop_at(int(np.argmax(long)), max_length, max_input, max_target)
        self.stops = np.minimum(self.offsets[1:], self.offsets[:-1] + room)
        used, trained = self._all_sizes()
        kept = np.ones(len(lengths), bool) if over_long == "truncate" else ~long
        masked = kept & (trained == 0) & (self.labels is None)
        self.kept = np.flatnonzero(kept & ~masked)
        self.counts.update(
            over_long=int(long.sum()) if over_long != "truncate" else 0,
            truncated=int((long & ~masked).sum()) if over_long == "truncate" else 0,
            all_masked=int(masked.sum()),
            kept=len(self.kept),
            tokens=int(used[self.kept].sum()),
            trained_tokens=int(trained[self.kept].sum()),
        )

    def _stop_at(self, raw: int, max_length: int, max_input: int | None, max_target: int | None) -> None:
        start, stop = self.offsets[raw], self.offsets[raw + 1]
        where = f"{self.files[self.file_index[raw]]}:{self.lines[raw]}"
        length, before = int(stop - start), int(self.inputs()[raw])
        found, most, key = f"a row of {length} tokens", max_length, "data.max_length"
        if max_input is not None and before > max_input:
            found, most, key = f"an input of {before} tokens", max_input, "data.mixture.max_input"
        elif max_target is not None and length - before > max_target:
            found, most, key = f"an answer of {length - before} tokens", max_target, "data.mixture.max_target"
        raise DataError(where, found, f"at most {most}", f"Raise {key}, or set data.over_long.")


def prepare(
    source: Source, domain: str, settings: DataSettings, encoder: Any, base_dir: Path, seed: int, cache_dir: Path | None
) -> TokenSet:
    """The token arrays of a source, from the cache where they are there whole."""
    opened = open_source(source, base_dir)
    mixture = settings.mixture
    rendering = None
    if mixture is not None and isinstance(source, TaskSource):
        rendering = Rendering.of(mixture, source, base_dir, settings.max_length, seed)
    key = cache.key_of(
        FORMAT_VERSION,
        opened.fingerprints,
        source.model_dump(mode="json", exclude={"path", "domain", "rate", "cap", "on_bad_row", "family", "licence"}),
        seed if source.limit else None,
        tokenizer_hash(encoder.tokenizer),
        settings.template,
        settings.loss_on,
        *([] if encoder.classes is None else [encoder.classes]),
        *(["pairs"] if encoder.pairs else []),
        *([] if rendering is None else rendering.key),
    )
    stored = cache.read(cache_dir, key) if cache_dir else None
    if stored:
        result = _unpack(source.name, stored, opened)
    else:
        result = _encode(source, settings, encoder, base_dir, seed, opened, rendering)
    if not stored and cache_dir:
        cache.write(cache_dir, key, _pack(result))
    if result.rejects and (source.on_bad_row or settings.on_bad_row) == "stop":
        raise result.rejects[0].error
    result.counts["domain"] = domain
    result.ending = encoder.ending
    limits = (mixture.max_input, mixture.max_target) if mixture is not None else ()
    result.fit(settings.max_length, settings.over_long, *limits)
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
    source: Source,
    settings: DataSettings,
    encoder: Any,
    base_dir: Path,
    seed: int,
    opened: OpenSource,
    rendering: Rendering | None = None,
) -> TokenSet:
    fields = None if rendering is None else rendering.fields()
    rows = read_rows(source, settings.on_bad_row, base_dir, seed, opened, encoder.classes, fields)
    stop = (source.on_bad_row or settings.on_bad_row) == "stop"
    drawn: dict[str, Any] = {}
    if rendering is None:
        encoded = encode_rows(rows.rows, rows.rejects, encoder, settings, stop)
    else:
        encoded, drawn = encode_task(rendering, rows.rows, rows.rejects, encoder, settings.workers, stop)
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
        counts=read_counts(rows) | drawn,
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
