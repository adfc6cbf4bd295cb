"""Where evaluation rows and training rows meet: by family, by exact text, by runs of 13 words.

The evaluation rows are held as tables (a digest of each prompt, a sorted array of hashed word runs); every training source is then read once
and looked up in them, so that the price is that of reading the rows: no pair of rows is ever compared.

Paper: the 13-gram test is that of GPT-3 (arXiv 2005.14165, appendix C). Ours differs in two points: a run that stands in many rows of the
evaluation set itself is an instruction, not contents, and is left out (and counted); rows shorter than 13 words are not tested by shorter
runs but by exact match alone (and counted).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from sparsmith.data.evalsets import LIMIT_SEED
from sparsmith.data.families import shared_families, tag_of, training_sources
from sparsmith.data.overlap_report import WORDS, Kind, Meeting, OverlapReport, SetOverlap
from sparsmith.data.plain_words import WordHashes, ngrams, normalised, words
from sparsmith.data.rows import one_line
from sparsmith.data.sources import Example, read_rows
from sparsmith.recipe.schema import DataSettings, EvalSource, TrainSource

COMMON_ROWS, COMMON_SHARE = 10, 0.1
"""A run in at least so many rows, and more than this share of the rows, of its own set is an instruction."""
_CHUNK = 2**19  # words looked up at once: some tens of MB
_NOTHING = np.zeros(0, np.int64)


@dataclass(frozen=True)
class Trained:
    """A training source, and what its rows depend on besides."""

    source: TrainSource
    seed: int = 42
    """Of the run; picks the rows of a `limit`."""
    on_bad_row: Literal["stop", "skip"] = "stop"


def trained_by(settings: DataSettings, seed: int) -> list[Trained]:
    """All that the settings train on."""
    return [Trained(source, seed, settings.on_bad_row) for source in training_sources(settings)]


def tag_overlap(
    trained: Sequence[Trained], evaluated: Sequence[EvalSource], presets: Sequence[str] = ()
) -> OverlapReport:
    """The report by families and files alone; reads no row."""
    sources = [one.source for one in trained]
    sets = {one.name: SetOverlap(one.name, tag_of(one), shared_families(one, sources, presets)) for one in evaluated}
    known = dict.fromkeys((source.name for source in sources), 0)
    return OverlapReport(sets, known, "families and files alone; no row was compared", presets=tuple(presets))


def find_overlap(
    trained: Sequence[Trained],
    evaluated: Sequence[EvalSource],
    *,
    on_bad_row: Literal["stop", "skip"] = "stop",
    base_dir: Path | str = ".",
    classes: int | None = None,
    presets: Sequence[str] = (),
    examples: int = 3,
) -> OverlapReport:
    """Hold every evaluation set against every training row.

    Args:
        trained: every source counts with all rows that it may give (`limit`, `where` and `heldout` apply; mixture, steps and `max_length`
            do not), so that no meeting is missed.
        on_bad_row: of the evaluation sets.
        classes: of a classifier's rows how many there are.
        presets: whole mixtures trained on besides, known by their families alone.
        examples: meetings told per set and kind.

    Raises:
        DataError: a file or row that cannot be used. UsageError: an unknown preset.
    """
    tags = tag_overlap(trained, evaluated, presets)
    sets, files = [], {}
    for source in evaluated:
        found = read_rows(source, on_bad_row, base_dir, LIMIT_SEED, classes=classes)
        files.update(found.fingerprints)
        sets.append(_Set(source.name, found.rows))
    search = _Search(sets)
    known = dict.fromkeys(tags.trained, 0)
    for one in _distinct(trained):
        rows = read_rows(one.source, one.on_bad_row, base_dir, one.seed, classes=classes)
        files.update(rows.fingerprints)
        search.look_up(one.source.name, rows.rows)
        known[one.source.name] += len(rows.rows)
    return OverlapReport(
        {one.name: search.told(one, tags.sets[one.name], examples) for one in sets},
        known,
        f"{sum(known.values()):,} training rows: families, exact prompts, runs of {WORDS} words",
        fingerprint_of(trained, evaluated, presets),
        tuple(presets),
        files,
    )


_ROWS_OF = {"name", "path", "columns", "format", "split", "limit", "where", "heldout", "part", "labels", "family"}


def fingerprint_of(trained: Sequence[Trained], evaluated: Sequence[EvalSource], presets: Sequence[str] = ()) -> str:
    """sha256 of what decides which rows are compared, and of the tags."""
    told = [
        [
            [one.source.model_dump(mode="json", include=_ROWS_OF), one.seed if one.source.limit else 0]
            for one in trained
        ],
        [source.model_dump(mode="json", include=_ROWS_OF) for source in evaluated],
        list(presets),
    ]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def _distinct(trained: Sequence[Trained]) -> Iterator[Trained]:
    """Without sources that a later stage names again."""
    seen = []
    for one in trained:
        key = (one.source.model_dump(include=_ROWS_OF), one.seed if one.source.limit else 0)
        if key not in seen:
            seen.append(key)
            yield one


def _texts(example: Example) -> list[str]:
    """What of a row is contents: every message but the system's."""
    return [message["content"] for message in example.messages if message["role"] != "system"]


