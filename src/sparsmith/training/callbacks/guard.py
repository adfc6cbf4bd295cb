"""The guard: nothing that is not finite reaches the optimiser.

One look per optimiser step, after the last backward and before the optimiser moves, at three numbers that together see everything:
the sum of the losses of the step's micro-batches (their terms are part of it), the norm of the whole gradient (the Trainer has it
already), and the largest magnitude among the trained parameters (a NaN may lie where no token of this step passes). They are read with
one wait for the device. Price: one pass over the trained parameters; the optimiser's own step makes several.

A look that fails is explained before the run stops: the step's micro-batches, kept by reference, are computed again with their own random
numbers (see `diagnosis.py`). On several ranks the look is shared, so that all stop in the same step with the same words.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, distributed, nn
from transformers import TrainerCallback

from sparsmith.errors import ProofError
from sparsmith.ops.balance import several_ranks
from sparsmith.ops.shards import part, whole
from sparsmith.training import diagnosis
from sparsmith.training.diagnosis import Finding

MAX_SKIPPED = 20
"""Steps in a row whose gradients a float16 loss scale may overflow: the scale halves each time, 2^20 lies between any two sane scales."""
_SHOWN_IDS, _SHOWN_PLACES = 32, 4
_KINDS = ("loss", "gradient norm", "parameter")


@dataclass(frozen=True)
class MicroBatch:
    """What is needed to compute a micro-batch again."""

    inputs: dict[str, Any]
    num_items: Any
    random: tuple[Tensor, list[Tensor]]
    """States of the CPU's and the devices' generators before its forward."""


class Guard(TrainerCallback):
    """Stops a run before a NaN or an infinity is learned.

    Args:
        model: the crafted model.
        place: `file:line` of a sample id, where the rows know theirs.
    """

    def __init__(self, model: nn.Module, place: Callable[[int], str] | None = None) -> None:
        self._model, self._place = model, place
        self._trained: list[Tensor] = []
        self._micro: list[MicroBatch] = []
        self._losses: list[Tensor] = []
        self._skipped = 0
        self._trainer: Any = None
        self.norm: Tensor | float | None = None
        """The gradient's norm before clipping, as the Trainer measured it for this step."""

    def attach(self, trainer: Any) -> None:
        """Hand over the trainer whose objective and accelerator compute a micro-batch again."""
        self._trainer = trainer

    def keep(self, inputs: dict[str, Any], num_items: Any) -> None:
        """Remember a micro-batch before its forward; no copies."""
        devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        self._micro.append(MicroBatch(inputs, num_items, (torch.get_rng_state(), devices)))

    def saw(self, loss: Tensor) -> None:
        """Remember a micro-batch's loss; not read yet."""
        self._losses.append(loss.detach())

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._micro, self._losses, self._skipped = [], [], 0
        # only now: sharding puts other parameters in the place of those that crafting made
        self._trained = [p for p in self._model.parameters() if p.requires_grad]
        self._check_parameters(f"step {state.global_step}, before training")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Where no next step looks before the weights are written."""
        if control.should_save or state.global_step >= state.max_steps:
            self._check_parameters(f"step {state.global_step}, after the optimiser moved", trained_only=True)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        micro, losses, norm = self._micro, self._losses, self.norm
        self._micro, self._losses, self.norm = [], [], None
        if norm is None:  # a Trainer that did not measure it
            norm = torch.nn.utils.get_total_norm([p.grad for p in self._trained if p.grad is not None])
        bad = self._look(losses, norm)
        if bad == ["gradient norm"] and self._scaler is not None:
            self._skipped += 1  # the scaler will skip this step and lower its scale
            if self._skipped < MAX_SKIPPED:
                return
        elif not bad:
            self._skipped = 0
            return
        raise self._fault(state.global_step + 1, bad, micro, losses, norm)

    @property
    def _scaler(self) -> Any:
        return getattr(getattr(self._trainer, "accelerator", None), "scaler", None)

    @torch.no_grad()
    def _look(self, losses: list[Tensor], norm: Tensor | float) -> list[str]:
        """The kinds that are not finite; on several ranks, on any of them."""
        device = losses[0].device if losses else None
        held = [p for p in map(part, self._trained) if p.numel()]
        figures = [
            torch.stack([loss.float() for loss in losses]).sum() if losses else torch.zeros(()),
            _figure(norm),
            torch.nn.utils.get_total_norm(held, norm_type=float("inf")),
        ]
        bad = torch.stack([~torch.isfinite(figure.to(device)) for figure in figures]).int()
        if several_ranks():
            distributed.all_reduce(bad, distributed.ReduceOp.MAX)
        return [kind for kind, found in zip(_KINDS, bad.tolist(), strict=True) if found]

    def _check_parameters(self, where: str, trained_only: bool = False) -> None:
        here = diagnosis.bad_parameter(self._model, trained_only=trained_only)
        found = next(filter(None, _shared(here)), None)
        if found is not None:
            raise ProofError(
                where, str(found), "finite numbers", "Take an earlier checkpoint, or a base that is whole."
            )

    def _fault(self, step: int, bad: list[str], micro: list[MicroBatch], losses: list[Tensor], norm: Any) -> ProofError:
        found = self._find(micro)
        said = {
            "loss": f"a loss of {sum(loss.item() for loss in losses)}",
            "gradient norm": f"a gradient of norm {_figure(norm).item()}",
        }
        heads = " and ".join(said.get(kind, "a trained parameter that is not finite") for kind in bad)
        told = _shared((found, f"{heads}; {self._told(found, micro)}"))
        rank = next((number for number, (one, _) in enumerate(told) if one is not None), 0)
        found, text = told[rank]
        text = f"on rank {rank} {text}" if len(told) > 1 else text
        return ProofError(f"step {step}", text, "finite numbers", self._mend(found))

    def _mend(self, found: Finding | None) -> str:
        if self._scaler is not None and self._skipped >= MAX_SKIPPED:
            advice = f"The loss scale has failed {MAX_SKIPPED} steps in a row: use train.precision bfloat16 or float32."
        elif found is None:
            advice = "Resume from the last checkpoint; if it stops elsewhere then, doubt the memory or the accelerator."
        else:
            advice = "Look at these rows, lower train.learning_rate or train.clip, or use a wider train.precision."
        return f"{advice} The optimiser has not moved, and no checkpoint holds such a number."

    def _find(self, micro: list[MicroBatch]) -> Finding | None:
        """The first bad place. Every rank runs the same number of forwards and backwards, whatever it finds."""
        parameter = diagnosis.bad_parameter(self._model)
        try:
            self._trainer.model.zero_grad()
            forward = self._first(micro, lambda one: diagnosis.bad_forward(self._model, lambda: self._forward(one)))
            if parameter is not None and forward is not None:
                parameter = replace(parameter, micro_batch=forward.micro_batch)
            if any(_shared(parameter or forward)):
                return parameter or forward
            backward = self._first(micro, lambda one: diagnosis.bad_backward(self._model, lambda: self._backward(one)))
            return backward if any(_shared(backward)) else diagnosis.overflown_gradient(self._model)
        except RuntimeError:  # the second computation may fail as the machine does; the run stops either way
            return parameter
        finally:
            self._trainer.model.zero_grad()

    @staticmethod
    def _first(micro: list[MicroBatch], look: Callable[[MicroBatch], Finding | None]) -> Finding | None:
        looks = [look(one) for one in micro]
        return next((replace(one, micro_batch=index) for index, one in enumerate(looks) if one is not None), None)

    def _forward(self, one: MicroBatch) -> dict[str, Any]:
        torch.set_rng_state(one.random[0])
        if one.random[1]:
            torch.cuda.set_rng_state_all(one.random[1])
        trainer = self._trainer
        inputs = trainer._prepare_inputs(one.inputs)
        with trainer.compute_loss_context_manager():
            return trainer.model(**inputs, num_items_in_batch=one.num_items)

    def _backward(self, one: MicroBatch) -> None:
        loss = self._forward(one)["loss"]
        scaler = self._scaler
        (loss if scaler is None else scaler.scale(loss)).backward()

    def _told(self, found: Finding | None, micro: list[MicroBatch]) -> str:
        """The finding and the samples of its micro-batch; of the whole step where it cannot be told."""
        if found is None:
            place, rows = "it did not come back when the step was computed again", micro
        else:
            place, rows = str(found), micro[found.micro_batch : found.micro_batch + 1]
        ids = [int(one) for row in rows if "sample_ids" in row.inputs for one in row.inputs["sample_ids"].tolist()]
        return f"{place}; {self._samples(ids)}"

    def _samples(self, ids: list[int]) -> str:
        if not ids:
            return "its rows carry no sample ids"
        text = "samples " + ", ".join(map(str, ids[:_SHOWN_IDS]))
        text += f" and {len(ids) - _SHOWN_IDS} more" if len(ids) > _SHOWN_IDS else ""
        if self._place is not None:
            places = [self._place(one) for one in ids[:_SHOWN_PLACES]]
            text += f" ({', '.join(places)}{', ...' if len(ids) > _SHOWN_PLACES else ''})"
        return text


def _shared(value: Any) -> list[Any]:
    """The value of every rank, in order of rank."""
    if not several_ranks():
        return [value]
    gathered: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(gathered, value)
    return gathered


def _figure(norm: Tensor | float) -> Tensor:
    return whole(norm) if isinstance(norm, Tensor) else torch.tensor(float(norm))
