"""What of a text is the answer, and when two answers are the same.

The same extractor and the same normalisation are applied to the generated text and to the reference:

| extractor      | answer                                                        | normalisation beside the common one        |
|----------------|---------------------------------------------------------------|--------------------------------------------|
| `exact`        | the whole text                                                | -                                          |
| `first_line`   | the first line that is not blank                              | -                                          |
| `first_word`   | the first word                                                | surrounding punctuation off, case folded   |
| `last_number`  | the last number (sign, digits, commas, decimals)              | `1,250.0` = `1250`                         |
| `after_marker` | what follows the last marker, to the end of its line          | a number is compared as a number           |

Common to all: Unicode NFC, runs of white space become one space, ends stripped; case is kept. A text without an answer matches
nothing.
"""

from __future__ import annotations

import re
import unicodedata
from decimal import Decimal, InvalidOperation

_NUMBER = re.compile(r"(?<![\w.])[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|(?<![\w.])[-+]?\.\d+")
_PUNCTUATION = "".join(map(chr, range(33, 127))).translate(
    {ord(c): None for c in map(chr, range(33, 127)) if c.isalnum()}
)

EXTRACTORS = ("exact", "first_line", "first_word", "last_number", "after_marker")


def normalise(text: str) -> str:
    """NFC, white space collapsed and stripped."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def number(text: str) -> str | None:
    """The number in its shortest form, or None where the text is not one number."""
    try:
        value = Decimal(text.replace(",", "").lstrip("$").rstrip("."))
    except InvalidOperation:
        return None
    if not value.is_finite():
        return None
    return format(value.normalize() + 0, "f")


def extract(text: str, extractor: str, marker: str = "####") -> str | None:
    """The normalised answer in `text`, or None where there is none."""
    if extractor == "last_number":
        found = _NUMBER.findall(text)
        return number(found[-1]) if found else None
    if extractor == "after_marker":
        _, hit, tail = text.rpartition(marker)
        answer = normalise(tail.strip().split("\n")[0]) if hit else ""
        return (number(answer) or answer) if answer else None
    if extractor == "first_line":
        text = next((line for line in text.splitlines() if line.strip()), "")
    elif extractor == "first_word":
        text = next((word for word in (w.strip(_PUNCTUATION) for w in text.split()) if word), "").casefold()
    elif extractor != "exact":
        raise ValueError(f"extractor {extractor!r} is not one of {EXTRACTORS}")
    return normalise(text) or None