def _digests(example: Example) -> Iterator[tuple[bytes, bytes]]:
    """(digest of a prompt, of the prompt with its answer) for each answer of a row; the prompt is all that stands before. A message that
    is no answer to anything else is also told alone. Texts without a word give none."""
    running, said = hashlib.blake2b(digest_size=16), False
    last = b""
    for message in example.messages:
        if message["role"] == "system":
            continue
        text = normalised(message["content"]).encode("utf-8", "surrogatepass")
        if message["role"] == "assistant":
            if said:
                yield running.digest(), _joined(running, text)
            if last and len(example.messages) > 3:
                alone = hashlib.blake2b(last + b"\n", digest_size=16)
                yield alone.digest(), _joined(alone, text)
        running.update(text + b"\n")
        said, last = said or bool(text), text
    if example.messages[-1]["role"] == "text" and said:
        yield running.digest(), _joined(running, b"")


def _joined(prompt: hashlib.blake2b, answer: bytes) -> bytes:
    whole = prompt.copy()
    whole.update(b"\0" + answer)
    return whole.digest()


@dataclass
class _Set:
    """An evaluation set under search."""

    name: str
    rows: list[Example]
    grams: np.ndarray = field(default_factory=lambda: _NOTHING)
    """Indices into the table of runs, one for each (run, row) pair of this set, common runs left out."""
    owners: np.ndarray = field(default_factory=lambda: _NOTHING)
    """Row of each."""
    short: int = 0
    common: int = 0
    prompts: dict[int, tuple[str, str]] = field(default_factory=dict)
    """Row -> (place, source) of the first training row with its prompt."""
    answered: dict[int, tuple[str, str]] = field(default_factory=dict)
    """The same for prompt and answer."""
    runs: dict[int, int] = field(default_factory=dict)
    """Row -> the first of its runs that was met."""
    by_source: dict[str, set[int]] = field(default_factory=dict)


