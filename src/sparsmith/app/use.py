"""Verbs on what already exists: evaluate, generate, export, report, verify, import."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsmith.app.facts import of_run
from sparsmith.app.recipes import measured_recipe, single_recipe
from sparsmith.errors import UsageError
from sparsmith.runs import RunFolder, StagesFolder, is_run, is_staged, last_stage, open_run, staged_root

if TYPE_CHECKING:
    from sparsmith.app.spent import Spent
    from sparsmith.recipe.schema import Recipe


def load_model(target: str | Path) -> tuple[Any, Any, Recipe | None]:
    """(model, tokenizer, the run's recipe) of a run, a checkpoint of ours, or any folder or hub id of a causal LM or a classifier."""
    from transformers.utils import logging

    from sparsmith.crafting.base_model import load_base, load_tokenizer, own_task
    from sparsmith.crafting.checkpoint import load
    from sparsmith.crafting.identity import FILE
    from sparsmith.recipe.schema import ModelSettings

    logging.disable_progress_bar()
    if is_run(target):
        run = open_run(target)
        recipe = single_recipe(run.recipe, check_paths=False)
        if not run.model.is_dir():
            raise UsageError(str(target), "a run without a model", "a finished run", "Run `sparsmith tune` to its end.")
        return load(run.model), load_tokenizer(recipe.model), recipe
    if (Path(target) / FILE).is_file():
        model: Any = load(target)
        base = model.sparsmith.base
        task: dict[str, Any] = {"task": base.task, "num_labels": len(base.labels) or None}
        settings = ModelSettings(path=str(target), **task)
        if not (Path(target) / "tokenizer_config.json").is_file():
            settings = ModelSettings(path=str(base.folder or base.id), **task)
        return model, load_tokenizer(settings), None
    settings = ModelSettings(path=str(target), dtype="auto", **own_task(str(target)))
    return load_base(settings), load_tokenizer(settings), None


def placed(model: Any) -> Any:
    """On the GPU where there is one; a quantised model lies there already."""
    from sparsmith import ranks

    return model.to("cuda") if ranks.on_cuda() and not getattr(model, "is_quantized", False) else model


def evaluate(
    target: str | Path, recipe: str | Path | None = None, overrides: Sequence[str] = (), *, seed: int = 42
) -> Any:
    """Measure a run or a model on the evaluation sets of a recipe (default: the run's own).

    Returns:
        An `EvalResult`; of a depth-elastic model a `DepthResult`, which holds one for every depth.
    """
    from sparsmith import anatomy
    from sparsmith.data import load_data
    from sparsmith.evaluating import elastic_depths, evaluate_depths
    from sparsmith.evaluating import evaluate as measure

    model, tokenizer, own = load_model(target)
    chosen = measured_recipe(recipe, overrides) if recipe is not None else own
    if chosen is None:
        raise UsageError(str(target), "no recipe", "a run, or --recipe with `data.eval`", "Add --recipe FILE.")
    task = anatomy.task_of(model)
    classes = model.config.num_labels if task == anatomy.SEQ_CLS else None
    if (chosen.model.task, chosen.model.num_labels) != (task, classes):
        raise UsageError(
            str(recipe or target),
            f"a recipe for {_task_words(chosen.model.task, chosen.model.num_labels)}",
            f"one for {_task_words(task, classes)}, as the model is",
            "Give a recipe of the same task.",
        )
    pairs = task == anatomy.SEQ2SEQ
    data = load_data(chosen.data, tokenizer, seed=chosen.train.seed, rows_needed=0, classes=classes, pairs=pairs)
    chosen_measure: Any = evaluate_depths if elastic_depths(model) else measure
    return chosen_measure(model, tokenizer, data.eval, seed=seed, domains=data.domains)


def evaluate_tasks(target: str | Path, tasks: Sequence[str], **options: Any) -> Any:
    """Measure a run or a model on tasks of lm-evaluation-harness, from files on disk.

    Args:
        tasks: names, task files or folders of such. options: as `evaluating.evaluate_tasks` takes them.

    Returns:
        A `TaskResult`.
    """
    from sparsmith.evaluating import evaluate_tasks as measure
    from sparsmith.evaluating.harness import find_tasks, installed

    find_tasks(tasks)
    installed()  # before the model is read, which takes longer
    model, tokenizer, _ = load_model(target)
    return measure(placed(model), tokenizer, tasks, **options)


def _task_words(task: str, classes: int | None) -> str:
    if task == "seq2seq":
        return "an encoder-decoder"
    return "the next token" if classes is None else f"{classes} classes"


def generate(
    target: str | Path,
    prompt: str,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 42,
    raw: bool = False,
    on_done: Callable[[Spent], None] | None = None,
    **mode: Any,
) -> Iterator[str]:
    """The answer to a prompt, piece by piece; greedy at temperature 0. The run's template (or the chat template) is put around it
    unless `raw`.

    Args:
        on_done: called at the end with what it took.
        mode: one of `depth`, `budget`, `exit_threshold`, `self_speculative` with its settings, as `inference.generate` takes them. A
            budget in milliseconds without `profile`, and the exit threshold `calibrated`, read the run's own files.
    """
    from transformers import set_seed

    from sparsmith.app.spent import Spent
    from sparsmith.data import render_prompt
    from sparsmith.inference import stream_text
    from sparsmith.inference.faults import require_text

    mode = _with_own_files(target, mode)
    model, tokenizer, recipe = load_model(target)
    require_text(model, str(target))
    ids = render_prompt(prompt, tokenizer, None if recipe is None else recipe.data.template, raw=raw)
    drawn = {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature > 0 else {}
    model = placed(model)
    set_seed(seed)
    whole: list[Any] = []
    started = time.perf_counter()
    yield from stream_text(model, tokenizer, ids, max_new_tokens=max_new_tokens, on_done=whole.append, **drawn, **mode)
    if on_done is not None:
        seconds, done = time.perf_counter() - started, whole[0]
        on_done(Spent(done.ids.shape[1] - len(ids), seconds, model.config.num_hidden_layers, done.stats))


def _with_own_files(target: str | Path, mode: dict[str, Any]) -> dict[str, Any]:
    """A run's profile and thresholds in the place of none and of the word `calibrated`.

    Raises:
        UsageError: thresholds that nobody has calibrated.
    """
    run = RunFolder(last_stage(target))
    if isinstance(mode.get("budget"), str) and mode.get("profile") is None and run.root.is_dir():
        mode = {**mode, "profile": run.profile}
    if mode.get("exit_threshold") == "calibrated":
        if not run.thresholds.is_file():
            mend = "Write them with `sparsmith bench RUN --calibrate 0.98`."
            raise UsageError(str(run.thresholds), "no such file", "calibrated thresholds of this run", mend)
        mode = {**mode, "exit_threshold": run.thresholds}
    return mode


def export(target: str | Path, out: str | Path, **options: Any) -> Any:
    """Write the settled model, or depths of it, as full checkpoints and prove them in a clean process."""
    from sparsmith.crafting.accounting import read as read_accounting
    from sparsmith.durable import write_json
    from sparsmith.exporting import SliceReports
    from sparsmith.exporting import export as write

    model, tokenizer, recipe = load_model(target)
    facts = of_run(open_run(target)) if recipe is not None else {}
    report = write(model, out, tokenizer=tokenizer, facts=facts, **options)
    if recipe is not None:
        run = open_run(target)
        cut = report if isinstance(report, SliceReports) else [report]
        proofs = {f"export, depth {one.slice['depth']}" if one.slice else "export": one.proof for one in cut}
        write_json(run.proof, {**(run.read(run.proof) or {}), **proofs})
        tables = read_accounting(Path(out))
        if tables:
            write_json(run.accounting, tables)
        rewrite_report(run.root)
    return report


def rewrite_report(root: Path) -> Path:
    """The run's own report, anew; of a stage also the page of the whole, where it is there."""
    from sparsmith.reporting import write_report, write_stages_report

    whole = staged_root(root)
    if whole is not None and StagesFolder(whole).report.is_file():
        write_stages_report(whole)
    return write_report([root], root / "report.html")


def report(runs: Sequence[str | Path], out: str | Path | None = None) -> Path:
    """One self-contained HTML page for one run or several side by side; of a run of several stages alone, its table of them all."""
    from sparsmith.reporting import write_report, write_stages_report

    if len(runs) == 1 and is_staged(runs[0]):
        open_run(runs[0])
        return write_stages_report(runs[0], out)
    folders = [open_run(run).root for run in runs]
    return write_report(folders, Path(out) if out else folders[0] / "report.html")


def verify(folder: str | Path) -> Any:
    """Every hash, shape and number of a checkpoint, an export or a run."""
    from sparsmith.exporting import verify as check

    return check(folder)


def import_camelidae(folder: str | Path, out: str | Path, **options: Any) -> Any:
    """A published PESC checkpoint as one of ours."""
    from sparsmith.exporting.camelidae import import_camelidae as convert

    return convert(folder, out, **options)
