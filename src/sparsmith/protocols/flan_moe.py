"""Does a mixture of experts gain more from instruction tuning than its dense twin? FLAN-MoE's three setups on your own checkpoint.

Paper: FLAN-MoE (arXiv 2305.14705) compares models that were pre-trained sparse with FLOP-matched dense ones: below them when tuned on a
task directly, above when instruction-tuned first. Here sides are named in the recipe (`protocol:`): the base tuned dense, its upcycled
mixture (an extension of ours), models that were pre-trained sparse. The question is answered as a difference of differences, paired by row
within each seed.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsmith.bootstrap import Figure, contrast
from sparsmith.durable import write_json, write_text
from sparsmith.errors import MethodError, UsageError
from sparsmith.evaluating import EvalResult
from sparsmith.methods.upcycle.config import UpcycleConfig
from sparsmith.protocols import flan_moe_suites as suites
from sparsmith.protocols.cells import over_seeds, spread
from sparsmith.protocols.flan_moe_cells import Settle, SetupCell, Tune, Work
from sparsmith.protocols.flan_moe_suites import Ask
from sparsmith.recipe.protocol import ProtocolSettings
from sparsmith.recipe.schema import Recipe

if TYPE_CHECKING:
    from rich.console import Group

METRICS = ("loss", "rank", "rank_margin", "exact_match")
SETUPS = {1: "tuned on the task", 2: "instruction-tuned, then asked", 3: "instruction-tuned, then on the task"}


@dataclass(frozen=True)
class FlanMoeComparison:
    """All cells of the protocol."""

    settings: ProtocolSettings
    cells: tuple[SetupCell, ...]
    flops: dict[str, int]
    """Side -> training FLOPs per token."""
    heldout: tuple[str, ...]
    """Names of the evaluation sets that no task is tuned on."""

    @cached_property
    def sides(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(cell.side for cell in self.cells))

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(dict.fromkeys(cell.seed for cell in self.cells))

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(task.name for task in self.settings.tasks)

    @property
    def eval_of(self) -> dict[str, str]:
        """Task -> its evaluation set."""
        return {task.name: task.eval.name for task in self.settings.tasks}

    def at(self, side: str, setup: int, task: str = "") -> list[SetupCell]:
        return [cell for cell in self.cells if (cell.side, cell.setup, cell.task) == (side, setup, task)]

    def value(self, side: str, setup: int, name: str, metric: str = "loss") -> tuple[float, float | None] | None:
        """Mean over seeds and their spread of a metric on a task's rows, or on a held-out set's (setups 0 and 2); setup -1 is the base."""
        values = [one.sets[name][metric].value for one in self._results(side, setup, name) if metric in one.sets[name]]
        return (statistics.fmean(values), spread(values)) if values else None

    def _results(self, side: str, setup: int, name: str) -> list[EvalResult]:
        task = next((task for task, held in self.eval_of.items() if held == name), "")
        if setup == -1:
            cells = self.at(side, 2) or self.at(side, 1, task)
            return [EvalResult.from_json(cell.base) for cell in cells]
        cells = self.at(side, setup, task if setup in (1, 3) else "")
        return [cell.cell.result for cell in cells]

    def rows(self, side: str, setup: int, names: Sequence[str]) -> dict[str, Any]:
        """`seed:set` -> metric -> rows, of the sets in `names`; setup -1 is the base."""
        found: dict[str, Any] = {}
        for name in names:
            task = next((task for task, held in self.eval_of.items() if held == name), "")
            cells = self.at(side, setup, task) if setup in (1, 3) else self.at(side, max(setup, 2))
            for cell in cells:
                result = EvalResult.from_json(cell.base) if setup == -1 else cell.cell.result
                if name in result.rows:
                    found[f"{cell.seed}:{name}"] = {m: r for m, r in result.rows[name].items() if m in METRICS}
        return found

    def contrast_of(
        self, parts: Sequence[tuple[int, str, int]], names: Sequence[str], metric: str
    ) -> dict[str, Any] | None:
        """The signed sum over (sign, side, setup), rows paired within each seed; the mean over the sets. `by_seed`: of each seed alone, as
        the interval is over rows; `over_seeds`: half of an interval over the seeds."""
        return self._contrast([(sign, self.rows(side, setup, names)) for sign, side, setup in parts], metric)

    def _contrast(self, scores: Sequence[tuple[int, dict[str, Any]]], metric: str) -> dict[str, Any] | None:
        shared = sorted(set.intersection(*(set(rows) for _, rows in scores))) if scores else []

        def figure(keys: Sequence[str]) -> Figure | None:
            kept = [(sign, {key: rows[key] for key in keys}) for sign, rows in scores]
            domain_of = {key: key.split(":", 1)[1] for key in keys}
            return contrast(kept, domain_of, seed=0).overall.get(metric)

        found = figure(shared) if shared else None
        if found is None:
            return None
        of_seed = {seed: [key for key in shared if key.split(":", 1)[0] == str(seed)] for seed in self.seeds}
        each = {str(seed): one.value for seed, keys in of_seed.items() if keys and (one := figure(keys))}
        return {**found.as_dict(), "by_seed": each, "over_seeds": over_seeds(list(each.values()))}

    def gains(self) -> list[dict[str, Any]]:
        """Of every pair: sparse minus dense in each setup, and whether instruction tuning brings the sparse side more."""
        found, tasks = [], tuple(self.eval_of.values())
        for dense, sparse in self.settings.pairs:
            for metric in METRICS:
                rows: dict[str, dict[str, Any] | None] = {}
                for setup in self.settings.setups:
                    names = self.heldout if setup == 2 else tasks
                    rows[f"setup {setup}"] = self.contrast_of([(1, sparse, setup), (-1, dense, setup)], names, metric)
                more_3 = [(1, sparse, 3), (-1, sparse, 1), (-1, dense, 3), (1, dense, 1)]
                more_2 = [(1, sparse, 2), (-1, sparse, -1), (-1, dense, 2), (1, dense, -1)]
                rows["gain: 3 over 1"] = self.contrast_of(more_3, tasks, metric)
                rows["gain: 2 over the base"] = self.contrast_of(more_2, self.heldout, metric)
                told = {name: figure for name, figure in rows.items() if figure is not None}
                if told:
                    found.append({"dense": dense, "sparse": sparse, "metric": metric, "figures": told})
        return found

    @property
    def asked(self) -> list[SetupCell]:
        """The cells that answered the suites."""
        return [cell for cell in self.cells if cell.suites is not None]

    def suite_gains(self) -> list[dict[str, Any]]:
        """`gains` of setup 2 in the tasks of the harness; shares of hits, the mean over the tasks."""

        def of(side: str, setup: int) -> dict[str, Any]:
            return suites.rows((cell for cell in self.asked if cell.side == side), setup)

        found = []
        for dense, sparse in self.settings.pairs:
            after, before = [(1, of(sparse, 2)), (-1, of(dense, 2))], [(-1, of(sparse, -1)), (1, of(dense, -1))]
            metrics = dict.fromkeys(m for scores in after[0][1].values() for m in scores)
            for metric in metrics:
                figures = {
                    "setup 2": self._contrast(after, metric),
                    "gain: 2 over the base": self._contrast([*after, *before], metric),
                }
                told = {name: figure for name, figure in figures.items() if figure is not None}
                if told:
                    found.append({"dense": dense, "sparse": sparse, "metric": metric, "figures": told})
        return found

    def table(self) -> list[dict[str, Any]]:
        """One record per side, setup and evaluation set."""
        from sparsmith.evaluating.normalised import normalised

        found = []
        chances = {task.eval.name: task.chance for task in self.settings.tasks}
        for side in self.sides:
            for setup in (-1, *self.settings.setups):
                names = (*self.heldout, *self.eval_of.values()) if setup in (-1, 2) else tuple(self.eval_of.values())
                for name in names:
                    metrics = {metric: self.value(side, setup, name, metric) for metric in METRICS}
                    told = {metric: {"value": v[0], "sd": v[1]} for metric, v in metrics.items() if v is not None}
                    if not told:
                        continue
                    chance, rank = chances.get(name), told.get("rank")
                    if chance is not None and rank is not None:
                        score = normalised(100 * (rank["value"] or 0.0), chance)
                        told["normalised"] = {"value": score, "sd": None}
                    found.append({"side": side, "setup": setup, "set": name, "metrics": told})
        return found

    def cost(self) -> list[dict[str, Any]]:
        """What each side is and costs."""
        found = []
        for side in self.sides:
            cells = [cell for cell in self.cells if cell.side == side]
            first = cells[0].cell
            found.append(
                {
                    "side": side,
                    "total": first.plan["parameters"]["total"],
                    "active": first.plan["parameters"]["active"],
                    "training_flops_per_token": self.flops[side],
                    "tokens": {str(cell.setup): cell.cell.facts["tokens_trained"] for cell in cells},
                    "seconds": sum(cell.cell.facts["train_seconds"] for cell in cells)
                    / len({cell.seed for cell in cells}),
                }
            )
        return found

    def as_dict(self) -> dict[str, Any]:
        first = self.cells[0].cell
        return {
            "protocol": "flan-moe",
            "machine": first.facts["machine"],
            "versions": first.facts["versions"],
            "match": self.settings.match,
            "seeds": list(self.seeds),
            "pairs": [list(pair) for pair in self.settings.pairs],
            "cost": self.cost(),
            "table": self.table(),
            "gains": self.gains(),
            **({"suites": self._told_suites()} if self.settings.suites else {}),
            "runs": [cell.cell.run.name for cell in self.cells],
            **({"kept_learning_rates": self.kept_rates()} if self.settings.task_learning_rates else {}),
        }

    def _told_suites(self) -> dict[str, Any]:
        asked = self.settings.suites
        told = {} if asked is None else asked.model_dump(mode="json", include={"limit", "shots", "scorer"})  # no paths
        return {"settings": told, "table": suites.table(self.asked), "gains": self.suite_gains()}

    def kept_rates(self) -> list[dict[str, Any]]:
        """Of every side, setup and task: the learning rate that the grid kept, by seed."""
        kept: dict[tuple[str, int, str], dict[str, float]] = {}
        for cell in self.cells:
            if cell.kept_rate is not None:
                kept.setdefault((cell.side, cell.setup, cell.task), {})[str(cell.seed)] = cell.kept_rate
        return [{"side": s, "setup": n, "task": task, "rates": rates} for (s, n, task), rates in kept.items()]

    def markdown(self) -> str:
        """Every table as Markdown."""
        from sparsmith.protocols.flan_moe_sheets import sheets

        return "\n".join(sheet.markdown() for sheet in sheets(self))

    def __rich__(self) -> Group:
        from rich.console import Group

        from sparsmith.protocols.flan_moe_sheets import sheets

        return Group(*(part for sheet in sheets(self) for part in (sheet.rich(), "")))


def compare(recipe: Recipe, seeds: Sequence[int], out: Path, tune: Tune, settle: Settle, ask: Ask) -> FlanMoeComparison:
    """Run every side through the setups with every seed, and write the comparison.

    Args:
        recipe: one `upcycle` entry, the mixture as its training rows, held-out sets under `data.eval`, and `protocol:`.
        out: folder of the cells and of the comparison.
        tune: runs a recipe to its end and returns the run's folder; returns that of a finished run at once.
        settle: writes what a run has settled into, once, and returns the folder.
        ask: measures a run or a model on `protocol.suites`.

    Raises:
        UsageError, MethodError: the recipe is not for this protocol.
    """
    settings = check(recipe, seeds)
    work = Work(recipe, settings, out, tune, settle, ask)
    for name, side in settings.sides.items():  # all of them before the first run
        if work.side_config(side).choosing and (side.start is not None or 3 in settings.setups):
            raise MethodError(
                f"protocol.sides.{name}",
                "experts that choose their tokens, where a run starts from another's result",
                "a router by which tokens choose, whose result is a stock model that can be tuned further",
                "Change moe.router, or write `setups: [1, 2]` without `start`.",
            )
    flops = {name: work.flops(name) for name in settings.sides}
    heldout = tuple(source.name for source in recipe.data.eval)
    cells: list[SetupCell] = []
    for seed in seeds:
        for name in settings.sides:
            cells += work.run_side(name, seed)
            suites.require_same_rows(cell for cell in cells if cell.suites is not None)
            write(FlanMoeComparison(settings, tuple(cells), flops, heldout), out)  # should the rest be cut short
    return FlanMoeComparison(settings, tuple(cells), flops, heldout)


def check(recipe: Recipe, seeds: Sequence[int]) -> ProtocolSettings:
    """The recipe's `protocol:` section.

    Raises:
        UsageError: no seed, no section. MethodError: another method, a control, or no rows to compare on.
    """
    if not seeds:
        raise UsageError("--seeds", "no seed", "at least one", "Write --seeds 0,1,2.")
    configs = recipe.methods
    if len(configs) != 1 or not isinstance(configs[0], UpcycleConfig):
        found = ", ".join(str(getattr(config, "method", "")) for config in configs)
        raise MethodError("methods", found, "upcycle alone", "Give a recipe with one `upcycle` entry.")
    if configs[0].control != "none":
        raise MethodError(
            "upcycle.control", f"`{configs[0].control}`", "none", "Name the dense twin under `protocol.sides`."
        )
    if recipe.train.steps is None:
        raise MethodError(
            "train.epochs", f"`{recipe.train.epochs:g}`", "train.steps, in which sides are matched", "Set it."
        )
    settings: Any = recipe.protocol
    if settings is None:
        raise UsageError(
            "protocol", "no section in the recipe", "sides and tasks", "Add `protocol:`; see docs/flan-moe.md."
        )
    sets = [*recipe.data.eval, *(task.eval for task in settings.tasks)]
    names = [one.name for one in (*sets, *(task.validation for task in settings.tasks if task.validation))]
    for one in names:
        if names.count(one) > 1:
            raise MethodError(
                "protocol.tasks", f"the evaluation set `{one}` twice", "a name for each", "Rename one of them."
            )
    if not recipe.data.eval and 2 in settings.setups:
        raise MethodError("data.eval", "no held-out set", "at least one, for setup 2", "Name one under `data.eval`.")
    if settings.suites and recipe.model.task != "causal_lm":
        found, mend = (
            f"tasks for a {recipe.model.task}",
            "Remove it: sets with metrics loss and rank say what suites would.",
        )
        raise MethodError("protocol.suites", found, "task causal_lm, which the harness asks", mend)
    for source in sets:
        if "loss" not in source.metrics:
            raise MethodError(f"{source.name}.metrics", ", ".join(source.metrics), "loss among them", "Add loss.")
    return settings


def write(comparison: FlanMoeComparison, out: Path) -> None:
    """`comparison.json`, `comparison.md` and `comparison.svg`."""
    from sparsmith.protocols.flan_moe_figure import three_panels
    from sparsmith.reporting.plots import svg_file

    write_json(out / "comparison.json", comparison.as_dict())
    write_text(out / "comparison.md", comparison.markdown())
    write_text(out / "comparison.svg", svg_file(three_panels(comparison)))
