"""A table of text, for the terminal and for Markdown alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sparsmith.bootstrap import Figure

if TYPE_CHECKING:
    from rich.table import Table


def signed(gap: Any) -> str:
    """`+0.0123 (-0.0010 to +0.0250)` of a figure or of its dictionary; `-` where there is none."""
    if gap is None:
        return "-"
    found = gap.as_dict() if isinstance(gap, Figure) else gap
    return f"{found['value']:+.4f} ({found['low']:+.4f} to {found['high']:+.4f})"


@dataclass(frozen=True)
class Sheet:
    """A table of text."""

    title: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""
    left: int = 1
    """Columns that are words and not figures."""

    def rich(self) -> Table:
        from rich.table import Table

        table = Table(title=self.title, caption=self.caption or None, title_justify="left", caption_justify="left")
        for index, head in enumerate(self.heads):
            table.add_column(head.replace("[", r"\["), justify="left" if index < self.left else "right")
        for row in self.rows:
            table.add_row(*(cell.replace("[", r"\[") for cell in row))
        return table

    def markdown(self, titled: bool = True) -> str:
        lines = [f"### {self.title}", ""] if titled else []
        lines += ["| " + " | ".join(self.heads) + " |", "|" + "---|" * len(self.heads)]
        lines += ["| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in self.rows]
        return "\n".join([*lines, *(["", self.caption] if self.caption else []), ""])