class _Search:
    """The tables of all evaluation sets, and what was met so far."""

    def __init__(self, sets: list[_Set]) -> None:
        self.sets, self.hashes = sets, WordHashes()
        pairs = [self._runs_of(one) for one in sets]
        self.table = np.unique(np.concatenate([hashes for hashes, _ in pairs])) if pairs else np.zeros(0, np.uint64)
        for one, (hashes, owners) in zip(sets, pairs):
            one.grams, one.owners = np.searchsorted(self.table, hashes), owners
        self.met: dict[int, tuple[str, str]] = {}
        """Run -> (place, source) of the first training row that holds it."""
        self.asked: dict[bytes, list[tuple[_Set, int]]] = {}
        self.replied: dict[bytes, list[tuple[_Set, int]]] = {}
        for one in sets:
            for number, example in enumerate(one.rows):
                self._enter(one, number, example)

    def _enter(self, one: _Set, number: int, example: Example) -> None:
        pairs = list(_digests(Example(example.file, example.line, _one_turn(example))))
        if pairs:
            self.asked.setdefault(pairs[0][0], []).append((one, number))
            self.replied.setdefault(pairs[0][1], []).append((one, number))

    def _runs_of(self, one: _Set) -> tuple[np.ndarray, np.ndarray]:
        """(hash, row) of the distinct runs of each row, without those that are the set's instructions."""
        texts = [(number, words(text)) for number, row in enumerate(one.rows) for text in _prompt(row)]
        lengths = np.zeros(len(one.rows), np.int64)
        for number, found in texts:
            lengths[number] = max(lengths[number], len(found))
        one.short = int((lengths < WORDS).sum())
        hashes, owner = ngrams([found for _, found in texts], WORDS, self.hashes)
        rows = np.array([number for number, _ in texts], np.int64)[owner]
        order = np.lexsort((rows, hashes))
        hashes, rows = hashes[order], rows[order]
        first = np.ones(len(hashes), bool)
        first[1:] = (hashes[1:] != hashes[:-1]) | (rows[1:] != rows[:-1])
        hashes, rows = hashes[first], rows[first]
        _, inverse, counts = np.unique(hashes, return_inverse=True, return_counts=True)
        common = (counts >= COMMON_ROWS) & (counts > COMMON_SHARE * len(one.rows))
        one.common = int(common.sum())
        kept = ~common[inverse]
        return hashes[kept], rows[kept]

    def look_up(self, source: str, rows: list[Example]) -> None:
        """Look the rows of a training source up in the tables."""
        now = np.zeros(len(self.table), bool)
        batch: list[tuple[int, list[str]]] = []
        size = 0
        for number, row in enumerate(rows):
            self._match(source, row)
            for text in _texts(row):
                found = words(text)
                if len(found) >= WORDS:
                    batch.append((number, found))
                    size += len(found)
            if size >= _CHUNK:
                self._scan(source, rows, batch, now)
                batch, size = [], 0
        self._scan(source, rows, batch, now)
        for one in self.sets:
            touched = np.unique(one.owners[now[one.grams]])
            if len(touched):
                one.by_source.setdefault(source, set()).update(touched.tolist())

    def _scan(self, source: str, rows: list[Example], batch: list[tuple[int, list[str]]], now: np.ndarray) -> None:
        if not len(self.table):
            return
        hashes, owner = ngrams([found for _, found in batch], WORDS, self.hashes)
        place = np.minimum(np.searchsorted(self.table, hashes), len(self.table) - 1)
        hits = np.flatnonzero(self.table[place] == hashes)
        found, first = np.unique(place[hits], return_index=True)
        now[found] = True
        for run, hit in zip(found.tolist(), hits[first].tolist()):
            if run not in self.met:
                row = rows[batch[owner[hit]][0]]
                self.met[run] = (f"{row.file}:{row.line}", source)

    def _match(self, source: str, row: Example) -> None:
        """Exact matches of one training row."""
        for prompt, whole in _digests(row):
            for digest, table, kind in ((prompt, self.asked, "prompts"), (whole, self.replied, "answered")):
                for one, number in table.get(digest, ()):
                    getattr(one, kind).setdefault(number, (f"{row.file}:{row.line}", source))
                    one.by_source.setdefault(source, set()).add(number)

    def told(self, one: _Set, tags: SetOverlap, examples: int) -> SetOverlap:
        """What was found of a set."""
        hit = np.array([run in self.met for run in one.grams.tolist()], bool)
        for run, row in zip(one.grams[hit].tolist(), one.owners[hit].tolist()):
            one.runs.setdefault(row, run)
        return SetOverlap(
            one.name,
            tags.tag,
            tags.shared,
            searched=True,
            rows=len(one.rows),
            exact_prompts=len(one.prompts),
            exact_rows=len(one.answered),
            ngram_rows=len(one.runs),
            met_rows=len(one.prompts.keys() | one.runs.keys()),
            short_rows=one.short,
            common_ngrams=one.common,
            by_source={name: len(rows) for name, rows in one.by_source.items()},
            examples=tuple(self._examples(one, examples)),
        )

    def _examples(self, one: _Set, most: int) -> Iterator[Meeting]:
        only_prompt = {row: place for row, place in one.prompts.items() if row not in one.answered}
        only_run = {row: self.met[run] for row, run in one.runs.items() if row not in one.prompts}
        kinds: list[tuple[Kind, dict[int, tuple[str, str]]]] = [
            ("prompt_and_answer", one.answered),
            ("prompt", only_prompt),
            ("ngram", only_run),
        ]
        for kind, found in kinds:
            for number in sorted(found)[:most]:
                row, (place, source) = one.rows[number], found[number]
                text = self._run_text(row, one.runs[number]) if kind == "ngram" else " ".join(_prompt(row))
                yield Meeting(kind, f"{row.file}:{row.line}", place, source, one_line(text, 120))

    def _run_text(self, row: Example, run: int) -> str:
        """The words of a run of a row."""
        for text in map(words, _prompt(row)):
            hashes, _ = ngrams([text], WORDS, self.hashes)
            for start in np.flatnonzero(hashes == self.table[run])[:1].tolist():
                return " ".join(text[start : start + WORDS])
        return ""


def _prompt(row: Example) -> list[str]:
    """What an evaluation row gives the model: every message but the system's and the last answer; of plain text the whole."""
    texts = _texts(row)
    return texts if row.messages[-1]["role"] == "text" else texts[:-1]


def _one_turn(row: Example) -> list[dict[str, str]]:
    """An evaluation row with all before its last answer as one message, the way `_digests` joins it."""
    if row.messages[-1]["role"] == "text":
        return row.messages
    *before, answer = [message for message in row.messages if message["role"] != "system"]
    return [*({**message, "role": "user"} for message in before), answer]
