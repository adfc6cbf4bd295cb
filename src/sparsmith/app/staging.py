"""`tune` of several stages: each is a run of its own that starts from the settled result of the one before.

    OUTPUT/recipe.yaml, stages.json         what is run, in which order
    OUTPUT/stages/1-NAME/                   a whole run, resumed like any; `settled/` is the full checkpoint that stage 2 starts from
    OUTPUT/stages/2-NAME/                   ...
    OUTPUT/report.html                      the table of them all

A stage is done once its run is finished; its settled checkpoint is made once, proven in a clean process, and there as a whole or not at
all. So a kill at any moment is taken up at the stage, and in it at the checkpoint, that it fell into.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsmith import durable, ranks
from sparsmith import recipe as recipes
from sparsmith.app import guarding, opening
from sparsmith.app.facts import of_run
from sparsmith.app.tuning import Baseline, tune
from sparsmith.errors import ProofError, UsageError
from sparsmith.recipe.schema import Recipe
from sparsmith.recipe.staged import StagedRecipe
from sparsmith.runs import RunFolder, StagesFolder, is_run, is_staged

if TYPE_CHECKING:
    from rich.console import Console

    from sparsmith.crafting.plan_stages import StagesPlan

_STAGE_KEY = re.compile(r"^stages\.(\d+)\.")


def tune_stages(
    recipe: StagedRecipe, *, console: Console | None = None, label: str = "", baseline: Baseline | None = None
) -> Path:
    """Run every stage to its end, or go on where an earlier process was cut, and return the folder of the whole.

    Args:
        baseline: of the first stage's base.

    Raises:
        as `tune`; MethodError before anything runs, where a stage could not start from what the one before leaves.
    """
    from sparsmith.crafting.plan_stages import plan_stages
    from sparsmith.training.callbacks.stop import PoliteStop

    whole = StagesFolder(Path(recipe.output).absolute())
    stages = _stages(recipe, whole)
    for stage in stages:
        ranks.rows_per_rank(stage.recipe.train.batch_size, stage.recipe.train.micro_batch_size)
        if (guard := guarding.guard_of(stage.recipe)) is not None:
            guard.check_start()
    plan = plan_stages(recipe)
    ranks.start()
    with PoliteStop().listening(), _opened(whole, recipe, stages):
        _require_space(whole, stages, plan)
        for index, stage in enumerate(stages):
            if _done(stage.run):
                _refuse_failed_guard(stage.run)
            else:
                shown = f"{label or whole.root.name} {stage.run.root.name}"
                tune(stage.recipe, console=console, label=shown, baseline=baseline if index == 0 else None)
            if stage is not stages[-1]:
                _settle(stage, plan, index)
        _report(whole)
    return whole.root


@dataclass(frozen=True)
class _Stage:
    run: RunFolder
    recipe: Recipe


def _stages(recipe: StagedRecipe, whole: StagesFolder) -> list[_Stage]:
    found: list[_Stage] = []
    for index, stage in enumerate(recipe.stages):
        run = whole.stage(index + 1, stage.name)
        model = recipe.model_at(str(found[-1].run.settled.resolve())) if found else recipe.model
        found.append(_Stage(run, recipe.recipe(index, model, str(run.root))))
    return found


@contextmanager
def _opened(whole: StagesFolder, recipe: StagedRecipe, stages: list[_Stage]) -> Iterator[None]:
    """Claim the folder and write down what is run.

    Raises:
        UsageError: a folder of something else, a finished run, or one that another process tunes.
        RecipeErrors: a begun stage of another recipe; every differing key with both values.
    """
    if not ranks.is_first():
        ranks.wait()  # until the first has looked
        yield
        return
    whole.root.mkdir(parents=True, exist_ok=True)
    with durable.claimed(whole.root) as free:
        if not free:
            raise UsageError(
                str(whole.root),
                "a run that another process is tuning",
                "a run that nobody tunes",
                "Wait for it, or end it.",
            )
        durable.clean_leftovers(whole.root)
        if any(whole.root.iterdir()):
            _check_own(whole, recipe, stages)
        durable.write_text(whole.recipe, recipes.dump(recipe))
        whole.write([stage.name for stage in recipe.stages])
        ranks.wait()
        yield


def _check_own(whole: StagesFolder, recipe: StagedRecipe, stages: list[_Stage]) -> None:
    where = str(whole.root)
    if not whole.recipe.is_file():
        raise UsageError(where, "a folder with other files", "a new folder, or a run", "Change `output`.")
    if not is_staged(whole.root) and any(path != whole.recipe for path in whole.root.iterdir()):
        raise UsageError(where, "a run of one stage", "a new folder, or a run of these stages", "Change `output`.")
    if whole.report.is_file() and all(_done(stage.run) for stage in stages):
        raise UsageError(
            where, "a finished run", "an unfinished one to go on with", "Change `output`, or remove the folder."
        )
    known = whole.stages() if is_staged(whole.root) else []
    begun = [is_run(run.root) for run in known]

    def free(key: str) -> bool:
        """Settings of a stage that has not begun may still change."""
        found = _STAGE_KEY.match(key)
        if found is None:
            return key in opening.FREE
        index = int(found.group(1))
        return not (index < len(begun) and begun[index]) or key[found.end() :] in opening.FREE

    opening.refuse_other_recipe(whole, recipe, free)


def _require_space(whole: StagesFolder, stages: list[_Stage], plan: StagesPlan) -> None:
    """Refuse a run whose stages cannot all fit, before the first step that is left to do."""
    if not ranks.is_first():
        return
    needed = 0
    for stage, planned in zip(stages, plan.stages, strict=True):
        if not _done(stage.run):
            needed += max(0, planned.disk - _bytes_in(stage.run))
        elif stage is not stages[-1] and not durable.has_manifest(stage.run.settled):
            needed += planned.plan.disk["export"]
    durable.require_space(whole.root, needed)


def _bytes_in(run: RunFolder) -> int:
    """What a stage that was cut has written of its share already."""
    places = (run.checkpoints, run.model, run.control.checkpoints, run.control.model)
    return sum(file.stat().st_size for place in places for file in place.rglob("*.safetensors"))


def _done(run: RunFolder) -> bool:
    return run.finished and run.report.is_file()


def _refuse_failed_guard(run: RunFolder) -> None:
    """A full model that lost too much to its control is not built upon, however often the command is given."""
    found = run.read(run.guard)
    if found is not None and not found["passed"]:
        raise guarding.fault(found, run)


def _settle(stage: _Stage, plan: StagesPlan, index: int) -> None:
    """Make the full checkpoint that the next stage starts from, once, and hold it against the plan."""
    if ranks.is_first():
        settle_once(stage.recipe, stage.run)
        _check_shape(stage.run, plan, index)
        record = durable.read_json(stage.run.settled / "proof.json")
        proof = stage.run.read(stage.run.proof) or {}
        if proof.get("settled") != record:  # a kill came between the folder and this line
            from sparsmith.reporting import write_report

            durable.write_json(stage.run.proof, {**proof, "settled": record})
            write_report([stage.run.root], stage.run.report)
    ranks.wait()


def settle_once(recipe: Recipe, run: RunFolder) -> Path:
    """The full checkpoint of a finished run, made from the saved delta where it is not there yet; whole in any case."""
    if not durable.has_manifest(run.settled):
        durable.clean_leftovers(run.root)
        _export(recipe, run)
    durable.verify_folder(run.settled)
    return run.settled


def _export(recipe: Recipe, run: RunFolder) -> None:
    """On the CPU and with the run's own number of threads, so that a later process makes the same bits."""
    import torch
    from transformers.utils import logging

    from sparsmith.crafting.base_model import load_tokenizer
    from sparsmith.crafting.checkpoint import load
    from sparsmith.exporting import export

    logging.disable_progress_bar()
    if recipe.train.threads:
        torch.set_num_threads(recipe.train.threads)
    tokenizer = load_tokenizer(recipe.model)
    export(load(run.model), run.settled, tokenizer=tokenizer, facts=of_run(run))


def _check_shape(run: RunFolder, plan: StagesPlan, index: int) -> None:
    """What settled has the shape that the next stage was planned on, unless its method only expected one."""
    from transformers import AutoConfig

    from sparsmith import anatomy

    planned = plan.stages[index]
    if not planned.exact:
        return
    expected, found = anatomy.shape_of(planned.settled), anatomy.shape_of(AutoConfig.from_pretrained(run.settled))
    if expected != found:
        raise ProofError(
            str(run.settled), f"the shape {_shape(found)}", f"the plan's {_shape(expected)}", "Please report this."
        )


def _shape(shape: Any) -> str:
    return f"{shape.layers} x {shape.hidden}, {shape.total_params:,} parameters"


def _report(whole: StagesFolder) -> None:
    from sparsmith.reporting import write_stages_report

    ranks.on_first(write_stages_report)(whole.root)
    ranks.wait()
