"""What an export says of itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sparsmith.exporting.elsewhere import commands, told


@dataclass(frozen=True)
class ExportReport:
    """What was written, and how it proved itself."""

    path: Path
    model_type: str
    needs_code: bool
    """True where plain transformers needs `trust_remote_code=True`; False for a stock architecture."""
    bytes: int
    parameters: dict[str, int]
    """`total`, and `active` per token."""
    proof: dict[str, Any] | None
    """{check, value, limit, passed, bitwise, ...}; None where it was not asked for."""
    settle: dict[str, Any] | None
    """Figures of the merge: per matrix the relative error; largest logit difference and mean KL on the probe."""
    conversion: dict[str, Any] | None = field(default=None)
    """With `dtype` or `fold_scale`: the exported model against the settled one on the probe."""
    slice: dict[str, Any] | None = None
    """Of one depth of a depth-elastic model: `depth`, `of` (blocks of the parent), `blocks`, `exits`, `parent` (hash of the settled
    parent), `still_elastic` (the depths at which the slice can be read out in turn)."""

    form: str | None = None
    """Of a pruned model, its form (`methods.base.FORMS`)."""
    accounting: dict[str, Any] | None = None
    """Of a pruned model: `counted`, `deletable` and `measured`, each with the base of its percentages (`crafting/accounting.py`)."""
    cautions: tuple[str, ...] = ()
    """What a user must know, in sentences."""
    proof_skipped: str = ""
    """Why there is no proof although the export could have had one."""
    tuned: bool = True
    """False for a conversion: nothing has been trained."""

    @property
    def is_cut(self) -> bool:
        """True for an inner exit; False for the full depth, also where the exits' own blocks were left out of it."""
        return self.slice is not None and self.slice["depth"] < self.slice["of"]

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "path": str(self.path), "elsewhere": self.elsewhere(), "cautions": list(self.cautions)}

    def elsewhere(self) -> dict[str, str]:
        """Runtime -> command with which a slice is used there."""
        return dict(commands(self.path, stock=not self.needs_code)) if self.is_cut else {}

    def proof_words(self) -> str:
        if self.proof is None:
            return f"left out: {self.proof_skipped}" if self.proof_skipped else "not proven"
        if self.proof["limit"] is None:
            return f"opens; logits moved by {self.proof['value']:.3g}, as asked for"
        return "logits equal" if self.proof["bitwise"] else "logits within rounding"

    def _line(self) -> str:
        code = "trust_remote_code=True" if self.needs_code else "no remote code"
        size = f"{self.bytes / 1e6:,.1f} MB, {self.model_type}, {code}"
        return f"export: {self.path} ({size}); proof: {self.proof_words()}"

    def __str__(self) -> str:
        lines = [self._line()]
        if self.slice is not None:
            lines.append(slice_words(self.slice))
        if self.is_cut:
            lines.append(told(self.path, stock=not self.needs_code))
        if self.accounting is not None:
            lines += [f"{name}: {words}" for name, words in accounting_rows(self.accounting)]
        return "\n".join([*lines, *(f"caution: {text}" for text in self.cautions)])

    def __rich__(self) -> Any:
        return _unwrapped(str(self))


def accounting_rows(account: dict[str, Any]) -> list[tuple[str, str]]:
    """The three columns, always together; every percentage with what it is a share of."""
    counted, deletable, measured = account["counted"], account["deletable"], account["measured"]
    total = deletable["total"]
    rows = [
        (f"removed, {name}", f"{one['removed']:,} ({one['share']:.1%} of {one['of']}, {one['total']:,})")
        for name, one in (("counted", counted), ("deletable", deletable))
    ]
    share = f"{measured['numbers'] / total:.1%} of {deletable['of']}, {total:,}"
    rows.append(("measured in the files", f"{measured['numbers']:,} numbers ({share}), {measured['bytes']:,} bytes"))
    if "flops_per_token" in measured:
        share = f"{measured['flops_share']:.1%} of the dense model's {measured['dense_flops_per_token']:,}"
        words = f"{measured['flops_per_token']:,} ({share}), forward, {measured['flops_context']} tokens"
        rows.append(("measured FLOPs per token", words))
    if latency := measured.get("latency"):
        rows += _latency_rows(latency)
    return rows


def _latency_rows(latency: dict[str, Any]) -> list[tuple[str, str]]:
    place = f"{latency['device']}, {latency['dtype']}, batch {latency['batch']}, context {latency['context']}"
    rows = []
    for kind, what in (("prefill", "prefill"), ("decode", "decode, per token")):
        texts = [
            f"{name} {one['median']:.3g} ms (p10 {one['p10']:.3g}, p90 {one['p90']:.3g})"
            for name, one in latency[f"{kind}_ms"].items()
        ]
        rows.append((f"measured {what}", f"{', '.join(texts)}; {latency['runs']} runs; {place}"))
    return rows


def _unwrapped(text: str) -> Any:
    """For a terminal: commands to copy keep their lines."""
    from rich.text import Text

    return Text(text, no_wrap=True, overflow="ignore")


def slice_words(cut: dict[str, Any]) -> str:
    """One sentence: which depth this is."""
    if cut["depth"] == cut["of"]:
        return f"The full depth, {cut['of']} blocks; what other exits own is left out."
    own = f", the last of them the exit's own ({cut['blocks']} in all)" if cut["blocks"] > cut["depth"] else ""
    more = [str(n) for n in cut["still_elastic"] if n < cut["blocks"]]
    inner = f" It can still be read out after {', '.join(more)} blocks." if more else ""
    return f"Exit {cut['depth']} of {cut['of']} blocks{own}.{inner}"


@dataclass(frozen=True)
class SliceReports:
    """The reports of several depths."""

    reports: tuple[ExportReport, ...]

    def __iter__(self) -> Iterator[ExportReport]:
        return iter(self.reports)

    def __len__(self) -> int:
        return len(self.reports)

    def as_dict(self) -> dict[str, Any]:
        return {"slices": [report.as_dict() for report in self.reports]}

    def _rows(self) -> list[tuple[str, ...]]:
        return [
            (
                str((report.slice or {}).get("depth", "")),
                str((report.slice or {}).get("blocks", "")),
                f"{report.parameters['total']:,}",
                f"{report.bytes / 1e6:,.1f}",
                report.proof_words(),
                str(report.path),
            )
            for report in self.reports
        ]

    def _hints(self) -> str:
        cut = next((report for report in self.reports if report.is_cut), None)
        return told(cut.path, stock=not cut.needs_code) if cut else ""

    def __str__(self) -> str:
        rows = [_HEADS, *self._rows()]
        widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADS))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
        return "\n".join([*lines, *filter(None, [self._hints()])])

    def __rich__(self) -> Any:
        return _unwrapped(str(self))


_HEADS = ("depth", "blocks", "parameters", "MB", "proof", "folder")
