"""The guard: a method that trains the model at several depths must not cost the full one more than it says.

A method that has a control (`Method.control`) is held against it: the same rows, order, steps, rates and seed, only the loss differs. The
control is a run folder of its own, `<run>/control`, so that it is resumed like any run; or a run that was tuned before. No setting can
leave the comparison out. Price: the control's training.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsmith import durable, ranks
from sparsmith.app.opening import FREE, flat
from sparsmith.app.recipes import single_recipe
from sparsmith.errors import CheckpointMismatch, GuardFailed, MethodError, UsageError
from sparsmith.methods import registry
from sparsmith.methods.base import Control, MethodConfig
from sparsmith.recipe.schema import Recipe
from sparsmith.runs import RunFolder, is_run

if TYPE_CHECKING:
    from sparsmith.evaluating import EvalResult, Sheet

write_json = ranks.on_first(durable.write_json)

TuneControl = Callable[[Recipe], Path]

# what may differ between a run and its control beside the method's own settings
_OWN = FREE | {"train.threads", "data.workers", "data.cache"}
_MEND = "Remove the path, so that the control is tuned beside the run, or name a control of the same training."


@dataclass(frozen=True)
class Guard:
    """What a recipe's run is held against."""

    recipe: Recipe
    place: int
    """Index of the method that asks for the control."""
    control: Control

    @property
    def given(self) -> RunFolder | None:
        """The control that was tuned before."""
        return RunFolder(Path(self.control.run).absolute()) if self.control.run else None

    def control_recipe(self, output: Path) -> Recipe:
        """The recipe of the control: the same but for the method's settings."""
        assert self.control.config is not None
        methods = [*self.recipe.methods]
        methods[self.place] = self.control.config
        return self.recipe.model_copy(update={"methods": tuple(methods), "output": str(output)})

    def check_start(self) -> None:
        """Refuse what could not be compared in the end, before anything is tuned.

        Raises:
            MethodError: no held-out rows. UsageError: no finished control at the given path. CheckpointMismatch: another training.
        """
        if not any("loss" in source.metrics for source in self.recipe.data.eval):
            raise MethodError(
                "data.eval",
                "no set with the metric loss: the guard has no rows",
                "at least one, on which the full model is held against its control",
                "Name held-out rows under `data.eval`.",
            )
        if self.given is None:
            return
        where = f"{self._key}.control"
        if not is_run(self.given.root) or not self.given.finished:
            raise UsageError(
                where, f"no finished run at {self.given.root}", "the folder of a finished control", "Check the path."
            )
        found = single_recipe(self.given.recipe, check_paths=False)
        self._check_methods(where, found)
        mine, theirs = (flat(one.model_dump(mode="json", exclude={"methods"})) for one in (self.recipe, found))
        for key in sorted(mine | theirs):
            if mine.get(key) != theirs.get(key) and key not in _OWN:
                raise CheckpointMismatch(f"{where}: {key}", f"`{theirs.get(key)}`", f"`{mine.get(key)}`", _MEND)

    def check_data(self, run: RunFolder) -> None:
        """Hold rows and trained tensors of a given control against the run's.

        Raises:
            CheckpointMismatch: other files of rows, or other tensors that trained.
        """
        if self.given is None:
            return
        where = f"{self._key}.control"
        mine, theirs = durable.read_json(run.data)["fingerprints"], durable.read_json(self.given.data)["fingerprints"]
        for file in sorted(mine | theirs):
            if mine.get(file) != theirs.get(file):
                raise CheckpointMismatch(
                    f"{where}: data of {file}", str(theirs.get(file)), f"fingerprint {mine.get(file)}", _MEND
                )
        ours, others = (durable.read_json(one.plan)["parameters"]["trained"] for one in (run, self.given))
        if ours != others:
            raise CheckpointMismatch(f"{where}: trained parameters", str(others), str(ours), _MEND)

    @property
    def _key(self) -> str:
        return f"methods.{self.place}"

    def _check_methods(self, where: str, found: Recipe) -> None:
        names = [getattr(config, "method", "") for config in found.methods]
        wanted = [getattr(config, "method", "") for config in self.recipe.methods]
        if names != wanted or _asked(found) is not None:
            what = ", ".join(names) + (", not as a control" if names == wanted else "")
            raise CheckpointMismatch(f"{where}: methods", what, f"{', '.join(wanted)} as the control's settings", _MEND)


def guard_of(recipe: Recipe) -> Guard | None:
    """The guard that the recipe's methods ask for, or None."""
    found = _asked(recipe)
    return Guard(recipe, *found) if found else None


def _asked(recipe: Recipe) -> tuple[int, Control] | None:
    for place, config in enumerate(recipe.methods):
        if isinstance(config, MethodConfig):
            control = registry.of(config).control(config)
            if control is not None:
                return place, control
    return None


