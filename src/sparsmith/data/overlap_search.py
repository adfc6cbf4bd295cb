"""Where evaluation rows and training rows meet: by family, by exact text, by runs of 13 words.

The evaluation rows are held as tables (a digest of each prompt, a sorted array of hashed word runs); every training source is then read
once and looked up in them, so that the price is that of reading the rows: no pair of rows is ever compared.

Paper: the 13-gram test is that of GPT-3 (arXiv 2005.14165, appendix C), which leaves out runs that more than ten training documents hold.
Prompts are made by templates, so here an instruction is told by its phrases: six words that many rows of the set, or of the training
source, hold. A run counts where at most three of its words are an instruction's; rows met by instructions alone are told apart. Rows
shorter than 13 words are not tested by shorter runs but by exact match alone, and counted.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from sparsmith.data.evalsets import LIMIT_SEED
from sparsmith.data.families import shared_families, tag_of, training_sources
from sparsmith.data.messages import Messages
from sparsmith.data.overlap_report import WORDS, Kind, Meeting, OverlapReport, SetOverlap
from sparsmith.data.plain_tasks import read_task
from sparsmith.data.plain_words import FlatWords, WordHashes, normalised, words
from sparsmith.data.rows import one_line
from sparsmith.data.sources import Example, read_rows
from sparsmith.recipe.mixture import TaskSource
from sparsmith.recipe.schema import DataSettings, EvalSource, Source

PHRASE = 6
"""Words of a phrase; one that many rows hold is (part of) an instruction."""
COMMON_ROWS = 10
"""Rows that must hold a phrase at least before it can be an instruction."""
OWN_SHARE = 0.1
"""A phrase in more than this share of the evaluation set's own rows is an instruction."""
SOURCE_SHARE = 0.002
"""The same for the rows of a training source, which may hold many templates."""
CONTENTS = 10
"""Words of a run that must not be an instruction's."""
_BATCH = 2**19  # words looked up at once: some tens of MB
_NOTHING = np.zeros(0, np.int64)


class _Place(NamedTuple):
    """A training row."""

    row: str
    """`file:line`"""
    source: str


@dataclass(frozen=True)
class Trained:
    """A training source, and what its rows depend on besides."""

    source: Source
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
    files: dict[str, str] = {}
    held: list[tuple[str, list[Example]]] = []
    for source in evaluated:
        found = read_rows(source, on_bad_row, base_dir, LIMIT_SEED, classes=classes)
        files.update(found.fingerprints)
        held.append((source.name, found.rows))
    search = _Search(held)
    known = dict.fromkeys(tags.trained, 0)
    for one in _distinct(trained):
        if isinstance(one.source, TaskSource):
            rows = read_task(one.source, one.on_bad_row, base_dir, one.seed)
        else:
            rows = read_rows(one.source, one.on_bad_row, base_dir, one.seed, classes=classes)
        files.update(rows.fingerprints)
        search.look_up(one.source.name, rows.rows)
        known[one.source.name] += len(rows.rows)
    return OverlapReport(
        {one.name: search.told(one, tags.sets[one.name], examples) for one in search.sets},
        known,
        f"{sum(known.values()):,} training rows: families, exact prompts, runs of {WORDS} words",
        fingerprint_of(trained, evaluated, presets),
        tuple(presets),
        files,
    )


_ROWS_OF = {"name", "path", "columns", "format", "split", "limit", "where", "heldout", "part", "labels", "family"}
_ROWS_OF |= {"templates", "options", "fixed"}  # of a mixture's task


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


def _digests(messages: Messages) -> Iterator[tuple[bytes, bytes]]:
    """(digest of a prompt, of the prompt with its answer) for each answer of a row; the prompt is all that stands before. A message that
    is no answer to anything else is also told alone. Texts without a word give none."""
    running, said = hashlib.blake2b(digest_size=16), False
    last = b""
    for message in messages:
        if message["role"] == "system":
            continue
        text = normalised(message["content"]).encode("utf-8", "surrogatepass")
        if message["role"] == "assistant":
            if said:
                yield running.digest(), _joined(running, text)
            if last and len(messages) > 3:
                alone = hashlib.blake2b(last + b"\n", digest_size=16)
                yield alone.digest(), _joined(alone, text)
        running.update(text + b"\n")
        said, last = said or bool(text), text
    if messages[-1]["role"] == "text" and said:
        yield running.digest(), _joined(running, b"")


def _joined(prompt: hashlib.blake2b, answer: bytes) -> bytes:
    whole = prompt.copy()
    whole.update(b"\0" + answer)
    return whole.digest()


