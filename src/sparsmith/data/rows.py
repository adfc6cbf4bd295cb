"""What a reader hands on: rows with their place, and rows that are bad with the reason."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sparsmith.errors import DataError

MAX_ROW_BYTES = 8 * 2**20
"""Longest row that is read; a longer one is nearly always a file that lost its line ends."""


class RowFault(Exception):
    """Why a row is bad, raised where file and line are not known; the reader adds the place."""

    def __init__(self, found: str, expected: str, mend: str, field: str = "") -> None:
        super().__init__(found)
        self.found, self.expected, self.mend, self.field = found, expected, mend, field

    def as_dict(self) -> dict[str, str]:
        """The arguments that make the fault anew."""
        return {"found": self.found, "expected": self.expected, "mend": self.mend, "field": self.field}

    def at(self, file: str, line: int) -> DataError:
        """The fault as the error that the user reads, in one line."""
        where = f"{file}:{line}" + (f":{self.field}" if self.field else "")
        return DataError(where, *(one_line(part) for part in (self.found, self.expected, self.mend)))


@dataclass(frozen=True)
class Row:
    """A row as it stands in its file."""

    file: str
    line: int
    """1-based line on which the row starts; for parquet and hub data sets the 1-based number of the row."""
    values: dict[str, Any]
    raw: str
    """The row's own text."""


@dataclass(frozen=True)
class Reject:
    """A bad row."""

    file: str
    line: int
    error: DataError
    raw: str

    def as_dict(self) -> dict[str, Any]:
        """The row of the rejects file."""
        return {"file": self.file, "line": self.line, "reason": str(self.error), "raw": self.raw}


def reject(fault: RowFault, file: str, line: int, raw: str | bytes) -> Reject:
    """A `Reject` of a fault at a place. Bytes that are not UTF-8 are written `\\xff`."""
    text = raw.decode("utf-8", "backslashreplace") if isinstance(raw, bytes) else raw
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return Reject(file, line, fault.at(file, line), text)


def one_line(text: str, most: int = 300) -> str:
    """`text` without line breaks, control signs and lone surrogates, cut to `most` characters."""
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    text = "".join(sign if sign.isprintable() else " " for sign in " ".join(text.split()))
    return text if len(text) <= most else text[: most - 3] + "..."


def kind_of(value: Any) -> str:
    """Plain word for a value's type, with a glimpse of short ones."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return f"the boolean {str(value).lower()}"
    if isinstance(value, (int, float)):
        return f"the number {value!r}"[:60]
    if isinstance(value, str):
        return "the text " + repr(value if len(value) <= 40 else value[:37] + "...")
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, (list, tuple)):
        return f"a list of {len(value)}"
    return f"a value of type {type(value).__name__}"
