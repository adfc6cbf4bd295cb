"""Tasks run on a loaded model: the top call. `lm_eval` builds the prompts, scores and filters; all it reads comes from `rows`."""

from __future__ import annotations

import io
import logging
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from torch import nn

from sparsmith import anatomy
from sparsmith.data.rows import one_line
from sparsmith.errors import DataError, EnvironmentFault, ProofError, SparsmithError, UsageError
from sparsmith.evaluating.batching import evaluation_mode
from sparsmith.evaluating.harness.rows import TaskRows, fingerprint, read_task_rows
from sparsmith.evaluating.harness.scores import Item, TaskResult, TaskScores
from sparsmith.evaluating.harness.task_files import TaskFile, find_tasks
from sparsmith.evaluating.harness.templates import PLACE, Row, answer_of, options_of, target_of, text_of

LOWEST = (0, 4, 13)
"""The lowest version of lm_eval: earlier ones have no task manager of this shape."""
BATCH_SIZE = 16


def evaluate_tasks(
    model: nn.Module,
    tokenizer: Any,
    tasks: str | Sequence[str],
    *,
    data: str | Path | None = None,
    limit: int | None = None,
    shots: int | None = None,
    seed: int = 42,
    batch_size: int = BATCH_SIZE,
    scorer: Literal["harness", "rank"] = "harness",
) -> TaskResult:
    """Measure a causal LM on tasks of the harness, from files on disk.

    Args:
        model: base or crafted, on any device; left as it was. A depth-elastic model is measured at its full depth.
        tokenizer: the model's; left as it was.
        tasks: one or several of: a name of `built_in_tasks()`, a YAML file, a folder of such files.
        data: the folder with the tasks' files (also directly below it); may be left out where all lie beside the task file.
        limit: at most this many rows of each task file, the same ones in every run.
        shots: examples before each question; default: each task's own number.
        seed: of the draw of the shots.
        batch_size: options or prompts per forward.
        scorer: `harness` scores options as lm_eval does; `rank` by our own rank classifier, which runs what they share once.

    Raises:
        EnvironmentFault: lm_eval is missing, too old, or does not do what it should.
        UsageError, RecipeErrors: an unknown task, a bad task file, a missing data file, too few rows for the shots.
        DataError: a row that cannot be asked or has no answer. ProofError: a score that is not finite.
    """
    started = time.perf_counter()
    if batch_size < 1:
        raise UsageError("batch_size", str(batch_size), "1 or more", "Mend the value.")
    version, asked = _prepared(tasks, data, limit, shots)
    _require_text(model, tokenizer)
    _require_room(model, asked)
    with _quiet(version), evaluation_mode(model):
        found, cut = _run(model, tokenizer, asked, seed=seed, batch_size=batch_size, scorer=scorer)
    scores = tuple(_scores(one, found[one.rows.name], cut) for one in asked)
    return TaskResult(scores, version, scorer, seed, limit, time.perf_counter() - started)


def check_tasks(
    tasks: str | Sequence[str],
    *,
    data: str | Path | None = None,
    limit: int | None = None,
    shots: int | None = None,
) -> None:
    """Everything that can be wrong with the tasks before a model is there: what `evaluate_tasks` raises of them, and of lm_eval."""
    _prepared(tasks, data, limit, shots)


def _prepared(
    tasks: str | Sequence[str], data: str | Path | None, limit: int | None, shots: int | None
) -> tuple[str, list[_Asked]]:
    """(version of lm_eval, the tasks with their rows)."""
    for name, value, least in (("limit", limit, 1), ("shots", shots, 0)):
        if value is not None and value < least:
            raise UsageError(name, str(value), f"{least} or more", "Mend the value.")
    files = find_tasks([tasks] if isinstance(tasks, str) else tasks)
    version = installed()
    folder = None if data is None else Path(data)
    if folder is not None and not folder.is_dir():
        raise UsageError("data", f"`{data}`, which is no folder", "the folder of the tasks' files", "Check the path.")
    asked = [one for file in files for one in _asked(file, folder, limit, file.shots if shots is None else shots)]
    return version, asked


