"""Promise 8: a bad row is named with its file, its line and the reason, or set aside and written down; no good row is changed or lost.

A file is good rows around one bad one, at a drawn place, in a drawn dress (gzip, CRLF, a byte order mark, a JSON list); or a bad file
as a whole; or an odd file that is good, whose texts must come out as they went in.
"""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

from sparsmith.data import load_data, read_rows
from sparsmith.errors import DataError
from sparsmith.recipe.schema import DataSettings
from tests.kit.evalsets import char_tokenizer
from tests.kit.refusals import unlike_refusal
from tests.kit.rowfiles import settings, source
from tests.kit.spoilt_rows import FILES, JSONL, ODD, PAIRS, TABLES, TALKS, line, talk
from tests.kit.tally import Tally


@dataclass(frozen=True)
class Case:
    """A file, and what must be said of it."""

    kind: str
    name: str
    data: bytes
    where: str = ""
    """The place that the refusal names; empty for a file without a fault."""
    words: str = ""
    """Of the reason; several possible ones apart by `|`."""
    texts: tuple[tuple[str, str], ...] = field(default=())
    """(prompt, completion) of the good rows; empty where the file as a whole cannot be read."""


def cases(count: int, seed: int = 0) -> Iterator[Case]:
    """`count` files, the kinds in turn."""
    makers: list[Callable[[random.Random], Case]] = [
        partial(_lines, f"row: {kind}", *JSONL[kind], False) for kind in JSONL
    ]
    makers += [partial(_lines, f"conversation: {kind}", *TALKS[kind], True) for kind in TALKS]
    makers += [partial(_listed, kind, *JSONL[kind]) for kind in JSONL if _is_plain(JSONL[kind][0])]
    makers += [partial(_table, kind) for kind in TABLES] + [partial(_file, kind) for kind in FILES]
    makers += [partial(_odd, kind) for kind in ODD]
    makers += [_parquet, _cut_parquet]
    stream = random.Random(seed)
    for number in range(count):
        yield makers[number % len(makers)](stream)


def run(folder: Path, count: int = 500) -> Tally:
    """Read each file twice: `stop` names the fault, `skip` sets it aside."""
    tally, kinds = Tally(), set()
    for case in cases(count):
        (folder / case.name).write_bytes(case.data)
        fault = _stops(case, folder) or _skips(case, folder)
        tally.case(not fault, f"{case.kind} in {case.name}: {fault}")
        kinds.add(case.kind)
        (folder / case.name).unlink()
    tally.figures = {"kinds": len(kinds)}
    return tally


def _stops(case: Case, folder: Path) -> str:
    """What is wrong with the reading under `on_bad_row: stop`."""
    read = partial(read_rows, source(case.name), "stop", folder)
    if not case.where:
        return _changed(case, read())
    fault = unlike_refusal(read, DataError)
    if fault:
        return fault
    try:
        read()
    except DataError as error:
        if not (error.where == case.where or error.where.startswith(f"{case.where}:")):
            return f"named {error.where}, not {case.where}"
        if not any(each in error.found for each in case.words.split("|")):
            return f"said `{error.found}`, not `{case.words}`"
    return ""


def _skips(case: Case, folder: Path) -> str:
    """What is wrong with the whole loading under `on_bad_row: skip`."""
    rejects = folder / "rejects"
    for old in rejects.glob("*"):
        old.unlink()
    wanted: DataSettings = settings(folder, [source(case.name)], on_bad_row="skip", max_length=4096, workers=1)
    load = partial(load_data, wanted, _tokenizer(), seed=1, base_dir=folder, rejects=rejects)
    if not case.texts:
        return unlike_refusal(load, DataError, (case.where,))
    counts = load().counts["train"]["rows"]
    written = (rejects / "rows.jsonl").read_text("utf-8").split("\n")[:-1] if (rejects / "rows.jsonl").is_file() else []
    bad = [json.loads(each) for each in written]
    if counts["kept"] + counts["rejected"] != counts["read"] or counts["rejected"] != len(bad):
        return f"rows do not add up: {counts}, {len(bad)} in the rejects file"
    if [f"{each['file']}:{each['line']}" for each in bad] != ([case.where] if case.where else []):
        return f"the rejects file holds {bad}"
    return _changed(case, read_rows(source(case.name), "skip", folder))


def _changed(case: Case, found: Any) -> str:
    """Good rows that are not what was written."""
    texts = [(row.messages[0]["content"], row.messages[-1]["content"]) for row in found.rows]
    return "" if texts == list(case.texts) else f"rows {texts} in place of {case.texts}"[:500]


