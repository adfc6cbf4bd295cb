"""The runs of the FLAN-MoE protocol: what each cell's recipe is, and the order in which cells stand on each other.

Setups (FLAN-MoE, arXiv 2305.14705): 1 the base tuned on one task; 2 the base tuned on the instruction mixture, then asked; 3 the result of
2 tuned on the task of 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sparsmith.errors import MethodError
from sparsmith.methods.upcycle.config import UpcycleConfig
from sparsmith.protocols.cells import Cell, read_cell
from sparsmith.protocols.flan_moe_suites import Ask, Figures, asked_once
from sparsmith.recipe.protocol import ProtocolSettings, Side, SingleTask
from sparsmith.recipe.schema import EvalSource, Recipe
from sparsmith.runs import RunFolder

Tune = Callable[[Recipe, str], Path]
Settle = Callable[[Recipe, RunFolder], Path]
START, DIRECT, INSTRUCT, THEN = "start", "direct", "instruct", "then"
_CONVERTING = ("experts", "top_k", "layers", "copy_noise", "router_init_std", "target")


@dataclass(frozen=True)
class SetupCell:
    """A finished run of one side and seed."""

    side: str
    setup: int
    """0 = continued pre-training."""
    task: str
    """Empty in setup 2 and before."""
    cell: Cell
    base: dict[str, Any]
    """What the model that the run started from measured on the same rows (an evaluation as JSON)."""
    kept_rate: float | None = None
    """The learning rate that the grid kept; None where there was none."""
    suites: dict[str, Figures] | None = None
    """Of setup 2, where the recipe names suites: `base` and `tuned`."""

    @property
    def seed(self) -> int:
        return self.cell.seed


@dataclass(frozen=True)
class Work:
    """How runs are made: by the caller, who knows how to tune and to settle."""

    recipe: Recipe
    settings: ProtocolSettings
    out: Path
    tune: Tune
    settle: Settle
    ask: Ask

    def side_config(self, side: Side) -> UpcycleConfig:
        """The method entry of a side, whole.

        Raises:
            MethodError: a key that the method does not have, or settings that contradict each other.
        """
        given = {name: getattr(self._entry, name) for name in self._entry.model_fields_set}
        dense = side.settings.get("control") == "dense"
        sparse = side.settings.get("donor") == "sparse"
        if dense:
            given = {"method": "upcycle"}
        if sparse:
            given = {name: value for name, value in given.items() if name not in _CONVERTING}
        try:
            return UpcycleConfig.model_validate(_plain(given) | side.settings)
        except ValueError as fault:
            raise MethodError(
                "protocol.sides", " ".join(str(fault).split())[:300], "settings of the method", "Mend the side."
            ) from fault

    @property
    def _entry(self) -> UpcycleConfig:
        entry = self.recipe.methods[0]
        assert isinstance(entry, UpcycleConfig)
        return entry

    def run_side(self, name: str, seed: int) -> list[SetupCell]:
        """Every cell of one side with one seed, in an order in which each finds what it stands on."""
        side, found = self.settings.sides[name], []
        base, config = side.path or self.recipe.model.path, self.side_config(side)
        if side.start is not None:
            recipe = self._recipe(base, config, f"{name}-seed{seed}-{START}", seed, (), steps=side.start.steps)
            data = recipe.data.model_copy(
                update={"train": side.start.train, "eval": self.recipe.data.eval, "loss_on": "all"}
            )
            rate = side.start.learning_rate or recipe.train.learning_rate
            recipe = recipe.model_copy(
                update={"data": data, "train": recipe.train.model_copy(update={"learning_rate": rate})}
            )
            cell = self._cell(recipe, name, 0, "", seed)
            found.append(cell)
            base, config = str(self.settle(recipe, RunFolder(cell.cell.run))), tuned_as_it_is(config)
        if 1 in self.settings.setups:
            found += [self._single(base, config, name, 1, task, seed) for task in self.settings.tasks]
        if {2, 3} & set(self.settings.setups):
            evals = (*self.recipe.data.eval, *(task.eval for task in self.settings.tasks))
            steps = self._steps(self.recipe.train.steps, name)
            recipe = self._recipe(base, config, f"{name}-seed{seed}-{INSTRUCT}", seed, _once(evals), steps=steps)
            cell = self._cell(recipe, name, 2, "", seed)
            found.append(self._asked(cell, base))
            if 3 in self.settings.setups:
                tuned = str(self.settle(recipe, RunFolder(cell.cell.run)))
                later = tuned_as_it_is(config)
                found += [self._single(tuned, later, name, 3, task, seed) for task in self.settings.tasks]
        return found

    def _single(
        self, base: str, config: UpcycleConfig, name: str, setup: int, task: SingleTask, seed: int
    ) -> SetupCell:
        """A cell of setup 1 or 3; of a grid of learning rates the one with the lowest validation loss, the first of equals."""
        kind = DIRECT if setup == 1 else THEN
        steps = self._steps(self.settings.task_steps or self.recipe.train.steps, name)
        grid = self.settings.task_learning_rates
        evals = (task.eval, task.validation) if grid and task.validation else (task.eval,)
        tried = []
        for rate in grid or (self.settings.task_learning_rate or self.recipe.train.learning_rate,):
            folder = f"{name}-seed{seed}-{kind}-{task.name}" + (f"-lr{rate:g}" if grid else "")
            recipe = self._recipe(base, config, folder, seed, evals, steps=steps, train=(task.train,))
            train = recipe.train.model_copy(update={"learning_rate": rate})
            cell = self._cell(recipe.model_copy(update={"train": train}), name, setup, task.name, seed)
            tried.append(replace(cell, kept_rate=rate) if grid else cell)
        return min(tried, key=lambda cell: validation_loss(cell, task)) if grid else tried[0]

    def _recipe(
        self,
        base: str,
        config: UpcycleConfig,
        folder: str,
        seed: int,
        evals: tuple[EvalSource, ...],
        *,
        steps: int | None,
        train: tuple[Any, ...] | None = None,
    ) -> Recipe:
        rows: dict[str, Any] = {"eval": evals}
        if train is not None:
            rows |= {"train": train, **({"mixture": None} if hasattr(self.recipe.data, "mixture") else {})}
        own = self.recipe.train.model_copy(update={"seed": seed, "steps": steps})
        model = self.recipe.model.model_copy(update={"path": base})
        return self.recipe.model_copy(
            update={
                "model": model,
                "methods": (config,),
                "data": self.recipe.data.model_copy(update=rows),
                "train": own,
                "output": str(self.out / folder),
                "protocol": None,
            }
        )

    def _cell(self, recipe: Recipe, side: str, setup: int, task: str, seed: int) -> SetupCell:
        folder = RunFolder(self.tune(recipe, Path(recipe.output).name))
        from sparsmith.durable import read_json

        return SetupCell(side, setup, task, read_cell(side, seed, folder), read_json(folder.evaluation)["base"])

    def _asked(self, cell: SetupCell, base: str) -> SetupCell:
        """The cell with the suites' figures of its result and of the model that it started from: a file per run and per base of a side."""
        suites = self.settings.suites
        if suites is None:
            return cell
        run, folder = cell.cell.run, self.out / "suites"
        given = f"{cell.side}-seed{cell.seed}" if self.settings.sides[cell.side].start else cell.side
        tuned = cell.cell.result.to_json()["sets"]
        figures = {
            "base": asked_once(folder / f"{given}-base.json", base, cell.base["sets"], suites, self.ask),
            "tuned": asked_once(folder / f"{run.name}.json", str(run), tuned, suites, self.ask),
        }
        return replace(cell, suites=figures)

    def _steps(self, steps: int | None, name: str) -> int | None:
        """With `match: flops` the steps whose training FLOPs are those of the dense side of the pair."""
        if self.settings.match == "tokens" or steps is None:
            return steps
        dense = next((pair[0] for pair in self.settings.pairs if pair[1] == name), None)
        if dense is None:
            return steps
        return max(1, round(steps * self.flops(dense) / self.flops(name)))

    def flops(self, name: str) -> int:
        """Training FLOPs per token of a side."""
        from sparsmith.crafting.base_model import resolve_base
        from sparsmith.crafting.plan import plan

        side = self.settings.sides[name]
        base = resolve_base(side.path or self.recipe.model.path)
        return plan(base, self.side_config(side), max_length=self.recipe.data.max_length).flops.training


def validation_loss(cell: SetupCell, task: SingleTask) -> float:
    """Of a cell of the grid; the recipe's check saw that the rows are there."""
    assert task.validation is not None
    return cell.cell.result.sets[task.validation.name]["loss"].value


def tuned_as_it_is(config: UpcycleConfig) -> UpcycleConfig:
    """The settings by which what a run has settled into is tuned further."""
    if not config.sparse or config.donor == "sparse":
        return config
    kept = {name: getattr(config, name) for name in config.model_fields_set if name not in (*_CONVERTING, "method")}
    return UpcycleConfig.model_validate({**_plain(kept), "donor": "sparse"})


def _plain(given: dict[str, Any]) -> dict[str, Any]:
    """Nested settings as what was set of them."""
    return {
        name: value.model_dump(exclude_unset=True) if hasattr(value, "model_dump") else value
        for name, value in given.items()
    }


def _once(evals: tuple[EvalSource, ...]) -> tuple[EvalSource, ...]:
    """Each set once, by its name."""
    return tuple({source.name: source for source in evals}.values())
