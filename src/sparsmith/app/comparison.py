"""`protocol`: a paper's comparison as one command."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsmith.app.recipes import single_recipe
from sparsmith.errors import UsageError, nearest

if TYPE_CHECKING:
    from rich.console import Console

    from sparsmith.app.tuning import Baseline
    from sparsmith.evaluating import TaskResult
    from sparsmith.recipe.protocol import Suites
    from sparsmith.recipe.schema import Recipe


_ONE = "a protocol compares one crafting of one base"


@dataclass(frozen=True)
class Asked:
    """What the command line may say of a protocol. None = not said."""

    recipe: str | Path
    overrides: Sequence[str] = ()
    seeds: Sequence[int] | None = None
    controls: Sequence[str] | None = None
    arms: Sequence[str] | None = None
    named: Sequence[str] | None = None
    """Further arms as `NAME=key=value,key=value`."""
    ict_share: float | None = None
    extracted_steps: str | None = None
    verdicts: str | Path | None = None
    targets: Sequence[float] | None = None
    console: Console | None = None


def protocol(name: str, recipe: str | Path, overrides: Sequence[str] = (), **options: Any) -> Any:
    """Run a comparison in the recipe's `output` folder, one run per arm and seed; a finished run is not repeated.

    Args:
        name: of `PROTOCOLS`.
        options: fields of `Asked`; one that the protocol does not have is refused.

    Returns:
        The comparison, with `markdown()`, `as_dict()` and a rich form.
    """
    if name not in PROTOCOLS:
        raise UsageError("protocol", f"`{name}`", "a known protocol", nearest(name, tuple(PROTOCOLS)))
    known = PROTOCOLS[name]
    asked = Asked(recipe, overrides, **options)
    for field in _OPTIONS:
        if getattr(asked, field) is not None and field not in known.options:
            flag = _flag(field)
            own = ", ".join(map(_flag, known.options))
            raise UsageError(flag, f"set for protocol {name}", f"one of its own options: {own}", f"Remove {flag}.")
    return known.run(asked)


def _pesc(asked: Asked) -> Any:
    from sparsmith.protocols.pesc import CONTROLS, compare

    loaded = single_recipe(asked.recipe, asked.overrides, what=_ONE)
    controls = tuple(asked.controls or CONTROLS)
    return compare(loaded, controls, _seeds(asked), Path(loaded.output).absolute(), _Cells(asked.console).tune)


def _soft(asked: Asked) -> Any:
    from sparsmith.protocols.judging import read_verdicts
    from sparsmith.protocols.soft import compare
    from sparsmith.protocols.soft_arms import ARMS, Choices

    loaded = single_recipe(asked.recipe, asked.overrides, what=_ONE)
    named = dict(_named(asked, text) for text in asked.named or ())
    steps: Any = asked.extracted_steps or "equal"
    share = 1.0 if asked.ict_share is None else asked.ict_share
    choices = Choices(tuple(asked.arms or ARMS), tuple(_seeds(asked)), share, steps)
    verdicts = read_verdicts(asked.verdicts) if asked.verdicts else ()
    cells = _Cells(asked.console)
    out = Path(loaded.output).absolute()
    return compare(loaded, named, choices, out, cells.tune_or_read, cells.measure, verdicts)


def _finegates(asked: Asked) -> Any:
    from sparsmith.protocols.finegates import ARMS, Choices, compare

    loaded = single_recipe(asked.recipe, asked.overrides, what=_ONE)
    named = dict(_named(asked, text) for text in asked.named or ())
    choices = Choices(arms=tuple(asked.arms or ARMS), seeds=tuple(_seeds(asked)))
    if asked.targets is not None:
        choices = replace(choices, targets=tuple(asked.targets))
    return compare(loaded, named, choices, Path(loaded.output).absolute(), _Cells(asked.console).tune_or_read)


def _flan_moe(asked: Asked) -> Any:
    from sparsmith.app.staging import settle_once
    from sparsmith.protocols.flan_moe import compare

    loaded = single_recipe(asked.recipe, asked.overrides, what=_ONE)
    _check_suites(loaded)
    cells = _Cells(asked.console)
    return compare(loaded, _seeds(asked), Path(loaded.output).absolute(), cells.tune_or_read, settle_once, _ask)


def _check_suites(recipe: Recipe) -> None:
    """Task files, rows and the harness are looked at before the first run."""
    if recipe.protocol is None or recipe.protocol.suites is None:
        return
    from sparsmith.evaluating.harness import check_tasks

    suites = recipe.protocol.suites
    check_tasks(suites.tasks, data=suites.data, limit=suites.limit, shots=suites.shots)


def _ask(target: str, suites: Suites) -> TaskResult:
    from sparsmith.app.use import evaluate_tasks

    options = {name: getattr(suites, name) for name in ("data", "limit", "shots", "scorer")}
    result: TaskResult = evaluate_tasks(target, suites.tasks, **options)
    return result


@dataclass(frozen=True)
class Protocol:
    """One row of the table below."""

    run: Callable[[Asked], Any]
    options: tuple[str, ...]
    """Fields of `Asked` that it reads beside the recipe."""


PROTOCOLS = {
    "finegates": Protocol(_finegates, ("seeds", "arms", "named", "targets")),
    "flan-moe": Protocol(_flan_moe, ("seeds",)),
    "pesc": Protocol(_pesc, ("seeds", "controls")),
    "soft": Protocol(_soft, ("seeds", "arms", "named", "ict_share", "extracted_steps", "verdicts")),
}
_OPTIONS = ("seeds", "controls", "arms", "named", "ict_share", "extracted_steps", "verdicts", "targets")


def _flag(field: str) -> str:
    return "--arm" if field == "named" else "--" + field.replace("_", "-")


def _seeds(asked: Asked) -> Sequence[int]:
    return (0, 1, 2) if asked.seeds is None else asked.seeds


class _Cells:
    """Runs the cells of one protocol; a base is measured once, however many cells start from it."""

    def __init__(self, console: Console | None) -> None:
        from sparsmith.app.tuning import Baseline

        self.console = console
        self.baselines: defaultdict[str, Baseline] = defaultdict(Baseline)

    def tune(self, recipe: Recipe, label: str) -> Path:
        from sparsmith.app.tuning import tune

        baseline = self.baselines[_measured(recipe)]
        return tune(recipe, console=self.console, label=label, baseline=baseline)

    def tune_or_read(self, recipe: Recipe, label: str) -> Path:
        """The run's folder; a finished run of the same recipe is left as it is. A failed guard is a result like any other."""
        from sparsmith.app.opening import refuse_other_recipe
        from sparsmith.errors import GuardFailed
        from sparsmith.runs import RunFolder

        run = RunFolder(Path(recipe.output).absolute())
        if run.finished:
            refuse_other_recipe(run, recipe)
            return run.root
        with suppress(GuardFailed):
            self.tune(recipe, label)
        return run.root

    def measure(self, recipe: Recipe, depths: Sequence[int]) -> Any:
        """The untuned base at every depth, measured once for the output folder; its full depth serves the cells as their baseline."""
        from sparsmith.durable import read_json, write_json
        from sparsmith.evaluating import DepthResult

        file = Path(recipe.output).absolute() / "base.json"
        settings = {"model": recipe.model.model_dump(mode="json"), "data": recipe.data.model_dump(mode="json")}
        known = read_json(file) if file.is_file() else None
        if known and known.get("settings") == settings and set(map(str, depths)) <= known["depths"].keys():
            result = DepthResult.from_json(known["depths"])
        else:
            result = self._measure(recipe, depths)
            write_json(file, {"settings": settings, "depths": result.to_json()})
        self.baselines[_measured(recipe)].result = result.full
        return result

    def _measure(self, recipe: Recipe, depths: Sequence[int]) -> Any:
        from sparsmith.crafting.base_model import load_base, load_tokenizer
        from sparsmith.data import load_data
        from sparsmith.evaluating import evaluate_depths

        tokenizer, seed = load_tokenizer(recipe.model), recipe.train.seed
        data = load_data(recipe.data, tokenizer, seed=seed, rows_needed=0)
        base = load_base(recipe.model)
        return evaluate_depths(base, tokenizer, data.eval, depths=depths, seed=seed, domains=data.domains)


def _measured(recipe: Recipe) -> str:
    """What a measurement of the base is of: the base and its evaluation rows."""
    return "|".join([recipe.model.path, *(source.model_dump_json() for source in recipe.data.eval)])


def _named(asked: Asked, text: str) -> tuple[str, Recipe]:
    """(name, recipe) of `NAME=key=value,key=value`: settings of the method, or of the training with `train.` before them."""
    name, equals, settings = text.partition("=")
    if not equals or not name or not settings:
        raise UsageError("--arm", f"`{text}`", "NAME=key=value,key=value", 'Write --arm boost="weights=full_boost".')
    given = [part.strip() for part in _split(settings)]
    keys = [part if part.startswith("train.") else f"methods.0.{part}" for part in given]
    return name, single_recipe(asked.recipe, [*asked.overrides, *keys], what=_ONE)


def _split(text: str) -> list[str]:
    """At commas that stand in no bracket."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "[{") - (letter in "]}")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts
