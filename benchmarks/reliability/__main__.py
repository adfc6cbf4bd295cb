"""All trials of reliability at full size. `python -m benchmarks.reliability [--only 1,3]`

Writes benchmarks/results/reliability.json and .md after every row, so that a cut run loses one row; rows that were not asked for keep the
figures that they have. Ends non-zero when a promise did not hold.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.reliability.rows import Row, rows
from sparsmith.app.facts import machine, versions
from sparsmith.durable import write_json, write_text

RESULT = Path(__file__).parents[1] / "results" / "reliability.json"
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


def table(result: dict[str, Any]) -> str:
    """The Markdown table."""
    lines = ["| # | promise | held | target | the plain stack |", "|---|---|---|---|---|"]
    for number, row in sorted(result["rows"].items(), key=lambda pair: int(pair[0])):
        held = f"{row['held']:,} of {row['tried']:,}"
        mark = "" if row["passed"] else " (**missed**)"
        lines.append(f"| {number} | {row['promise']} | {held}{mark} | {row['target']} | {row['field']} |")
    failed = [
        f"- promise {number}: {failure}"
        for number, row in sorted(result["rows"].items())
        for failure in row["failures"]
    ]
    return "\n".join(lines + (["", "What failed:", *failed] if failed else [])) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="numbers of rows, with commas")
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    wanted = {int(number) for number in args.only.split(",") if number}
    result: dict[str, Any] = json.loads(args.out.read_text()) if args.out.is_file() else {"rows": {}}
    passed = True
    for row in rows():
        if wanted and row.number not in wanted:
            continue
        print(f"promise {row.number}: {row.promise}", flush=True)
        figures = measure(row)
        passed = passed and figures["passed"]
        print(f"  {figures['held']}/{figures['tried']} in {figures['seconds']} s", *figures["failures"][:5], sep="\n  ")
        result["rows"][str(row.number)] = figures
        result |= {"command": "python -m benchmarks.reliability", "machine": machine(), "versions": versions()}
        write_json(args.out, result)
        write_text(args.out.with_suffix(".md"), table(result))
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
