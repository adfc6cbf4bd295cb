"""Whole commands in processes of their own that start in milliseconds: children of a server that has the libraries loaded already.

Each child is a real process with a real exit code that can be killed at any moment.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tests.kit.launch import free_port

PRELOADED = ["tests.kit.preloaded"]


@cache
def _server() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


@dataclass
class Child:
    """A command that runs."""

    process: Any
    log: Path

    def wait(self, seconds: float = 120) -> int:
        """Its exit code (negative: the signal that killed it)."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
            raise TimeoutError(f"no end after {seconds} s:\n{self.text[-2000:]}")
        return self.process.exitcode

    def kill_after(self, seconds: float) -> None:
        """SIGKILL, unless it has ended before."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            os.kill(self.process.pid, signal.SIGKILL)
        self.process.join()

    @property
    def text(self) -> str:
        """What it has printed so far."""
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log.is_file() else ""

    def saw(self, words: str, seconds: float = 60) -> bool:
        """Wait until it has printed `words`."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if words in self.text:
                return True
            if self.process.exitcode is not None:
                return words in self.text
            time.sleep(0.01)
        return False


def start(arguments: Sequence[str | Path], log: Path, prepare: Callable[..., None] | None = None, *given: Any) -> Child:
    """Start `sparsmith ARGUMENTS`, its output in `log`. `prepare(*given)` is called in the child first (to plant a fault)."""
    process = _server().Process(target=_main, args=([str(a) for a in arguments], str(log), prepare, given))
    process.start()
    return Child(process, log)


def run(arguments: Sequence[str | Path], log: Path, prepare: Callable[..., None] | None = None, *given: Any) -> int:
    """Start it and wait for its exit code."""
    return start(arguments, log, prepare, *given).wait()


def ranks(
    function: Callable[..., None], given: tuple[Any, ...], log: Path, count: int = 2, seconds: float = 600
) -> None:
    """`function(rank, *given)` in that many processes at once, with what torchrun tells its own in their environment.

    Raises:
        RuntimeError: one ended with a fault; the end of what it said.
    """
    log.mkdir(parents=True, exist_ok=True)
    told = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1"}
    told |= {"MASTER_PORT": str(free_port()), "ACCELERATE_USE_CPU": "true"}
    children = []
    for rank in range(count):
        own = told | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        file = log / f"rank{rank}.log"
        process = _server().Process(target=_as_rank, args=(function, rank, given, own, str(file)))
        process.start()
        children.append(Child(process, file))
    try:
        codes = [child.wait(seconds) for child in children]
    finally:
        for child in children:
            child.kill_after(0)
    for child, code in zip(children, codes, strict=True):
        if code:
            raise RuntimeError(child.text[-3000:])


def _as_rank(function: Callable[..., None], rank: int, given: tuple[Any, ...], told: dict[str, str], log: str) -> None:
    os.environ.update(told)
    _written_to(log)
    function(rank, *given)
    sys.stdout.flush()
    sys.stderr.flush()


def _written_to(log: str) -> None:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout = open(1, "w", encoding="utf-8", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", buffering=1, closefd=False)  # noqa: SIM115


def _main(arguments: list[str], log: str, prepare: Callable[..., None] | None, given: tuple[Any, ...]) -> None:
    _written_to(log)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the server's children ignore it
    if prepare is not None:
        prepare(*given)
    from sparsmith.cli import main

    code = main(arguments)
    sys.stdout.flush()
    os._exit(code)
