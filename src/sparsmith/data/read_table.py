"""csv, tsv and parquet.

csv follows RFC 4180: quoted cells may hold commas, quotes (doubled) and line ends; the first record names the columns.
tsv has no quoting: a cell is what stands between two tabs. Its first line is a header when it reads like one (short, distinct
words, no digit-only cell) and the recipe does not name columns by position. Without a header the columns are named `0`, `1`, `2`, ..., and
the two characters `\\n` in a cell are a line break, as FLAN writes its files; nothing else is unescaped. With a header every
cell is kept as it stands.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from typing import Any

from sparsmith.data.files import lines_of
from sparsmith.data.read_json import decode_text
from sparsmith.data.rows import MAX_ROW_BYTES, Reject, Row, RowFault, reject
from sparsmith.errors import DataError

_HEADER_CELL = re.compile(r"[A-Za-z_][\w .\-/]{0,39}")


def read_csv(data: bytes, shown: str, positional: bool = False) -> Iterator[Row | Reject]:
    """Rows of a csv file. `positional`: no header, columns `0`, `1`, ..."""
    header: list[str] | None = None
    for number, raw, result in _csv_records(data):
        if isinstance(result, RowFault):
            if header is None:
                raise result.at(shown, number)
            yield reject(result, shown, number, raw)
            continue
        if header is None:
            headless = positional and result != _positions(result)
            header = _positions(result) if headless else _header(result, shown)
            if not headless:
                continue
        yield _table_row(header, result, shown, number, raw, unescape=False)


def read_tsv(data: bytes, shown: str, positional: bool = False) -> Iterator[Row | Reject]:
    """Rows of a tsv file; see the head of this file for header and line breaks."""
    header: list[str] | None = None
    headless = positional
    for number, raw in lines_of(data):
        try:
            cells = _decode([raw] if not raw.strip() else raw.split(b"\t"))
        except RowFault as fault:
            if header is None:
                raise fault.at(shown, number) from None
            yield reject(fault, shown, number, raw)
            continue
        if header is None:
            named = _reads_like_header(cells) and not positional
            headless = not named and cells != _positions(cells)
            header = _positions(cells) if headless else _header(cells, shown)
            if not headless:
                continue
        yield _table_row(header, cells, shown, number, raw, unescape=headless)


def read_parquet(data: bytes, shown: str) -> Iterator[Row | Reject]:
    """Rows of a parquet file; the line is the number of the row."""
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(io.BytesIO(data))
        number = 0
        for batch in table.iter_batches(batch_size=1024):
            for values in batch.to_pylist():
                number += 1
                yield Row(shown, number, values, json.dumps(values, ensure_ascii=False, default=repr))
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as fault:
        reason = str(fault).splitlines()[0][:120] if str(fault) else type(fault).__name__
        raise DataError(
            shown,
            f"a parquet file that cannot be read ({reason})",
            "a whole parquet file",
            "Write or download it again.",
        ) from None


def _table_row(header: list[str], cells: list[str], shown: str, line: int, raw: bytes, unescape: bool) -> Row | Reject:
    try:
        if len(cells) == 1 and not cells[0].strip() and len(header) > 1:
            raise RowFault("a blank line", f"{len(header)} cells", "Remove the line.")
        if len(cells) != len(header):
            raise RowFault(
                f"{len(cells)} cells",
                f"{len(header)}, as in the first row",
                "Mend the row (quote cells that hold the separator).",
            )
    except RowFault as fault:
        return reject(fault, shown, line, raw)
    if unescape:
        cells = [cell.replace("\\n", "\n") for cell in cells]
    return Row(shown, line, dict(zip(header, cells)), raw.decode("utf-8", "backslashreplace"))


def _positions(cells: list[str]) -> list[str]:
    return [str(position) for position in range(len(cells))]


def _reads_like_header(cells: list[str]) -> bool:
    return len(set(cells)) == len(cells) and all(_HEADER_CELL.fullmatch(cell) for cell in cells)


def _header(cells: list[str], shown: str) -> list[str]:
    names = [cell.strip() for cell in cells]
    for place, name in enumerate(names):
        if not name or names.count(name) > 1:
            found = f"the column name `{name}` twice" if name else f"an empty name for column {place + 1}"
            raise DataError(f"{shown}:1", found, "distinct column names in the first row", "Name each column.")
    return names


def _decode(cells: list[bytes]) -> list[str]:
    if sum(map(len, cells)) > MAX_ROW_BYTES:
        decode_text(b"\t".join(cells))
    return [decode_text(cell) for cell in cells]


def _csv_records(data: bytes) -> Iterator[tuple[int, bytes, Any]]:
    """(line, bytes, cells or the fault) of each record."""
    end, start, line = len(data.rstrip(b"\r\n \t")), 0, 1
    while start < end:
        stop, cells = _csv_record(data, start)
        raw = data[start:stop].removesuffix(b"\n").removesuffix(b"\r")
        try:
            yield line, raw, cells if isinstance(cells, RowFault) else _decode(cells)
        except RowFault as fault:
            yield line, raw, fault
        line += data.count(b"\n", start, stop)
        start = stop


def _csv_record(data: bytes, start: int) -> tuple[int, list[bytes] | RowFault]:
    """Where the record at `start` ends (past its line end) and its cells. A record that is faulty ends with its first line."""
    line_end = data.find(b"\n", start)
    line_end = len(data) if line_end < 0 else line_end
    if data.find(b'"', start, line_end) < 0:
        return min(line_end + 1, len(data)), data[start:line_end].removesuffix(b"\r").split(b",")
    cells: list[bytes] = []
    position = start
    while True:
        if data[position : position + 1] == b'"':
            stop = _closing_quote(data, position)
            if stop is None:
                fault = RowFault(
                    "a quote that is never closed",
                    'a closing `"`',
                    "Close the quote, or double the quotes inside the cell.",
                )
                return min(line_end + 1, len(data)), fault
            cells.append(data[position + 1 : stop].replace(b'""', b'"'))
            position = stop + 1
        else:
            stop = _first(data, position)
            cells.append(data[position:stop])
            position = stop
        sign = data[position : position + 2]
        if sign[:1] == b",":
            position += 1
        elif not sign or sign[:1] == b"\n" or sign == b"\r\n":
            break
        else:
            fault = RowFault(
                "text after a closing quote", "`,` or the end of the line", "Double the quotes inside the cell."
            )
            return min(line_end + 1, len(data)), fault
    return min(position + (2 if sign == b"\r\n" else 1), len(data)), cells


def _closing_quote(data: bytes, opening: int) -> int | None:
    position = opening + 1
    limit = opening + MAX_ROW_BYTES
    while True:
        position = data.find(b'"', position, limit)
        if position < 0:
            return None
        if data[position + 1 : position + 2] != b'"':
            return position
        position += 2


def _first(data: bytes, start: int) -> int:
    """Where an unquoted cell that starts at `start` ends."""
    line_end = data.find(b"\n", start)
    line_end = len(data) if line_end < 0 else line_end
    comma = data.find(b",", start, line_end)
    if comma >= 0:
        return comma
    return line_end - 1 if data[line_end - 1 : line_end] == b"\r" and line_end > start else line_end
