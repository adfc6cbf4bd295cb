"""`write_report`: one HTML file that needs nothing beside itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from sparsmith.durable import write_text
from sparsmith.reporting import charts, sections
from sparsmith.reporting.comparing import compare, several_sets
from sparsmith.reporting.folder import Run, read_runs


def write_report(runs: Sequence[str | Path], out: str | Path) -> Path:
    """Write the report of one run, or of several side by side.

    Args:
        runs: run folders. The report is about the first that is no control; the others stand beside it.
        out: the HTML file; replaced if it is there.

    Raises:
        CheckpointError: a folder that lacks the files of a finished run, or holds damaged ones.
    """
    out = Path(out)
    write_text(out, render(read_runs(runs)))
    return out


def render(runs: Sequence[Run]) -> str:
    """The page's HTML."""
    environment = Environment(
        loader=PackageLoader("sparsmith.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["svg"] = Markup  # our own figures, already escaped by matplotlib
    environment.tests["long"] = lambda text: len(text) > 24
    return environment.get_template("report.html.j2").render(view(runs))


def view(runs: Sequence[Run]) -> dict[str, Any]:
    """Everything that the template shows."""
    main = runs[0]
    systems, gaps, metrics = compare(runs)
    checks = [(run.name, sections.proofs(run)) for run in runs]
    return {
        "main": main,
        "runs": runs,
        "several": len(runs) > 1,
        "colours": charts.colours(runs),
        "base": sections.base_words(main),
        "methods": [(run.name, sections.method_words(run)) for run in runs],
        "changes": [change["what"].replace("->", "→") for change in (main.plan or {}).get("changes", [])],
        "tiles": sections.tiles(main),
        "checks": checks,
        "passed": sum(check["passed"] == "yes" for check in checks[0][1]),
        "headline": next((m for m in metrics if m.key == "loss"), metrics[0] if metrics else None),
        "systems": systems,
        "gaps": gaps,
        "metrics": metrics,
        "dots": [charts.metric_dots(m, runs) for m in metrics if m.key in ("loss", "exact_match", "rank")],
        "by_set": compare(runs, "sets")[2] if several_sets(runs) else [],
        "learning": [
            c for c in (f(runs) for f in (charts.loss_by_domain, charts.loss_terms, charts.gradients, charts.pace)) if c
        ],
        "health": list(charts.health(runs)),
        "loads": [(run.name, list(charts.expert_load(run))) for run in runs if run.tables],
        "samples": sections.samples(runs),
        "plans": [(run.name, sections.plan_tables(run), list((run.plan or {}).get("notes", []))) for run in runs],
        "data": [(run.name, sections.data_table(run), sections.fingerprints(run)) for run in runs],
        "facts": [(run.name, sections.fact_rows(run)) for run in runs],
    }
