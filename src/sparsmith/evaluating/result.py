"""The figures of one evaluation: what is measured, how sure it is, and the rows behind it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sparsmith.bootstrap import RESAMPLES, Figure, Figures, RowScores, Summary, paired_differences, summarise
from sparsmith.errors import CheckpointError
from sparsmith.evaluating.metrics import METRICS, NATS, words

FORMAT = 1


@dataclass(frozen=True)
class EvalResult:
    """Figures per set, per domain and overall (mean over domains), each with a 95 % bootstrap interval over rows."""

    sets: Figures
    domains: Figures
    overall: dict[str, Figure]
    domain_of: dict[str, str]
    """Set -> domain."""
    rows: dict[str, dict[str, RowScores]]
    """Set -> metric -> sums row by row, for paired differences."""
    fingerprints: dict[str, str]
    """Set -> sha256 of its tokens and labels."""
    seed: int = 42
    resamples: int = RESAMPLES
    answers: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Set -> the generated answers, where exact match was measured."""

    @classmethod
    def of(
        cls, rows: dict[str, dict[str, RowScores]], domain_of: dict[str, str], *, seed: int, resamples: int, **more: Any
    ) -> EvalResult:
        """The result from scores row by row."""
        summary = summarise(rows, domain_of, seed=seed, resamples=resamples)
        levels = (summary.sets, summary.domains, summary.overall)
        return cls(*levels, domain_of, rows, seed=seed, resamples=resamples, **more)

    def minus(self, other: EvalResult) -> Summary:
        """Paired differences `self - other` over the sets whose rows are the same."""
        same = {name for name, print_ in self.fingerprints.items() if other.fingerprints.get(name) == print_}
        mine = {name: metrics for name, metrics in self.rows.items() if name in same}
        return paired_differences(other.rows, mine, self.domain_of, seed=self.seed, resamples=self.resamples)

    def to_json(self) -> dict[str, Any]:
        """Plain data for a JSON file."""
        measured = {metric for metrics in self.rows.values() for metric in metrics}
        return {
            "format": FORMAT,
            "metrics": {
                metric: {
                    "title": words(metric, measured),
                    "larger_is_better": larger,
                    "unit": "nats" if metric in NATS else "share",
                }
                for metric, (_, larger) in METRICS.items()
                if metric in measured
            },
            "sets": _plain(self.sets),
            "domains": _plain(self.domains),
            "overall": _plain({"": self.overall})[""],
            "domain_of": self.domain_of,
            "rows": {name: {m: rows.as_dict() for m, rows in metrics.items()} for name, metrics in self.rows.items()},
            "fingerprints": self.fingerprints,
            "seed": self.seed,
            "resamples": self.resamples,
            "answers": {name: list(texts) for name, texts in self.answers.items()},
        }

    @classmethod
    def from_json(cls, raw: Mapping[str, Any] | str) -> EvalResult:
        """The result that `to_json` wrote; also takes its text.

        Raises:
            CheckpointError: not such data.
        """
        try:
            data = json.loads(raw) if isinstance(raw, str) else raw
            if data["format"] != FORMAT:
                raise ValueError(f"format {data['format']}")
            return cls(
                sets=_figures(data["sets"]),
                domains=_figures(data["domains"]),
                overall=_figures({"": data["overall"]})[""],
                domain_of=dict(data["domain_of"]),
                rows={name: {m: RowScores.of(r) for m, r in metrics.items()} for name, metrics in data["rows"].items()},
                fingerprints=dict(data["fingerprints"]),
                seed=int(data["seed"]),
                resamples=int(data["resamples"]),
                answers={name: tuple(texts) for name, texts in data["answers"].items()},
            )
        except (KeyError, TypeError, ValueError, AttributeError) as fault:
            raise CheckpointError(
                "eval result",
                f"{type(fault).__name__}: {fault}",
                f"data of format {FORMAT}",
                "Run the evaluation again.",
            ) from fault

    def table(self, title: str = "") -> Any:
        """A rich table of this result alone."""
        from sparsmith.evaluating.show import result_table

        return result_table({title or "value": self}, title=title)

    def text(self, title: str = "") -> str:
        """The same as plain text."""
        from sparsmith.evaluating.show import plain_text

        return plain_text(self.table(title))


def _plain(figures: Figures) -> dict[str, dict[str, dict[str, float | int]]]:
    return {name: {metric: figure.as_dict() for metric, figure in metrics.items()} for name, metrics in figures.items()}


def _figures(raw: Mapping[str, Any]) -> Figures:
    return {name: {metric: Figure(**figure) for metric, figure in metrics.items()} for name, metrics in raw.items()}
