"""A plan as tables."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparsmith.crafting.plan import Plan

_UNITS = ("B", "KB", "MB", "GB", "TB")


def size(count: float) -> str:
    """Bytes for people (decimal units)."""
    for unit in _UNITS:
        if abs(count) < 1000 or unit == _UNITS[-1]:
            return f"{count:.3g} {unit}" if unit != "B" else f"{count:.0f} B"
        count /= 1000
    return ""


def number(count: float) -> str:
    """A count for people: 12.3 K, 7.81 B."""
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(count) >= limit:
            return f"{count / limit:.4g} {unit}"
    return f"{count:.0f}"


def plan_tables(plan: Plan) -> list[tuple[str, list[str], list[list[str]]]]:
    """(title, columns, rows) of every table."""
    memory, flops = plan.memory, plan.flops
    cases = ("low", "expected", "high")
    fixed = [("weights", memory.weights), ("gradients", memory.gradients), ("optimizer", memory.optimizer)]
    return [
        (
            f"{' + '.join(plan.methods)} on {plan.base}",
            ["modules", "change", "count"],
            [[change.where, change.what, str(change.count)] for change in plan.changes],
        ),
        (
            "Parameters",
            ["", "count", "of base"],
            [
                [label, f"{count:,}", f"{count / plan.base_params:.2%}"]
                for label, count in [
                    ("base", plan.base_params),
                    ("total", plan.total_params),
                    ("active per token", plan.active_params),
                    *((f"trained: {role}", n) for role, n in plan.trained.items()),
                    ("trained, all", plan.trained_params),
                ]
            ],
        ),
        (
            "Memory while tuning",
            ["", *cases],
            [
                *([name, *[size(value)] * 3] for name, value in fixed),
                ["activations", *(size(memory.activations[case]) for case in cases)],
                ["together", *(size(memory.total(case)) for case in cases)],
            ],
        ),
        (
            "Cost",
            ["", "", ""],
            [
                ["forward FLOPs per token", number(flops.forward), f"{flops.overhead:.3f}x the base"],
                ["training FLOPs per token", number(flops.training), f"at {flops.context} tokens of context"],
                ["disk: delta checkpoint", size(plan.disk["delta"]), ""],
                ["disk: with optimizer state", size(plan.disk["trainer_checkpoint"]), ""],
                ["disk: full export", size(plan.disk["export"]), ""],
            ],
        ),
    ]


def plan_text(plan: Plan) -> str:
    """Plain text, for files and pipes."""
    lines: list[str] = []
    for title, columns, rows in plan_tables(plan):
        widths = [max(len(row[i]) for row in [columns, *rows]) for i in range(len(columns))]
        lines.append(title)
        lines += ["  " + "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*lines, *(f"note: {note}" for note in plan.notes)])


def plan_renderable(plan: Plan) -> Any:
    """A rich group of tables."""
    from rich.console import Group
    from rich.table import Table

    parts: list[Any] = []
    for title, columns, rows in plan_tables(plan):
        table = Table(title=title, title_justify="left", show_header=any(columns))
        for i, column in enumerate(columns):
            table.add_column(
                column, justify="left" if i == 0 or title.startswith(" + ".join(plan.methods)) else "right"
            )
        for row in rows:
            table.add_row(*row)
        parts.append(table)
    parts += [f"note: {note}" for note in plan.notes]
    return Group(*parts)
