"""The clean processes that prove exports, forked from one that has torch and transformers loaded (`clean_server`): as isolated as the real
ones, without seconds of imports each. Trials of the proof itself start the real ones.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from sparsmith.exporting import prove

SOCKET = "SPARSMITH_TESTS_STRANGERS"
"""Where the server listens: processes that a trial starts find it in their environment."""
SERVER = Path(__file__).with_name("clean_server.py")
REAL = prove._stranger
_started: list[subprocess.Popen[str]] = []


@contextmanager
def serving(folder: Path) -> Iterator[None]:
    """Here exports are proved by forks. The server starts with the first of them."""
    os.environ[SOCKET] = str(folder / "socket")
    prove._stranger = partial(ask, starts=True)
    try:
        yield
    finally:
        prove._stranger = REAL
        del os.environ[SOCKET]
        if _started:
            _started.pop().communicate()


def ask(
    arguments: list[str], environment: dict[str, str], work: Path, timeout: float, starts: bool = False
) -> subprocess.CompletedProcess[str]:
    """In place of `prove._stranger`; the real one where there is no server, and this process does not start it."""
    place = os.environ.get(SOCKET, "")
    if starts and not _started:
        _start(place)
    if not place or not Path(place).exists():
        return REAL(arguments, environment, work, timeout)
    with socket.socket(socket.AF_UNIX) as line:
        line.settimeout(timeout)
        line.connect(place)
        with line.makefile("rw") as lines:
            lines.write(json.dumps({"arguments": arguments, "environment": environment, "work": str(work)}) + "\n")
            lines.flush()
            answer = json.loads(lines.readline())
    return subprocess.CompletedProcess(arguments, answer["returncode"], answer["stdout"], answer["stderr"])


def _start(place: str) -> None:
    command = [sys.executable, "-I", str(SERVER), place]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    if server.stdout.readline() != "ready\n":
        raise RuntimeError("the server of clean processes did not start")
    _started.append(server)
