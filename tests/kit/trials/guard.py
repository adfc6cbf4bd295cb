"""Promise 5: a NaN or an infinity, planted in a running tuning, stops it before the optimiser moves, and is on no disk."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainingArguments

import sparsmith as sm
from sparsmith.crafting.apply import trained_roles
from sparsmith.crafting.tensors import content_hash
from sparsmith.errors import ProofError
from sparsmith.methods.base import LoraSettings
from sparsmith.seeds import numpy_generator
from tests.kit.cases import base_for
from tests.kit.rows import RowDataset, pad_rows
from tests.kit.tally import Tally

VALUES = {"nan": float("nan"), "inf": float("inf")}
ROWS, MICRO, STEPS, SAVE_EVERY = 4, 2, 50, 5


class NumberedRows(RowDataset):
    """Rows that know their number and their place."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**super().__getitem__(index), "sample_ids": index}

    @staticmethod
    def place(sample_id: int) -> str:
        return f"rows.jsonl:{sample_id + 1}"


def numbered_batch(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {**pad_rows(rows), "sample_ids": torch.tensor([row["sample_ids"] for row in rows])}


PESC = sm.PescConfig(num_experts=4, top_k=2, adapter_dim=8, path="masked", lora=LoraSettings(r=4, dropout=0.1))


def pesc_tuner(
    folder: Path, callbacks: list[TrainerCallback], steps: int = STEPS, config: Any = PESC, **changes: Any
) -> sm.Tuner:
    """A method (PESC with LoRA and its dropout) on a pico model; 2 micro-batches of 2 rows, a checkpoint each 5 steps."""
    settings: dict[str, Any] = {
        "max_steps": steps,
        "per_device_train_batch_size": MICRO,
        "gradient_accumulation_steps": ROWS // MICRO,
        "learning_rate": 5e-3,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.3,
        "logging_steps": 1000,
        "save_strategy": "steps",
        "save_steps": SAVE_EVERY,
        "save_total_limit": 2,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
        **changes,
    }
    return sm.Tuner(
        model=sm.craft(base_for(config, "llama"), config, seed=3, proof=False),
        args=TrainingArguments(output_dir=str(folder), **settings),
        train_dataset=NumberedRows(STEPS * ROWS),
        data_collator=numbered_batch,
        callbacks=callbacks,
    )


class Hashes(TrainerCallback):
    """The trained weights' hash after every step, from step 0."""

    def __init__(self) -> None:
        self.model: Any = None
        self.after: list[str] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.after.append(weights_hash(self.model))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.after.append(weights_hash(self.model))


def weights_hash(model: nn.Module) -> str:
    return content_hash(pair for role in trained_roles(model).values() for pair in role)


class Plant(TrainerCallback):
    """Arms at the beginning of a step; `now(micro)` is true in its chosen micro-batch."""

    def __init__(self, step: int, micro: int, at_begin: Callable[[], None] | None = None) -> None:
        self.step, self.micro, self.at_begin = step, micro, at_begin
        self.armed = False
        self.undo: Callable[[], None] = lambda: None
        self.ids: list[int] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.armed = state.global_step + 1 == self.step
        if self.armed and self.at_begin is not None:
            self.at_begin()

    def sees(self, objective: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Pre-hook of the objective: which rows are being computed."""
        self.ids = kwargs["sample_ids"].tolist()

    def now(self) -> bool:
        start = (self.step - 1) * ROWS + self.micro * MICRO
        return self.armed and self.ids == list(range(start, start + MICRO))


def plant_loss(tuner: sm.Tuner, plant: Plant, value: float, layer: int) -> tuple[str, ...]:
    """The objective's loss is multiplied by the value."""

    def spoil(module: nn.Module, args: Any, output: dict[str, Any]) -> dict[str, Any] | None:
        return {**output, "loss": output["loss"] * value} if plant.now() else None

    tuner.model.register_forward_hook(spoil)
    return ("objective",)


def plant_gradient(tuner: sm.Tuner, plant: Plant, value: float, layer: int) -> tuple[str, ...]:
    """The gradient of a LoRA tensor is replaced, the loss stays finite."""
    tensors = [pair for pair in trained_roles(tuner.crafted)["lora"] if f"layers.{layer}." in pair[0]]
    name, parameter = tensors[plant.step % len(tensors)]
    parameter.register_hook(lambda grad: torch.full_like(grad, value) if plant.now() else None)
    return (name.rpartition(".")[0],)


def plant_router(tuner: sm.Tuner, plant: Plant, value: float, layer: int) -> tuple[str, ...]:
    """The router's logits, as an overflowing product would leave them."""
    name = f"base.model.layers.{layer}.mlp.pesc.router"

    def spoil(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor | None:
        return output + value if plant.now() else None

    tuner.crafted.get_submodule(name).register_forward_hook(spoil)
    return (name,)


def plant_adapter(tuner: sm.Tuner, plant: Plant, value: float, layer: int) -> tuple[str, ...]:
    """One number of an adapter's weights, of an expert that the step's tokens may well not choose."""
    name = f"base.model.layers.{layer}.mlp.pesc"
    adapters: Any = tuner.crafted.get_submodule(name)
    part = ("down", "up")[plant.step % 2]

    number = getattr(adapters, part).data[plant.step % 4, 0]

    def spoil() -> None:
        plant.undo = partial(number.__setitem__, 0, number[0].clone())
        number[0] = value

    plant.at_begin = spoil
    return (name,)


PLANTS = {"loss": plant_loss, "gradient": plant_gradient, "router": plant_router, "adapter": plant_adapter}


def planted_run(folder: Path, where: str, step: int, value: float) -> tuple[sm.Tuner, Plant, tuple[str, ...], Any]:
    """Run with the plant; the last is what stopped it, or None."""
    plant, hashes = Plant(step, micro=step % 2), Hashes()
    tuner = pesc_tuner(folder, [plant, hashes])
    hashes.model = tuner.crafted
    tuner.model.register_forward_pre_hook(plant.sees, with_kwargs=True)
    modules = PLANTS[where](tuner, plant, value, layer=step % 2)
    try:
        tuner.train()
    except ProofError as stop:
        return tuner, plant, modules, (stop, hashes)
    return tuner, plant, modules, None


def good_hashes(folder: Path, steps: int) -> list[str]:
    """After every step of the run that nobody spoils."""
    hashes = Hashes()
    tuner = pesc_tuner(folder / "good", [hashes], steps, save_strategy="no")
    hashes.model = tuner.crafted
    tuner.train()
    return hashes.after


def tensors_on_disk(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor in every file below the folder that can hold one."""
    from safetensors.torch import load_file

    for file in sorted(folder.rglob("*")):
        if file.suffix == ".safetensors":
            yield from ((f"{file.name}: {name}", tensor) for name, tensor in load_file(file).items())
        elif file.suffix in (".pt", ".pth", ".bin"):
            yield from (
                (f"{file.name}: {name}", tensor) for name, tensor in _inside(torch.load(file, weights_only=False))
            )


def _inside(value: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _inside(inner, f"{name}.{key}")
    elif isinstance(value, (list, tuple)):
        for index, inner in enumerate(value):
            yield from _inside(inner, f"{name}.{index}")


def faults(folder: Path, where: str, step: int, kind: str, good: list[str]) -> list[str]:
    """What of the promise one planted run did not keep."""
    tuner, plant, modules, stopped = planted_run(folder, where, step, VALUES[kind])
    if stopped is None:
        return ["it went on"]
    stop, hashes = stopped
    start = (step - 1) * ROWS + (plant.micro * MICRO if where != "adapter" else 0)
    told = [int(one) for one in re.findall(r"samples ([\d, ]+)", stop.found)[0].replace(" ", "").split(",") if one]
    module = re.search(r"first bad module `([^`]*)`", stop.found)
    plant.undo()
    now = weights_hash(tuner.crafted)
    on_disk = list(tensors_on_disk(folder))
    checks = {
        "another step": stop.where == f"step {step}",
        # a spoilt weight meets the first micro-batch first
        f"samples {told}, not from {start}": told == list(range(start, start + MICRO)),
        "no place": f"rows.jsonl:{told[0] + 1}" in stop.found,
        f"module {module and module[1]}, not {modules}": bool(module) and module[1] in modules,
        "another exit code": stop.exit_code == 8,
        "another past": hashes.after == good[:step],
        "weights that moved": now == good[step - 1],
        "no checkpoint to look at": bool(on_disk) or step <= SAVE_EVERY,
        "a number on disk": all(bool(t.isfinite().all()) for _, t in on_disk if t.is_floating_point()),
    }
    return [what for what, held in checks.items() if not held]


def run(folder: Path) -> Tally:
    """At full size: 50 runs for each place."""
    return trial(folder)


def trial(folder: Path, count: int = 50, last: int = STEPS, places: tuple[str, ...] = tuple(PLANTS)) -> Tally:
    """`count` runs for each place, NaN and infinity by turns, each at another one of the first `last` steps."""
    tally = Tally()
    good = good_hashes(folder, last)
    tally.case(len(set(good)) == last + 1, "the run that nobody spoils does not train")
    chosen = numpy_generator(5, "trial.guard").permutation(last)[:count] + 1
    for place in places:
        for index, step in enumerate(map(int, chosen)):
            kind = ("nan", "inf")[index % 2]
            said = faults(folder / f"{place}-{step}", place, step, kind, good)
            tally.case(not said, f"{kind} in {place} at step {step}: {', '.join(said)}")
    tally.figures["runs"] = dict.fromkeys(places, count)
    return tally
