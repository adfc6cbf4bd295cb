"""`tune`: craft, tune, measure, prove, write it all down."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsmith import durable, ranks
from sparsmith.app import facts, guarding, parts
from sparsmith.app.guarding import Guard, guard_of
from sparsmith.app.opening import opened, require_space
from sparsmith.app.recipes import load_recipe
from sparsmith.errors import DataError, MethodError, ProofError
from sparsmith.recipe.schema import Recipe
from sparsmith.recipe.staged import StagedRecipe
from sparsmith.runs import RunFolder

if TYPE_CHECKING:
    from rich.console import Console

# of several processes every one computes, and the first alone writes
write_json, write_text = ranks.on_first(durable.write_json), ranks.on_first(durable.write_text)


@dataclass
class Baseline:
    """What the base measured, filled by the first run that is given it; later runs on the same base and rows reuse it."""

    result: Any = None
    samples: list[dict[str, str]] = field(default_factory=list)

    @property
    def whole(self) -> bool:
        return self.result is not None and bool(self.samples)

    def read(self, run: RunFolder) -> None:
        """Take what an earlier process has measured for that run."""
        from sparsmith.evaluating import EvalResult

        self.result = EvalResult.from_json(durable.read_json(run.evaluation)["base"])
        kept = {"domain": "domain", "set": "set", "prompt": "prompt", "reference": "reference", "base": "answer"}
        kept["base_probability"] = "probability"  # of a classifier
        self.samples = [
            {ours: sample[key] for key, ours in kept.items() if key in sample}
            for sample in durable.read_json(run.samples)
        ]


def tune(
    recipe: Recipe | StagedRecipe | str | Path,
    overrides: Sequence[str] = (),
    *,
    console: Console | None = None,
    label: str = "",
    baseline: Baseline | None = None,
) -> Path:
    """Run a recipe to its end, with every stage of it, and return the run's folder.

    Args:
        recipe: a recipe or the path of one.
        overrides: `key=value` settings for a path.
        console: where progress is drawn; default: the terminal's standard error.
        label: the run's name on the progress bar; default: its folder's name.
        baseline: shared by runs of the same base on the same evaluation rows, so that the base is measured once.

    Raises:
        SparsmithError: bad recipe, data, base or setting; ProofError where something that must hold does not; GuardFailed, after
            everything is saved, where the full model lost more to its control than the recipe allows.
    """
    if not isinstance(recipe, Recipe | StagedRecipe):
        recipe = load_recipe(recipe, overrides)
    if isinstance(recipe, StagedRecipe):
        from sparsmith.app.staging import tune_stages

        return tune_stages(recipe, console=console, label=label, baseline=baseline)
    ranks.rows_per_rank(recipe.train.batch_size, recipe.train.micro_batch_size)  # refused before anything is read
    guard = guard_of(recipe)
    if guard is not None:
        guard.check_start()
    ranks.start()
    run = RunFolder(Path(recipe.output).absolute())
    baseline, label = baseline or Baseline(), label or run.root.name
    _tune(recipe, run, console, label, baseline, guard)
    if guard is not None:
        _guard(guard, run, console, label, baseline)
    return run.root


def _tune(
    recipe: Recipe, run: RunFolder, console: Console | None, label: str, baseline: Baseline, guard: Guard | None
) -> None:
    """The run itself. One that is tuned and waits for its guard alone is left as it is."""
    session = _Session(recipe, run, console, label, baseline, guarded=guard is not None)
    with session.stop.listening(), opened(run, recipe, session.warn) as checkpoint:
        if guard is not None and run.tuned:
            return
        session.prepare()
        if guard is not None:
            ranks.wait()  # until the first has written them
            guard.check_data(run)
        session.craft()
        session.train(checkpoint)
        session.finish()


def _guard(guard: Guard, run: RunFolder, console: Console | None, label: str, baseline: Baseline) -> None:
    """Hold the tuned run against its control, write it down, and fail where it lost too much."""
    from rich.console import Console

    from sparsmith.reporting import write_report

    if not baseline.whole:
        baseline.read(run)

    def tune_control(recipe: Recipe) -> Path:
        return tune(recipe, console=console, label=f"control of {label}", baseline=baseline)

    found = guarding.compare(guard, run, tune_control)
    write_json(run.guard, found)
    write_json(run.facts, {**(run.read(run.facts) or {}), "finished": _now()})
    ranks.on_first(write_report)([run.root], run.report)
    ranks.wait()
    if ranks.is_first():
        (console or Console(stderr=True)).print(guarding.sheet(found).rich())
    if not found["passed"]:
        raise guarding.fault(found, run)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


class _Session:
    """One run: each step leaves its figures in the run's folder."""

    def __init__(
        self,
        recipe: Recipe,
        run: RunFolder,
        console: Console | None,
        label: str,
        baseline: Baseline,
        guarded: bool = False,
    ) -> None:
        from rich.console import Console

        self.recipe, self.run, self.label, self.baseline = recipe, run, label, baseline
        self.guarded = guarded
        self.console = console or Console(stderr=True)
        from sparsmith.training.callbacks.stop import PoliteStop

        self.stop = PoliteStop()
        self.started = time.time()
        self.proof: dict[str, Any] = run.read(run.proof) or {}

    def warn(self, text: str) -> None:
        """A line of its own, whatever the progress bar does."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def prepare(self) -> None:
        """Threads, tokenizer, rows, plan: everything that can fail before a weight is read."""
        import torch
        from transformers import set_seed
        from transformers.utils import logging

        from sparsmith.crafting.base_model import load_tokenizer
        from sparsmith.crafting.plan import plan_recipe
        from sparsmith.data import load_data
        from sparsmith.methods import registry

        train = self.recipe.train
        if train.threads:
            torch.set_num_threads(train.threads)
        logging.disable_progress_bar()
        set_seed(train.seed)
        self.plan = plan_recipe(self.recipe)
        require_space(self.run, self.plan.disk, train.keep if train.save_every else None)
        write_json(self.run.plan, self.plan.as_dict())
        self.tokenizer = load_tokenizer(self.recipe.model)
        with ranks.first_before_others():  # the others find the token cache that the first has filled
            self.data = load_data(
                self.recipe.data,
                self.tokenizer,
                seed=train.seed,
                rows_needed=train.steps * train.batch_size if train.steps else None,
                epochs=train.epochs,
                rejects=self.run.rejects if ranks.is_first() else None,
                classes=self.recipe.model.num_labels,
                pairs=self.recipe.model.task == "seq2seq",
                select=train.select,
            )
        self.steps = train.steps or len(self.data.train) // train.batch_size
        if not self.steps:
            raise DataError(
                "data.train",
                f"{len(self.data.train)} rows in {train.epochs:g} epochs",
                f"at least one batch of {train.batch_size}",
                "Lower train.batch_size, or give train.steps.",
            )
        for config in self.recipe.methods:
            registry.of(config).check_steps(config, self.steps)  # type: ignore[arg-type]
        write_json(
            self.run.data,
            {"domains": self.data.domains, "counts": self.data.counts, "fingerprints": self.data.fingerprints},
        )

    def craft(self) -> None:
        """Load the base, measure it, craft it, hold the counts against the plan."""
        from sparsmith.crafting.apply import check_roles, craft
        from sparsmith.crafting.record import record_of
        from sparsmith.training.sharding import for_reading

        with self._memory_told(f"loading {self.recipe.model.path}"):
            base = parts.load_base(self.recipe)
            self._to_device(base)
        if self.data.eval and not self.baseline.whole:
            cut = for_reading(base)
            self.baseline.result = self.baseline.result or self._evaluate(base)
            self.baseline.samples = self._samples(base)
            if cut:  # crafting needs it in one piece again
                del base
                base = parts.load_base(self.recipe)
        proven = self.recipe.proof.enabled
        configs = list(self.recipe.methods)
        self.model = craft(base, configs, inplace=True, seed=self.recipe.train.seed, proof=proven)  # type: ignore[arg-type]
        counts = check_roles(self.model)
        if counts != self.plan.trained:
            raise ProofError("trained tensors", str(counts), f"the plan's {self.plan.trained}", "Please report this.")
        self.proof["craft"] = {
            **record_of(self.model).neutral,
            "trained": {"check": "trained parameters by role equal the plan", "value": counts, "passed": True},
        }

    def train(self, checkpoint: Path | None) -> None:
        """The Trainer's loop, from `checkpoint` on."""
        from sparsmith.training import Tuner
        from sparsmith.training.arguments import training_arguments
        from sparsmith.training.callbacks.dry_step import DryStep
        from sparsmith.training.callbacks.measure import Evaluation
        from sparsmith.training.callbacks.progress import ProgressBar
        from sparsmith.training.callbacks.recorder import Recorder
        from sparsmith.training.saves import step_of

        recipe = self.recipe
        recorder = Recorder(self.run.metrics)
        if ranks.is_first():
            recorder.forget_after(step_of(checkpoint) if checkpoint else -1)
        tuner = Tuner(
            model=self.model,
            args=training_arguments(recipe.train, self.run.checkpoints, self.steps),
            train_dataset=self.data.train,
            data_collator=parts.collator(recipe, self.tokenizer, self.model),
            domains=self.data.domains,
            moved_after=recipe.proof.looks_after,
            proven=self._moved,
            save_at_end=True,
            callbacks=[recorder],
        )
        if recipe.train.dry_step:
            tuner.add_callback(DryStep(tuner, self.plan.memory))
        bar = ProgressBar(self.label, lambda: tuner.health.words, self.console)
        tuner.add_callback(bar)
        if recipe.train.eval_every and self.data.eval:
            record = ranks.on_first(recorder.write)
            if checkpoint is None:
                record({"step": 0, **self._losses(self.baseline.result)})
            tuner.add_callback(Evaluation(self._measure, record, recipe.train.eval_every, recorder.evaluated))
        selection = parts.selection(recipe, self.run, self.model, self.data.selection, self.stop)
        if selection is not None:
            selection.take_up(step_of(checkpoint) if checkpoint else 0)
            tuner.add_callback(selection)
        try:
            tuner.create_optimizer()
        except (ValueError, ImportError, RuntimeError) as fault:
            reason = " ".join(str(fault).split())[:300]
            raise MethodError("train.optimizer", reason, "an optimiser that runs here", "Try adamw_torch.") from fault
        tuner.add_callback(self.stop)  # last, so that it hears what came during an evaluation
        self.stop.training = True
        try:
            with self._memory_told("training"):
                tuner.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        finally:
            bar.close()
            self.stop.training = False
        step = tuner.state.global_step
        if self.stop.number is not None:
            mend = f"the checkpoint of step {step} is whole, and the same command goes on from it"
            raise self.stop.fault(f"in step {step}", mend)
        self.selected = selection.restore() if selection is not None else None
        spent = tuner.spent
        self.train_seconds, tokens = spent["seconds"], spent["tokens"]
        self.tokens_per_second = tokens / self.train_seconds

    def _moved(self, record: dict[str, Any]) -> None:
        """Written at once, so that a run which is cut later keeps its proof."""
        self.proof["during"] = record
        write_json(self.run.proof, self.proof)

    def finish(self) -> None:
        """Measure the tuned model, save it, write the run's facts and its report."""
        from sparsmith.crafting.checkpoint import save
        from sparsmith.evaluating.samples import side_by_side
        from sparsmith.reporting import write_report

        self.model.eval()
        tables = self._load_tables()
        if self.data.eval:
            write_json(self.run.evaluation, {"base": self.baseline.result.to_json(), **self._measured()})
            write_json(self.run.samples, side_by_side(self.baseline.samples, self._samples(self.model)))
        if tables:
            write_json(self.run.tables, tables)
        save(self.model, self.run.model, tokenizer=self.tokenizer, replace=True)
        write_json(self.run.proof, self.proof)
        write_json(self.run.facts, self._facts())
        if not self.guarded:  # else the report waits for the guard, which is its first table
            ranks.on_first(write_report)([self.run.root], self.run.report)
        ranks.wait()  # a rank that left early would be missed by a launcher

    def _facts(self) -> dict[str, Any]:
        from sparsmith import __version__

        rows = self.steps * self.recipe.train.batch_size
        return {
            "sparsmith": __version__,
            "methods": [config.method for config in self.recipe.methods],  # type: ignore[attr-defined]
            "versions": facts.versions(),
            "machine": facts.machine(),
            "command": facts.command(),
            "seed": self.recipe.train.seed,
            **({"selected": self.selected} if self.selected else {}),
            "steps": self.steps,
            "rows": rows,
            "tokens_trained": sum(len(self.data.train[i]["input_ids"]) for i in range(rows)),
            "tokens_per_second": self.tokens_per_second,
            "train_seconds": self.train_seconds,
            "seconds": time.time() - self.started,
            "started": datetime.fromtimestamp(self.started, UTC).isoformat(timespec="seconds"),
            "finished": None if self.guarded else _now(),
        }

    def _memory_told(self, what: str) -> Any:
        import torch

        from sparsmith.training.out_of_memory import told_in_bytes

        mend = "Take less: model.quant nf4, a smaller model.dtype, train.micro_batch_size or data.max_length."
        return told_in_bytes(what, self.plan.memory, mend, torch.device("cuda" if ranks.on_cuda() else "cpu"))

    def _to_device(self, model: Any) -> None:
        if ranks.on_cuda() and self.recipe.model.quant == "none" and not ranks.sharded():
            model.to("cuda")

    def _evaluate(self, model: Any, **options: Any) -> Any:
        from sparsmith.evaluating import evaluate

        if not self.data.eval:
            return None
        return evaluate(
            model, self.tokenizer, self.data.eval, seed=self.recipe.train.seed, domains=self.data.domains, **options
        )

    def _measured(self) -> dict[str, Any]:
        """`tuned`: the tuned model's result; `depths`: that of every depth, where there are several."""
        from sparsmith.evaluating import elastic_depths, evaluate_depths

        elastic = elastic_depths(self.model)
        if elastic and ranks.sharded():  # a view of some blocks would not gather them
            self.warn(
                "warning: depths of a sharded model are not measured here; run `sparsmith eval` on the run's folder."
            )
            elastic = ()
        if not elastic:
            return {"tuned": self._evaluate(self.model).to_json()}
        options: dict[str, Any] = {"seed": self.recipe.train.seed, "domains": self.data.domains}
        by_depth = evaluate_depths(self.model, self.tokenizer, self.data.eval, **options)
        return {"tuned": by_depth.full.to_json(), "depths": by_depth.to_json()}

    def _samples(self, model: Any) -> list[dict[str, str]]:
        from sparsmith.evaluating.samples import sample_answers

        return sample_answers(model, self.tokenizer, self.data.eval, per_set=1)

    def _measure(self) -> dict[str, Any]:
        # with several ranks none leaves alone: another may wait for its share of a sharded forward
        check = (lambda batch: self.stop.check()) if ranks.world() == 1 else None
        return self._losses(self._evaluate(self.model, metrics=["loss"], resamples=1, on_batch=check))

    @staticmethod
    def _losses(result: Any) -> dict[str, Any]:
        return {
            "eval_loss": {name: m["loss"].value for name, m in result.sets.items() if "loss" in m},
            "eval_domain_loss": {name: m["loss"].value for name, m in result.domains.items() if "loss" in m},
        }

    def _load_tables(self) -> dict[str, Any]:
        """Nested figures of the methods (expert load by layer and domain), measured on the evaluation rows."""
        from sparsmith.crafting.record import record_of
        from sparsmith.methods.base import Method

        parts = record_of(self.model).parts
        # a method that is not told of its batches has nothing to tell of them, and one pass over the rows is saved
        told = [m for m, _ in parts if m.reads_batches and type(m).before_forward is not Method.before_forward]
        if self.data.eval and told:
            for method, config in parts:
                method.metrics(self.model, config)  # empties the window

            def before_forward(batch: Any) -> None:
                for method, config in parts:
                    method.before_forward(self.model, config, batch)

            self._evaluate(self.model, metrics=["loss"], resamples=1, on_batch=before_forward)
        tables = {}
        for method, config in parts:
            if method.reads_batches and not self.data.eval:
                continue
            method.after_forward(self.model, config)
            figures = method.metrics(self.model, config)
            nested = {k.removeprefix("table/"): v for k, v in figures.items() if k.startswith("table/")}
            if nested:
                tables[method.name] = {**nested, "domains": self.data.domains}
        return tables
