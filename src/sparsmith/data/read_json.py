"""jsonl and json, read strictly: one object is one row, and what JSON leaves open (duplicate keys, NaN) is an error."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from sparsmith.data.files import lines_of
from sparsmith.data.rows import MAX_ROW_BYTES, Reject, Row, RowFault, kind_of, reject
from sparsmith.errors import DataError

_SPACE = re.compile(r"[ \t\r\n]*")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise RowFault(f"the key `{twice}` twice in one object", "each key once", "Remove one of the two.", twice)
    return result


def _constant(name: str) -> Any:
    raise RowFault(
        f"the number {name}", "JSON, which has no such number", "Remove the field, or write a number or a text."
    )


ROW_LISTS = ("messages", "conversations", "conversation")
"""Lists of objects that are part of a row and not a list of rows."""
_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant)


def decode_text(raw: bytes) -> str:
    """UTF-8 text of a row, or the fault with the byte and its place."""
    if len(raw) > MAX_ROW_BYTES:
        raise RowFault(
            f"a row of {len(raw) / 2**20:.1f} MiB",
            f"at most {MAX_ROW_BYTES // 2**20} MiB",
            "Check that the file has its line ends, or split the row.",
        )
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as fault:
        byte = f"the byte 0x{raw[fault.start]:02x} at byte {fault.start + 1} of the line, not UTF-8"
        raise RowFault(byte, "UTF-8 text", "Convert the file to UTF-8 (for example with iconv).") from None


def parse_value(text: str, start: int = 0) -> tuple[Any, int]:
    """The JSON value at `start` and where it ends; every fault of Python's parser becomes a `RowFault`."""
    try:
        return _DECODER.raw_decode(text, start)
    except json.JSONDecodeError as fault:
        glimpse = text[fault.pos : fault.pos + 20]
        seen = f"near {glimpse!r}" if glimpse.strip() else "at the end of the row"
        raise RowFault(
            f"broken JSON at character {fault.pos - start + 1}, {seen} ({fault.msg})", "a JSON object", "Mend the row."
        ) from None
    except RecursionError:
        raise RowFault("JSON nested too deep", "a plain object", "Flatten the row.") from None
    except ValueError:
        raise RowFault("a number with too many digits", "a number of normal size", "Write it as text.") from None


def parse_line(raw: bytes) -> dict[str, Any]:
    """The one object of a line."""
    text = decode_text(raw)
    start = _end_of_space(text, 0)
    if start == len(text):
        raise RowFault("a blank line", "a JSON object on each line", "Remove the line.")
    if text[start] == "\ufeff":
        raise RowFault("a byte order mark inside the file", "one at its head at most", "Remove it (U+FEFF).")
    if text[start:].strip() == "[":
        raise RowFault("`[`, the head of a JSON list", "a JSON object on each line", "Rename the file to .json.")
    value, end = parse_value(text, start)
    rest = text[_end_of_space(text, end) :]
    if rest:
        what = "two objects on one line" if rest[0] in "{[," else f"text after the object: {rest[:20]!r}"
        raise RowFault(what, "one JSON object per line", "Put each object on a line of its own.")
    return _expect_object(value)


def read_jsonl(data: bytes, shown: str) -> Iterator[Row | Reject]:
    """One row per line."""
    for number, raw in lines_of(data):
        try:
            yield Row(shown, number, parse_line(raw), raw.decode("utf-8"))
        except RowFault as fault:
            yield reject(fault, shown, number, raw)


def read_json(data: bytes, shown: str) -> Iterator[Row | Reject]:
    """The objects of a list, or of the one list in an object (`{"data": [...]}`); lines of objects are read as jsonl.

    A fault of syntax ends the file: past it no row has a certain place.
    """
    if _is_lines(data):
        yield from read_jsonl(data, shown)
        return
    text = _decode_whole(data, shown)
    start = _end_of_space(text, 0)
    try:
        inner = text[start : start + 1] == "{"
        if inner:
            start = _find_list(text, start, shown)
        yield from _elements(text, start, shown, inner)
    except RowFault as fault:
        raise fault.at(shown, 1) from None


