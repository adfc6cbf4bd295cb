"""`write_report`: one HTML file that needs nothing beside itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from sparsmith.durable import write_text
from sparsmith.reporting import charts, depths, gates, sections
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
    return environment().get_template("report.html.j2").render(view(runs))


def environment() -> Environment:
    """The templates, with what they use."""
    found = Environment(
        loader=PackageLoader("sparsmith.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters["svg"] = Markup  # our own figures, already escaped by matplotlib
    found.tests["long"] = lambda text: len(text) > 24
    return found


def view(runs: Sequence[Run]) -> dict[str, Any]:
    """Everything that the template shows."""
    main = runs[0]
    systems, gaps, metrics = compare(runs)
    checks = [(run.name, sections.proofs(run)) for run in runs]
    health, loads = list(charts.health(runs)), [(run.name, list(charts.expert_load(run))) for run in runs if run.tables]
    shown = {
        "guards": [(run.name, found) for run in runs if (found := depths.guard(run))],
        "by_depth": [c for c in (depths.training(runs), depths.measured(runs)) if c],
        "depth_tables": [(run.name, found) for run in runs if (found := depths.table(run))],
        "exits": [(run.name, found) for run in runs if (found := depths.exits(run))],
        "speed": depths.speed_and_quality(runs),
        "speed_tables": [(run.name, tables) for run in runs if (tables := depths.speed_tables(run))],
        "gate_charts": [
            c for c in (gates.quality_by_size(runs), gates.over_time(runs), gates.size_over_time(runs)) if c
        ]
        + [c for run in runs for c in (gates.by_layer(run), gates.folded(run)) if c],
        "gate_tables": [
            (run.name, [table for table in (gates.accounting(run), gates.widths(run)) if table])
            for run in runs
            if gates.table_of(run)
        ],
        # a run with depths or gates and no router is no run whose router was not measured
        "routed": bool(health or any(drawn for _, drawn in loads))
        or not any(depths.depths_of(run) or gates.remains_of(run) is not None for run in runs),
    }
    return {
        **shown,
        "contents": [(key, title) for key, title, there in _contents(shown) if there],
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
        "health": health,
        "loads": loads,
        "samples": sections.samples(runs),
        "plans": [(run.name, sections.plan_tables(run), list((run.plan or {}).get("notes", []))) for run in runs],
        "data": [(run.name, sections.data_table(run), sections.fingerprints(run)) for run in runs],
        "facts": [(run.name, sections.fact_rows(run)) for run in runs],
    }


def _contents(shown: dict[str, Any]) -> list[tuple[str, str, bool]]:
    """(anchor, title, whether it is on the page) of every section."""
    return [
        ("guard", "What the full depth pays", bool(shown["guards"])),
        ("before-and-after", "Before and after", True),
        ("depths", "Every depth", bool(shown["by_depth"] or shown["depth_tables"])),
        ("exits", "Where tokens leave", bool(shown["exits"])),
        ("speed", "Speed", bool(shown["speed"] or shown["speed_tables"])),
        ("gates", "Gates and size", bool(shown["gate_charts"] or shown["gate_tables"])),
        ("learning", "How it learned", True),
        ("health", "Router health", shown["routed"]),
        ("load", "Expert load", shown["routed"]),
        ("samples", "Samples", True),
        ("proof", "Proof", True),
        ("plan", "Plan", True),
        ("data", "Data", True),
        ("recipe", "Recipe and machine", True),
    ]
