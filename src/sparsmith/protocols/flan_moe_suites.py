"""Tasks of lm-evaluation-harness on what setup 2 starts from and ends with: the benchmarks that the paper asks its models after instruction
tuning, in the words in which others quote them. Figures beside those of the recipe's own held-out sets, never mixed with them.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsmith.bootstrap import RowScores
from sparsmith.durable import read_json, write_json
from sparsmith.errors import MethodError
from sparsmith.evaluating import TaskResult
from sparsmith.recipe.protocol import Suites

if TYPE_CHECKING:
    from sparsmith.protocols.flan_moe_cells import SetupCell

Ask = Callable[[str, Suites], TaskResult]
"""Measures a run, or a model by its path, on the suites."""
Figures = dict[str, Any]
"""A `TaskResult` as JSON."""


def asked_once(file: Path, target: str, measured: Mapping[str, Any], suites: Suites, ask: Ask) -> Figures:
    """The figures of `target`, from `file` where the same question was answered before; else measured and written there.

    Args:
        measured: what the run itself measured on the model, set -> metrics: one that was made anew under the same name has other losses.
    """
    losses = {name: metrics["loss"]["value"] for name, metrics in measured.items()}
    question = {"target": target, "losses": losses, "suites": suites.model_dump(mode="json")}
    if file.is_file() and (known := read_json(file)).get("question") == question:
        return dict(known["result"])
    result = ask(target, suites).to_json()
    write_json(file, {"question": question, "result": result})
    return result


def rows(cells: Iterable[SetupCell], setup: int) -> dict[str, dict[str, RowScores]]:
    """`seed:task` -> metric -> hits row by row, of the results of setup 2 or (-1) of what it started from."""
    found = {}
    for cell in cells:
        for name, task in _figures(cell, setup)["tasks"].items():
            hits = [item["hits"] for item in task["items"]]
            scores = {m: RowScores(tuple(h[m] for h in hits), (1.0,) * len(hits)) for m in task["metrics"]}
            found[f"{cell.seed}:{name}"] = scores
    return found


def table(cells: Iterable[SetupCell]) -> list[dict[str, Any]]:
    """One record for every side before and after setup 2: of each task file its metrics, the score over chance, and their average.

    The average is over the task files, each by its first metric: 0 is guessing, 100 is all right.
    """
    by_side: dict[str, list[SetupCell]] = {}
    for cell in cells:
        by_side.setdefault(cell.side, []).append(cell)
    found = []
    for side, own in by_side.items():
        for setup in (-1, 2):
            results = [_figures(cell, setup)["groups"] for cell in own]
            tasks = {name: {m: _over(results, name, m) for m in group["metrics"]} for name, group in results[0].items()}
            averages = [
                statistics.fmean(_first(group)["normalised"] for group in result.values()) for result in results
            ]
            found.append({"side": side, "setup": setup, "tasks": tasks, "average": _spread(averages)})
    return found


def require_same_rows(cells: Iterable[SetupCell]) -> None:
    """Every side and seed answered the same questions.

    Raises:
        MethodError: a task's rows or prompts changed between two runs of the protocol.
    """
    known: dict[str, tuple[str, str]] = {}
    for cell in cells:
        for setup in (-1, 2):
            for name, task in _figures(cell, setup)["tasks"].items():
                mark, place = known.setdefault(name, (task["fingerprint"], cell.cell.run.name))
                if mark != task["fingerprint"]:
                    found = f"rows of `{name}` that differ between {place} and {cell.cell.run.name}"
                    mend = (
                        f"Remove {cell.cell.run.parent / 'suites'}: the tasks are asked anew, nothing is tuned again."
                    )
                    raise MethodError("protocol.suites", found, "the same rows for every side and seed", mend)


def _figures(cell: SetupCell, setup: int) -> Figures:
    assert cell.suites is not None
    return cell.suites["base" if setup == -1 else "tuned"]


def _over(results: list[Figures], name: str, metric: str) -> dict[str, Any]:
    figures = [result[name]["metrics"][metric] for result in results]
    values = _spread([figure["value"] for figure in figures])
    return {**values, "normalised": statistics.fmean(f["normalised"] for f in figures), "n": figures[0]["n"]}


def _first(group: Figures) -> dict[str, float]:
    return dict(next(iter(group["metrics"].values())))


def _spread(values: list[float]) -> dict[str, float | None]:
    return {"value": statistics.fmean(values), "sd": statistics.stdev(values) if len(values) > 1 else None}