def _is_lines(data: bytes) -> bool:
    """True where the first line is a whole object and others follow, or where the only line is itself a row."""
    lines = lines_of(data)
    try:
        first = parse_line(next(lines, (1, b""))[1])
    except RowFault:
        return False
    holds_rows = any(isinstance(value, list) and value and isinstance(value[0], dict) for value in first.values())
    return next(lines, None) is not None or not holds_rows or any(name in first for name in ROW_LISTS)


def _decode_whole(data: bytes, shown: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as fault:
        line = data.count(b"\n", 0, fault.start) + 1
        found = f"the byte 0x{data[fault.start]:02x}, not UTF-8"
        raise DataError(
            f"{shown}:{line}", found, "UTF-8 text", "Convert the file to UTF-8 (for example with iconv)."
        ) from None


def _elements(text: str, start: int, shown: str, inner: bool) -> Iterator[Row | Reject]:
    if text[start : start + 1] != "[":
        raise RowFault(
            "no JSON list", 'a list of objects, or an object that holds one, `{"data": [...]}`', "Mend the file."
        )
    position, line, counted = _end_of_space(text, start + 1), 1, 0
    if text[position : position + 1] == "]":
        return _expect_end(text, position + 1, shown, inner)
    while True:
        line, counted = line + text.count("\n", counted, position), position
        try:
            value, end = parse_value(text, position)
        except RowFault as fault:
            raise fault.at(shown, line) from None
        raw = text[position:end]
        try:
            yield Row(shown, line, _expect_object(value), raw)
        except RowFault as fault:
            yield reject(fault, shown, line, raw)
        position = _end_of_space(text, end)
        sign = text[position : position + 1]
        if sign == "]":
            return _expect_end(text, position + 1, shown, inner)
        if sign != ",":
            line += text.count("\n", counted, position)
            raise RowFault(
                f"{sign!r} after a row" if sign else "the end of the file", "`,` or `]`", "Mend the list."
            ).at(shown, line)
        position = _end_of_space(text, position + 1)


def _expect_end(text: str, position: int, shown: str, inner: bool) -> None:
    rest = _end_of_space(text, position)
    if not inner and rest < len(text):
        found = f"text after the end of the list: {text[rest : rest + 20]!r}"
        raise RowFault(found, "the end of the file", "Mend the file.").at(shown, text.count("\n", 0, rest) + 1)


def _find_list(text: str, start: int, shown: str) -> int:
    """Where the one list of objects in the outer object starts."""
    position, lists = _end_of_space(text, start + 1), []
    while text[position : position + 1] not in ("}", ""):
        try:
            name, end = parse_value(text, position)
            position = _end_of_space(text, end)
            if text[position : position + 1] != ":":
                raise RowFault("no `:` after a key", "a JSON object", "Mend the file.")
            position = _end_of_space(text, position + 1)
            value, end = parse_value(text, position)
        except RowFault as fault:
            raise fault.at(shown, text.count("\n", 0, position) + 1) from None
        if isinstance(value, list) and value and isinstance(value[0], dict):
            lists.append((name, position))
        position = _end_of_space(text, end)
        if text[position : position + 1] == ",":
            position = _end_of_space(text, position + 1)
    if not text[position : position + 1]:
        raise RowFault("the end of the file", "`}`", "Download or write the file again.").at(
            shown, text.count("\n") + 1
        )
    _expect_end(text, position + 1, shown, inner=False)
    if len(lists) != 1:
        names = ", ".join(f"`{name}`" for name, _ in lists) or "none"
        raise RowFault(
            f"an object with lists of rows: {names}", "exactly one", "Keep the list of rows alone in the file."
        )
    return lists[0][1]


def _expect_object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise RowFault(
            kind_of(value), 'a JSON object, {"prompt": ..., "completion": ...}', "Write the row as an object."
        )
    return value


def _end_of_space(text: str, start: int) -> int:
    found = _SPACE.match(text, start)
    return found.end() if found else start
