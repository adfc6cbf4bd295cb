"""Rows as the model sees them, with the trained tokens marked, and what became of every row."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsmith.data.load import LoadedData, load_data
from sparsmith.recipe.schema import DataSettings

if TYPE_CHECKING:
    from rich.console import Group

COUNTS = (
    "read",
    "kept",
    "rejected",
    "filtered",
    "limited",
    "over_long",
    "truncated",
    "all_masked",
    "tokens",
    "trained_tokens",
)


@dataclass(frozen=True)
class ShownRow:
    """A row of the training stream."""

    place: str
    """`file:line`"""
    source: str
    domain: str
    tokens: int
    trained_tokens: int
    pieces: tuple[tuple[str, bool], ...]
    """(text, trained) stretches; together the whole row, special tokens included."""
    label: int | None = None
    """The class, of a classifier's row."""

    @property
    def what(self) -> str:
        """What of the row is learned."""
        if self.label is not None:
            return f"class {self.label}, {self.tokens} tokens"
        return f"{self.trained_tokens} of {self.tokens} tokens trained"


@dataclass(frozen=True)
class DataView:
    """What `sparsmith data show` prints."""

    rows: tuple[ShownRow, ...]
    counts: tuple[dict[str, Any], ...]
    """One record per source: use (`train` or `eval`), source, domain, format, share, and the numbers of `COUNTS`."""
    domains: dict[str, dict[str, int]]
    """Domain -> rows kept, tokens and trained tokens of the training sources."""
    rejects: tuple[str, ...]
    """The first bad rows, one line each."""

    def as_dict(self) -> dict[str, Any]:
        """The view as data."""
        return asdict(self)

    def as_text(self) -> str:
        """The view for a terminal without colours; trained text stands between « and »."""
        lines = []
        for row in self.rows:
            lines.append(f"--- {row.source} ({row.domain}) {row.place}: {row.what}")
            lines.append("".join(f"«{text}»" if trained else text for text, trained in row.pieces))
        heads = ("use", "source", "domain", "format", "share", *COUNTS)
        table = [heads, *(tuple(_cell(record.get(head)) for head in heads) for record in self.counts)]
        widths = [max(len(line[column]) for line in table) for column in range(len(heads))]
        lines += [
            *_drawn(self.counts),
            "",
            *("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in table),
        ]
        return "\n".join([*lines, *self.rejects])

    def __rich__(self) -> Group:
        """The view for rich: trained text green, the rest dim."""
        from rich.console import Group
        from rich.panel import Panel
        from rich.table import Table
        from rich.text import Text

        parts: list[Any] = []
        for row in self.rows:
            text = Text()
            for piece, trained in row.pieces:
                text.append(piece, style="bold green" if trained else "dim")
            title = Text(f"{row.source} · {row.domain} · {row.what}")
            parts.append(Panel(text, title=title, subtitle=Text(row.place), title_align="left", subtitle_align="right"))
        table = Table(title="Rows and tokens", title_justify="left")
        for head in ("use", "source", "domain", "format"):
            table.add_column(head)
        for head in ("share", *COUNTS):
            table.add_column(head.replace("_", " "), justify="right")
        for record in self.counts:
            table.add_row(
                *(Text(_cell(record.get(head))) for head in ("use", "source", "domain", "format", "share", *COUNTS))
            )
        parts.append(table)
        parts += [Text(line, style="dim") for line in _drawn(self.counts)]
        return Group(*parts, *(Text(line, style="yellow") for line in self.rejects))


def show(
    settings: DataSettings,
    tokenizer: Any,
    n: int = 3,
    *,
    seed: int = 42,
    base_dir: Path | str = ".",
    rejects: Path | str | None = None,
    classes: int | None = None,
    pairs: bool = False,
) -> DataView:
    """Load the data and look at the first `n` rows of the training stream."""
    needed = max(n, 1)
    data = load_data(
        settings,
        tokenizer,
        seed=seed,
        base_dir=base_dir,
        rows_needed=needed,
        rejects=rejects,
        classes=classes,
        pairs=pairs,
    )
    return view_of(data, n)


def view_of(data: LoadedData, n: int = 3) -> DataView:
    """The view of data that is loaded."""
    counts = tuple(
        {"use": use, "source": name, **record}
        for use, sources in data.counts.items()
        for name, record in sources.items()
    )
    rejects = [str(row.error) for rows in data.rejects.values() for row in rows[:3]]
    return DataView(
        tuple(_shown(data, index) for index in range(min(n, len(data.train)))), counts, _domains(data), tuple(rejects)
    )


def _shown(data: LoadedData, index: int) -> ShownRow:
    item = data.train[index]
    ids, labels = item["input_ids"].tolist(), item["labels"]
    label = labels if isinstance(labels, int) else None
    trained = [False] * len(ids) if isinstance(labels, int) else (labels >= 0).tolist()
    source = data.train.sets[int(data.train.source[index])].name
    domain = data.domains[int(item["domain"][0])]
    return ShownRow(
        data.place(item["sample_ids"]),
        source,
        domain,
        len(ids),
        sum(trained),
        pieces(data.encoder.tokenizer, ids, trained),
        label,
    )


def pieces(tokenizer: Any, ids: list[int], trained: list[bool]) -> tuple[tuple[str, bool], ...]:
    """(text, trained) stretches of a row. Texts are cut out of the whole row's text, so that they join to it."""
    result: list[tuple[str, bool]] = []
    start, done = 0, ""
    for stop in range(1, len(ids) + 1):
        if stop == len(ids) or trained[stop] != trained[start]:
            text = tokenizer.decode(ids[:stop], skip_special_tokens=False, clean_up_tokenization_spaces=False)
            result.append((text[len(done) :], trained[start]))
            start, done = stop, text
    return tuple(result)


def _domains(data: LoadedData) -> dict[str, dict[str, int]]:
    result: dict[str, dict[str, int]] = {}
    for record in data.counts["train"].values():
        total = result.setdefault(record["domain"], {"kept": 0, "tokens": 0, "trained_tokens": 0})
        for name in total:
            total[name] += record[name]
    return result


def _drawn(counts: tuple[dict[str, Any], ...]) -> list[str]:
    """A line for each task of a mixture: in which ways its rows are shown."""
    return [
        f"{record['source']}: "
        + ", ".join(f"{name} {count:,}" for name, count in record["variants"].items())
        + f"; {record['shots']:,} worked examples, {record['shots_pruned']:,} left out for length"
        for record in counts
        if "variants" in record
    ]


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.1%}"
    return f"{value:,}" if isinstance(value, int) else str(value)
