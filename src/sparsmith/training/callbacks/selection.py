"""The best of several points of a run is kept, chosen on rows that were cut from the training sources.

Every so many steps, and after the last, the selection rows are measured; where the accuracy is higher than ever, or as high with a lower
loss, the trained tensors are written to the run's folder. At the end the best ones are put back. All is on disk: a run that was cut takes
up the choice where its checkpoint left it, and points that lie after that checkpoint are measured again.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback

from sparsmith import durable, ranks
from sparsmith.crafting.checkpoint import save
from sparsmith.crafting.delta import fill_delta
from sparsmith.crafting.record import record_of
from sparsmith.errors import CheckpointError, EnvironmentFault, Interrupted
from sparsmith.training.saves import listed, step_of

RECORD = "points.json"
Point = dict[str, Any]
"""`step`, `accuracy`, `loss`."""


class Selection(TrainerCallback):
    """Measures, remembers and restores.

    Args:
        model: the crafted model.
        measure: gives `accuracy` and `loss` of the selection rows; every rank calls it.
        every: steps between two measurements.
        folder: of the run, for the record and the best tensors.
        checkpoints: where the run's checkpoints lie: tensors that a resume from one of them may need are not removed.

    Raises:
        EnvironmentFault: a sharded model.
    """

    def __init__(
        self, model: nn.Module, measure: Callable[[], dict[str, float]], every: int, folder: Path, checkpoints: Path
    ) -> None:
        if ranks.sharded():
            raise EnvironmentFault(
                "train.select", "a model cut over several ranks", "one in one piece", "Use DDP, or leave `select` out."
            )
        self._model, self._measure, self._every = model, measure, every
        self._folder, self._checkpoints = folder, checkpoints
        self.points: list[Point] = []
        """Every measurement so far, in order."""

    @property
    def best(self) -> Point | None:
        """The first point that no other beats."""
        return max(self.points, key=_goodness, default=None)

    def take_up(self, step: int) -> None:
        """Read what an earlier process has measured up to `step`, from which the run goes on; later points are forgotten."""
        record = self._folder / RECORD
        known = durable.read_json(record) if record.is_file() else []
        self.points = [point for point in known if point["step"] <= step]
        best = self.best
        if best is not None and not self._place(best).is_dir():
            raise CheckpointError(
                str(self._place(best)), "nothing", f"the tensors of step {best['step']}", "Start the run anew."
            )
        ranks.wait()
        if ranks.is_first():
            self._write()
            self._remove({int(point["step"]) for point in self.points})

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A run that was stopped in the middle of this step's measurement makes up for it."""
        if state.global_step and all(point["step"] != state.global_step for point in self.points):
            self.on_step_end(args, state, control)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step = state.global_step
        if (step % self._every and step < state.max_steps) or step < self._final_from(state.max_steps):
            return
        with suppress(Interrupted):  # the stop callback hears of it right after
            self._add({"step": step, **self._measure()})

    def _final_from(self, total_steps: int) -> int:
        parts = record_of(self._model).parts
        return max((method.final_from(config, total_steps) for method, config in parts), default=0)

    def restore(self) -> Point | None:
        """Put the best tensors into the model; returns their point."""
        ranks.wait()
        best = self.best
        if best is not None:
            fill_delta(self._model, self._place(best))  # type: ignore[arg-type]
        return best

    def _add(self, point: Point) -> None:
        self.points.append(point)
        if self.best is point:
            save(self._model, self._place(point), replace=True)  # type: ignore[arg-type]
        if ranks.is_first():
            self._write()
            self._remove(self._needed())

    def _write(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        durable.write_json(self._folder / RECORD, self.points)

    def _needed(self) -> set[int]:
        """Steps whose tensors are the best now, or will be after a resume from some checkpoint that lies there."""
        resumes = [step_of(path) for path in listed(self._checkpoints)]
        until = [
            [point for point in self.points if point["step"] <= step] for step in (*resumes, self.points[-1]["step"])
        ]
        return {max(points, key=_goodness)["step"] for points in until if points}

    def _remove(self, kept: set[int]) -> None:
        for path in self._folder.glob("step-*"):
            if int(path.name.removeprefix("step-")) not in kept:
                shutil.rmtree(path, ignore_errors=True)

    def _place(self, point: Point) -> Path:
        return self._folder / f"step-{point['step']}"


def _goodness(point: Point) -> tuple[float, float]:
    return point["accuracy"], -point["loss"]
