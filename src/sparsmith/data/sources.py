"""One source of the recipe -> its examples, with the bad rows told or set aside."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from sparsmith.data import hub, read_json, read_table
from sparsmith.data.classes import find_label
from sparsmith.data.columns import Columns, look_up
from sparsmith.data.fields import TaskFields, TaskRow
from sparsmith.data.files import list_files, missing_file, read_bytes, without_mark
from sparsmith.data.heldout import belongs
from sparsmith.data.messages import Messages, find_format, to_messages
from sparsmith.data.options import find_options
from sparsmith.data.rows import Reject, Row, RowFault, kind_of, reject
from sparsmith.errors import DataError
from sparsmith.recipe.schema import Source
from sparsmith.seeds import numpy_generator


@dataclass(frozen=True)
class Example:
    """A good row."""

    file: str
    line: int
    messages: Messages
    options: tuple[str, ...] | None = None
    """For rank classification; the assistant's last message is one of them."""
    label: int | None = None
    """The class, of a classifier's row; the assistant's last message is its name."""
    fields: TaskRow | None = None
    """Of a mixture's task: what its templates are filled with. Its messages are made from that."""


@dataclass
class RowSet:
    """What a source holds. read = rejected + filtered + limited + len(rows)."""

    name: str
    rows: list[Example] = field(default_factory=list)
    rejects: list[Reject] = field(default_factory=list)
    read: int = 0
    filtered: int = 0
    """Rows that `where` or the other side of `heldout` left out."""
    limited: int = 0
    """Good rows beyond `limit`."""
    form: str = "auto"
    fingerprints: dict[str, str] = field(default_factory=dict)
    """File -> sha256 of its bytes on disk; a hub data set -> sha256 of its rows."""


@dataclass
class OpenSource:
    """A source whose files were read (bytes and fingerprints) and whose rows were not parsed yet."""

    source: Source
    fingerprints: dict[str, str]
    streams: list[Any]
    """Callables, one per file, each giving an iterator of rows."""


def open_source(source: Source, base_dir: Path | str = ".") -> OpenSource:
    """Find and read the files of a source."""
    path = Path(base_dir) / Path(source.path).expanduser()
    columns = Columns.of(source)
    if (path.is_dir() and hub.is_saved_dataset(path)) or (
        not path.exists() and hub.looks_like_hub_id(source.path) and not _is_name(path)
    ):
        dataset = hub.open_dataset(path, source.path, source.split)
        return OpenSource(
            source, {source.path: hub.fingerprint_rows(dataset)}, [lambda: hub.read_dataset(dataset, source.path)]
        )
    if not path.exists():
        raise missing_file(path, source.path)
    opened = OpenSource(source, {}, [])
    for file in list_files(path, source.path, source.split):
        data, opened.fingerprints[file.shown] = read_bytes(file)
        opened.streams.append(_stream(file.kind, data, file.shown, columns.positional))
    return opened


def _is_name(path: Path) -> bool:
    """True for a path whose ending says that a data file is meant, so that it is never looked up on the hub."""
    return any(ending in path.name.lower() for ending in (".json", ".csv", ".tsv", ".parquet", ".gz", ".txt"))


def _stream(kind: str, data: bytes, shown: str, positional: bool) -> Any:
    if kind == "parquet":
        return lambda: read_table.read_parquet(data, shown)
    text = without_mark(data, shown)
    if kind == "csv":
        return lambda: read_table.read_csv(text, shown, positional)
    if kind == "tsv":
        return lambda: read_table.read_tsv(text, shown, positional)
    return (lambda: read_json.read_json(text, shown)) if kind == "json" else (lambda: read_json.read_jsonl(text, shown))