@cache
def _tokenizer() -> Any:
    return char_tokenizer()


def _good(stream: random.Random, most: int = 5) -> list[tuple[str, str]]:
    return [stream.choice(PAIRS) for _ in range(stream.randint(1, most))]


def _lines(kind: str, bad: bytes, words: str, chat: bool, stream: random.Random) -> Case:
    """jsonl, packed or not, with either line end, with or without a mark at its head."""
    before, after = _good(stream), _good(stream)

    def rows(pairs: list[tuple[str, str]]) -> list[bytes]:
        return [talk(("user", p), ("assistant", c)) if chat else line(prompt=p, completion=c) for p, c in pairs]

    parts = [*rows(before), bad, *rows(after)]
    if stream.random() < 0.3:
        parts = [part[:-1] + b"\r\n" for part in parts]
    data = b"".join(parts)
    if stream.random() < 0.3:
        data = b"\xef\xbb\xbf" + data
    packed = stream.random() < 0.3
    name = "rows.jsonl.gz" if packed else "rows.jsonl"
    return Case(
        kind, name, gzip.compress(data, 1) if packed else data, f"{name}:{len(before) + 1}", words, (*before, *after)
    )


def _listed(kind: str, bad: bytes, words: str, stream: random.Random) -> Case:
    """The bad row in a JSON list, each row on its line."""
    before, after = _good(stream), _good(stream)
    rows = [line(prompt=p, completion=c) for p, c in before], [line(prompt=p, completion=c) for p, c in after]
    data = b"[\n" + b",\n".join(row.strip() for row in [*rows[0], bad, *rows[1]]) + b"\n]\n"
    return Case(f"listed row: {kind}", "rows.json", data, f"rows.json:{len(before) + 2}", words, (*before, *after))


def _is_plain(bad: bytes) -> bool:
    """True where the row is valid JSON on its own, so that a list around it stays one."""
    if not bad.startswith((b"{", b"[", b'"')):
        return False

    def refuse(_: Any) -> None:
        raise ValueError

    try:
        value = json.loads(
            bad,
            parse_constant=refuse,
            object_pairs_hook=lambda pairs: refuse(0) if len(dict(pairs)) < len(pairs) else dict(pairs),
        )
    except (ValueError, RecursionError):
        return False
    return value is not None and len(bad) < 1 << 20


def _table(kind: str, stream: random.Random) -> Case:
    ending, data, number, words = TABLES[kind]
    good = [pair for pair in (("a", "b"), ("c", "d")) if _cells(pair, ending) in data]
    if kind == "after a record of three lines":
        good = [("a\n\nb", "b")]
    if kind == "open quote":  # the row after the open quote stands on its own line
        good = [("a", "b"), ("c", "d")]
    return Case(f"table: {kind}", f"rows.{ending}", data, f"rows.{ending}:{number}", words, tuple(good))


def _cells(pair: tuple[str, str], ending: str) -> bytes:
    return ((("," if ending == "csv" else "\t").join(pair)) + "\n").encode()


def _file(kind: str, stream: random.Random) -> Case:
    name, data, words = FILES[kind]
    return Case(f"file: {kind}", name, data, name, words)


def _odd(kind: str, stream: random.Random) -> Case:
    name, data = ODD[kind]
    return Case(f"odd: {kind}", name, data, texts=tuple(PAIRS))


def _table_of(rows: list[dict[str, Any]]) -> bytes:
    import io

    import pyarrow
    import pyarrow.parquet

    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), out)
    return out.getvalue()


def _parquet(stream: random.Random) -> Case:
    """A null or an empty cell in a column of texts."""
    before, after = _good(stream), _good(stream)
    empty = stream.choice([None, "", "  "])
    rows = [{"prompt": p, "completion": c} for p, c in [*before, ("a", empty), *after]]
    words = "null as completion" if empty is None else "an empty completion"
    return Case(
        "parquet: empty cell",
        "rows.parquet",
        _table_of(rows),
        f"rows.parquet:{len(before) + 1}",
        words,
        (*before, *after),
    )


def _cut_parquet(stream: random.Random) -> Case:
    data = _table_of([{"prompt": p, "completion": c} for p, c in PAIRS])
    return Case(
        "parquet: cut", "rows.parquet", data[: stream.randrange(1, len(data))], "rows.parquet", "cannot be read"
    )
