"""Several processes, one run: who writes, who prints, who waits.

`torchrun` and `accelerate launch` start the same command once per rank and tell each its number by environment variables; that is all
that this file reads before torch is there. Rank 0 alone writes and prints results; every rank computes the same figures.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, ParamSpec

from sparsmith.errors import MethodError

_P = ParamSpec("_P")
PATIENCE = timedelta(hours=2)
"""How long a rank waits for another: reading a large base or tokenising takes minutes, and the slowest rank decides."""


def world() -> int:
    """Processes of this launch; 1 where no launcher started us."""
    return max(1, _number("WORLD_SIZE", 1))


def rank() -> int:
    """This process among all, from 0."""
    return _number("RANK", 0) if world() > 1 else 0


def local_rank() -> int:
    """This process among those of its machine, from 0."""
    return _number("LOCAL_RANK", 0) if world() > 1 else 0


def is_first() -> bool:
    """True on the one process that writes and prints."""
    return rank() == 0


def sharded() -> bool:
    """Whether the launch asks for FSDP (set by `accelerate launch --use_fsdp`, or by hand under torchrun)."""
    return world() > 1 and _flag("ACCELERATE_USE_FSDP")


def on_cuda() -> bool:
    """Whether the processes work on CUDA devices; `accelerate launch --cpu` says no where there are some."""
    import torch

    return torch.cuda.is_available() and not _flag("ACCELERATE_USE_CPU")


def start() -> None:
    """Join the other processes, if there are any. Called before anything is read, so that ranks can wait for each other.

    On CUDA small host tensors go over gloo beside nccl, so that counting and waiting need no kernel.
    """
    if world() == 1:
        return
    import torch
    from torch import distributed

    # set by `accelerate launch --use_fsdp`: transformers would give every rank but the first an empty base, and crafting needs a whole one
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    cuda = on_cuda()
    if cuda:
        torch.cuda.set_device(local_rank() % torch.cuda.device_count())
    if not distributed.is_initialized():
        distributed.init_process_group("cuda:nccl,cpu:gloo" if cuda else "gloo", timeout=PATIENCE)


def stop() -> None:
    """Leave the other processes, so that none hangs on one that has gone."""
    if world() == 1:
        return
    from torch import distributed

    if distributed.is_initialized():
        distributed.destroy_process_group()


def wait() -> None:
    """Go on when every rank is here."""
    if world() == 1:
        return
    import torch
    from torch import distributed

    if distributed.is_initialized():
        # a sum, because `barrier` guesses a device
        distributed.all_reduce(torch.zeros(1, device=_message_device()))


def tell(text: str) -> str:
    """The first rank's text, on every rank."""
    if world() == 1:
        return text
    import torch
    from torch import distributed

    device, data = _message_device(), list(text.encode()) if is_first() else []
    size = torch.tensor(len(data), device=device)
    distributed.broadcast(size, src=0)
    letters = torch.tensor(data or [0] * int(size), dtype=torch.uint8, device=device)
    distributed.broadcast(letters, src=0)
    return bytes(letters.tolist()).decode()


@contextmanager
def first_before_others() -> Iterator[None]:
    """The block runs on rank 0, then on the others: they find what it wrote (a token cache, a folder)."""
    if not is_first():
        wait()
    yield
    if is_first():
        wait()


def on_first(function: Callable[_P, Any]) -> Callable[_P, None]:
    """`function` on rank 0, nothing on the others."""

    def call(*args: _P.args, **kwargs: _P.kwargs) -> None:
        if is_first():
            function(*args, **kwargs)

    return call


def rows_per_rank(batch_size: int, micro: int | None) -> tuple[int, int]:
    """Rows per forward and forwards per step of each rank, so that a step takes `batch_size` rows whatever the number of ranks.

    Raises:
        MethodError: the batch cannot be shared out evenly.
    """
    ranks = world()
    if batch_size % ranks:
        raise MethodError(
            "train.batch_size",
            f"{batch_size} rows per step for {ranks} processes",
            f"a multiple of {ranks}: the batch is that of all processes together",
            "Change train.batch_size, or the number of processes.",
        )
    share = batch_size // ranks
    # a micro-batch that was right for one process may be more than a rank's whole share
    micro = min(micro or share, share)
    if share % micro:
        raise MethodError(
            "train.micro_batch_size",
            f"{micro} rows per forward",
            f"a divisor of {share}, the rows per step of each of {ranks} processes",
            "Change train.micro_batch_size, or the number of processes.",
        )
    return micro, share // micro


def _message_device() -> str:
    """Where a small message lies: in host memory, unless the processes were joined by somebody else with nccl alone."""
    from torch import distributed

    return "cpu" if "cpu:" in str(distributed.get_backend_config()) else "cuda"


def _flag(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes")


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdigit() else default
