"""Encoding of many rows, in processes where that pays.

Up to `PARALLEL_FROM` characters the rows are encoded here (the tokenizer's own threads already share the work of a batch). Above it
fresh interpreters encode a shard each. They are started as commands, neither forked (threads of torch may hold locks) nor spawned
by multiprocessing (which would run the user's script again). A worker first proves that its tokenizer is the same, by hash; the shard of
one that fails is encoded here, so that processes change the time alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from sparsmith.data.messages import Messages
from sparsmith.data.rows import RowFault
from sparsmith.data.tokens import TokenRow, tokenizer_hash

BATCH = 1000
"""Rows that are encoded together."""
PARALLEL_FROM = 50_000_000
"""Characters from which processes pay: below it starting them (seconds each) costs more than it saves."""


def encode_all(encoder: Any, rows: list[Messages], workers: int = 0) -> Iterator[TokenRow | RowFault]:
    """Encode all rows, in their order. `workers`: processes; 0 = one per core."""
    count = min(workers or os.cpu_count() or 1, len(rows))
    if count > 1 and sum(len(message["content"]) for row in rows for message in row) >= PARALLEL_FROM:
        yield from _in_processes(encoder, rows, count)
    else:
        yield from encode_here(encoder, rows)


def encode_here(encoder: Any, rows: list[Messages]) -> Iterator[TokenRow | RowFault]:
    """Encode rows in this process."""
    for start in range(0, len(rows), BATCH):
        yield from encoder.encode(rows[start : start + BATCH])


def _in_processes(encoder: Any, rows: list[Messages], count: int) -> Iterator[TokenRow | RowFault]:
    bounds = [len(rows) * number // count for number in range(count + 1)]
    shards = [rows[start:stop] for start, stop in pairwise(bounds)]
    running: list[subprocess.Popen] = []
    with tempfile.TemporaryDirectory(prefix="sparsmith-encode-") as name:
        folder = Path(name)
        encoder.tokenizer.save_pretrained(folder / "tokenizer")
        job = {
            "template": encoder.recipe_template,
            "loss_on": encoder.loss_on,
            "classes": encoder.classes,
            "pairs": encoder.pairs,
            "hash": tokenizer_hash(encoder.tokenizer),
        }
        (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
        try:
            for number, shard in enumerate(shards):
                (folder / f"{number}.json").write_text(json.dumps(shard), encoding="utf-8")
                running.append(_start(folder, number))
            for number, (process, shard) in enumerate(zip(running, shards)):
                done = process.wait() == 0
                yield from _read(folder / f"{number}.npz") if done else encode_here(encoder, shard)
        finally:
            for process in running:
                with contextlib.suppress(OSError):
                    process.kill()
                process.wait()


def _start(folder: Path, number: int) -> subprocess.Popen:
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-P", "-m", "sparsmith.data.workers", str(folder), str(number)]
    return subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def _read(path: Path) -> Iterator[TokenRow | RowFault]:
    with np.load(path, allow_pickle=False) as stored:
        ids, trained, offsets = stored["ids"].tolist(), stored["trained"].tolist(), stored["offsets"].tolist()
        faults = json.loads(stored["faults"].tobytes())
    for number, (start, stop) in enumerate(pairwise(offsets)):
        fault = faults.get(str(number))
        yield RowFault(**fault) if fault else TokenRow(ids[start:stop], trained[start:stop])


def _write(path: Path, encoded: list[TokenRow | RowFault]) -> None:
    rows = [row if isinstance(row, TokenRow) else TokenRow([], []) for row in encoded]
    faults = {number: row.as_dict() for number, row in enumerate(encoded) if isinstance(row, RowFault)}
    np.savez(
        path,
        ids=np.array([token for row in rows for token in row.ids], np.int32),
        trained=np.array([one for row in rows for one in row.trained], np.bool_),
        offsets=np.cumsum([0, *(len(row.ids) for row in rows)], dtype=np.int64),
        faults=np.frombuffer(json.dumps(faults).encode(), np.uint8),
    )


def main(folder: Path, number: int) -> int:
    """Encode one shard. 0 = written."""
    from transformers import AutoTokenizer

    from sparsmith.data.chat import make_encoder

    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    if tokenizer_hash(tokenizer) != job["hash"]:
        return 1
    encoder = make_encoder(tokenizer, job["template"], job["loss_on"], job["classes"], job["pairs"])
    rows = json.loads((folder / f"{number}.json").read_text(encoding="utf-8"))
    _write(folder / f"{number}.npz", list(encode_here(encoder, rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2])))
