"""What does a smaller model lose, and do learned gates choose better than their rivals? FineGates at several sizes against flap_like,
magnitude, random and the dense LoRA, on the same rows, over several seeds.

Paper: FineGates (arXiv 2412.12951) tells accuracy over the share removed. Here every rival has the same cut, recovery, tokens and export as
the learned gates (spec 4.9); the dense LoRA is the size 1 to which losses refer; differences are paired by row within each seed.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsmith.bootstrap import Figure
from sparsmith.durable import write_json, write_text
from sparsmith.errors import MethodError, UsageError, nearest
from sparsmith.methods.finegates.config import FineGatesConfig
from sparsmith.protocols.cells import Cell, pooled_difference, read_cell, spread
from sparsmith.recipe.schema import Recipe
from sparsmith.reporting.folder import points_of
from sparsmith.runs import RunFolder

if TYPE_CHECKING:
    from rich.console import Group

Tune = Callable[[Recipe, str], Path]

LEARNED, DENSE = "finegates", "lora"
RIVALS = ("importance", "flap_like", "magnitude", "random")
"""`importance` is what learning starts from: it tells what learning adds."""
ARMS = (LEARNED, *RIVALS, DENSE)
METRICS = ("accuracy", "loss")
"""The first that a run has is what the plot shows."""


@dataclass(frozen=True)
class SizedCell:
    """A finished run at one target; 1 for the dense rival."""

    target: float
    remains: float
    """Share of the target's base that is really left."""
    cell: Cell

    @property
    def arm(self) -> str:
        return self.cell.arm


@dataclass(frozen=True)
class FineGatesComparison:
    """All cells of the protocol."""

    cells: tuple[SizedCell, ...]

    @cached_property
    def arms(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(cell.arm for cell in self.cells))

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(dict.fromkeys(cell.cell.seed for cell in self.cells))

    @property
    def targets(self) -> tuple[float, ...]:
        """Descending, without the dense 1."""
        return tuple(sorted({cell.target for cell in self.cells if cell.target < 1}, reverse=True))

    @property
    def learned(self) -> tuple[str, ...]:
        """The learned gates and their named variants."""
        return tuple(arm for arm in self.arms if arm not in (*RIVALS, DENSE))

    @property
    def metric(self) -> str:
        first = self.cells[0].cell.result.overall
        return next(name for name in METRICS if name in first)

    def at(self, arm: str, target: float) -> list[SizedCell]:
        return [cell for cell in self.cells if cell.arm == arm and (cell.target == target or arm == DENSE)]

    def difference(self, arm: str, rival: str, target: float, metric: str = "loss") -> Figure | None:
        """`arm` minus `rival` at one size, paired within each seed; for the loss below 0 = `arm` is better."""
        theirs = {cell.cell.seed: cell.cell.result for cell in self.at(rival, target)}
        ours = [(cell.cell.seed, cell.cell.result) for cell in self.at(arm, target)]
        return pooled_difference(
            ((seed, theirs[seed], result) for seed, result in ours if seed in theirs), metric=metric
        )

    def by_seed(self, arm: str, rival: str, target: float, metric: str = "loss") -> list[float]:
        """The same difference seed by seed."""
        theirs = {cell.cell.seed: cell.cell.result.overall[metric].value for cell in self.at(rival, target)}
        ours = [(cell.cell.seed, cell.cell.result.overall[metric].value) for cell in self.at(arm, target)]
        return [value - theirs[seed] for seed, value in ours if seed in theirs]

    def table(self) -> list[dict[str, Any]]:
        """One record per arm and size."""
        found = []
        for arm in self.arms:
            for target in (1.0,) if arm == DENSE else self.targets:
                cells = self.at(arm, target)
                if cells:
                    found.append(self._record(arm, target, cells))
        return found

    def _record(self, arm: str, target: float, cells: list[SizedCell]) -> dict[str, Any]:
        overall = [cell.cell.result.overall for cell in cells]
        losses = [one["loss"].value for one in overall]
        metrics = {name: [one[name].value for one in overall] for name in overall[0] if name != "loss"}
        return {
            "arm": arm,
            "target": target,
            "remains": statistics.fmean(cell.remains for cell in cells),
            "loss": statistics.fmean(losses),
            "sd": spread(losses),
            "losses": losses,
            "metrics": {
                name: {"value": statistics.fmean(values), "sd": spread(values), "values": values}
                for name, values in metrics.items()
            },
            "domains": {
                domain: statistics.fmean(cell.cell.result.domains[domain]["loss"].value for cell in cells)
                for domain in cells[0].cell.result.domains
            },
            "tokens": cells[0].cell.facts["tokens_trained"],
            "seconds": cells[0].cell.facts["train_seconds"],
            "trained": cells[0].cell.plan["parameters"]["trained_total"],
        }

    def gaps(self) -> list[dict[str, Any]]:
        """Every learned arm against every rival and the dense LoRA, at every size."""
        found = []
        for arm in self.learned:
            for rival in (*(name for name in (*RIVALS, DENSE) if name in self.arms),):
                for target in self.targets:
                    for metric in dict.fromkeys(("loss", self.metric)):
                        gap = self.difference(arm, rival, target, metric)
                        if gap is not None:
                            each = self.by_seed(arm, rival, target, metric)
                            found.append(
                                {
                                    "arm": arm,
                                    "rival": rival,
                                    "target": target,
                                    "metric": metric,
                                    "difference": gap.as_dict(),
                                    "by_seed": each,
                                }
                            )
        return found

    def as_dict(self) -> dict[str, Any]:
        first = self.cells[0].cell
        return {
            "protocol": "finegates",
            "machine": first.facts["machine"],
            "versions": first.facts["versions"],
            "seeds": list(self.seeds),
            "targets": list(self.targets),
            "table": self.table(),
            "gaps": self.gaps(),
            "runs": [cell.cell.run.name for cell in self.cells],
        }

    def markdown(self) -> str:
        """Every table as Markdown."""
        from sparsmith.protocols.finegates_sheets import sheets

        return "\n".join(sheet.markdown() for sheet in sheets(self))

    def __rich__(self) -> Group:
        from rich.console import Group

        from sparsmith.protocols.finegates_sheets import sheets

        return Group(*(part for sheet in sheets(self) for part in (sheet.rich(), "")))


