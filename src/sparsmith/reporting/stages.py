"""The page of a run of several stages: what every stage made of the base in one table, their proofs, and links to their own pages."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from sparsmith.durable import write_text
from sparsmith.reporting import charts, sections
from sparsmith.reporting.comparing import Metric, System, compare_systems
from sparsmith.reporting.folder import Run, read_runs
from sparsmith.reporting.page import environment
from sparsmith.reporting.palette import BASE, colour_of
from sparsmith.reporting.words import count, duration
from sparsmith.runs import RunFolder, StagesFolder


def write_stages_report(root: str | Path, out: str | Path | None = None) -> Path:
    """Write the page of a run whose stages are all finished.

    Args:
        root: the run's folder. out: the HTML file, replaced if it is there; None = `report.html` of the run.

    Raises:
        CheckpointError: a stage that lacks the files of a finished run, or holds damaged ones.
    """
    whole = StagesFolder(Path(root))
    page = Path(out) if out is not None else whole.report
    write_text(page, environment().get_template("stages.html.j2").render(view(whole, page)))
    return page


def view(whole: StagesFolder, page: Path) -> dict[str, Any]:
    """Everything that the template shows."""
    folders = whole.stages()
    runs = [read_runs([folder.root])[0] for folder in folders]
    columns, other_rows = systems_of(runs)
    systems, gaps, metrics = compare_systems(columns)
    if other_rows:
        metrics = [_without_best(metric) for metric in metrics]
    colours = _colours(systems)
    return {
        "name": whole.root.absolute().name,
        "base": sections.base_words(runs[0]),
        "sparsmith": runs[-1].facts.get("sparsmith", ""),
        "finished": str(runs[-1].facts.get("finished") or ""),
        "stages": [_stage(run, folder, page) for run, folder in zip(runs, folders, strict=True)],
        "systems": systems,
        "gaps": gaps,
        "metrics": metrics,
        "colours": colours,
        "dots": [
            charts.interval_dots(metric, colours) for metric in metrics if metric.key in ("loss", "exact_match", "rank")
        ],
        "other_rows": other_rows,
        "checks": [(run.name, sections.proofs(run)) for run in runs],
        "recipe": whole.recipe.read_text(encoding="utf-8"),
    }


def systems_of(runs: Sequence[Run]) -> tuple[list[System], bool]:
    """(the base and what each stage made of it, whether some stage was measured on other rows than the one before).

    Where it was, the result of the stage before stands there a second time, as it was measured on the later stage's rows.
    """
    found, other_rows = [System("base", runs[0], "base")], False
    for before, run in zip([None, *runs], runs):
        if before is not None and _rows(before) != _rows(run):
            other_rows = True
            found.append(System(f"{before.name}, rows of {run.name}", run, "base"))
        found.append(System(run.name, run, "tuned"))
    return [system for system in found if system.result], other_rows


def _rows(run: Run) -> dict[str, Any]:
    return ((run.evaluation or {}).get("tuned") or {}).get("fingerprints", {})


def _without_best(metric: Metric) -> Metric:
    """Figures on different rows are no contest."""
    rows = [(name, n, [_plain(cell) for cell in cells]) for name, n, cells in metric.rows]
    return replace(metric, rows=rows)


def _plain(cell: Any) -> Any:
    return replace(cell, tone="") if cell is not None and cell.tone == "best" else cell


def _colours(systems: Sequence[System]) -> dict[str, str]:
    """Base grey; a stage has one colour, on whichever rows."""
    runs = list(dict.fromkeys(system.name.split(", rows of ")[0] for system in systems if system.name != "base"))
    tones = {name: colour_of(index) for index, name in enumerate(runs)}
    return {system.name: tones.get(system.name.split(", rows of ")[0], BASE) for system in systems}


def _stage(run: Run, folder: RunFolder, page: Path) -> dict[str, Any]:
    """A row of the list of stages."""
    parameters = (run.plan or {}).get("parameters") or {}
    trained = parameters.get("trained_total", 0)
    return {
        "name": run.name,
        "words": sections.method_words(run),
        "link": quote(Path(os.path.relpath(folder.report.absolute(), page.absolute().parent)).as_posix()),
        "before": count(parameters.get("base", 0)),
        "after": count(parameters.get("total", 0)),
        "trained": count(trained),
        "steps": count(run.facts.get("steps", 0)),
        "tokens": count(run.facts.get("tokens_trained", 0)),
        "time": duration(run.facts["seconds"]) if "seconds" in run.facts else "",
        "changes": [change["what"].replace("->", "→") for change in (run.plan or {}).get("changes", [])],
    }
