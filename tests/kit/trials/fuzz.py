"""Promise 20: no input ends in a traceback or hangs.

Each surface spoils one kind of input and opens it; it may be refused with a fault of ours in whole lines, or be opened. A checkpoint that
opens although it was spoilt must compute what it did before.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import random
import shutil
import signal
import struct
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

import sparsmith as sm
from sparsmith import app, durable
from sparsmith.cli.entry import run as run_command
from sparsmith.crafting.base_model import load_tokenizer
from sparsmith.data import read_rows
from sparsmith.errors import RecipeErrors, SparsmithError
from sparsmith.exporting import verify
from sparsmith.methods import registry
from sparsmith.recipe import load_text
from sparsmith.recipe.schema import ModelSettings
from sparsmith.training.state import read_state
from tests.golden.make import GOLDEN
from tests.kit.checkpoints import DELTA, IDENTITY, make_home
from tests.kit.evalsets import char_tokenizer
from tests.kit.hostile import HOSTILE
from tests.kit.mutate import spoil_bytes, spoil_json
from tests.kit.pico import pico_ids
from tests.kit.recipes import GOOD, write
from tests.kit.rowfiles import source
from tests.kit.spoilt_rows import ODD
from tests.kit.tally import Tally
from tests.kit.trials.strict_loading import open_base

LIMIT = 5.0  # seconds
Trial = Callable[[random.Random, int], None]


class _Wrong(Exception):
    """A spoilt checkpoint that opened as another function, or a command line that ended as none may."""


@dataclass(frozen=True)
class Bench:
    """Where a surface works: the checkpoints, and the logits that they have."""

    home: Path
    logits: dict[str, torch.Tensor]


def run(folder: Path, count: int = 10_000, seed: int = 0) -> Tally:
    """`count` mutants, shared out over the surfaces."""
    home = make_home(folder / "home")
    char_tokenizer().save_pretrained(home / "base")
    bench = Bench(home, {kind: _logits(sm.load(home / kind)) for kind in ("delta", "full")})
    write(folder)
    tally, slowest, refused, total = Tally(), 0.0, 0, sum(share for _, share in SURFACES.values())
    for name, (make, share) in SURFACES.items():
        trial = make(bench, folder)
        for number in range(math.ceil(count * share / total)):
            rng = random.Random(f"{seed}:{name}:{number}")
            begun = time.perf_counter()
            end, fault = _end_of(partial(trial, rng, number))
            seconds = time.perf_counter() - begun
            if seconds > LIMIT:  # also where a library took the alarm for a fault of the file
                fault = f"{seconds:.1f} s"
            slowest, refused = max(slowest, seconds), refused + (end == "refused")
            tally.case(not fault, f"{name} {number}: {fault}")
    tally.figures = {"surfaces": list(SURFACES), "refused": refused, "slowest, seconds": round(slowest, 2)}
    return tally


def _end_of(trial: Callable[[], None]) -> tuple[str, str]:
    """(how it ended, what is wrong with that)."""
    try:
        with _alarm():
            trial()
    except SparsmithError as fault:
        for each in fault.faults if isinstance(fault, RecipeErrors) else [fault]:
            if "\n" in str(each) or not each.mend:
                return "refused", f"not one whole line: {each!r}"
        return "refused", ""
    except BaseException as fault:
        if isinstance(fault, KeyboardInterrupt | SystemExit):
            raise
        return "broke", f"{type(fault).__name__}: {fault}"[:500]
    return "passed", ""


@contextlib.contextmanager
def _alarm() -> Iterator[None]:
    def ring(number: int, frame: Any) -> None:
        raise TimeoutError(f"more than {LIMIT} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, LIMIT)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# ---------------------------------------------------------------- checkpoints


def _file(file: str, spoil: Callable[[random.Random, bytes], bytes], *, sealed: bool) -> Callable[[Bench, Path], Trial]:
    """A surface that spoils one file of a checkpoint; `sealed`: the folder is sealed again, as a careful forger would."""

    def make(bench: Bench, work: Path) -> Trial:
        folder = bench.home / file.split("/")[0]
        place = bench.home / file
        whole = {path: path.read_bytes() for path in (place, folder / durable.MANIFEST)}
        options = {"base": bench.home / "base"} if folder.name == "delta" else {}

        def trial(rng: random.Random, number: int) -> None:
            place.write_bytes(spoil(rng, whole[place]))
            if sealed:
                durable.seal(folder)
            try:
                if number % 2:
                    verify(folder)
                elif not torch.equal(_logits(sm.load(folder, **options)), bench.logits[folder.name]):
                    raise _Wrong("opened as another function")
            finally:
                for path, data in whole.items():
                    path.write_bytes(data)

        return trial

    return make


def _json_file(rng: random.Random, data: bytes) -> bytes:
    if rng.random() < 0.2:
        return spoil_bytes(rng, data)
    return json.dumps(spoil_json(rng, json.loads(data))).encode()


def _header(rng: random.Random, data: bytes) -> bytes:
    """Spoil the header of a safetensors file: its bytes, or its JSON with the length set right again."""
    length = struct.unpack("<Q", data[:8])[0]
    header, payload = data[8 : 8 + length], data[8 + length :]
    if rng.random() < 0.1:
        return spoil_bytes(rng, data[:8], 1)[:8] + header + payload
    spoilt = (
        spoil_bytes(rng, header) if rng.random() < 0.5 else json.dumps(spoil_json(rng, json.loads(header))).encode()
    )
    return struct.pack("<Q", len(spoilt)) + spoilt + payload


def _base_file(
    name: str, way: Callable[[Path], Any], spoil: Callable[[random.Random, bytes], bytes]
) -> Callable[[Bench, Path], Trial]:
    """A surface that spoils one file of a base."""

    def make(bench: Bench, work: Path) -> Trial:
        folder = work / "base"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(bench.home / "base", folder)
        whole = (folder / name).read_bytes()

        def trial(rng: random.Random, number: int) -> None:
            (folder / name).write_bytes(spoil(rng, whole))
            way(folder)

        return trial

    return make


def _run_file(name: str, spoil: Callable[[random.Random, bytes], bytes]) -> Callable[[Bench, Path], Trial]:
    """A surface that spoils the optimiser's state in a checkpoint of a run."""

    def make(bench: Bench, work: Path) -> Trial:
        folder = work / "checkpoint-4"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(GOLDEN / "v1" / "run" / "checkpoints" / "checkpoint-4", folder)
        whole, names = (folder / name).read_bytes(), json.loads((folder / "tuner.json").read_text())["names"]

        def trial(rng: random.Random, number: int) -> None:
            (folder / name).write_bytes(spoil(rng, whole))
            read_state(folder, names=names if number % 2 else None)

        return trial

    return make


