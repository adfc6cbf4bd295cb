"""Promise 21: many processes give one run. Two gloo ranks on CPU against one process, by both launchers, cut and taken up by others.

Sums over two halves are rounded differently from one sum, so figures agree to 1e-5 and not bit for bit; where the number of ranks stays,
bit for bit is asked for. Dropout is off: its masks are drawn per rank.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import sparsmith as sm
from sparsmith.app import tune as tune_recipe
from sparsmith.runs import RunFolder
from tests.kit.launch import gap, launched
from tests.kit.small_run import make_recipe
from tests.kit.tally import Tally
from tests.kit.two_ranks import STEPS, pico_runs, tune

NEAR = 1e-5
# a bfloat16 base rounds to 8 bits: products over other row counts differ in the last one, and a token near the edge changes its expert
COARSE = 1e-2
FIGURES = ("losses", "balance", "norms", "health", "dead", "weights")
_CERTAIN = ["methods.0.adapter_dropout=0", "methods.0.lora.dropout=0"]
_CONFIG = "num_machines: 1\nnum_processes: 2\nmixed_precision: 'no'\n"
CONFIGS = {
    "DDP": "distributed_type: MULTI_GPU\n" + _CONFIG,
    "FSDP2": "distributed_type: FSDP\nfsdp_config: {fsdp_version: 2}\n" + _CONFIG,
}
"""accelerate's config files."""
WAYS = [(launcher, layout) for launcher in ("torchrun", "accelerate") for layout in CONFIGS]


def steps_trial(folder: Path) -> Tally:
    """Pico runs by DDP and FSDP2, whole and cut: 2 ranks alone, 1 -> 2 -> 1, 2 -> 1 -> 2, 2 -> 2."""
    tally = Tally()
    alone = {base: tune(str(folder / f"alone-{base}"), base=base) for base in ("float32", "bfloat16")}
    layouts = {"DDP": {"sharded": False}, "FSDP2": {"sharded": True}}
    first: dict[str, Any] = {}
    for layout, way in layouts.items():
        tune(str(folder / f"121-{layout}"), stop=4, save=4)
        first[f"whole-{layout}"] = {"run": folder / f"whole-{layout}", **way}
        first[f"bf16-{layout}"] = {"run": folder / f"bf16-{layout}", "base": "bfloat16", **way}
        first[f"121-{layout}"] = {"run": folder / f"121-{layout}", "stop": 8, "save": 4, **way}
        first[f"212-{layout}"] = {"run": folder / f"212-{layout}", "stop": 4, "save": 4, **way}
        first[f"22a-{layout}"] = {"run": folder / f"22-{layout}", "stop": 8, "save": 4, **way}
        first[f"22b-{layout}"] = {"run": folder / f"22-{layout}", "save": 4, **way}
    figures = pico_runs(folder / "first", 2, **first)
    for layout in layouts:
        figures[f"121-{layout}"] = [tune(str(folder / f"121-{layout}"), save=4)]
        tune(str(folder / f"212-{layout}"), stop=8, save=4)
    last = {f"212-{layout}": {"run": folder / f"212-{layout}", "save": 4, **way} for layout, way in layouts.items()}
    figures |= pico_runs(folder / "last", 2, **last)
    for layout in layouts:
        for kind, what in (("whole", "2 ranks"), ("121", "1, then 2, then 1"), ("212", "2, then 1, then 2")):
            _near(tally, f"{layout}, {what}", figures[f"{kind}-{layout}"], alone["float32"])
        _near(tally, f"{layout}, 2 ranks, bfloat16 base", figures[f"bf16-{layout}"], alone["bfloat16"], COARSE)
        whole, again = figures[f"whole-{layout}"], figures[f"22b-{layout}"]
        same = all(one[key] == two[key] for one, two in zip(whole, again, strict=True) for key in FIGURES)
        tally.case(same, f"{layout}, 2, then 2: not the same bits")
    return tally


def recipe_trial(folder: Path, ways: Sequence[tuple[str, str]] = tuple(WAYS)) -> Tally:
    """A whole recipe through the command line: the series, the files and the model of one process, told by one process.

    Args:
        ways: (torchrun | accelerate, DDP | FSDP2).
    """
    tally = Tally()
    recipe = make_recipe(folder)
    # one process takes two rows per forward, each of two ranks one: what is computed together is the same
    alone = tune_recipe(recipe, [*_CERTAIN, f"output={folder / 'alone'}", "train.micro_batch_size=2"])
    for launcher, layout in ways:
        out = folder / f"{launcher}-{layout}"
        config = folder / f"{layout}.yaml"
        config.write_text(CONFIGS[layout])
        sharded = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"} if layout == "FSDP2" else {}
        words = ["sparsmith", "tune", str(recipe), *_CERTAIN, f"output={out}", "train.micro_batch_size=1"]
        by_torchrun = launcher == "torchrun"
        done = launched(
            words, 2, by="torchrun" if by_torchrun else config, env=sharded if by_torchrun else {}, cwd=folder
        )
        tally.case(done.returncode == 0, f"{launcher} {layout}: {done.stderr[-500:]}")
        if done.returncode:
            continue
        told = (done.stdout.count("run: "), done.stderr.count(f"{out.name} 12/12"))
        tally.case(told == (1, 1), f"{launcher} {layout}: the result and the last step told {told} times")
        tally.case(_files(out) == _files(alone), f"{launcher} {layout}: other files than one process writes")
        shards = list(out.glob("checkpoints/*/shards/rank-*"))
        tally.case(bool(shards) == (layout == "FSDP2"), f"{launcher} {layout}: {len(shards)} shards")
        worst = gap(_series(alone), _series(out))
        tally.figures[f"recipe, {launcher} {layout}"] = worst
        tally.case(worst <= NEAR, f"{launcher} {layout}: a figure of metrics.jsonl differs by {worst:.1e}")
        pairs = zip(sm.load(alone).parameters(), sm.load(out).parameters(), strict=True)
        worst = max(float((p - q).detach().abs().max()) for p, q in pairs)
        tally.case(worst <= NEAR, f"{launcher} {layout}: a weight differs by {worst:.1e}")
    return tally


def whole_trial(folder: Path) -> Tally:
    """Everything."""
    tally = steps_trial(folder / "steps")
    tally.add(recipe_trial(folder / "recipe"))
    return tally


def _near(tally: Tally, what: str, ranks: list[dict[str, Any]], alone: dict[str, Any], loss: float = NEAR) -> None:
    """One series and one set of weights on all ranks, those of one process; with a coarser limit, of the losses alone."""
    worst = {key: max(gap(one[key], alone[key]) for one in ranks) for key in FIGURES}
    tally.figures[what] = worst
    whole = all(len(one["losses"]) == STEPS for one in ranks)
    equal = all(one["weights"] == ranks[0]["weights"] for one in ranks)
    near = worst["losses"] <= loss and (loss > NEAR or max(worst.values()) <= NEAR)
    tally.case(whole and equal and near, f"{what}: {worst}" + ("" if equal else "; ranks differ"))


def _series(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, speed left out."""
    lines = [json.loads(line) for line in RunFolder(run).metrics.read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in line.items() if key != "tokens_per_second"} for line in lines]


def _files(run: Path) -> set[str]:
    names = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    return {name for name in names if "checkpoint" not in name}
