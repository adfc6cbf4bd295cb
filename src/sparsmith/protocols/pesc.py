"""Does routing help? PESC against its controls on the same stream of rows, over several seeds.

Paper: PESC (arXiv 2401.02731) §3 compares with the dense LoRA alone, on one seed. Here more controls can join: a router that is random,
frozen, hashed or dense; one adapter of the same active width; a LoRA with as many trained parameters. "Routing helps" may be said only
where learned routing beats the random router *and* the single adapter.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsmith.bootstrap import Figure
from sparsmith.durable import write_json, write_text
from sparsmith.errors import MethodError, UsageError, nearest
from sparsmith.evaluating import Sheet, signed
from sparsmith.protocols.cells import Cell, pooled_difference, read_cell, spread
from sparsmith.recipe.schema import Recipe
from sparsmith.runs import RunFolder

if TYPE_CHECKING:
    from rich.table import Table

LEARNED = "learned"
CONTROLS: dict[str, dict[str, Any]] = {
    LEARNED: {},
    "random": {"router": "random"},
    "frozen": {"router_trainable": False},
    "hash": {"router": "hash"},
    "dense": {"router": "dense"},
    "single_adapter": {"control": "single_adapter"},
    "equal_lora": {"control": "equal_lora"},
    "dense_lora": {"control": "dense_lora"},
}
"""Control -> what it changes in the PESC settings of the recipe."""

# of the recipe's own settings: what has no effect in a control and would be refused there
_ONLY_LEARNED = ("balance_alpha", "balance_norm", "router_z_coef", "router_input_norm", "router_trainable", "top1_gate")

Tune = Callable[[Recipe, str], Path]


@dataclass(frozen=True)
class Comparison:
    """All cells of a protocol."""

    cells: tuple[Cell, ...]

    @property
    def controls(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(cell.arm for cell in self.cells))

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(dict.fromkeys(cell.seed for cell in self.cells))

    def of(self, control: str) -> list[Cell]:
        return [cell for cell in self.cells if cell.arm == control]

    def losses(self, control: str) -> list[float]:
        """Mean held-out loss over the domains, one figure per seed."""
        return [cell.result.overall["loss"].value for cell in self.of(control)]

    def difference(self, control: str, reference: str = LEARNED) -> Figure | None:
        """Held-out loss of `control` minus `reference`, rows paired within each seed and pooled over the seeds.

        The interval is over rows; how much seeds differ is told by the standard deviation.
        """
        if control == reference:
            return None
        mine, theirs = self.of(control), self.of(reference)
        return pooled_difference((a.seed, a.result, b.result) for a in theirs for b in mine if a.seed == b.seed)

    def verdict(self) -> str:
        """What may be said about routing from these figures."""
        if not {LEARNED, "random", "single_adapter"} <= set(self.controls):
            return "routing: not tested (needs learned, random and single_adapter)"
        gains = {name: self.difference(name) for name in ("random", "single_adapter")}
        wins = [name for name, gain in gains.items() if gain is not None and gain.low > 0]
        if len(wins) == 2:
            return "routing helps: learned beats random and single_adapter"
        return "routing is not shown to help: learned beats " + (wins[0] + " alone" if wins else "neither control")

    def rows(self) -> list[dict[str, Any]]:
        """One record per control."""
        found = []
        for control in self.controls:
            cells, losses = self.of(control), self.losses(control)
            difference = self.difference(control)
            parameters = cells[0].plan["parameters"]
            found.append(
                {
                    "control": control,
                    "seeds": [cell.seed for cell in cells],
                    "loss": statistics.fmean(losses),
                    "sd": spread(losses),
                    "losses": losses,
                    "domains": {
                        domain: statistics.fmean(cell.result.domains[domain]["loss"].value for cell in cells)
                        for domain in cells[0].result.domains
                    },
                    "minus_learned": difference.as_dict() if difference else None,
                    "trained": parameters["trained_total"],
                    "active": parameters["active"],
                    "total": parameters["total"],
                    "flops_per_token": cells[0].plan["flops_per_token"]["forward"],
                    "tokens_per_second": statistics.median(cell.facts["tokens_per_second"] for cell in cells),
                }
            )
        return found

    def as_dict(self) -> dict[str, Any]:
        first = self.cells[0]
        return {
            "protocol": "pesc",
            "machine": first.facts["machine"],
            "versions": first.facts["versions"],
            "steps": first.facts["steps"],
            "rows_per_run": first.facts["rows"],
            "verdict": self.verdict(),
            "controls": self.rows(),
        }

    def sheet(self) -> Sheet:
        """The comparison as text."""
        domains = list(self.cells[0].result.domains)
        heads = ("control", *domains, "mean", "sd", "minus learned [95 %]", "trained", "active", "FLOPs/token")
        rows = tuple(tuple(_cells(row, domains)) for row in self.rows())
        return Sheet("PESC against its controls: held-out loss, nats per token", heads, rows, self.verdict())

    def table(self) -> Table:
        """The comparison for the terminal."""
        return self.sheet().rich()

    def __rich__(self) -> Table:
        return self.table()

    def markdown(self) -> str:
        """The same as a Markdown table."""
        return self.sheet().markdown(titled=False)


def compare(recipe: Recipe, controls: Sequence[str], seeds: Sequence[int], out: Path, tune: Tune) -> Comparison:
    """Tune every control with every seed; a cell that is finished is read, not run again.

    Args:
        recipe: holds one `pesc` entry, whose `router` and `control` are what varies.
        controls: names of `CONTROLS`.
        seeds: at least one; three or more for a claim.
        out: folder of the cells and of `comparison.json`, `comparison.md`.
        tune: runs a recipe and returns the run's folder.

    Raises:
        UsageError: unknown control, no seed. MethodError: the recipe is not for PESC, or has no evaluation rows.
    """
    for name in controls:
        if name not in CONTROLS:
            raise UsageError("--controls", f"`{name}`", "a control of PESC", nearest(name, list(CONTROLS)))
    if not seeds or not controls:
        raise UsageError(
            "protocol pesc", "no seeds or no controls", "at least one of each", "Give --seeds and --controls."
        )
    _check(recipe)
    cells = []
    for seed in seeds:
        for control in controls:
            folder = RunFolder(out / f"{control}-seed{seed}")
            if not folder.finished:
                tune(variant(recipe, control, seed, folder.root), f"{control} seed {seed}")
            cells.append(read_cell(control, seed, folder))
    comparison = Comparison(tuple(cells))
    write_json(out / "comparison.json", comparison.as_dict())
    write_text(out / "comparison.md", comparison.markdown())
    return comparison


def variant(recipe: Recipe, control: str, seed: int, output: Path) -> Recipe:
    """The recipe of one cell."""
    config = recipe.methods[0]
    given = {name: getattr(config, name) for name in config.model_fields_set}
    if control != LEARNED:
        given = {name: value for name, value in given.items() if name not in _ONLY_LEARNED}
    if control == "dense":
        given.pop("top_k", None)
    settings = type(config)(**{**given, **CONTROLS[control]})
    train = recipe.train.model_copy(update={"seed": seed})
    return recipe.model_copy(update={"methods": (settings,), "train": train, "output": str(output)})


def _check(recipe: Recipe) -> None:
    names = [getattr(config, "method", "") for config in recipe.methods]
    if names != ["pesc"]:
        raise MethodError("methods", ", ".join(names), "pesc alone", "Give a recipe with one `pesc` entry.")
    config: Any = recipe.methods[0]
    if config.control != "none" or config.router != "learned":
        raise MethodError(
            "methods.0", f"control {config.control}, router {config.router}", "learned routing", "Leave both out."
        )
    if not any("loss" in source.metrics for source in recipe.data.eval):
        raise MethodError("data.eval", "no set with the metric loss", "at least one", "Name one under `data.eval`.")


def _cells(row: dict[str, Any], domains: Sequence[str]) -> list[str]:
    return [
        row["control"],
        *(f"{row['domains'][domain]:.3f}" for domain in domains),
        f"{row['loss']:.4f}",
        "-" if row["sd"] is None else f"{row['sd']:.4f}",
        signed(row["minus_learned"]),
        f"{row['trained']:,}",
        f"{row['active']:,}",
        f"{row['flops_per_token']:,}",
    ]