def _open_tokenizer(folder: Path) -> None:
    load_tokenizer(ModelSettings(path=str(folder))).encode("1 + 1")


def _logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(pico_ids()).logits


# ---------------------------------------------------------------- rows, recipes, command lines


def _rows(bench: Bench, work: Path) -> Trial:
    def trial(rng: random.Random, number: int) -> None:
        name, whole = rng.choice(_row_files())
        (work / name).write_bytes(spoil_bytes(rng, whole))
        wanted = source(name, columns={"prompt": "{0}", "completion": "1"} if rng.random() < 0.1 else {})
        found = read_rows(wanted, "skip" if number % 2 else "stop", work)
        if found.read != len(found.rows) + len(found.rejects):
            raise _Wrong(f"{found.read} read, {len(found.rows)} kept, {len(found.rejects)} rejected")

    return trial


@cache
def _row_files() -> tuple[tuple[str, bytes], ...]:
    import pyarrow
    import pyarrow.parquet

    out = io.BytesIO()
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist([{"prompt": "a", "completion": f"b{i}"} for i in range(9)]), out
    )
    tsv = b"prompt\tcompletion\n" + b"q\ta\n" * 5
    talk = b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n' * 3
    return (*ODD.values(), ("r.parquet", out.getvalue()), ("r.tsv", tsv), ("r.jsonl", talk))


def _recipes(bench: Bench, work: Path) -> Trial:
    from sparsmith.recipe.yaml_tree import dump_yaml, parse

    data = parse(GOOD, "good").data

    def trial(rng: random.Random, number: int) -> None:
        if number % 2:
            text = spoil_bytes(rng, GOOD.encode()).decode("utf-8", "replace")
        else:
            text = dump_yaml(spoil_json(rng, data))
        overrides = [rng.choice(_WORDS) for _ in range(rng.randrange(3))]
        load_text(text, "mutant.yaml", overrides, registry.config_classes(), work, check_paths=number % 3 == 0)

    return trial


