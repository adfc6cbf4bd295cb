"""What a model reached on tasks: hits with their standard error beside the level of chance, and every item behind them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from sparsmith.bootstrap import RESAMPLES, RowScores, Summary, paired_differences
from sparsmith.evaluating.sheet import Sheet

FORMAT = 1


@dataclass(frozen=True)
class Item:
    """One scored row."""

    place: str
    """`file:line`"""
    hits: dict[str, float]
    """Metric -> 1.0 or 0.0."""
    scores: tuple[float, ...] = ()
    """Summed log-likelihood of every option, nats."""
    answer: str = ""
    """What was taken from the written text, where text was written."""


@dataclass(frozen=True)
class Share:
    """A share of hits."""

    value: float
    stderr: float | None
    """Standard error of the mean over the items, as the harness gives it; None of a single item."""
    n: int

    @classmethod
    def of(cls, hits: list[float]) -> Share:
        n, mean = len(hits), math.fsum(hits) / len(hits)
        spread = math.fsum((hit - mean) ** 2 for hit in hits)
        return cls(mean, math.sqrt(spread / (n - 1) / n) if n > 1 else None, n)

    def normalised(self, chance: float) -> float:
        """100 (x - chance) / (100 - chance) of percentages: 0 at chance, negative below it."""
        return 100 * (self.value - chance) / (1 - chance)


@dataclass(frozen=True)
class TaskScores:
    """One task."""

    name: str
    group: str
    """The task file; several tasks of one group are its subjects."""
    chance: float
    """The share that a fair draw among the options hits; of written text what the task file says, else 0."""
    shots: int
    items: tuple[Item, ...]
    cut: int = 0
    """Items whose prompt lost its head, because it did not fit into the model's context."""
    removed: int = 0
    """Rows kept out of the shots because they are scored."""
    fingerprint: str = ""

    @property
    def metrics(self) -> list[str]:
        return list(self.items[0].hits)

    def share(self, metric: str) -> Share:
        return Share.of([item.hits[metric] for item in self.items])


@dataclass(frozen=True)
class TaskResult:
    """Every task of one evaluation."""

    tasks: tuple[TaskScores, ...]
    version: str
    """Of lm_eval."""
    scorer: str
    seed: int
    limit: int | None
    seconds: float

    @property
    def groups(self) -> dict[str, TaskScores]:
        """Task file -> its tasks as one: all items weigh alike."""
        return {
            name: _pooled(name, [t for t in self.tasks if t.group == name])
            for name in dict.fromkeys(t.group for t in self.tasks)
        }

    def minus(self, other: TaskResult, *, resamples: int = RESAMPLES) -> Summary:
        """Paired differences `self - other`, with 95 % intervals, over the tasks whose rows and prompts are the same."""
        theirs = {task.name: task for task in other.tasks}
        same = [t for t in self.tasks if t.name in theirs and theirs[t.name].fingerprint == t.fingerprint]
        ours = {t.name: _rows(t) for t in same}
        groups = {t.name: t.group for t in same}
        first = {name: _rows(theirs[name]) for name in ours}
        return paired_differences(first, ours, groups, seed=self.seed, resamples=resamples)

    def to_json(self) -> dict[str, Any]:
        """Plain data: `groups` and `tasks` with their figures, the tasks with their items."""
        return {
            "format": FORMAT,
            "lm_eval": self.version,
            "scorer": self.scorer,
            "seed": self.seed,
            "limit": self.limit,
            "seconds": self.seconds,
            "groups": {name: _figures(scores) for name, scores in self.groups.items()},
            "tasks": {
                task.name: {
                    **_figures(task),
                    "group": task.group,
                    "fingerprint": task.fingerprint,
                    "items": [asdict(item) for item in task.items],
                }
                for task in self.tasks
            },
        }

    def sheet(self, *, subjects: bool = False) -> Sheet:
        """One row per task file and metric (with `subjects` per task of it)."""
        shown: Iterable[TaskScores] = self.tasks if subjects else self.groups.values()
        rows = [_line(scores, metric) for scores in shown for metric in scores.metrics]
        notes = [
            f"lm_eval {self.version}; options scored by {'our rank classifier' if self.scorer == 'rank' else 'the harness'}."
        ]
        cut, removed = sum(t.cut for t in self.tasks), sum(t.removed for t in self.tasks)
        notes += [f"{cut} prompts lost their head: the model's context is too short for them."] if cut else []
        notes += [f"{removed} rows were kept out of the shots: they are scored."] if removed else []
        short = sum(task.shots < self.groups[task.group].shots for task in self.tasks)
        notes += [f"{short} tasks have fewer shots for that."] if short else []
        heads = ("task", "metric", "items", "shots", "value", "stderr", "chance", "normalised")
        return Sheet("Tasks", heads, tuple(rows), " ".join(notes), left=2)

    def table(self) -> Any:
        """The sheet as a rich table."""
        return self.sheet().rich()


def _line(scores: TaskScores, metric: str) -> tuple[str, ...]:
    share = scores.share(metric)
    stderr = "-" if share.stderr is None else f"{100 * share.stderr:.2f}"
    figures = (
        f"{100 * share.value:.2f} %",
        stderr,
        f"{100 * scores.chance:.2f} %",
        f"{share.normalised(scores.chance):.2f}",
    )
    return (scores.name, metric, str(share.n), str(scores.shots), *figures)


def _figures(scores: TaskScores) -> dict[str, Any]:
    shares = {metric: scores.share(metric) for metric in scores.metrics}
    return {
        "metrics": {m: {**asdict(share), "normalised": share.normalised(scores.chance)} for m, share in shares.items()},
        "chance": scores.chance,
        "n": len(scores.items),
        "shots": scores.shots,
        "cut": scores.cut,
        "removed_from_shots": scores.removed,
    }


def _pooled(name: str, parts: list[TaskScores]) -> TaskScores:
    items = tuple(item for part in parts for item in part.items)
    chance = math.fsum(part.chance * len(part.items) for part in parts) / len(items)
    return TaskScores(
        name, name, chance, max(p.shots for p in parts), items, sum(p.cut for p in parts), sum(p.removed for p in parts)
    )


def _rows(task: TaskScores) -> dict[str, RowScores]:
    ones = (1.0,) * len(task.items)
    return {metric: RowScores(tuple(item.hits[metric] for item in task.items), ones) for metric in task.metrics}
