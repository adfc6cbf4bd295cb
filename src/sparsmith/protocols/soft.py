"""One model for every depth, or a model for each? SoFT against the paper's rivals on the same stream of rows, over several seeds.

Paper: Sorted LLaMA (arXiv 2309.08968) §4, Tables 4 and 5. Every arm is measured at every depth by the same code: held-out loss, agreement
with its own full depth, the sets' own metrics, and wins and losses where verdicts of a judge are given. What differs from the paper: the
cost of each arm stands beside its figures, arms that were trained for another number of steps are marked, and further settings of SoFT
can join as named arms, so that one command draws the frontier between inner depths and the full one.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsmith.bootstrap import Figure
from sparsmith.durable import write_json, write_text
from sparsmith.errors import UsageError
from sparsmith.evaluating import DepthResult, EvalResult
from sparsmith.protocols import soft_arms as arms
from sparsmith.protocols.cells import Cell, pooled_difference, read_cell, spread
from sparsmith.protocols.judging import Tally, Verdict, tally
from sparsmith.recipe.schema import Recipe
from sparsmith.runs import RunFolder

if TYPE_CHECKING:
    from rich.console import Group

Tune = Callable[[Recipe, str], Path]
Measure = Callable[[Recipe, Sequence[int]], DepthResult]
"""The base of a recipe at the given depths."""

BASE = "base"
RIVALS = (arms.SFT, arms.ICT, arms.EXTRACTED)


@dataclass(frozen=True)
class SoftComparison:
    """All cells of the protocol."""

    cells: tuple[Cell, ...]
    base: DepthResult
    """The base before any tuning."""
    depths: tuple[int, ...]
    """Those of the recipe, ascending; the last is the full depth."""
    after_sft: frozenset[str] = frozenset()
    """Arms whose training begins with the result of SFT."""
    one_more: frozenset[str] = frozenset()
    """Arms whose inner depths have a block of their own beside those they share."""
    verdicts: tuple[Verdict, ...] = ()

    @property
    def full(self) -> int:
        return self.depths[-1]

    @cached_property
    def arms(self) -> tuple[str, ...]:
        """In the order in which they were run; all extracted models are one arm."""
        return tuple(dict.fromkeys(_arm_of(cell) for cell in self.cells))

    @property
    def elastic(self) -> tuple[str, ...]:
        """SoFT and its named variants."""
        return tuple(arm for arm in self.arms if arm not in RIVALS)

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(dict.fromkeys(cell.seed for cell in self.cells))

    def results(self, arm: str, depth: int) -> list[tuple[int, EvalResult]]:
        """(seed, result) of an arm at a depth; empty where it was not measured there."""
        if arm == BASE:
            return [(0, self.base.depths[depth])] if depth in self.base.depths else []
        if arm == arms.EXTRACTED:
            return [(cell.seed, cell.result) for cell in self.cells if cell.arm == arms.extracted_name(depth)]
        cells = [cell for cell in self.cells if cell.arm == arm]
        found = [(cell.seed, cell.by_depth.depths.get(depth) if cell.by_depth else None) for cell in cells]
        if depth == self.full:
            found = [(cell.seed, cell.result) for cell in cells]
        return [(seed, result) for seed, result in found if result is not None]

    def difference(self, arm: str, depth: int, rival: str, rival_depth: int) -> Figure | None:
        """Held-out loss of `arm` minus that of `rival`, paired within each seed; below 0 = the arm is better."""
        if (arm, depth) == (rival, rival_depth):
            return None
        theirs = dict(self.results(rival, rival_depth))
        ours = self.results(arm, depth)
        return pooled_difference((seed, theirs[seed], result) for seed, result in ours if seed in theirs)

    def judged(self, arm: str, depth: int, rival: str, rival_depth: int) -> Tally | None:
        return tally(self.verdicts, f"{arm}@{depth}", f"{rival}@{rival_depth}")

    def matrix(self) -> list[dict[str, Any]]:
        """One record per arm and depth."""
        found = []
        for arm in (BASE, *self.arms):
            for depth in self.depths:
                results = [result for _, result in self.results(arm, depth)]
                if results:
                    found.append({"arm": arm, "depth": depth, **self._figures(arm, depth, results)})
        return found

    def _figures(self, arm: str, depth: int, results: list[EvalResult]) -> dict[str, Any]:
        losses = [result.overall["loss"].value for result in results]
        means = {
            metric: statistics.fmean(result.overall[metric].value for result in results)
            for metric in results[0].overall
        }
        means.pop("loss")
        same = means.pop("agreement", 1.0 if depth == self.full or arm == arms.EXTRACTED else None)
        return {
            "loss": statistics.fmean(losses),
            "sd": spread(losses),
            "losses": losses,
            "agreement": same,
            "metrics": means,
            "domains": {
                domain: statistics.fmean(result.domains[domain]["loss"].value for result in results)
                for domain in results[0].domains
                if "loss" in results[0].domains[domain]
            },
        }

    def diagonal(self) -> list[dict[str, Any]]:
        """Every elastic arm against every rival at the same depth."""
        found = []
        for arm in self.elastic:
            for rival in (name for name in RIVALS if name in self.arms):
                for depth in self.depths:
                    found += self._compared(arm, depth, rival, depth)
        return found

    def headline(self) -> list[dict[str, Any]]:
        """Every arm at every depth against the full SFT model."""
        found = []
        for arm in self.arms:
            for depth in self.depths:
                found += self._compared(arm, depth, arms.SFT, self.full)
        return found

    def _compared(self, arm: str, depth: int, rival: str, rival_depth: int) -> list[dict[str, Any]]:
        gap, judged = self.difference(arm, depth, rival, rival_depth), self.judged(arm, depth, rival, rival_depth)
        if gap is None and judged is None:
            return []
        record: dict[str, Any] = {"arm": arm, "rival": rival, "depth": depth, "rival_depth": rival_depth}
        record["loss_difference"] = gap.as_dict() if gap else None
        if judged is not None:
            record["judged"] = {**vars(judged), "score": judged.score}
        return [record]

    def training(self) -> list[dict[str, Any]]:
        """What each arm cost: steps, tokens, parameters, FLOPs of one seed."""
        sft = self._spent(arms.SFT)
        found = []
        for arm in self.arms:
            own = self._spent(arm)
            before = sft if arm in self.after_sft else None
            steps = [before["steps"][0], *own["steps"]] if before else own["steps"]
            equal = before is None and set(own["steps"]) == set(sft["steps"])
            found.append(
                {
                    "arm": arm,
                    **own,
                    "steps_shown": " + ".join(map(str, steps)) if before else _range(own["steps"]),
                    "flops": own["flops"] + (before["flops"] if before else 0),
                    "flops_over_sft": (own["flops"] + (before["flops"] if before else 0)) / sft["flops"],
                    "equal_training": equal,
                }
            )
        return found

    def _spent(self, arm: str) -> dict[str, Any]:
        cells = [cell for cell in self.cells if _arm_of(cell) == arm and cell.seed == self.seeds[0]]
        parameters = [cell.plan["parameters"] for cell in cells]
        return {
            "models": len(cells),
            "steps": [cell.facts["steps"] for cell in cells],
            "tokens": sum(cell.facts["tokens_trained"] for cell in cells),
            "trained": sum(part["trained_total"] for part in parameters),
            "extra": sum(part["total"] - part["base"] for part in parameters),
            "flops": sum(cell.facts["tokens_trained"] * cell.plan["flops_per_token"]["training"] for cell in cells),
            "seconds": sum(cell.facts.get("train_seconds", 0.0) for cell in cells),
        }

    def as_dict(self) -> dict[str, Any]:
        first = self.cells[0]
        return {
            "protocol": "soft",
            "machine": first.facts["machine"],
            "versions": first.facts["versions"],
            "depths": list(self.depths),
            "seeds": list(self.seeds),
            "arms": self.training(),
            "matrix": self.matrix(),
            "headline": self.headline(),
            "diagonal": self.diagonal(),
            "runs": {f"{cell.arm}-seed{cell.seed}": cell.run.name for cell in self.cells},
            "one_block_more": sorted(self.one_more),
        }

    def markdown(self) -> str:
        """Every table as Markdown."""
        from sparsmith.protocols.soft_sheets import sheets

        return "\n".join(sheet.markdown() for sheet in sheets(self))

    def __rich__(self) -> Group:
        from rich.console import Group

        from sparsmith.protocols.soft_sheets import sheets

        return Group(*(part for sheet in sheets(self) for part in (sheet.rich(), "")))


def compare(
    recipe: Recipe,
    named: Mapping[str, Recipe],
    choices: arms.Choices,
    out: Path,
    tune: Tune,
    measure: Measure,
    verdicts: Sequence[Verdict] = (),
) -> SoftComparison:
    """Tune every arm with every seed, measure the base, write the comparison.

    Args:
        recipe: holds one `soft` entry: the arm `soft`.
        named: further arms: name -> the recipe with other settings.
        out: folder of the cells, of the bases that were made for some of them, and of the comparison.
        tune: runs a recipe to its end and returns the run's folder; returns that of a finished run at once.
        measure: the untuned base at given depths.

    Raises:
        UsageError: unknown arm, a name that is taken, no seed. MethodError: the recipe is not for SoFT, or has no evaluation rows.
    """
    choices.check()
    configs = {name: arms.soft_of(one) for name, one in ({arms.ELASTIC: recipe} | dict(named)).items()}
    for name in named:
        if name in (*arms.ARMS, BASE) or not name.isidentifier():
            raise UsageError("--arm", f"`{name}`", "a word that is no arm yet", "Choose another name.")
    depths = configs[arms.ELASTIC].depths(layers_of(recipe))
    chosen = [name for name in (arms.ELASTIC,) if name in choices.arms] + list(named)
    cells: list[Cell] = []

    def run(plot: arms.Plot) -> Path:
        folder = RunFolder(tune(plot.recipe, plot.label))
        cells.append(read_cell(plot.arm, plot.seed, folder))
        return folder.root

    base = measure(recipe, depths)
    for seed in choices.seeds:
        sft = run(arms.sft_plot(recipe, seed, out))
        if arms.ICT in choices.arms:
            run(arms.ict_plot(recipe, seed, out, sft, choices.ict_share))
        if arms.EXTRACTED in choices.arms:
            for plot in arms.extracted_plots(recipe, depths, seed, out, choices.extracted_steps):
                run(plot)
        for name in chosen:
            run(arms.elastic_plot(name, named.get(name, recipe), seed, out, sft))
    frozen = frozenset(name for name in chosen if configs[name].frozen_trunk)
    comparison = SoftComparison(
        tuple(cells), base, depths, frozen | {arms.ICT}, one_more=frozen, verdicts=tuple(verdicts)
    )
    write(comparison, out)
    return comparison


def write(comparison: SoftComparison, out: Path) -> None:
    """`comparison.json`, `comparison.md` and `comparison.svg`."""
    from sparsmith.protocols.soft_figure import loss_by_depth
    from sparsmith.reporting.plots import svg_file

    write_json(out / "comparison.json", comparison.as_dict())
    write_text(out / "comparison.md", comparison.markdown())
    write_text(out / "comparison.svg", svg_file(loss_by_depth(comparison)))


def layers_of(recipe: Recipe) -> int:
    """Blocks of the recipe's base, from its config alone."""
    from transformers import AutoConfig

    from sparsmith import anatomy
    from sparsmith.crafting.base_model import resolve_base

    return anatomy.shape_of(AutoConfig.from_pretrained(resolve_base(recipe.model.path))).layers


def _arm_of(cell: Cell) -> str:
    name, _, depth = cell.arm.rpartition("-")
    return arms.EXTRACTED if name == arms.EXTRACTED and depth.isdecimal() else cell.arm


def _range(steps: list[int]) -> str:
    low, high = min(steps), max(steps)
    return str(low) if low == high else f"{low}-{high}"
