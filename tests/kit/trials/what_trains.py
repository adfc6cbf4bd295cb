"""Promise 12: what trains is what was said: as many numbers as planned, each of its tensors reached, every other bit frozen."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainingArguments

import sparsmith as sm
from sparsmith.crafting.apply import check_roles, trained_roles
from sparsmith.crafting.delta import method_state
from tests.kit.cases import Configs, base_config_for, base_for, cases
from tests.kit.rows import RowDataset, pad_rows
from tests.kit.tally import Tally

REACHED_WITHIN = 20


class Reached(TrainerCallback):
    """Notes the step in which each trained tensor first has a gradient that is not zero."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.waiting = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.first: dict[str, int] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for name, parameter in list(self.waiting.items()):
            if parameter.grad is not None and bool(parameter.grad.any()):
                self.first[name] = state.global_step + 1
                del self.waiting[name]


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


def run(folder: Path) -> Tally:
    """At full size: every method on every family."""
    return trial(folder)


def trial(
    folder: Path,
    of: Iterable[tuple[str, Configs, str]] | None = None,
    steps: int = 50,
    within: int = REACHED_WITHIN,
) -> Tally:
    """Tune each case for `steps` steps and look at every tensor of the model."""
    tally, latest = Tally(), 0
    for number, (what, config, family) in enumerate(of if of is not None else cases()):
        plan = sm.plan(base_config_for(config, family), config)
        model = sm.craft(base_for(config, family), config, seed=number, proof=False)
        named = [name for tensors in trained_roles(model).values() for name, _ in tensors]
        flagged = [name for name, p in model.named_parameters() if p.requires_grad]
        counted = sum(p.numel() for p in model.parameters() if p.requires_grad)
        before = {name: digest(t) for name, t in model.state_dict().items()}
        places = {p.data_ptr() for p in model.parameters() if p.requires_grad}
        to_move = sorted(
            name for name, t in model.state_dict().items() if t.data_ptr() in places
        )  # tied ones by both names
        reached = Reached(model)
        _tune(model, folder / str(number), steps, reached)
        after = {name: digest(t) for name, t in model.state_dict().items()}
        records = (
            method_state(model).keys() - dict(model.named_parameters()).keys()
        )  # what a method writes down moves too
        moved = sorted(name for name in before.keys() - records if before[name] != after[name])
        latest = max([latest, *reached.first.values()])
        late = [name for name, step in reached.first.items() if step > within] + list(reached.waiting)
        faults = {
            f"{counted:,} trained numbers, {plan.trained_params:,} planned": counted == plan.trained_params,
            "roles are not what is trained": sorted(named) == sorted(flagged) and check_roles(model) == plan.trained,
            f"no gradient within {within} steps: {late}": not late,
            f"what moved is not what trains: {sorted(set(moved) ^ set(to_move))}": moved == to_move,
        }
        tally.case(all(faults.values()), f"{what}: {'; '.join(text for text, held in faults.items() if not held)}")
    tally.figures["last step in which a tensor got its first gradient"] = latest
    return tally


def _tune(model: Any, folder: Path, steps: int, reached: Reached) -> None:
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=1000,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    tuner = sm.Tuner(
        model=model,
        args=args,
        train_dataset=RowDataset(4 * steps),
        data_collator=pad_rows,
        callbacks=[reached],
        moved_after=None,
    )
    tuner.train()
