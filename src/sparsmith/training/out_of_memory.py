"""Out of memory, said in bytes: what was asked for, what is free, what the plan had reckoned with, and what would help."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from traceback import clear_frames
from typing import TYPE_CHECKING

import torch

from sparsmith.crafting.plan_text import size
from sparsmith.errors import EnvironmentFault

if TYPE_CHECKING:
    from sparsmith.crafting.memory import Memory

_UNITS = {"bytes": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
_ASKED = re.compile(r"ried to allocate ([\d.]+) (bytes|KiB|MiB|GiB|TiB)")
_SIGNS = ("out of memory", "can't allocate memory", "not enough memory", "bad_alloc")


@contextmanager
def told_in_bytes(where: str, memory: Memory, mend: str, device: torch.device) -> Iterator[None]:
    """Turn an allocator's failure inside the block into one line.

    Args:
        where: what was being done. memory: the plan's. mend: what would need less. device: whose free bytes are told.

    Raises:
        EnvironmentFault: the block ran out of memory. The frames that failed are emptied: they hold the tensors that filled it.
    """
    free = free_bytes(device)
    try:
        yield
        return
    except (RuntimeError, MemoryError) as fault:
        text = str(fault)
        if not isinstance(fault, (MemoryError, torch.OutOfMemoryError)) and not any(sign in text for sign in _SIGNS):
            raise
        clear_frames(fault.__traceback__)
    found = _ASKED.search(text)
    asked = f"{size(float(found[1]) * _UNITS[found[2]])} more were asked for" if found else "the memory ended"
    planned = {"weights": memory.weights, "gradients": memory.gradients, "optimizer": memory.optimizer}
    planned |= {"activations": memory.activations["high"]}
    raise EnvironmentFault(
        where,
        f"out of memory on {device}: {asked}, and {size(free)} were free at its start",
        f"room for {size(sum(planned.values()))} by the plan: "
        + ", ".join(f"{name} {size(count)}" for name, count in planned.items()),
        mend,
    ) from None


def free_bytes(device: torch.device) -> int:
    """Bytes that this process can still take: of the device, or of the machine within the process's own limit."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    free = _proc("/proc/meminfo", "MemAvailable:")
    try:
        import resource
    except ImportError:  # Windows has none
        return free
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY:
        free = min(free, max(0, limit - _proc("/proc/self/status", "VmSize:")))
    return free


def _proc(file: str, key: str) -> int:
    """A figure of Linux in bytes; 0 elsewhere."""
    try:
        with Path(file).open(encoding="ascii", errors="replace") as lines:
            return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(key)), 0)
    except OSError:
        return 0
