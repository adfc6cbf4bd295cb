"""What a protocol needs beside one run's settings: the sides that are compared, and the single tasks that they are tuned on.

Read by `sparsmith protocol flan-moe` alone; the other verbs take the recipe as that of one run.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import Field

from sparsmith.errors import nearest
from sparsmith.recipe.sources import EvalSource, Name, PositiveInt, Text, TrainSource
from sparsmith.recipe.strict import Clash, StrictModel

Rate = Annotated[float, Field(gt=0)]


class Continued(StrictModel):
    """Training on plain text before everything else, with the same losses."""

    train: Annotated[tuple[TrainSource, ...], Field(min_length=1)]
    steps: PositiveInt
    """The budget: steps x `train.batch_size` rows of `data.max_length` tokens."""
    learning_rate: Rate | None = None
    """Absent = the recipe's."""


class Side(StrictModel):
    """One kind of model that goes through the setups."""

    path: Text | None = None
    """Its base; absent = the recipe's `model.path`."""
    settings: dict[str, Any] = {}
    """What differs from the recipe's one method entry."""
    start: Continued | None = None
    """Continued pre-training; absent = none."""


class SingleTask(StrictModel):
    """A task that setups 1 and 3 tune on, and are measured on."""

    name: Name
    train: TrainSource
    eval: EvalSource
    validation: EvalSource | None = None
    """Rows by which one of `task_learning_rates` is kept: neither trained on nor reported."""
    chance: Annotated[float, Field(ge=0, lt=100)] | None = None
    """Accuracy of guessing, in percent, for normalised scores of rank classification; absent = none are given."""

    def clashes(self) -> Iterable[Clash]:
        if "rank" not in self.eval.metrics:
            yield from self.without_effect(["chance"], "rank among eval.metrics")
        if self.validation and "loss" not in self.validation.metrics:
            found = ", ".join(self.validation.metrics)
            yield Clash("validation.metrics", found, "loss among them: the lowest is kept", "Add loss.")


class Suites(StrictModel):
    """Tasks of lm-evaluation-harness for what setup 2 starts from and ends with: benchmarks as others quote them, from files on disk."""

    tasks: Annotated[tuple[Text, ...], Field(min_length=1)]
    """Names of tasks that ship with sparsmith, task files, or folders of such; paths are relative to the recipe's folder."""
    data: Text | None = None
    """The folder of the tasks' rows; may be absent where they lie beside the task files."""
    limit: PositiveInt | None = None
    """At most this many rows of each task file, the same for every side."""
    shots: Annotated[int, Field(ge=0)] | None = None
    """Examples before each question; absent = each task's own number."""
    scorer: Literal["harness", "rank"] = "harness"
    """Who scores options: the harness, or our faster rank classifier."""


class ProtocolSettings(StrictModel):
    """The three setups: tuned on a task; tuned on the mixture and asked; tuned on the mixture, then on a task."""

    setups: tuple[Literal[1, 2, 3], ...] = (1, 2, 3)
    sides: dict[Name, Side] = {"dense": Side(settings={"control": "dense"}), "moe": Side()}
    pairs: tuple[tuple[str, str], ...] = (("dense", "moe"),)
    """(dense, sparse) sides that are held against each other."""
    tasks: tuple[SingleTask, ...] = ()
    task_steps: PositiveInt | None = None
    """Steps of setups 1 and 3; absent = the recipe's `train.steps`."""
    task_learning_rate: Rate | None = None
    """Absent = the recipe's."""
    task_learning_rates: tuple[Rate, ...] = ()
    """A grid in its place: setups 1 and 3 try each, the same for every side, and keep the one with the lowest loss on the task's
    `validation` rows. Multiplies their runs."""
    match: Literal["tokens", "flops"] = "tokens"
    """`tokens`: both sides of a pair see the same stream; `flops`: the dearer side takes fewer steps of it, so that the training FLOPs
    are the dense side's."""
    suites: Suites | None = None
    """Absent = the recipe's own held-out sets alone."""

    def clashes(self) -> Iterable[Clash]:
        if not self.setups or len(set(self.setups)) != len(self.setups):
            yield Clash("setups", f"`{list(self.setups)}`", "some of 1, 2, 3, each once", "Write `setups: [1, 2, 3]`.")
        for pair in self.pairs:
            for side in pair:
                if side not in self.sides:
                    yield Clash("pairs", f"`{side}`", "the name of a side", nearest(side, tuple(self.sides)))
        needing = [setup for setup in self.setups if setup != 2]
        if needing and not self.tasks:
            found = f"none, with setup {needing[0]}"
            yield Clash("tasks", found, "tasks to tune on", "Add `tasks`, or write `setups: [2]`.")
        if not needing:
            unread = ["tasks", "task_steps", "task_learning_rate", "task_learning_rates"]
            yield from self.without_effect(unread, "setup 1 or 3")
        if 2 not in self.setups:
            yield from self.without_effect(["suites"], "setup 2")
        yield from self._grid_clashes()
        names = [task.name for task in self.tasks]
        for name in dict.fromkeys(name for name in names if names.count(name) > 1):
            yield Clash("tasks", f"`{name}` twice", "a name for each task", "Rename one of them.")

    def _grid_clashes(self) -> Iterable[Clash]:
        rates = self.task_learning_rates
        if rates and len(set(rates)) < max(2, len(rates)):
            yield Clash(
                "task_learning_rates", f"`{list(rates)}`", "two or more, each once", "Or set task_learning_rate."
            )
        if rates and self.task_learning_rate is not None:
            yield Clash("task_learning_rate", "a rate beside the grid", "one of the two", "Remove one of them.")
        for task in self.tasks:
            if rates and task.validation is None:
                expected = "rows to choose among task_learning_rates by"
                yield Clash(f"tasks.{task.name}.validation", "nothing", expected, "Add `validation`, or one rate.")
            if not rates and task.validation is not None:
                found, unless = "rows that nothing reads", "task_learning_rates"
                yield Clash(f"tasks.{task.name}.validation", found, unless, "Remove it, or give the grid.")
