"""Promise 9: the faults of a recipe are named all at once, and nothing is loaded or written before.

A mutant holds one to three faults, each in another group of the recipe: a setting that contradicts others is told once each of its own
group is valid alone, and a group that is no group at all hides what stands in it.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsmith.recipe.yaml_tree import dump_yaml, parse
from tests.kit.checkpoints import files_of
from tests.kit.recipes import GOOD, SPOILT, write
from tests.kit.tally import Tally

WRONG_KIND: dict[type, list[Any]] = {
    str: [3, True, [], {}],
    int: ["x", 2.5, True, [1]],
    float: ["x", False, {}],
    bool: ["true", 1],
    list: [3, "x"],
    dict: [3, "x"],
}
GROUPS = ("model", "methods", "data", "train", "output", "proof")
_CHILD = """
import contextlib, io, json, sys
from sparsmith.cli.entry import run
rows = []
for file in sys.stdin.read().split():
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        code = run(["tune", file, "--json"])
    heavy = sorted({"torch", "transformers", "safetensors", "datasets"} & sys.modules.keys())
    rows.append({"code": code, "heavy": heavy, "said": json.loads(out.getvalue())})
print(json.dumps(rows))
"""


@dataclass(frozen=True)
class Mutant:
    """A spoilt recipe and what must be said of it: (key, words of the message)."""

    text: str
    named: tuple[tuple[str, str], ...]


def mutants(count: int, seed: int = 0) -> Iterator[Mutant]:
    """`count` mutants, by turns of the text (clashes, tags, twins) and of the data (any key, any kind of value)."""
    for number in range(count):
        rng = random.Random(f"{seed}:{number}")
        yield _of_text(rng) if number % 2 else _of_data(rng)


def run(folder: Path, count: int = 300) -> Tally:
    """`sparsmith tune` on each mutant, in one process that afterwards must not have loaded a library nor written a file."""
    made = list(mutants(count))
    write(folder)
    for number, mutant in enumerate(made):
        (folder / f"mutant{number}.yaml").write_text(mutant.text, encoding="utf-8")
    before = files_of(folder)
    done = subprocess.run(
        [sys.executable, "-c", _CHILD],
        input="\n".join(f"mutant{number}.yaml" for number in range(count)),
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path)), "HF_HUB_OFFLINE": "1"},
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    )
    tally = Tally()
    for number, (mutant, row) in enumerate(zip(made, json.loads(done.stdout), strict=True)):
        fault = _misses(mutant, row, f"mutant{number}.yaml")
        tally.case(not fault, f"{fault}; named should be {mutant.named}")
    tally.figures = {"faults": sum(len(mutant.named) for mutant in made)}
    written = sorted(str(file.relative_to(folder)) for file in set(files_of(folder)) - set(before))
    if written:
        tally.case(False, f"written: {written}")
    return tally


def _misses(mutant: Mutant, row: dict[str, Any], file: str) -> str:
    """What of the mutant was not told as it should be."""
    if row["code"] != 3 or row["heavy"]:
        return f"exit code {row['code']}, loaded {row['heavy']}: {row['said']}"
    faults = row["said"]["error"]["faults"]
    lines = mutant.text.splitlines()
    for key, words in mutant.named:
        hits = [
            fault for fault in faults if fault["where"].split(": ")[-1] == key and words in " ".join(fault.values())
        ]
        if not hits:
            return f"not told: {key} ({words}) among {[' '.join(fault.values()) for fault in faults]}"
        place, last = hits[0]["where"].split(":"), key.rsplit(".", 1)[-1]
        absent = hits[0]["found"].startswith(("nothing", "neither")) or key == "(top)" or last.isdigit()
        if place[0] != file or not (absent or last in lines[int(place[1]) - 1]):
            return f"wrong line: {hits[0]['where']}"
    unkempt = [fault for fault in faults if not all(fault.values()) or "\n" in "".join(fault.values())]
    return f"not one whole line: {unkempt}" if unkempt else ""


def _of_text(rng: random.Random) -> Mutant:
    text, named = GOOD, []
    for group in rng.sample(GROUPS, 3)[: rng.randint(1, 3)]:
        old, new, key, words = rng.choice([row for row in SPOILT if _group(row) == group])
        if text.count(old) >= 1:
            text = text.replace(old, new, 1)
            named.append((key, words))
    return Mutant(text, tuple(named))


def _group(row: tuple[str, str, str, str]) -> str:
    """The group of GOOD that the replacement spoils."""
    end = GOOD.index("\n", GOOD.index(row[0]))
    return [line.split(":")[0] for line in GOOD[:end].splitlines() if line[0].isalpha()][-1]


def _of_data(rng: random.Random) -> Mutant:
    data = parse(GOOD, "good").data
    groups = rng.sample(GROUPS, 3)[: rng.randint(1, 3)]
    named = [spoil(data, rng, group) for group in groups]
    return Mutant(dump_yaml(data), tuple(named))


def spoil(data: dict[str, Any], rng: random.Random, group: str) -> tuple[str, str]:
    """Spoil one key of a group in place; (the key to be named, a word of the message)."""
    path = rng.choice([path for path in _walk(data) if path[:1] == (group,) and "where" not in path])
    parent, key, value = _at(data, path[:-1]), path[-1], _at(data, path)
    kinds = ["kind"]
    if isinstance(key, str) and "columns" not in path[:-1]:
        kinds += ["typo", "unknown"]
    if isinstance(value, int | float) and not isinstance(value, bool):
        kinds.append("range")
    words = ""
    match rng.choice(kinds):
        case "kind":  # a text is as good as a list for options and targets
            parent[key] = 3 if key in ("options", "targets") else rng.choice(WRONG_KIND[type(value)])
        case "typo":
            words = f"`{key}`"  # the nearest name
            key = f"{key[:-1]}z{key[-1]}"
            parent[key] = parent.pop(path[-1])
        case "unknown":
            key = "surplus"
            parent[key] = 1
            words = "unknown key"
        case "range":
            parent[key] = -7
    return ".".join(map(str, (*path[:-1], key))), words


def _walk(value: Any, path: tuple = ()) -> Iterator[tuple]:
    yield path
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from _walk(item, (*path, key))


def _at(data: Any, path: tuple) -> Any:
    for part in path:
        data = data[part]
    return data
