"""A plan as tables."""

from __future__ import annotations

from typing import Any

Figures = dict[str, Any]
"""A plan as data (`Plan.as_dict()`)."""

_UNITS = ("B", "KB", "MB", "GB", "TB")
_LAYOUTS = {"ddp": "DDP", "fsdp2": "FSDP2", "qlora": "QLoRA (NF4 base, DDP)"}


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


def plan_tables(plan: Figures) -> list[tuple[str, list[str], list[list[str]]]]:
    """(title, columns, rows) of every table."""
    memory, flops, counts, disk = plan["memory"], plan["flops_per_token"], plan["parameters"], plan["disk"]
    cases = ("low", "expected", "high")
    return [
        (
            f"{' + '.join(plan['methods'])} on {plan['base']}",
            ["modules", "change", "count"],
            [[change["where"], change["what"], str(change["count"])] for change in plan["changes"]],
        ),
        (
            "Parameters",
            ["", "count", "of base"],
            [
                [label, f"{count:,}", f"{count / counts['base']:.2%}"]
                for label, count in [
                    ("base", counts["base"]),
                    ("total", counts["total"]),
                    ("active per token", counts["active"]),
                    *((f"trained: {role}", n) for role, n in counts["trained"].items()),
                    ("trained, all", counts["trained_total"]),
                ]
            ],
        ),
        (
            "Memory while tuning",
            ["", *cases],
            [
                *([name, *[size(memory[name])] * 3] for name in ("weights", "gradients", "optimizer")),
                ["activations", *(size(memory["activations"][case]) for case in cases)],
                ["together", *(size(memory["total"][case]) for case in cases)],
            ],
        ),
        (
            "Memory per GPU, expected",
            ["", *(f"{ranks} GPU" + ("s" if ranks != "1" else "") for ranks in plan["memory_per_rank"]["ddp"])],
            [
                [_LAYOUTS[layout], *(size(one["total"]) for one in rows.values())]
                for layout, rows in plan["memory_per_rank"].items()
            ],
        ),
        (
            "Cost",
            ["", "", ""],
            [
                ["forward FLOPs per token", number(flops["forward"]), f"{flops['overhead']:.3f}x the base"],
                ["training FLOPs per token", number(flops["training"]), f"at {flops['context']} tokens of context"],
                ["disk: delta checkpoint", size(disk["delta"]), ""],
                ["disk: with optimizer state", size(disk["trainer_checkpoint"]), ""],
                ["disk: full export", size(disk["export"]), ""],
            ],
        ),
    ]


def plan_text(plan: Figures) -> str:
    """Plain text, for files and pipes."""
    lines: list[str] = []
    for title, columns, rows in plan_tables(plan):
        widths = [max(len(row[i]) for row in [columns, *rows]) for i in range(len(columns))]
        lines.append(title)
        shown = [columns, *rows] if any(columns) else rows
        lines += [
            "  " + "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in shown
        ]
    return "\n".join([*lines, *(f"note: {note}" for note in plan["notes"])])


def plan_renderable(plan: Figures) -> Any:
    """A rich group of tables."""
    from rich.console import Group
    from rich.table import Table

    parts: list[Any] = []
    for title, columns, rows in plan_tables(plan):
        table = Table(title=title, title_justify="left", show_header=any(columns))
        for i, column in enumerate(columns):
            table.add_column(
                column, justify="left" if i == 0 or title.startswith(" + ".join(plan["methods"])) else "right"
            )
        for row in rows:
            table.add_row(*row)
        parts.append(table)
    parts += [f"note: {note}" for note in plan["notes"]]
    return Group(*parts)