@dataclass(frozen=True)
class Choices:
    """What of the protocol is not in the recipe."""

    targets: tuple[float, ...] = (0.9, 0.8, 0.7, 0.6, 0.5)
    arms: tuple[str, ...] = ARMS
    seeds: tuple[int, ...] = (0, 1, 2)

    def check(self) -> None:
        """Raises: UsageError: an unknown arm, no seed, a size that is none."""
        for name in self.arms:
            if name not in ARMS:
                raise UsageError("--arms", f"`{name}`", "an arm of the protocol", nearest(name, ARMS))
        if not self.seeds:
            raise UsageError("--seeds", "no seed", "at least one", "Write --seeds 0,1,2.")
        for target in self.targets:
            if not 0 < target < 1:
                raise UsageError("--targets", f"`{target:g}`", "shares between 0 and 1", "Write --targets 0.8,0.6.")
        if not self.targets:
            raise UsageError("--targets", "no size", "at least one", "Write --targets 0.8,0.6.")


def config_of(recipe: Recipe) -> FineGatesConfig:
    """The recipe's one method.

    Raises:
        MethodError: another method or several; a baseline instead of the learned gates; no rows to compare on.
    """
    configs = recipe.methods
    if len(configs) != 1 or not isinstance(configs[0], FineGatesConfig):
        names = ", ".join(str(getattr(config, "method", "")) for config in configs)
        raise MethodError("methods", names, "finegates alone", "Give a recipe with one `finegates` entry.")
    config = configs[0]
    if config.baseline is not None:
        raise MethodError("finegates.baseline", f"`{config.baseline}`", "none", "The protocol makes the rivals itself.")
    if not any("loss" in source.metrics for source in recipe.data.eval):
        raise MethodError("data.eval", "no set with the metric loss", "at least one", "Name one under `data.eval`.")
    return config


