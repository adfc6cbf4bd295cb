"""`demo`: the whole story on the embedded base, offline, on CPU, in a few minutes.

Two models are tuned on the same stream of rows: a dense LoRA control and PESC, which adds adapters and a router to the same LoRA. Both are
measured on held-out rows of three domains; the sparse one is exported and opened again in a process that has only transformers.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsmith.app.tuning import Baseline, tune
from sparsmith.app.use import export, report
from sparsmith.durable import read_json
from sparsmith.errors import UsageError
from sparsmith.recipe.schema import DataSettings, EvalSource, ModelSettings, Recipe, TrainSettings, TrainSource

if TYPE_CHECKING:
    from rich.console import Console

STEPS = 240
ROWS = {"train": 9000, "held_out": 300}
LORA: dict[str, Any] = {"r": 8, "alpha": 16, "dropout": 0.0}
SHAPES: dict[str, dict[str, Any]] = {
    "dense LoRA": {"control": "dense_lora"},
    "PESC": {"num_experts": 8, "top_k": 2, "adapter_dim": 32, "adapter_scale": 1.0, "balance_alpha": 0.05},
}


def demo(out: str | Path | None = None, *, console: Console | None = None, steps: int = STEPS) -> dict[str, Any]:
    """Run the demonstration; returns `seconds` and the paths `export` and `report`.

    Args:
        out: a new folder for rows, runs, export and report; absent = the first free one of runs/demo, runs/demo-2, ...
        console: where tables and progress are drawn.
        steps: optimiser steps of each tuning.

    Raises:
        UsageError: the folder is not empty.
    """
    from rich.console import Console

    from sparsmith.crafting.plan import plan_recipe
    from sparsmith.embedded.tasks import DOMAINS, write_jsonl

    console = console or Console()
    folder = Path(out).absolute() if out else _free(Path("runs/demo").absolute())
    if folder.exists() and any(folder.iterdir()):
        raise UsageError(
            str(folder), "a folder that is not empty", "a new folder", "Remove it, or give --out another name."
        )
    begun = time.perf_counter()
    console.rule("sparsmith demo: one dense base, two tunings on the same rows")
    paths = write_jsonl(folder / "rows", seed=7, train=ROWS["train"], held_out=ROWS["held_out"])
    runs: dict[str, Path] = {}
    baseline = None
    for label, shape in SHAPES.items():
        recipe = _recipe(shape, folder / "runs" / label.lower().replace(" ", "-"), paths, DOMAINS, steps)
        console.print()
        console.print(plan_recipe(recipe))
        baseline = baseline or Baseline()
        runs[label] = tune(recipe, console=console, label=label, baseline=baseline)
    export(runs["PESC"], folder / "export")
    page = report(list(runs.values()), folder / "report.html")
    _show(runs, console)
    console.print(
        f"always the most common answer of a task: {_guessing(paths['held_out']):.0%} exact match", highlight=False
    )
    seconds = round(time.perf_counter() - begun, 1)
    return {"seconds": seconds, "export": str(folder / "export"), "report": str(page)}


def _guessing(file: Path) -> float:
    """Exact match of someone who knows of every task only its most common answer: what a tuned model must beat."""
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    answers = {
        task: Counter(row["completion"] for row in rows if row["task"] == task) for task in {r["task"] for r in rows}
    }
    return sum(counter.most_common(1)[0][1] for counter in answers.values()) / len(rows)


def _free(folder: Path) -> Path:
    names = (folder if number == 1 else folder.with_name(f"{folder.name}-{number}") for number in count(1))
    return next(name for name in names if not name.exists() or not any(name.iterdir()))


def _recipe(shape: dict[str, Any], output: Path, rows: dict[str, Path], domains: tuple[str, ...], steps: int) -> Recipe:
    from sparsmith.methods.base import LoraSettings
    from sparsmith.methods.pesc.config import PescConfig

    columns = {"prompt": "prompt", "completion": "completion"}

    def source(domain: str, split: str) -> dict[str, Any]:
        return {
            "name": domain,
            "domain": domain,
            "path": str(rows[split]),
            "columns": columns,
            "where": {"domain": domain},
        }

    return Recipe(
        model=ModelSettings(path="embedded"),
        methods=(PescConfig(lora=LoraSettings(**LORA), **shape),),
        data=DataSettings(
            train=tuple(TrainSource(**source(domain, "train")) for domain in domains),
            eval=tuple(
                EvalSource(**source(domain, "held_out"), metrics=("loss", "exact_match"), max_new_tokens=24)
                for domain in domains
            ),
            max_length=256,
            mixing="balanced",
        ),
        train=TrainSettings(
            steps=steps,
            batch_size=32,
            learning_rate=6e-3,
            schedule="linear",
            warmup=0.08,
            clip=1.0,
            betas=(0.9, 0.95),
            log_every=20,
            eval_every=100,
        ),
        output=str(output),
    )


def _show(runs: dict[str, Path], console: Console) -> None:
    """Table, expert load by domain, samples, proof."""
    from rich.table import Table

    from sparsmith.evaluating import EvalResult, result_table

    results: dict[str, EvalResult] = {}
    for label, run in runs.items():
        evaluation = read_json(run / "eval.json")
        results.setdefault("base", EvalResult.from_json(evaluation["base"]))
        results[label] = EvalResult.from_json(evaluation["tuned"])
    console.print()
    console.print(result_table(results, title="Held-out rows"))
    run = runs["PESC"]
    tables = read_json(run / "tables.json")["pesc"]
    console.print(_load_table(tables))
    samples = Table(title="Three samples", title_justify="left")
    for head in ("domain", "prompt", "reference", "base", "PESC"):
        samples.add_column(head, overflow="fold")
    for sample in read_json(run / "samples.json")[:3]:
        cells = (sample["domain"], sample["prompt"], sample["reference"], sample["base"][:80], sample["tuned"])
        samples.add_row(*(cell.replace("[", r"\[") for cell in cells))
    console.print(samples)
    for phase, checks in read_json(run / "proof.json").items():
        passed = all(check.get("passed", True) for check in checks.values() if isinstance(check, dict))
        passed = passed and checks.get("passed", True)
        console.print(f"proof, {phase}: {'passed' if passed else 'FAILED'}  {checks.get('check', '')}", highlight=False)


def _load_table(tables: dict[str, Any]) -> Any:
    """Share of each domain's token slots that each expert took, mean over the layers."""
    from rich.table import Table

    domains, loads = tables["domains"], tables["load_by_domain"]
    loads = loads.get("load", loads) if isinstance(loads, dict) else loads
    table = Table(title="Expert load by domain (mean over layers; even = 1 / experts)", title_justify="left")
    table.add_column("domain")
    for expert in range(len(loads[0][0])):
        table.add_column(str(expert), justify="right")
    for domain, layers in zip(domains, loads, strict=True):
        means = [sum(layer[e] for layer in layers) / len(layers) for e in range(len(layers[0]))]
        table.add_row(domain, *(f"{share:.1%}" for share in means))
    return table
