"""All trials of reliability at full size. `python -m benchmarks.reliability [--only 1,3] [--jobs 2]`

Writes benchmarks/results/reliability.json and .md after every row, so that a cut run loses one row; rows that were not asked for keep the
figures that they have. Ends non-zero when a promise did not hold.
"""

from __future__ import annotations

import argparse
import json
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.reliability.measure import measure_all
from benchmarks.reliability.rows import rows
from sparsmith.app.facts import machine, versions
from sparsmith.durable import write_json, write_text

RESULT = Path(__file__).parents[1] / "results" / "reliability.json"


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
    parser.add_argument("--jobs", type=int, default=1, help="rows at a time, each in a process of its own")
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    wanted = {int(number) for number in args.only.split(",") if number} or {row.number for row in rows()}
    result: dict[str, Any] = json.loads(args.out.read_text()) if args.out.is_file() else {"rows": {}}
    passed = True
    # one set of kills serves both of the first promises
    groups = [group for group in ([1, 2], *([row.number] for row in rows() if row.number > 2)) if wanted & set(group)]
    with ProcessPoolExecutor(args.jobs, get_context("spawn"), max_tasks_per_child=1) as pool:
        for done in as_completed([pool.submit(measure_all, [n for n in group if n in wanted]) for group in groups]):
            for number, figures in done.result().items():
                passed = passed and figures["passed"]
                print(f"promise {number}: {figures['promise']}")
                held = f"  {figures['held']}/{figures['tried']} in {figures['seconds']} s"
                print(held, *figures["failures"][:5], sep="\n  ", flush=True)
                result["rows"][str(number)] = figures
            result |= {"command": "python -m benchmarks.reliability", "machine": machine(), "versions": versions()}
            write_json(args.out, result)
            write_text(args.out.with_suffix(".md"), table(result))
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
