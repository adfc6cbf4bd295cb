"""Scores that chance does not flatter: 0 = guessing, 100 = perfect, and below 0 worse than guessing.

Paper: Chung et al. (arXiv 2210.11416) §2.3 average six such scores; FLAN-MoE (arXiv 2305.14705) averages suites, how is not verified. The
two are different numbers, and are never put into one column here.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

from sparsmith.errors import UsageError
from sparsmith.evaluating.sheet import Sheet

FOUR = ("MMLU", "BBH", "reasoning", "QA")
"""Suites of the headline."""
SIX = ("MMLU direct", "MMLU CoT", "BBH direct", "BBH CoT", "TyDiQA", "MGSM")
"""Scores of Chung et al.'s average."""


@dataclass(frozen=True)
class TaskScore:
    """A task's score and what guessing would get, both in percent."""

    score: float
    chance: float = 0.0
    """100 / number of options; 0 where the answer is written freely."""

    @property
    def normalised(self) -> float:
        return normalised(self.score, self.chance)


def normalised(score: float, chance: float = 0.0, where: str = "score") -> float:
    """100 (score - chance) / (100 - chance), in (-inf, 100].

    Args:
        score: in percent, [0, 100].
        chance: of guessing, in percent, [0, 100).

    Raises:
        UsageError: a value outside of its range, or not finite.
    """
    if not (math.isfinite(score) and 0 <= score <= 100):
        raise UsageError(where, f"a score of {score}", "percent, from 0 to 100", "Give the score in percent.")
    if not (math.isfinite(chance) and 0 <= chance < 100):
        raise UsageError(
            where, f"a chance of {chance}", "percent, from 0 to less than 100", "Give 100 / the number of options."
        )
    return 100 * (score - chance) / (100 - chance)


def suite_score(tasks: Mapping[str, TaskScore], where: str = "suite") -> float:
    """Unweighted mean of the normalised scores of a suite's tasks: a task with many rows counts as one with few.

    Raises:
        UsageError: no task, or a value outside of its range.
    """
    if not tasks:
        raise UsageError(where, "no task", "at least one", "Measure a task of the suite.")
    return statistics.fmean(normalised(task.score, task.chance, f"{where}: {name}") for name, task in tasks.items())


@dataclass(frozen=True)
class Headline:
    """The averages of one model."""

    scores: dict[str, float]
    """Suite (or score of Chung et al.) -> normalised score."""

    @property
    def four(self) -> float | None:
        """Mean of the four suites; None unless all were measured."""
        return _mean_of(self.scores, FOUR)

    @property
    def six(self) -> float | None:
        """Mean of the six scores of Chung et al.; None unless all were measured."""
        return _mean_of(self.scores, SIX)

    def as_dict(self) -> dict[str, object]:
        return {"scores": self.scores, "four_suites": self.four, "six_scores": self.six}


def headline(suites: Mapping[str, Mapping[str, TaskScore]]) -> Headline:
    """The averages of a model from its tasks, suite by suite.

    Args:
        suites: a name of `FOUR` or `SIX` -> its tasks. `MMLU` of the four is the form that the protocol calls so; it does not stand for
            `MMLU direct`, nor the other way about.

    Raises:
        UsageError: another name, an empty suite, or a value outside of its range.
    """
    for name in suites:
        if name not in (*FOUR, *SIX):
            raise UsageError("suites", f"`{name}`", "one of " + ", ".join((*FOUR, *SIX)), "Rename it, or leave it out.")
    return Headline({name: suite_score(tasks, name) for name, tasks in suites.items()})


def _mean_of(scores: Mapping[str, float], names: tuple[str, ...]) -> float | None:
    return statistics.fmean(scores[name] for name in names) if all(name in scores for name in names) else None


def headline_sheet(models: Mapping[str, Headline]) -> Sheet:
    """A row per model, a column per score, and the two averages in columns of their own."""
    names = [name for name in (*FOUR, *SIX) if any(name in model.scores for model in models.values())]
    rows = tuple(
        (model, *(_shown(one.scores.get(name)) for name in names), _shown(one.four), _shown(one.six))
        for model, one in models.items()
    )
    caption = "100 (score - chance) / (100 - chance); suites are unweighted means of their tasks; - = not all of its parts were measured"
    return Sheet("Normalised scores", ("model", *names, "mean of four suites", "mean of six scores"), rows, caption)


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
