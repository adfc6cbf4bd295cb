"""Starting several processes for a test, on a port that nobody else has."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def launched(
    module: Sequence[str],
    processes: int,
    *,
    by: str | Path = "torchrun",
    env: dict[str, str] | None = None,
    seconds: int = 240,
    cwd: Path = ROOT,
) -> subprocess.CompletedProcess[str]:
    """`python -m MODULE ...` in that many processes, started by torchrun, or by accelerate with the config file `by`; one process is
    started by nobody."""
    port = str(free_port())
    launcher: list[str] = []
    if processes > 1 and by == "torchrun":
        launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", port]
    elif processes > 1:
        launcher = ["-m", "accelerate.commands.launch", "--config_file", str(by), "--main_process_port", port]
    surroundings = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)]),
        "ACCELERATE_USE_CPU": "true",
        **(env or {}),
    }
    return subprocess.run(
        [sys.executable, *launcher, "-m", *module],
        cwd=cwd,
        env=surroundings,
        capture_output=True,
        text=True,
        timeout=seconds,
    )


def gap(first: Any, second: Any) -> float:
    """The largest difference of two figures, lists or dicts of figures; of dicts over the keys that both have."""
    if isinstance(first, dict):
        return max(gap(first[key], second[key]) for key in first.keys() & second.keys())
    if isinstance(first, list):
        return max((gap(a, b) for a, b in zip(first, second, strict=True)), default=0.0)
    return abs(first - second)