def compare(guard: Guard, run: RunFolder, tune_control: TuneControl) -> dict[str, Any]:
    """Tune the control where it is not there yet, and hold the run against it: what `guard.json` holds.

    Args:
        run: tuned and measured.
        tune_control: runs a recipe to its end, or goes on with it.
    """
    control = _control(guard, run, tune_control)
    results = {"base": _result(run, "base")}
    results["control"] = results["base"] if control is None else _result(control, "tuned")
    results["tuned"] = _result(run, "tuned")
    _check_rows(guard, results["control"], results["tuned"])
    gap = results["tuned"].minus(results["control"])
    limit = guard.control.max_loss_gap
    passed = gap.overall["loss"].value <= limit
    if control is None:  # nothing of the full model may have moved
        passed = gap.overall["loss"].value == 0.0 and _losses(results["tuned"]) == _losses(results["base"])
    folders = {"base": None, "control": control, "tuned": run}
    return {
        "format": 1,
        "method": guard.recipe.methods[guard.place].method,  # type: ignore[attr-defined]
        "control": _place(control, run),
        "rows": [_row(name, results[name], folders[name]) for name in results],
        "difference": gap.overall["loss"].as_dict(),
        "differences": {metric: figure.as_dict() for metric, figure in gap.overall.items()},
        "domains": {name: figures["loss"].as_dict() for name, figures in gap.domains.items() if "loss" in figures},
        "limit": limit,
        "passed": passed,
    }


def sheet(found: dict[str, Any]) -> Sheet:
    """`guard.json` as a table."""
    from sparsmith.bootstrap import Figure
    from sparsmith.evaluating import Sheet, signed

    metrics = [metric for metric in found["rows"][-1]["metrics"] if metric in found["differences"]]
    heads = ("full depth", "held-out loss [95 %]", *metrics, "tokens seen", "steps")
    rows = []
    for row in found["rows"]:
        figure = Figure(**row["loss"])
        shown = [_short(row["metrics"].get(metric)) for metric in metrics]
        loss = f"{figure.value:.4f} ({figure.low:.4f} to {figure.high:.4f})"
        rows.append((row["name"], loss, *shown, f"{row['tokens']:,}", str(row["steps"])))
    gaps = [f"{found['differences'][metric]['value']:+.4f}" for metric in metrics]
    rows.append(("tuned - control", signed(found["difference"]), *gaps, "", ""))
    verdict = "passed" if found["passed"] else "FAILED"
    against = "the base" if found["control"] is None else "the control"
    return Sheet(
        "Guard: what the full model pays",
        heads,
        tuple(rows),
        f"{verdict}: {found['difference']['value']:+.4f} nats against {against}, limit {found['limit']:+.4f}",
    )


def fault(found: dict[str, Any], run: RunFolder) -> GuardFailed:
    """The error of a guard that did not pass."""
    gap = found["difference"]
    return GuardFailed(
        f"{run.guard}",
        f"a full model {gap['value']:+.4f} nats from its control (95 %: {gap['low']:+.4f} to {gap['high']:+.4f})",
        f"at most {found['limit']:+.4f}",
        "The run is saved and reported. Give the full depth more weight or more steps, or raise guard.max_loss_gap.",
    )


def _control(guard: Guard, run: RunFolder, tune_control: TuneControl) -> RunFolder | None:
    """The finished control; None where the base is it."""
    if guard.control.config is None:
        return None
    if guard.given is not None:
        guard.check_data(run)
        return guard.given
    if not run.control.finished:
        tune_control(guard.control_recipe(run.control.root))
    return run.control


def _result(run: RunFolder, key: str) -> EvalResult:
    from sparsmith.evaluating import EvalResult  # loads torch, which a bad recipe need not wait for

    return EvalResult.from_json(durable.read_json(run.evaluation)[key])


def _losses(result: EvalResult) -> dict[str, Any]:
    return {name: metrics["loss"].total for name, metrics in result.rows.items() if "loss" in metrics}


def _check_rows(guard: Guard, control: EvalResult, tuned: EvalResult) -> None:
    """Both must have been measured on the same rows of every set."""
    for name, print_ in tuned.fingerprints.items():
        if control.fingerprints.get(name) != print_:
            raise CheckpointMismatch(
                f"control: rows of {name}", str(control.fingerprints.get(name)), f"fingerprint {print_}", _MEND
            )


def _place(control: RunFolder | None, run: RunFolder) -> str | None:
    if control is None:
        return None
    return "control" if control == run.control else str(control.root)


def _row(name: str, result: EvalResult, run: RunFolder | None) -> dict[str, Any]:
    facts = {} if run is None else durable.read_json(run.facts)
    return {
        "name": name,
        "loss": result.overall["loss"].as_dict(),
        "metrics": {metric: figure.as_dict() for metric, figure in result.overall.items() if metric != "loss"},
        "domains": {name: figures["loss"].value for name, figures in result.domains.items() if "loss" in figures},
        "tokens": facts.get("tokens_trained", 0),
        "steps": facts.get("steps", 0),
    }


def _short(figure: dict[str, Any] | None) -> str:
    return "-" if figure is None else f"{figure['value']:.4f}"
