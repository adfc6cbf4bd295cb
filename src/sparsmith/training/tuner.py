"""The Tuner: the transformers Trainer over an `Objective`. The only Trainer subclass; everything else is a callback."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, TrainerState
from transformers.trainer_utils import TrainOutput

from sparsmith import durable, ranks
from sparsmith.crafting.checkpoint import save
from sparsmith.crafting.delta import fill_delta
from sparsmith.crafting.gathered import reshard
from sparsmith.crafting.record import record_of
from sparsmith.errors import CheckpointError
from sparsmith.training import sharding, shards
from sparsmith.training.callbacks.guard import Guard
from sparsmith.training.callbacks.health import Health
from sparsmith.training.callbacks.proof import RolesMove
from sparsmith.training.callbacks.saving import Saving
from sparsmith.training.callbacks.streams import Streams
from sparsmith.training.groups import own_rates
from sparsmith.training.objective import Objective
from sparsmith.training.saves import folder_of, latest, prune, step_of
from sparsmith.training.state import TREE, parameter_names, read_state, state_bytes, write_state, write_tree
from sparsmith.training.window import Window

MODEL_FOLDER, TRAINER_STATE = "model", "trainer_state.json"
"""In a run's checkpoint: the folder of the delta, and the Trainer's own record."""


class Tuner(Trainer):
    """Tune a crafted model.

    Args:
        model: from `sparsmith.craft`.
        args: as for the Trainer. Rows must reach the collator untouched, so `remove_unused_columns` is switched off.
        train_dataset: rows, or `LoadedData.train`, whose order is already the seeded one.
        data_collator: makes a batch with `input_ids`, `labels` and, where known, `token_mask`, `position_ids`, `domain`.
        domains: names of the domains, for losses by domain.
        moved_after: optimiser steps after which every trained role must have changed; None = do not prove it.
        proven: called with the proof's record.
        save_at_end: write a checkpoint after the last step even where `args` ask for none.
        callbacks: further callbacks.
        kwargs: anything else that the Trainer takes.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments | None = None,
        train_dataset: Any = None,
        data_collator: Callable[..., Any] | None = None,
        *,
        domains: Sequence[str] = (),
        moved_after: int | None = 20,
        proven: Callable[[dict[str, Any]], None] | None = None,
        save_at_end: bool = False,
        callbacks: list[TrainerCallback] | None = None,
        **kwargs: Any,
    ) -> None:
        record = record_of(model)
        args = args or TrainingArguments(output_dir="sparsmith-tuner")
        args.remove_unused_columns = False
        # the Trainer would replace a NaN loss by the running mean; here it stops the run
        args.logging_nan_inf_filter = False
        if args.ddp_find_unused_parameters is None:
            args.ddp_find_unused_parameters = any(method.leaves_idle(config) for method, config in record.parts)
        if getattr(train_dataset, "ordered", False):
            args.train_sampling_strategy = "sequential"
        self.parts = record.parts
        self.window = Window(tuple(domains))
        self.health = Health(model)
        self.roles_move = RolesMove(model, moved_after, proven) if moved_after is not None else None
        self.guard = Guard(model, getattr(train_dataset, "place", None))
        own: list[TrainerCallback] = [Streams(), self.guard, self.health, Saving(save_at_end)]
        own += [self.roles_move] if self.roles_move else []
        super().__init__(
            model=Objective(model, domains=len(domains)),
            args=args,
            train_dataset=train_dataset,
            data_collator=data_collator,
            callbacks=own + (callbacks or []),
            **kwargs,
        )
        self.remove_callback(PrinterCallback)
        self.guard.attach(self)
        self.sharded = self.is_fsdp_enabled = sharding.set_up(self.accelerator, model)
        if self.is_deepspeed_enabled:
            sharding.check_deepspeed(self.accelerator, saves=self.args.save_strategy != "no")
        self.crafted: Any = model
        self._logged_at = 0
        self._begun = time.perf_counter()
        self._before = {"seconds": 0.0, "tokens": 0}

    @property
    def spent(self) -> dict[str, Any]:
        """`seconds` and `tokens` of training up to the last log line, those before a resume included."""
        return {
            "seconds": self._before["seconds"] + time.perf_counter() - self._begun,
            "tokens": self._before["tokens"] + self.window.tokens_seen,
        }

    def train(  # type: ignore[override]
        self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any
    ) -> TrainOutput:
        """The Trainer's own; `True` takes the newest checkpoint whose every byte is as written.

        Raises:
            CheckpointError: the checkpoint is damaged, or none is whole.
        """
        if resume_from_checkpoint is True:
            found = latest(str(self.args.output_dir), lambda fault: print(f"warning: {fault}"))
            if found is None:
                where = str(self.args.output_dir)
                raise CheckpointError(where, "no whole checkpoint", "one to resume from", "Start without resuming.")
            resume_from_checkpoint = str(found)
        self._begun = time.perf_counter()
        if isinstance(resume_from_checkpoint, str):
            checkpoint = Path(resume_from_checkpoint)
            durable.verify_folder(checkpoint)
            record = _record(checkpoint)
            self._logged_at = record.global_step
            if 0 < self.args.max_steps <= record.global_step:
                return self._take_up_the_end(checkpoint, record)
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def _take_up_the_end(self, checkpoint: Path, record: TrainerState) -> TrainOutput:
        """A checkpoint of the last step needs no training, only its weights and its record."""
        self._load_from_checkpoint(str(checkpoint))
        self.state = record
        self._read_state(checkpoint, None)
        sharding.for_reading(self.crafted)
        self._begun = time.perf_counter()
        return TrainOutput(self.state.global_step, float("nan"), {})

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> Any:
        """accelerate wraps the forward of a model in autocast, but not where it shards it."""
        return self.accelerator.autocast() if self.sharded else super().autocast_smart_context_manager(cache_enabled)

    def create_optimizer(self, model: Any = None) -> Any:
        """The Trainer's own; roles with a rate of their own are groups of their own, without weight decay."""
        optimizer = super().create_optimizer(model)
        own_rates(optimizer, self.crafted, self.parts)
        return optimizer

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The Trainer's own, with the named terms kept for the log."""
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        if outputs["loss"].requires_grad:
            self.window.add(outputs)
        return (loss, {"loss": outputs["loss"]}) if return_outputs else loss

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        self.guard.keep(inputs, num_items_in_batch)
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.guard.saw(loss)
        for method, config in self.parts:
            method.after_forward(self.crafted, config)
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The Trainer's own, seen by the guard: after this the gradient is clipped and a NaN has spread everywhere."""
        self.guard.norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        return self.guard.norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add terms, losses by domain, speed and health to the Trainer's line, flat, so that every tracker gets them."""
        if "loss" in logs:
            figures = self.window.take(self.state.global_step - self._logged_at)
            self._logged_at = self.state.global_step
            health = self.health.take()
            logs["tokens_per_second"] = figures["tokens_per_second"]
            logs.update({f"term/{name}": value for name, value in figures["terms"].items()})
            logs.update({f"domain/{name}": value for name, value in figures.get("domain_loss", {}).items()})
            logs.update({f"health/{name}": value for name, value in health.items()})
        super().log(logs, start_time)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Trained tensors of every role, in the delta format; the base is not written again."""
        if self.args.should_save:
            save(self.crafted, Path(output_dir or self.args.output_dir or ".") / MODEL_FOLDER)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """One folder with everything that a resume needs: whole and in its place, or not there."""
        if (
            self.is_deepspeed_enabled
        ):  # refused at the start where the recipe asks for it; the end of a run is not saved
            return
        reshard(self.crafted)
        root = Path(str(self.args.output_dir))
        parts = {name: part.state_dict() for name, part in self._stateful().items()}
        needed = state_bytes(parts["optimizer"]) + sum(p.nbytes for p in self.crafted.parameters() if p.requires_grad)
        with self._new_folder(folder_of(root, self.state.global_step), needed) as folder:
            if self.sharded:
                tensors = write_tree(folder, parts, names=self._names(), facts=self.spent)
                shards.write_checkpoint(folder, self.crafted, tensors)
            elif self.args.should_save:
                save(self.crafted, folder / MODEL_FOLDER)
                write_state(folder, parts, names=self._names(), facts=self.spent)
            if self.args.should_save:
                self.state.save_to_json(str(folder / TRAINER_STATE))
        if self.args.should_save:
            prune(root, self.args.save_total_limit)
        ranks.wait()

    @contextmanager
    def _new_folder(self, target: Path, needed: int) -> Iterator[Path]:
        """The first rank's durable folder, in which the others may write too."""
        if self.args.should_save:
            with durable.durable_folder(target, replace=True, needed=needed) as folder:
                ranks.tell(str(folder))
                yield folder
                ranks.wait()
        else:
            yield Path(ranks.tell(""))
            ranks.wait()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Strictly, into the crafted model that is already built; each rank takes what it holds."""
        checkpoint = Path(resume_from_checkpoint)
        if shards.is_sharded_checkpoint(checkpoint):
            shards.fill_model(self.crafted, checkpoint)
        else:
            fill_delta(self.crafted, checkpoint / MODEL_FOLDER)

    def _read_state(self, checkpoint: Path, names: list[str] | None) -> dict[str, Any]:
        moved = [p for group in self.optimizer.param_groups for p in group["params"]] if self.optimizer else []
        parts, self._before = read_state(checkpoint, names=names, read=shards.optimizer_reader(moved))
        return parts

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """From safetensors and JSON; the parameters' names must be the same, in the same order."""
        if checkpoint is None:
            return
        parts = self._read_state(Path(checkpoint), self._names())
        for name, part in self._stateful().items():
            if name in parts:
                try:
                    part.load_state_dict(parts[name])
                except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
                    raise _no_state(
                        Path(checkpoint) / TREE, f"a state that the {name} cannot take ({error})"
                    ) from error

    def _stateful(self) -> dict[str, Any]:
        """What holds a state between steps, by its name in a checkpoint."""
        scaler = getattr(self.accelerator, "scaler", None)
        found = {"optimizer": self.optimizer, "schedule": self.lr_scheduler, "scaler": scaler}
        return {name: part for name, part in found.items() if part is not None}

    def _names(self) -> list[str]:
        return parameter_names(self.crafted, self.optimizer)

    def _load_scaler(self, checkpoint: str | None) -> None:
        """Read with the optimiser."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Nothing to read: every step starts its generators itself (`Streams`)."""


def _record(checkpoint: Path) -> TrainerState:
    """The Trainer's own record, which must be of the step in the folder's name."""
    file = durable.inside(checkpoint, TRAINER_STATE)
    data = durable.read_json(file)
    try:
        record = TrainerState(**data)
        known = isinstance(record.global_step, int) and step_of(checkpoint) in (-1, record.global_step)
    except TypeError as error:
        raise _no_state(file, f"no record of a Trainer ({error})") from error
    if not known:
        raise _no_state(file, f"a record of step {record.global_step}")
    return record


def _no_state(file: Path, found: str) -> CheckpointError:
    return CheckpointError(str(file), found, "the file as this run wrote it", "Take an earlier checkpoint.")