def installed() -> str:
    """The version of lm_eval.

    Raises:
        EnvironmentFault: there is none, or it is too old.
    """
    lowest = ".".join(map(str, LOWEST))
    mend = "pip install 'sparsmith[eval]'"
    try:
        version = metadata.version("lm_eval")
    except metadata.PackageNotFoundError:
        raise EnvironmentFault("--tasks", "no package lm_eval", f"lm_eval {lowest} or later", mend) from None
    numbers = tuple(int(part) for part in version.split(".")[:3] if part.isdecimal())
    if numbers < LOWEST:
        raise EnvironmentFault("--tasks", f"lm_eval {version}", f"lm_eval {lowest} or later", mend)
    return version


@dataclass(frozen=True)
class _Asked:
    """One task, ready to be run."""

    file: TaskFile
    rows: TaskRows
    config: dict[str, Any]
    """For the harness: the file's keys with its texts as functions of a row."""
    chance: float


def _asked(file: TaskFile, folder: Path | None, limit: int | None, shots: int) -> Iterator[_Asked]:
    prompt = text_of(file.config["doc_to_text"], "doc_to_text")
    settings = file.config.get("fewshot_config", {})
    shot_prompt = (
        text_of(settings["doc_to_text"], "fewshot_config.doc_to_text") if "doc_to_text" in settings else prompt
    )
    for rows in read_task_rows(file, folder, shots=shots, limit=limit, prompt=prompt, shot_prompt=shot_prompt):
        config = _config(file, rows, prompt)
        chance = file.config.get("metadata", {}).get("chance", 0.0)
        if file.chooses:
            chance = sum(1 / len(config["doc_to_choice"](row)) for row in rows.scored) / len(rows.scored)
        yield _Asked(file, rows, config, chance)


def _config(file: TaskFile, rows: TaskRows, prompt: Callable[[Row], str]) -> dict[str, Any]:
    """The task for the harness. Every scored row is rendered once here, so that a bad one is named before the model runs."""
    given = file.config
    scored, pool = given["test_split"], given["fewshot_split"]
    kept = ("output_type", "description", "target_delimiter", "fewshot_delimiter", "generation_kwargs", "filter_list")
    config: dict[str, Any] = {key: given[key] for key in kept if key in given}
    config["metric_list"] = [
        {"aggregation": "mean", "higher_is_better": True, **metric} for metric in given["metric_list"]
    ]
    if file.chooses:
        options = options_of(given["doc_to_choice"], "doc_to_choice")
        target: Callable[[Row], Any] = answer_of(given["doc_to_target"], options, "doc_to_target")
        config["doc_to_choice"] = options
    else:
        target = _target(given["doc_to_target"], rows)
    for row in rows.scored:
        prompt(row)
        target(row)
    shown = given.get("fewshot_config", {})
    keys = [key for key in ("doc_to_text", "doc_to_target") if key in shown]
    texts: dict[str, Any] = {key: text_of(shown[key], f"fewshot_config.{key}") for key in keys}
    return config | {
        "task": rows.name,
        "custom_dataset": lambda **_: {scored: rows.scored, pool: rows.pool},
        "test_split": scored,
        "fewshot_split": pool,
        "num_fewshot": rows.shots,
        "doc_to_text": prompt,
        "doc_to_target": target,
        "fewshot_config": {"sampler": shown.get("sampler", "default"), **texts},
    }


def _target(text: str, rows: TaskRows) -> Callable[[Row], str | list[str]]:
    """The target of written text; lists for every row where one row has a list, as the harness asks the first row alone."""
    target = target_of(text, "doc_to_target")
    if not any(isinstance(target(row), list) for row in rows.scored):
        return target

    def listed(row: Row) -> list[str]:
        found = target(row)
        return found if isinstance(found, list) else [found]

    return listed


def _require_text(model: nn.Module, tokenizer: Any) -> None:
    if anatomy.task_of(model) == anatomy.SEQ_CLS:
        raise UsageError("tasks", "a classifier", "a model that writes text", "Measure it on sets of a recipe.")
    if anatomy.task_of(model) == anatomy.SEQ2SEQ:
        found, expected = "an encoder-decoder", "a decoder, whose text goes on from its question"
        raise UsageError(
            "tasks", found, expected, "Measure it on sets of a recipe with metrics loss, rank, exact_match."
        )
    if tokenizer.eos_token_id is None:
        raise DataError("tokenizer", "no end-of-sequence token", "a tokenizer with one", "Set tokenizer.eos_token.")


