"""The plan of several stages, from configs alone: every stage is planned on the shape that the one before will leave.

Figures are exact, except behind a method whose widths are learned: it says so itself (`Method.settled_note`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sparsmith.crafting.plan import Plan, config_of, plan_recipe
from sparsmith.crafting.plan import plan as plan_one
from sparsmith.crafting.plan_text import number, plan_renderable, plan_text, size
from sparsmith.errors import MethodError
from sparsmith.methods import registry
from sparsmith.methods.base import MethodConfig
from sparsmith.recipe.schema import Recipe
from sparsmith.recipe.staged import StagedRecipe


@dataclass(frozen=True)
class StagePlan:
    """One stage."""

    name: str
    """`1-soft`: as its folder is called."""
    plan: Plan
    disk: int
    """Bytes that the stage leaves at most: checkpoints, the tuned model, and the settled one where another stage follows."""
    training_flops: int | None
    """Of all steps, every row full; None where the number of steps follows from the rows."""
    settled: Any
    """Config of the dense model that it leaves; None of the last."""
    exact: bool
    """Whether `settled` is exact, and not the expectation of a method."""


@dataclass(frozen=True)
class StagesPlan:
    """What every stage builds and costs, and all of them together. Print it, or read `as_dict()`."""

    stages: tuple[StagePlan, ...]

    def total(self) -> dict[str, Any]:
        """Of the whole: disk and training FLOPs are sums, memory is that of the largest stage."""
        plans, flops = [stage.plan for stage in self.stages], [stage.training_flops for stage in self.stages]
        memory = [plan.memory.as_dict()["total"] for plan in plans]
        return {
            "parameters": {
                "base": plans[0].base_params,
                "total": plans[-1].total_params,
                "active": plans[-1].active_params,
            },
            "trained": sum(plan.trained_params for plan in plans),
            "memory": {case: max(one[case] for one in memory) for case in memory[0]},
            "training_flops": None if None in flops else sum(flop or 0 for flop in flops),
            "disk": sum(stage.disk for stage in self.stages),
        }

    def as_dict(self) -> dict[str, Any]:
        stages = [
            {"name": s.name, **s.plan.as_dict(), "disk_at_most": s.disk, "training_flops": s.training_flops}
            for s in self.stages
        ]
        return {"stages": stages, "total": self.total()}

    def rows(self) -> list[list[str]]:
        """The table of the whole: a row per stage, and one of all."""
        found = [
            [
                stage.name,
                f"{stage.plan.base_params:,}",
                f"{stage.plan.total_params:,}",
                f"{stage.plan.trained_params:,}",
                size(stage.plan.memory.as_dict()["total"]["expected"]),
                _flops(stage.training_flops),
                size(stage.disk),
            ]
            for stage in self.stages
        ]
        total = self.total()
        counts = total["parameters"]
        return [
            *found,
            [
                "all stages",
                f"{counts['base']:,}",
                f"{counts['total']:,}",
                f"{total['trained']:,}",
                size(total["memory"]["expected"]),
                _flops(total["training_flops"]),
                size(total["disk"]),
            ],
        ]

    def __str__(self) -> str:
        rows = [_HEADS, *self.rows()]
        widths = [max(len(row[i]) for row in rows) for i in range(len(_HEADS))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
        parts = [f"Stage {stage.name}\n{plan_text(stage.plan.as_dict())}" for stage in self.stages]
        return "\n\n".join([*parts, "\n".join(["Total", *(f"  {line}" for line in lines)])])

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table(title="Total", title_justify="left")
        for index, head in enumerate(_HEADS):
            table.add_column(head, justify="right" if index else "left")
        for row in self.rows():
            table.add_row(*row)
        parts: list[Any] = []
        for stage in self.stages:
            parts += [Text(f"Stage {stage.name}", style="bold"), plan_renderable(stage.plan.as_dict())]
        return Group(*parts, table)


_HEADS = ["stage", "parameters before", "after", "trained", "memory, expected", "training FLOPs", "disk, at most"]


def plan(base: Any, config: MethodConfig | Sequence[MethodConfig] | None = None, **settings: Any) -> Any:
    """Plan a crafting, or all that a recipe says.

    Args:
        base: a loaded recipe alone; or a folder, hub id, config or model, beside a method's config or a list of them.
        settings: as `crafting.plan.plan` takes them; a recipe has its own.

    Returns:
        A `Plan`; of a recipe of several stages a `StagesPlan`.
    """
    if config is not None:
        return plan_one(base, config, **settings)
    if isinstance(base, Recipe | StagedRecipe) and not settings:
        return plan_stages(base) if isinstance(base, StagedRecipe) else plan_recipe(base)
    found = f"{', '.join(settings)} beside a recipe" if settings else f"{type(base).__name__} without a method's config"
    raise MethodError(
        "plan", found, "a loaded recipe alone, or a base and a config", "Write sparsmith.plan(base, config)."
    )


def plan_stages(recipe: StagedRecipe, base_dir: Path | None = None) -> StagesPlan:
    """Plan every stage.

    Raises:
        MethodError: a method in front of another stage does not settle into a stock dense model; or what a stage's own plan raises.
    """
    from sparsmith.crafting.base_model import resolve_base

    start = resolve_base(recipe.model.path, base_dir)
    _, base = config_of(start, recipe.model.task, recipe.model.num_labels)
    found: list[StagePlan] = []
    notes: list[str] = []
    for index, stage in enumerate(recipe.stages):
        own = recipe.recipe(index)
        label = f"the settled result of {found[-1].name}" if found else start
        plan = replace(plan_recipe(own, base=base), base=label)
        plan = replace(plan, notes=(*plan.notes, *notes, *_quantised_again(recipe, index)))
        last = index == len(recipe.stages) - 1
        settled = None if last else settled_config(stage.methods, base, f"stages.{index}")  # type: ignore[arg-type]
        name = f"{index + 1}-{stage.name}"
        found.append(
            StagePlan(
                name=name,
                plan=plan,
                disk=_disk(own, plan, last),
                training_flops=_training_flops(own, plan),
                settled=settled,
                exact=not _notes(stage.methods),  # type: ignore[arg-type]
            )
        )
        notes += [f"after {name}: {note}" for note in _notes(stage.methods)]  # type: ignore[arg-type]
        base = settled
    return StagesPlan(tuple(found))


def settled_config(configs: Sequence[MethodConfig], base_config: Any, where: str) -> Any:
    """The config of the dense model that settling leaves after all of the methods.

    Raises:
        MethodError: one of them leaves none; `where` names the stage.
    """
    for config in configs:
        try:
            base_config = registry.of(config).settled_config(config, base_config)
        except MethodError as fault:
            raise MethodError(f"{where}.{fault.where}", fault.found, fault.expected, fault.mend) from fault
    return base_config


def _notes(configs: Sequence[MethodConfig]) -> list[str]:
    return [note for config in configs if (note := registry.of(config).settled_note(config))]


def _quantised_again(recipe: StagedRecipe, index: int) -> tuple[str, ...]:
    if recipe.model.quant == "none" or index == 0:
        return ()
    return (f"the settled weights are quantised to {recipe.model.quant} anew, which changes them a little",)


def _disk(recipe: Recipe, plan: Plan, last: bool) -> int:
    """`keep` + 1 checkpoints lie there at once, then the tuned model, the same of a control that is tuned beside it, then the settled
    model."""
    places = recipe.train.keep + 1 if recipe.train.save_every else 1
    runs = 1 + sum(_tunes_control(config) for config in recipe.methods)
    tuned = runs * (places * plan.disk["trainer_checkpoint"] + plan.disk["delta"])
    return tuned + (0 if last else plan.disk["export"])


def _tunes_control(config: Any) -> bool:
    control = registry.of(config).control(config)
    return control is not None and control.config is not None and control.run is None


def _training_flops(recipe: Recipe, plan: Plan) -> int | None:
    if recipe.train.steps is None:
        return None
    return plan.flops.training * recipe.train.steps * recipe.train.batch_size * recipe.data.max_length


def _flops(count: int | None) -> str:
    return "-" if count is None else number(count)