def rival_of(config: FineGatesConfig, name: Any) -> FineGatesConfig:
    """The same cut, recovery and LoRA with a rival's choice; settings that only learning reads are left at their defaults."""
    if name == DENSE:
        if config.lora is None:
            raise MethodError("finegates.lora", "none", "a LoRA, for the dense rival", "Leave `lora` out of --arms.")
        return FineGatesConfig(baseline="lora", lora=config.lora, head_lr=config.head_lr)
    if config.gates.blocks or config.gates.attention == "kv_groups+q_heads":
        raise MethodError(
            "finegates.gates",
            "sub-blocks or query heads, which no rival scores",
            "gates that all arms can choose by (ffn, kv_groups)",
            "Leave `blocks` and `q_heads` out, or compare learned arms alone: --arms finegates,lora.",
        )
    hold, known = config.schedule.hold, type(config.schedule).model_fields
    kept: dict[str, Any] = {
        "target": config.target,
        "target_of": config.target_of,
        "target_unit": config.target_unit,
        "flops_context": config.flops_context,
        "schedule": {"hold": hold, **{key: max(hold, known[key].default) for key in ("warmup", "settle_at")}},
        "lora": config.lora,
        "head_lr": config.head_lr,
        "settle": config.settle.model_copy(update={"survivors": "reopen"}),
        "gates": {"ffn": config.gates.ffn, "attention": config.gates.attention},
    }
    if config.settle.train_scales:
        kept["gates"]["lr"] = config.gates.lr
    return FineGatesConfig(baseline=name, **kept)


def compare(
    recipe: Recipe,
    named: Mapping[str, Recipe],
    choices: Choices,
    out: Path,
    tune: Tune,
) -> FineGatesComparison:
    """Tune every arm at every size with every seed, write the comparison.

    Args:
        recipe: holds one `finegates` entry: the arm `finegates`.
        named: further learned arms: name -> the recipe with other settings.
        out: folder of the cells and of the comparison.
        tune: runs a recipe to its end and returns the run's folder; returns that of a finished run at once.

    Raises:
        UsageError: unknown arm, size or seed, a name that is taken. MethodError: the recipe is not for FineGates.
    """
    choices.check()
    configs = {name: config_of(one) for name, one in ({LEARNED: recipe} | dict(named)).items()}
    for name in named:
        if name in ARMS or not name.isidentifier():
            raise UsageError("--arm", f"`{name}`", "a word that is no arm yet", "Choose another name.")
    learned = [name for name in (LEARNED,) if name in choices.arms] + list(named)
    cells: list[SizedCell] = []
    for seed in choices.seeds:
        if DENSE in choices.arms:
            cells.append(_run(recipe, rival_of(configs[LEARNED], DENSE), DENSE, 1.0, seed, out, tune))
        for target in choices.targets:
            for name in learned:
                config = configs[name].model_copy(update={"target": target})
                cells.append(_run(named.get(name, recipe), config, name, target, seed, out, tune))
            for name in (rival for rival in RIVALS if rival in choices.arms):
                sized = configs[LEARNED].model_copy(update={"target": target})
                cells.append(_run(recipe, rival_of(sized, name), name, target, seed, out, tune))
            write(FineGatesComparison(tuple(cells)), out)  # what is there, should the rest be cut short
    comparison = FineGatesComparison(tuple(cells))
    write(comparison, out)
    return comparison


def _run(
    recipe: Recipe, config: FineGatesConfig, arm: str, target: float, seed: int, out: Path, tune: Tune
) -> SizedCell:
    name = f"{arm}-seed{seed}" if arm == DENSE else f"{arm}-{target:g}-seed{seed}"
    one = recipe.model_copy(
        update={
            "methods": (config,),
            "train": recipe.train.model_copy(update={"seed": seed}),
            "output": str(out / name),
        }
    )
    folder = RunFolder(tune(one, name))
    return SizedCell(target, 1.0 if arm == DENSE else remains_of(folder), read_cell(arm, seed, folder))


def remains_of(folder: RunFolder) -> float:
    """The share that a finished run has kept, as its last log line tells."""
    lines = [line for line in points_of(folder.metrics) if "finegates/remains" in line.get("health", {})]
    return float(lines[-1]["health"]["finegates/remains"])


def write(comparison: FineGatesComparison, out: Path) -> None:
    """`comparison.json`, `comparison.md` and `comparison.svg`."""
    from sparsmith.protocols.finegates_figure import quality_by_size
    from sparsmith.reporting.plots import svg_file

    write_json(out / "comparison.json", comparison.as_dict())
    write_text(out / "comparison.md", comparison.markdown())
    write_text(out / "comparison.svg", svg_file(quality_by_size(comparison)))
