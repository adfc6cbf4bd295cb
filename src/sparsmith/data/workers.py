"""Encoding of many rows, in batches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sparsmith.data.messages import Messages
from sparsmith.data.rows import RowFault
from sparsmith.data.tokens import TokenRow

BATCH = 1000


def encode_all(encoder: Any, rows: list[Messages], workers: int = 0) -> Iterator[TokenRow | RowFault]:
    """Encode all rows, in their order."""
    for start in range(0, len(rows), BATCH):
        yield from encoder.encode(rows[start : start + BATCH])
