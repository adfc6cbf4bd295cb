"""Runs trials and keeps their figures."""

from __future__ import annotations

import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.reliability.rows import Row, rows

SHOWN_FAILURES = 20


def measure(row: Row) -> dict[str, Any]:
    """Run one row's trial and return what is kept of it."""
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix=f"promise-{row.number}-") as folder:
        tally = row.run(Path(folder))
    return {
        "promise": row.promise,
        "target": row.target,
        "field": row.field,
        "tried": tally.tried,
        "held": tally.held,
        "passed": tally.whole,
        "failures": tally.failures[:SHOWN_FAILURES],
        "figures": tally.figures,
        "seconds": round(time.perf_counter() - begun, 1),
        "date": datetime.now(UTC).date().isoformat(),
    }


def measure_all(numbers: list[int]) -> dict[int, dict[str, Any]]:
    """Those rows one after the other, in this process."""
    return {row.number: measure(row) for row in rows() if row.number in numbers}
