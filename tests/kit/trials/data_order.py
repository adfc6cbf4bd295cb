"""Promise 7: a resumed run meets the rows that the uncut one meets, in the same order, whatever the sizes, the packing and the mixture."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

import sparsmith as sm
from sparsmith.crafting.base_model import load_tokenizer
from sparsmith.data import Collator, load_data
from sparsmith.recipe.schema import DataSettings, ModelSettings
from sparsmith.training import Tuner
from sparsmith.training.saves import folder_of
from tests.kit.evalsets import char_tokenizer
from tests.kit.pico import pico_model
from tests.kit.tally import Tally

COLUMNS = {"prompt": "p", "completion": "c"}


class OrderTuner(Tuner):
    """Goes through the real loop, loader, saves and resume, and notes the rows instead of computing on them."""

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        self.seen.append((self.state.global_step, inputs["sample_ids"].tolist()))
        return torch.zeros(())

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self.state.global_step == self.args.save_steps:  # the other ones would not be read
            super()._save_checkpoint(model, trial)

    seen: list[tuple[int, list[int]]]


def run(folder: Path) -> Tally:
    """At full size."""
    return order_trial(folder, cases=1000)


def order_trial(folder: Path, *, cases: int, seed: int = 0) -> Tally:
    """Random sizes, batch, accumulation, epochs or steps, packing and mixture; cut at a random save; streams of sample ids compared."""
    folder.mkdir(parents=True, exist_ok=True)
    char_tokenizer().save_pretrained(folder / "tokenizer")
    tokenizer = load_tokenizer(ModelSettings(path=str(folder / "tokenizer")))
    model = sm.craft(pico_model(), sm.PescConfig(num_experts=2, top_k=1, adapter_dim=8), seed=0)
    tally = Tally()
    for case in range(cases):
        stream = random.Random(f"{seed}-{case}")
        settings, micro, accumulation, length = _drawn(folder, stream)
        steps = stream.randint(2, 8)
        given = {"rows_needed": steps * micro * accumulation} if length is None else {"epochs": length}
        data = load_data(settings, tokenizer, seed=stream.randrange(1000), base_dir=folder, **given)
        if length is not None:
            while len(data.train) < micro * accumulation:
                micro, accumulation = (micro - 1, accumulation) if micro > 1 else (micro, accumulation - 1)
            steps = len(data.train) // (micro * accumulation)
        cut = stream.randint(1, max(1, steps - 1))
        collator = Collator.of(settings, tokenizer, model.config)
        given = {"model": model, "data": data, "collator": collator, "micro": micro, "accumulation": accumulation}
        whole = _run(folder / "whole", steps, cut, None, **given)
        rest = _run(folder / "rest", steps, cut, folder_of(folder / "whole", cut), **given)
        wanted = [entry for entry in whole if entry[0] >= cut]
        enough = len(whole) == steps * accumulation
        what = f"case {case}: {steps} steps of {accumulation} x {micro}, cut at {cut}, {len(whole)} and {len(rest)} micro-batches"
        tally.case(enough and rest == wanted, what)
    return tally


def _run(root: Path, steps: int, cut: int, resume: Path | None, *, model: Any, data: Any, **given: Any) -> list[Any]:
    shutil.rmtree(root, ignore_errors=True)
    args = TrainingArguments(
        output_dir=str(root),
        max_steps=steps,
        per_device_train_batch_size=given["micro"],
        gradient_accumulation_steps=given["accumulation"],
        save_strategy="steps",
        save_steps=cut,
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        train_sampling_strategy="sequential",
    )
    tuner = OrderTuner(
        model=model, args=args, train_dataset=data.train, data_collator=given["collator"], moved_after=None
    )
    tuner.seen = []
    tuner.train(resume_from_checkpoint=None if resume is None else str(resume))
    return tuner.seen


def _drawn(folder: Path, stream: random.Random) -> tuple[DataSettings, int, int, float | None]:
    """(data settings over new files, rows per micro-batch, micro-batches per step, epochs or None for a number of steps)."""
    sources = []
    for name in "abc"[: stream.randint(1, 3)]:
        rows = [{"p": f"{name} {i} ", "c": "x" * stream.randint(1, 12)} for i in range(stream.randint(1, 30))]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        source = {"name": name, "domain": stream.choice("de"), "path": f"{name}.jsonl", "columns": COLUMNS}
        sources.append({**source, "rate": stream.choice([0.5, 1.0, 3.0])})
    settings = {
        "train": sources,
        "template": "{prompt}",
        "max_length": stream.choice([32, 48]),
        "packing": stream.random() < 0.5,
        "mixing": stream.choice(["sizes", "rates", "balanced"]),
        "workers": 1,
        "cache": str(folder / "cache"),
    }
    epochs = stream.choice([None, 1.0, 2.0, 1.5])
    return DataSettings.model_validate(settings), stream.randint(1, 3), stream.randint(1, 3), epochs