def read_rows(
    source: Source,
    on_bad_row: Literal["stop", "skip"] = "stop",
    base_dir: Path | str = ".",
    seed: int = 42,
    opened: OpenSource | None = None,
    classes: int | None = None,
    fields: TaskFields | None = None,
) -> RowSet:
    """Read a source whole.

    Args:
        on_bad_row: `stop` raises the first bad row's `DataError`; `skip` collects them (`source.on_bad_row` comes first).
        seed: of the order from which `limit` takes its rows (the rows taken stay in file order).
        classes: of a classifier's rows how many there are; each must then have one of them.
        fields: reads the rows of a mixture's task; their messages are made later, by templates.

    Raises:
        DataError: a bad row, or a file that is missing, damaged or holds no good row.
    """
    stop = (source.on_bad_row or on_bad_row) == "stop"
    opened = opened or open_source(source, base_dir)
    result = RowSet(source.name, fingerprints=opened.fingerprints, form=source.format)
    columns = Columns.of(source)
    for row in _all_rows(opened):
        result.read += 1
        example = row if isinstance(row, Reject) else _example(row, result, source, columns, classes, fields)
        if isinstance(example, Example):
            result.rows.append(example)
        elif isinstance(example, Reject):
            if stop:
                raise example.error
            result.rejects.append(example)
    if not result.rows:
        reason = f"; the first: {result.rejects[0].error}" if result.rejects else ""
        found = f"no usable row ({result.read} read, {len(result.rejects)} bad, {result.filtered} left out by `where`{reason})"
        raise DataError(source.path, found, "at least one", "Check the file, `columns` and `where`.")
    _apply_limit(result, source.limit, seed)
    return result


def _all_rows(opened: OpenSource) -> Iterator[Row | Reject]:
    for stream in opened.streams:
        yield from stream()


def _example(
    row: Row,
    result: RowSet,
    source: Source,
    columns: Columns,
    classes: int | None = None,
    fields: TaskFields | None = None,
) -> Example | Reject | None:
    """The example of a row, the reject, or None where `where` or `part` leaves it out."""
    try:
        if not all(_matches(key, wanted, row.values) for key, wanted in source.where.items()):
            result.filtered += 1
            return None
        if fields is not None:
            return _task_example(row, result, source, columns, fields)
        if result.form == "auto":
            result.form = find_format(row.values, columns)
        wanted_options = getattr(source, "options", None)
        values, options, label = row.values, None, None
        if wanted_options is not None:
            values, options, columns = find_options(wanted_options, row.values, columns)
        if classes is not None:
            label, values, columns = find_label(result.form, source.label_names, classes, values, columns)
        example = Example(row.file, row.line, to_messages(result.form, values, columns), options, label)
    except RowFault as fault:
        return reject(fault, row.file, row.line, row.raw)
    if not belongs(example.messages, source):
        result.filtered += 1
        return None
    return example


def _task_example(row: Row, result: RowSet, source: Source, columns: Columns, fields: TaskFields) -> Example | None:
    result.form = "templates"
    found = fields.read(row, columns)
    if not belongs([{"role": "user", "content": found.prompt}], source):
        result.filtered += 1
        return None
    return Example(row.file, row.line, [], fields=found)


def _matches(key: str, wanted: Any, values: Mapping[str, Any]) -> bool:
    """One condition of `where`. Cells of a table are texts, so a text also equals the number or boolean that it spells."""
    name = key.removesuffix(":range")
    value = look_up(name, values)
    if name != key and name not in (k for k in values if k == key):
        return _in_range(name, value, wanted)
    return any(_equal(value, one) for one in (wanted if isinstance(wanted, (list, tuple)) else [wanted]))


def _equal(value: Any, wanted: Any) -> bool:
    if isinstance(value, str) and not isinstance(wanted, str):
        return value == (str(wanted).lower() if isinstance(wanted, bool) else str(wanted))
    return value == wanted and isinstance(value, bool) == isinstance(wanted, bool)


def _in_range(name: str, value: Any, wanted: Any) -> bool:
    try:
        low, high = (float(bound) for bound in wanted)
    except (TypeError, ValueError):
        raise DataError(
            f"where.{name}:range", kind_of(wanted), "[low, high]", "Give two numbers, both included."
        ) from None
    try:
        number = float("nan") if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if math.isnan(number):
        raise RowFault(kind_of(value), "a number, for `where`", "Mend the row, or drop the condition.", name)
    return low <= number <= high


def _apply_limit(result: RowSet, limit: int | None, seed: int) -> None:
    if limit is None or limit >= len(result.rows):
        return
    order = numpy_generator(seed, f"data.limit.{result.name}").permutation(len(result.rows))
    result.limited = len(result.rows) - limit
    result.rows = [result.rows[index] for index in sorted(order[:limit].tolist())]
