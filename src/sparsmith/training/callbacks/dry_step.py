"""The dry step: before step 1, the micro-batch that needs the most memory goes forward and backward once, and nothing stays of it.

A run whose longest rows do not fit would otherwise end hours later, when it first meets them. The step runs where the real ones will:
on the wrapped model, with its autocast, checkpointing and sharding, and with the optimiser's state reserved that the first real step
will make. A resumed run is tried too, because it may go on on another machine. Price: one micro-batch.

Afterwards everything is as before: no gradient, the same random numbers, the same buffers and counters; the run's weights and losses are
those of a run without it, bit for bit.

On a CPU the operating system may promise memory that it does not have; what it then kills cannot be told here.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback

from sparsmith.crafting.memory import Memory, optimizer_bytes
from sparsmith.crafting.record import record_of
from sparsmith.data.longest import longest_batch
from sparsmith.ops.shards import part
from sparsmith.training.out_of_memory import told_in_bytes

MEND = (
    "Lower train.micro_batch_size (now {rows}) or data.max_length, set train.gradient_checkpointing, "
    "or load the base with model.quant nf4. Nothing was trained or written."
)


class DryStep(TrainerCallback):
    """Tries the longest micro-batch when the training begins.

    Args:
        tuner: whose model, rows and collator are tried.
        memory: the plan's figures, for the message.

    Raises (when the training begins):
        EnvironmentFault: it does not fit.
    """

    def __init__(self, tuner: Any, memory: Memory) -> None:
        self._tuner, self._memory = tuner, memory
        self.shape: tuple[int, ...] = ()
        """(B, S) of the micro-batch that was tried."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        rows = args.per_device_train_batch_size
        batch = longest_batch(self._tuner.train_dataset, self._tuner.data_collator, rows)
        self.shape = tuple(batch["input_ids"].shape)
        where = "dry step with the longest micro-batch, {} x {} tokens".format(*self.shape)
        mend = MEND.format(rows=rows)
        with _undone(self._tuner.model), told_in_bytes(where, self._memory, mend, args.device):
            reserved = self._reserve(args.device)
            self._step(batch)
            del reserved
            for method, config in record_of(self._tuner.crafted).parts:
                method.after_forward(self._tuner.crafted, config)  # may move buffers, which are put back
                method.metrics(self._tuner.crafted, config)  # empties the window

    def _reserve(self, device: torch.device) -> Tensor | None:
        """As many bytes as the optimiser's state will take; a resumed optimiser has it already."""
        if self._tuner.optimizer.state:
            return None
        count = sum(part(p).numel() for p in self._tuner.model.parameters() if p.requires_grad)
        optim = self._tuner.args.optim
        wanted = optimizer_bytes(count, str(getattr(optim, "value", optim)))
        return torch.empty(wanted, dtype=torch.uint8, device=device)

    def _step(self, batch: dict[str, Tensor]) -> None:
        tuner = self._tuner
        model = tuner.model_wrapped
        model.train()
        # DDP would order its buckets after this backward and not after the first real one: the sums of step 1 could round otherwise
        apart = model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()
        with apart:
            inputs = tuner._prepare_inputs(batch)
            with tuner.compute_loss_context_manager():
                loss = model(**inputs)["loss"]
            tuner.accelerator.backward(loss)


@contextmanager
def _undone(model: nn.Module) -> Iterator[None]:
    """Gradients, random numbers, buffers and plain attributes of modules are as before afterwards."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    modules = [(module, _plain(module), _buffers(module)) for module in model.modules()]
    try:
        yield
    finally:
        model.zero_grad()
        for module, plain, buffers in modules:
            vars(module).update(plain)
            for name, (buffer, content) in buffers.items():
                module._buffers[name] = buffer
                with torch.no_grad():
                    buffer.copy_(content)
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])
        if cuda:
            torch.cuda.set_rng_state_all(cuda)


def _plain(module: nn.Module) -> dict[str, Any]:
    return {k: v for k, v in vars(module).items() if v is None or isinstance(v, (bool, int, float, str))}


def _buffers(module: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    return {name: (buffer, buffer.clone()) for name, buffer in module._buffers.items() if buffer is not None}