_WORDS = (
    *("plan", "tune", "eval", "generate", "export", "report", "verify", "doctor", "demo", "protocol", "data", "show"),
    *("import", "camelidae", "pesc", "nothing", "", "-", "--", "-n", "-p", "x", "0", "-1", "1e9", "nan", "--no-such"),
    *("--json", "--debug", "--help", "--version", "--out", "--seed", "--recipe", "--prompt", "--raw", "--dtype", "--rows"),
    *("--max-new-tokens", "--temperature", "--top-p", "--proof", "--no-proof", "--fold-scale", "--controls", "--seeds"),
    *("--adapter-dim", "--adapter-scale", "--top-k", "--rope-theta", "--base", "float16", "0,1", "a,b"),
    *("train.steps=3", "train.steps=", "=", "a=b=c", "methods.0.top_k=1", "methods.9.top_k=1", "train=3", "data.train.0=x"),
    *("model.path=nowhere", "train.seed=\x00", "output=[", "train.steps=!!python/name:os.system", "x.y.z.0.1=2"),
    *("recipe.yaml", "spoilt.yaml", "home/delta", "home/full", "home/base", "home", "sums.jsonl", "no/such/thing"),
)  # fmt: skip
# these would work for minutes, or fill a disk, where a mutant happens to be right; the words before them are read all the same
_STILL = ("demo", "tune", "export", "protocol")


def _command_lines(bench: Bench, work: Path) -> Trial:
    (work / "spoilt.yaml").write_text(GOOD.replace("steps: 10", "stpes: 10"))
    (work / "no" / "such").mkdir(parents=True, exist_ok=True)

    def trial(rng: random.Random, number: int) -> None:
        words = [rng.choice(_WORDS) if rng.random() < 0.95 else rng.choice(HOSTILE) for _ in range(rng.randint(0, 6))]
        if rng.random() < 0.8:
            words = [rng.choice(_WORDS[:12]), *words]
        with _quiet_screen(work) as said:
            code = run_command(words)
        wild = "--debug" in words
        if code not in range(10) or ("Traceback" in said.getvalue() and not wild):
            raise _Wrong(f"{words} ended with {code}: {said.getvalue()[-300:]}")

    return trial


@contextlib.contextmanager
def _quiet_screen(work: Path) -> Iterator[io.StringIO]:
    """Stand in `work`, with nothing on stdin, what is printed held back, and the long verbs stilled."""
    out, kept = io.StringIO(), dict(app.__dict__)
    stdin, sys.stdin = sys.stdin, io.StringIO("")
    app.__dict__.update({name: lambda *words, **options: {} for name in _STILL})
    try:
        with contextlib.chdir(work), contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            yield out
    finally:
        sys.stdin = stdin
        for name in _STILL:
            app.__dict__.pop(name)
        app.__dict__.update({name: kept[name] for name in _STILL if name in kept})


SURFACES: dict[str, tuple[Callable[[Bench, Path], Trial], int]] = {
    "manifest": (_file("full/manifest.json", _json_file, sealed=False), 12),
    "header of a delta": (_file(f"delta/{DELTA}", _header, sealed=True), 8),
    "header of a LoRA": (_file("delta/adapter_model.safetensors", _header, sealed=True), 6),
    "header of a full checkpoint": (_file("full/model.safetensors", _header, sealed=True), 8),
    "sparsmith.json of a delta": (_file(f"delta/{IDENTITY}", _json_file, sealed=True), 8),
    "sparsmith.json of a full checkpoint": (_file(f"full/{IDENTITY}", _json_file, sealed=True), 6),
    "adapter_config.json": (_file("delta/adapter_config.json", _json_file, sealed=True), 4),
    "config.json": (_file("full/config.json", _json_file, sealed=True), 6),
    "generation_config.json": (_file("full/generation_config.json", _json_file, sealed=True), 2),
    "config.json of a base": (_base_file("config.json", open_base, _json_file), 8),
    "header of a base": (_base_file("model.safetensors", open_base, _header), 4),
    "tokenizer.json": (_base_file("tokenizer.json", _open_tokenizer, _json_file), 4),
    "tokenizer_config.json": (_base_file("tokenizer_config.json", _open_tokenizer, _json_file), 4),
    "tuner.json of a run": (_run_file("tuner.json", _json_file), 5),
    "header of an optimiser": (_run_file("optimizer.safetensors", _header), 3),
    "rows": (_rows, 20),
    "recipes": (_recipes, 20),
    "command lines": (_command_lines, 20),
}
"""Name -> (surface, share of the mutants)."""