class _Set:
    """An evaluation set under search: its words, and what was met so far."""

    def __init__(self, name: str, rows: list[Example], hashes: WordHashes) -> None:
        self.name, self.rows = name, rows
        texts = [(number, words(text)) for number, row in enumerate(rows) for text in _prompt(row)]
        flat = FlatWords.of([found for _, found in texts], hashes)
        self.size = len(flat.hashes)
        row_of = np.array([number for number, _ in texts], np.int64)[flat.owner] if texts else _NOTHING
        self.runs, self.starts = flat.ngrams(WORDS)
        """Hash and first word of each run; hashes are then replaced by their numbers in the table of all sets."""
        self.owners = row_of[self.starts]
        self.phrases, self.phrase_starts = flat.ngrams(PHRASE)
        self.own = self._own_phrases(row_of[self.phrase_starts])
        self.short = len(rows) - len(np.unique(self.owners))
        self.prompts: dict[int, _Place] = {}
        """Row -> the first training row with its prompt."""
        self.answered: dict[int, _Place] = {}
        """The same for prompt and answer."""
        self.met: dict[int, tuple[int, _Place]] = {}
        """Row -> (number of a run, the first training row that holds it)."""
        self.instructed: set[int] = set()
        """Rows with a run that was met and is an instruction."""
        self.by_source: dict[str, set[int]] = {}

    def _own_phrases(self, rows: np.ndarray) -> np.ndarray:
        """(phrases,) bool: those that stand in many rows of the set itself."""
        distinct, number = np.unique(self.phrases, return_inverse=True)
        held = np.unique(number * len(self.rows) + rows) // max(1, len(self.rows))
        counts = np.bincount(held, minlength=len(distinct))
        often = (counts >= COMMON_ROWS) & (counts > OWN_SHARE * len(self.rows))
        return often[number]

    def contents(self, common: np.ndarray) -> np.ndarray:
        """(runs,) bool: runs with at most three words of an instruction.

        Args:
            common: (table of phrases,) bool, those that many rows of the training source hold.
        """
        change = np.zeros(self.size + 1, np.int64)
        begun = self.phrase_starts[common[self.phrases] | self.own]
        np.add.at(change, begun, 1)
        np.add.at(change, begun + PHRASE, -1)
        inside = np.concatenate([[0], np.cumsum(np.cumsum(change[:-1]) > 0)])
        return inside[self.starts + WORDS] - inside[self.starts] <= WORDS - CONTENTS


