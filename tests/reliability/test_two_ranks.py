"""Two gloo ranks on CPU: no unused-parameter error although most experts get no token, one loss series, one set of weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(out, rows, ranks):
    out.mkdir()
    launcher = (
        ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--master-port", "29531"] if ranks > 1 else []
    )
    command = [sys.executable, *launcher, "-m", "tests.kit.two_ranks", str(out), str(rows)]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(ranks)]


@pytest.mark.skipif(sys.platform != "linux", reason="gloo under torchrun is tried on Linux")
def test_two_ranks_equal_one_process(tmp_path):
    first, second = run(tmp_path / "two", 2, ranks=2)
    (alone,) = run(tmp_path / "one", 4, ranks=1)
    assert first["hash"] == second["hash"]
    assert len(first["losses"]) == 20
    # sums over two halves are rounded differently from one sum
    assert first["losses"] == pytest.approx(alone["losses"], abs=1e-5)