def _require_room(model: nn.Module, asked: list[_Asked]) -> None:
    room = getattr(model.config, "max_position_embeddings", None)
    for one in asked:
        needed = one.config.get("generation_kwargs", {}).get("max_gen_toks", 0)
        if room is not None and needed >= room:
            raise UsageError(
                f"task {one.rows.name}",
                f"answers of up to {needed} tokens, of a model with a context of {room}",
                "room for a question too",
                "Use a copy of the task file with a smaller generation_kwargs.max_gen_toks.",
            )


def _run(
    model: nn.Module, tokenizer: Any, asked: list[_Asked], *, seed: int, batch_size: int, scorer: str
) -> tuple[dict[str, list[dict]], set[str]]:
    """(task -> what the harness logged of every row, the prompts that were cut)."""
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.evaluator import evaluate

    from sparsmith.evaluating.harness.scoring import HarnessModel

    lm = HarnessModel(model, tokenizer, batch_size=batch_size, scorer=scorer)
    tasks: dict[str, Any] = {one.rows.name: ConfigurableTask(config=one.config) for one in asked}
    for task in tasks.values():
        task.set_fewshot_seed(seed)
    done: Any = evaluate(lm, {"tasks": tasks, "groups": {}, "group_map": {}}, bootstrap_iters=1)
    return done["samples"], lm.cut_prompts


def _scores(one: _Asked, samples: list[dict], cut: set[str]) -> TaskScores:
    ordered = sorted(samples, key=lambda sample: sample["doc_id"])
    metrics = [metric["metric"] for metric in one.config["metric_list"]]
    items = []
    for sample in ordered:
        place, found = sample["doc"][PLACE], sample["filtered_resps"]
        hits = {metric: float(sample[metric]) for metric in metrics}
        if not one.file.chooses:
            items.append(Item(place, hits, answer=str(found[0])))
            continue
        scores = tuple(float(score) for score, _ in found)
        if not all(abs(score) < float("inf") for score in scores):
            mend = "The model's weights or activations are not finite on this row; look at the last training steps."
            raise ProofError(
                f"{one.rows.name} {place}", f"option scores {list(scores)}", "finite log-likelihoods", mend
            )
        items.append(Item(place, hits, scores=scores))
    prompts = [str(sample["arguments"][0][0]) for sample in ordered]
    return TaskScores(
        name=one.rows.name,
        group=one.rows.group,
        chance=one.chance,
        shots=one.rows.shots,
        items=tuple(items),
        cut=sum(prompt in cut for prompt in prompts),
        removed=one.rows.removed,
        fingerprint=fingerprint(one.rows.scored, prompts),
    )


@contextmanager
def _quiet(version: str) -> Iterator[None]:
    """Nothing that the library prints, logs or warns of is shown; a fault inside it becomes one of ours."""
    from transformers.utils import logging as transformers_logging

    logger, verbosity = logging.getLogger("lm_eval"), transformers_logging.get_verbosity()
    level, unseen = logger.level, io.StringIO()
    logger.setLevel(logging.CRITICAL)
    transformers_logging.set_verbosity_error()
    try:
        with warnings.catch_warnings(), redirect_stdout(unseen), redirect_stderr(unseen):
            warnings.simplefilter("ignore")
            yield
    except (SparsmithError, RuntimeError):  # RuntimeError: torch's, of the model or of memory
        raise
    except (ImportError, ValueError, KeyError, TypeError, AttributeError, IndexError, AssertionError) as fault:
        raise EnvironmentFault(
            f"lm_eval {version}",
            one_line(f"{type(fault).__name__}: {fault}"),
            "tasks that it can run",
            f"Install the version that was tested: pip install 'lm_eval=={'.'.join(map(str, LOWEST))}'.",
        ) from fault
    finally:
        logger.setLevel(level)
        transformers_logging.set_verbosity(verbosity)