class _Search:
    """The tables of all evaluation sets."""

    def __init__(self, named: Sequence[tuple[str, list[Example]]]) -> None:
        self.hashes = WordHashes()
        self.sets = [_Set(name, rows, self.hashes) for name, rows in named]
        self.table = np.unique(np.concatenate([one.runs for one in self.sets]))
        self.phrases = np.unique(np.concatenate([one.phrases for one in self.sets]))
        self.asked: dict[bytes, list[tuple[_Set, int]]] = {}
        self.replied: dict[bytes, list[tuple[_Set, int]]] = {}
        for one in self.sets:
            one.runs = np.searchsorted(self.table, one.runs)
            one.phrases = np.searchsorted(self.phrases, one.phrases)
            for number, row in enumerate(one.rows):
                self._enter(one, number, row)

    def _enter(self, one: _Set, number: int, row: Example) -> None:
        for prompt, whole in islice(_digests(_one_turn(row)), 1):
            self.asked.setdefault(prompt, []).append((one, number))
            self.replied.setdefault(whole, []).append((one, number))

    def look_up(self, source: str, rows: list[Example]) -> None:
        """Look the rows of a training source up in the tables."""
        holder = np.full(len(self.table), -1, np.int64)
        counts = np.zeros(len(self.phrases), np.int64)
        for owners, texts in self._batches(source, rows):
            flat = FlatWords.of(texts, self.hashes)
            row_of = owners[flat.owner]
            runs, starts = _found(self.table, *flat.ngrams(WORDS))
            first, places = np.unique(runs, return_index=True)
            new = holder[first] < 0
            holder[first[new]] = row_of[starts[places[new]]]
            phrases, starts = _found(self.phrases, *flat.ngrams(PHRASE))
            held = np.unique(phrases * len(rows) + row_of[starts]) // len(rows)
            counts += np.bincount(held, minlength=len(counts))
        common = counts > max(COMMON_ROWS, SOURCE_SHARE * len(rows))
        for one in self.sets:
            self._record(one, source, rows, holder, common)

    def _record(self, one: _Set, source: str, rows: list[Example], holder: np.ndarray, common: np.ndarray) -> None:
        """What of a set's runs the source holds."""
        hit, contents = holder[one.runs] >= 0, one.contents(common)
        one.instructed.update(one.owners[hit & ~contents].tolist())
        kept = np.flatnonzero(hit & contents)
        for place in kept[np.unique(one.owners[kept], return_index=True)[1]].tolist():
            row = rows[holder[one.runs[place]]]
            number = int(one.owners[place])
            one.met.setdefault(number, (int(one.runs[place]), _Place(f"{row.file}:{row.line}", source)))
            one.by_source.setdefault(source, set()).add(number)

    def _batches(self, source: str, rows: list[Example]) -> Iterator[tuple[np.ndarray, list[list[str]]]]:
        """(row of each text, texts as words) in portions; every row's exact matches are taken on the way."""
        owners: list[int] = []
        texts: list[list[str]] = []
        size = 0
        for number, row in enumerate(rows):
            self._match(source, row)
            for text in _texts(row):
                found = words(text)
                if len(found) >= PHRASE:
                    owners.append(number)
                    texts.append(found)
                    size += len(found)
            if size >= _BATCH:
                yield np.array(owners), texts
                owners, texts, size = [], [], 0
        if texts:
            yield np.array(owners), texts

    def _match(self, source: str, row: Example) -> None:
        """Exact matches of one training row."""
        place = _Place(f"{row.file}:{row.line}", source)
        for prompt, whole in _digests(row.messages):
            for one, number in self.asked.get(prompt, ()):
                one.prompts.setdefault(number, place)
                one.by_source.setdefault(source, set()).add(number)
            for one, number in self.replied.get(whole, ()):
                one.answered.setdefault(number, place)

    def told(self, one: _Set, tags: SetOverlap, examples: int) -> SetOverlap:
        """What was found of a set."""
        return replace(
            tags,
            searched=True,
            rows=len(one.rows),
            exact_prompts=len(one.prompts),
            exact_rows=len(one.answered),
            ngram_rows=len(one.met),
            met_rows=len(one.prompts.keys() | one.met.keys()),
            short_rows=one.short,
            instruction_rows=len(one.instructed - one.met.keys() - one.prompts.keys()),
            by_source={name: len(rows) for name, rows in one.by_source.items()},
            examples=tuple(self._examples(one, examples)),
        )

    def _examples(self, one: _Set, most: int) -> Iterator[Meeting]:
        kinds: list[tuple[Kind, dict[int, _Place]]] = [
            ("prompt_and_answer", one.answered),
            ("prompt", {row: place for row, place in one.prompts.items() if row not in one.answered}),
            ("ngram", {row: place for row, (_, place) in one.met.items() if row not in one.prompts}),
        ]
        for kind, found in kinds:
            for number in sorted(found)[:most]:
                row, place = one.rows[number], found[number]
                text = self._run_text(row, one.met[number][0]) if kind == "ngram" else " ".join(_prompt(row))
                yield Meeting(kind, f"{row.file}:{row.line}", place.row, place.source, one_line(text, 120))

    def _run_text(self, row: Example, run: int) -> str:
        """The words of a run of a row."""
        texts = list(map(words, _prompt(row)))
        flat = [word for text in texts for word in text]
        hashes, starts = FlatWords.of(texts, self.hashes).ngrams(WORDS)
        start = int(starts[np.flatnonzero(hashes == self.table[run])[0]])
        return " ".join(flat[start : start + WORDS])


def _found(table: np.ndarray, hashes: np.ndarray, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(number in the table, first word) of those hashes that stand in it."""
    if not len(table):
        return _NOTHING, _NOTHING
    place = np.minimum(np.searchsorted(table, hashes), len(table) - 1)
    hits = np.flatnonzero(table[place] == hashes)
    return place[hits], starts[hits]


def _prompt(row: Example) -> list[str]:
    """What an evaluation row gives the model: every message but the system's and the last answer; of plain text the whole."""
    texts = _texts(row)
    return texts if row.messages[-1]["role"] == "text" else texts[:-1]


def _one_turn(row: Example) -> Messages:
    """An evaluation row with all before its last answer as one message, the way `_digests` joins it."""
    if row.messages[-1]["role"] == "text":
        return row.messages
    *before, answer = [message for message in row.messages if message["role"] != "system"]
    return [*({**message, "role": "user"} for message in before), answer]
