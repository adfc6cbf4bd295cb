"""What `sparsmith data overlap` found, as data, as a table, and as a file that an evaluation reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sparsmith import durable
from sparsmith.errors import CheckpointError

if TYPE_CHECKING:
    from rich.console import Group

FORMAT = 1
FILE = "overlap.json"
WORDS = 13
"""Words of a run that must be equal for a hit."""
CONTAMINATED = 0.01
"""A set is contaminated where more than this share of its rows was met in training: a few chance hits of common phrases are no reason
to distrust a set, a leaked file is far above."""

Kind = Literal["prompt", "prompt_and_answer", "ngram"]


@dataclass(frozen=True)
class Meeting:
    """One evaluation row and the training row where it was met."""

    kind: Kind
    evaluated: str
    """`file:line`"""
    trained: str
    """`file:line`"""
    source: str
    """Name of the training source."""
    text: str
    """The words that are equal, cut."""


@dataclass(frozen=True)
class SetOverlap:
    """One evaluation set against all training rows."""

    name: str
    tag: str
    """Its family, or what its name says."""
    shared: dict[str, list[str]]
    """Why it counts as of a seen family -> names of the training sources; empty = of none."""
    searched: bool = False
    """Whether the rows were compared; False where tags alone were."""
    rows: int = 0
    exact_prompts: int = 0
    """Rows whose prompt is, normalised, a training prompt."""
    exact_rows: int = 0
    """Those whose answer is the same too."""
    ngram_rows: int = 0
    """Rows with a run of 13 words that stands in a training prompt or answer."""
    met_rows: int = 0
    """Rows with any of them."""
    short_rows: int = 0
    """Rows of fewer than 13 words, which only an exact match can find."""
    instruction_rows: int = 0
    """Rows whose runs were met but are instructions (a prompt's template) and no contents: not among `ngram_rows`."""
    by_source: dict[str, int] = field(default_factory=dict)
    """Training source -> rows of this set that it meets."""
    examples: tuple[Meeting, ...] = ()

    @property
    def share(self) -> float:
        """Of the rows, those met in training; in [0, 1]."""
        return self.met_rows / self.rows if self.rows else 0.0

    @property
    def verdict(self) -> Literal["clean", "seen", "contaminated"]:
        """`contaminated`: more than 1 % of the rows were met; else `seen` where a family is shared; else `clean`."""
        if self.share > CONTAMINATED:
            return "contaminated"
        return "seen" if self.shared else "clean"

    @property
    def is_clean(self) -> bool:
        return self.verdict == "clean"

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "share": self.share, "verdict": self.verdict}

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> SetOverlap:
        given = {key: value for key, value in raw.items() if key not in ("share", "verdict")}
        return cls(**{**given, "examples": tuple(Meeting(**one) for one in given.get("examples", ()))})


@dataclass(frozen=True)
class OverlapReport:
    """Every evaluation set against what is trained on."""

    sets: dict[str, SetOverlap]
    trained: dict[str, int]
    """Training source -> rows compared (0 where tags alone were)."""
    basis: str
    """What the verdicts rest on, in words."""
    fingerprint: str = ""
    """Of the sources and seeds that were compared; a stored report serves no others."""
    presets: tuple[str, ...] = ()
    """Whole mixtures that were trained on besides, known by their families alone."""
    files: dict[str, str] = field(default_factory=dict)
    """File -> sha256 of its bytes when it was compared."""

    def clean(self) -> list[str]:
        """Names of the sets that are clean."""
        return [name for name, one in self.sets.items() if one.is_clean]

    def seen(self) -> list[str]:
        """Names of the sets that are not: of a seen family, or contaminated."""
        return [name for name, one in self.sets.items() if not one.is_clean]

    def as_dict(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "words": WORDS,
            "contaminated_above": CONTAMINATED,
            "basis": self.basis,
            "fingerprint": self.fingerprint,
            "trained": self.trained,
            "presets": list(self.presets),
            "files": self.files,
            "clean": self.clean(),
            "seen": self.seen(),
            "sets": {name: one.as_dict() for name, one in self.sets.items()},
        }

    def write(self, folder: str | Path) -> Path:
        """Write `overlap.json` into a folder; returns its path."""
        path = Path(folder) / FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        durable.write_json(path, self.as_dict())
        return path

    @classmethod
    def read(cls, path: str | Path) -> OverlapReport:
        """The report that `write` wrote.

        Raises:
            CheckpointError: not such a file.
        """
        raw = durable.read_json(Path(path))
        try:
            if raw["format"] != FORMAT:
                raise ValueError(f"format {raw['format']}")
            sets = {str(name): SetOverlap.from_dict(one) for name, one in raw["sets"].items()}
            known = {str(name): int(rows) for name, rows in raw["trained"].items()}
            return cls(sets, known, str(raw["basis"]), str(raw["fingerprint"]), tuple(raw["presets"]), raw["files"])
        except (KeyError, TypeError, ValueError, AttributeError) as fault:
            mend = "Write it again: sparsmith data overlap RECIPE --out FOLDER."
            raise CheckpointError(
                str(path), f"{type(fault).__name__}: {fault}", f"a report of format {FORMAT}", mend
            ) from None

    def __rich__(self) -> Group:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table(title="Evaluation sets against the training rows", title_justify="left", caption_justify="left")
        for head in ("set", "verdict", "seen by"):
            table.add_column(head)
        for head in ("rows", "same prompt", "and answer", f"{WORDS} words", "met", "too short"):
            table.add_column(head, justify="right")
        for one in self.sets.values():
            style = {"clean": "green", "seen": "yellow", "contaminated": "bold red"}[one.verdict]
            counts = [_share(n, one) for n in (one.exact_prompts, one.exact_rows, one.ngram_rows, one.met_rows)]
            table.add_row(
                Text(one.name),
                Text(one.verdict, style=style),
                Text(_reasons(one.shared)),
                f"{one.rows:,}",
                *counts,
                f"{one.short_rows:,}",
            )
        table.caption = self.basis
        return Group(table, *self._lines())

    def _lines(self) -> list[Any]:
        """Examples and what was left out, a line each."""
        from rich.text import Text

        lines = []
        for one in self.sets.values():
            if one.instruction_rows:
                lines.append(
                    f"{one.name}: instructions alone are shared by {one.instruction_rows:,}; these do not count"
                )
            if one.by_source:
                lines.append(
                    f"{one.name} is met by " + ", ".join(f"{name} ({n:,})" for name, n in one.by_source.items())
                )
            lines += [
                f"  {meeting.kind.replace('_', ' ')}: {meeting.evaluated} = {meeting.trained}: {meeting.text}"
                for meeting in one.examples
            ]
        return [Text(line) for line in lines]


def _share(count: int, one: SetOverlap) -> str:
    if not one.searched:
        return "-"
    return f"{count:,} ({count / one.rows:.1%})" if count else "0"


def _reasons(shared: Mapping[str, list[str]], most: int = 3) -> str:
    told = [f"{reason}: {', '.join(dict.fromkeys(names))}" for reason, names in shared.items()]
    more = [f"and {len(told) - most} more"] if len(told) > most else []
    return "; ".join([*told[:most], *more]) or "-"
