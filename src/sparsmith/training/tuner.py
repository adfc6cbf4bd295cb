"""The Tuner: the transformers Trainer over an `Objective`. The only Trainer subclass; everything else is a callback."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from sparsmith.crafting.checkpoint import save
from sparsmith.crafting.delta import fill_delta
from sparsmith.crafting.record import record_of
from sparsmith.errors import ProofError
from sparsmith.training.callbacks.health import Health
from sparsmith.training.callbacks.proof import RolesMove
from sparsmith.training.objective import Objective
from sparsmith.training.window import Window

MODEL_FOLDER = "model"
"""Folder of the delta inside a trainer checkpoint."""


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
        callbacks: list[TrainerCallback] | None = None,
        **kwargs: Any,
    ) -> None:
        record = record_of(model)
        args = args or TrainingArguments(output_dir="sparsmith-tuner")
        args.remove_unused_columns = False
        # the Trainer would replace a NaN loss by the running mean; here it stops the run
        args.logging_nan_inf_filter = False
        if getattr(train_dataset, "ordered", False):
            args.train_sampling_strategy = "sequential"
        self.parts = record.parts
        self.window = Window(tuple(domains))
        self.health = Health(model)
        self.roles_move = RolesMove(model, moved_after, proven) if moved_after is not None else None
        own: list[TrainerCallback] = [self.health, *([self.roles_move] if self.roles_move else [])]
        super().__init__(
            model=Objective(model, domains=len(domains)),
            args=args,
            train_dataset=train_dataset,
            data_collator=data_collator,
            callbacks=own + (callbacks or []),
            **kwargs,
        )
        self.remove_callback(PrinterCallback)
        self.crafted: Any = model
        self._logged_at = 0

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
            if not torch.isfinite(loss):
                raise ProofError(
                    f"step {self.state.global_step + 1}",
                    f"a loss of {loss.item()}",
                    "a finite loss",
                    "Lower the learning rate, or look at the rows of this step; the optimiser has not moved.",
                )
            self.window.add(outputs)
        return (loss, {"loss": outputs["loss"]}) if return_outputs else loss

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        for method, config in self.parts:
            method.after_forward(self.crafted, config)
        return loss

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

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Strictly, into the crafted model that is already built."""
        fill_delta(self.crafted, Path(resume_from_checkpoint) / MODEL_FOLDER)
