"""The folder of a depth-elastic run as a tuning, its guard and a bench would leave it, made of seeded numbers: for tests of the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from sparsmith.bootstrap import RowScores
from sparsmith.evaluating import EvalResult
from tests.kit.runfolder import DOMAINS, NASTY, make_run

DEPTHS = (2, 3, 4, 6)
FULL = DEPTHS[-1]


def make_soft_run(root: Path, *, seed: int = 0, lift: float = 1.0, gap: float = 0.008, benched: bool = True) -> Path:
    """`gap`: nats that the full depth lost to its control; the limit is 0.02."""
    make_run(root, control=True, seed=seed, lift=lift)
    _change(root / "recipe.yaml", "method: pesc\n  control: dense_lora", "method: soft\n  arm: soft\n  control: train")
    _metrics(root / "metrics.jsonl", lift)
    depths = {str(n): _result(lift, n).to_json() for n in DEPTHS}
    evaluation = json.loads((root / "eval.json").read_text())
    _write(root / "eval.json", {**evaluation, "tuned": depths[str(FULL)], "depths": depths})
    (root / "control").mkdir()
    others = {str(n): _result(lift * (1 if n == FULL else 0.25 * n / FULL), n).to_json() for n in DEPTHS}
    _write(root / "control" / "eval.json", {"tuned": others[str(FULL)], "depths": others})
    _write(root / "guard.json", _guard(evaluation["base"], depths[str(FULL)], gap))
    if benched:
        _write(root / "bench.json", _bench(lift))
        _write(root / "exits.json", _exits())
    return root


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def _change(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


def _metrics(path: Path, lift: float) -> None:
    points = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for point in points:
        if "health" in point:
            falls = {
                n: 2.5 + 0.5 * (1 - n / FULL) + (2.4 + 0.3 * (1 - n / FULL)) * np.exp(-lift * point["step"] / 70)
                for n in DEPTHS
            }
            point["health"] |= {f"soft/loss_at_{n}": float(value) for n, value in falls.items()}
    path.write_text("".join(json.dumps(point) + "\n" for point in points), encoding="utf-8")


def _result(lift: float, depth: int) -> EvalResult:
    rows: dict[str, dict[str, RowScores]] = {}
    share = depth / FULL
    for index, domain in enumerate(DOMAINS):
        rng = np.random.default_rng(index)
        weight, hard = rng.integers(4, 60, 200), rng.normal(0, 0.35, 200)
        loss = (4.9 + 0.2 * index - 2.3 * lift * share**0.3 + hard) * weight
        ones = (1.0,) * 200
        hits = (rng.random(200) < 0.02 + 0.52 * lift * share).astype(float)
        rows[domain] = {
            "loss": RowScores(tuple(loss), tuple(map(float, weight))),
            "exact_match": RowScores(tuple(hits), ones),
        }
        if depth < FULL:
            agreed = np.round(weight * np.clip(0.5 + 0.4 * share + rng.normal(0, 0.05, 200), 0, 1))
            rows[domain]["agreement"] = RowScores(tuple(agreed), tuple(map(float, weight)))
    prints = {domain: f"{domain}-rows" for domain in DOMAINS}
    return EvalResult.of(rows, {domain: domain for domain in DOMAINS}, seed=42, resamples=40, fingerprints=prints)


def _guard(base: dict[str, Any], tuned: dict[str, Any], gap: float) -> dict[str, Any]:
    def figure(value: float, width: float = 0.004) -> dict[str, Any]:
        return {"value": value, "low": value - width, "high": value + width, "n": 600}

    def row(name: str, result: dict[str, Any], lower: float, tokens: int) -> dict[str, Any]:
        loss, hits = result["overall"]["loss"], result["overall"]["exact_match"]
        steps = 300 if tokens else 0
        loss = {**loss, "value": loss["value"] - lower}
        return {
            "name": name,
            "loss": loss,
            "metrics": {"exact_match": hits},
            "domains": {},
            "tokens": tokens,
            "steps": steps,
        }

    return {
        "format": 1,
        "method": "soft",
        "control": "control",
        "rows": [row("base", base, 0, 0), row("control", tuned, gap, 612_480), row("tuned", tuned, 0, 612_480)],
        "difference": figure(gap),
        "differences": {"loss": figure(gap), "exact_match": figure(-0.01, 0.02)},
        "domains": {domain: figure(gap) for domain in DOMAINS},
        "limit": 0.02,
        "passed": gap <= 0.02,
    }


def _timing(value: float) -> dict[str, float]:
    return {"value": value, "low": 0.97 * value, "high": 1.04 * value}


def _bench(lift: float) -> dict[str, Any]:
    def row(system: str, depth: int, loss: float) -> dict[str, Any]:
        ms = 0.9 + 0.62 * depth
        return {
            "system": system,
            "depth": depth,
            "predicted_share": (depth + 1.8) / (FULL + 1.8),
            "weights_bytes": 4 * (786_432 + 430_000 * depth),
            "prefill_tokens_per_second": _timing(9000 * FULL / depth),
            "ms_per_token": {"1": _timing(ms), "8": _timing(2.1 * ms)},
            "loss": loss,
        }

    def way(name: str, kind: str, ms: float, loss: float, **more: Any) -> dict[str, Any]:
        same = None if kind in ("depth", "exits") else True
        timing = {"ms_per_token": _timing(ms), "tokens_per_second": 1e3 / ms, "tokens": 400}
        return {"name": name, "kind": kind, **timing, "same_text": same, "loss": loss, **more}

    losses = {n: 5.1 - 2.3 * lift * (n / FULL) ** 0.3 for n in DEPTHS}
    left = {name: dict(zip(map(str, DEPTHS), counts)) for name, counts in _HISTOGRAMS.items()}
    return {
        "format_version": 1,
        "facts": {
            "target": "run",
            "device": "Some Processor 2.4 GHz",
            "dtype": "float32",
            "layers": FULL,
            "depths": list(DEPTHS),
            "prompts": 16,
            "settings": {"repeats": 5, "context": 64, "new_tokens": 32},
            "machine": {"threads": 1},
        },
        "speed": [row("base", FULL, 4.9), *(row("tuned", n, losses[n]) for n in DEPTHS)],
        "ways": [
            way("token by token", "plain", 5.0, losses[FULL]),
            *(way(f"depth {n}", "depth", 1.2 + 0.62 * n, losses[n]) for n in DEPTHS[:-1]),
            way("drafts 2:2", "speculation", 3.9, losses[FULL], acceptance=0.71, drafted=300, accepted=213),
            way("drafts 2:4", "speculation", 3.6, losses[FULL], acceptance=0.64, drafted=420, accepted=268),
            way("drafts 3:4", "speculation", 4.1, losses[FULL], acceptance=0.8, drafted=400, accepted=320),
            *(
                way(name, "exits", ms, losses[FULL] + more, mean_depth=mean, agreement=agreed, histogram=left[name])
                for (name, ms, more, mean, agreed) in (
                    ("exits calibrated for 0.98", 4.2, 0.01, 4.6, 0.985),
                    ("exits 0.9", 3.9, 0.03, 4.0, 0.96),
                    ("exits 0.7", 3.2, 0.12, 3.1, 0.88),
                )
            ),
        ],
        "calibration": None,
        "written": [],
    }


_HISTOGRAMS = {
    "exits calibrated for 0.98": (90, 40, 30, 240),
    "exits 0.9": (140, 60, 40, 160),
    "exits 0.7": (240, 60, 20, 80),
}


def _exits() -> dict[str, Any]:
    texts = ("The answer is 18 eggs, because 3 boxes hold 6 each.", "find . -name '*.py' | xargs wc -l", NASTY)
    rng = np.random.default_rng(0)
    return {
        "format_version": 1,
        "layers": FULL,
        "depths": list(DEPTHS),
        "histograms": {name: dict(zip(map(str, DEPTHS), counts)) for name, counts in _HISTOGRAMS.items()},
        "shown": "exits calibrated for 0.98",
        "thresholds": {"2": 0.93, "3": 0.9, "4": 2.0},
        "agreement": 0.985,
        "mean_depth": 4.6,
        "prompts": [
            {
                "prompt": f"### Human:\n{NASTY}\n### Assistant:\n",
                "tokens": [
                    [piece, FULL if place == 0 else int(rng.choice(DEPTHS))]
                    for place, piece in enumerate(text[i : i + 4] for i in range(0, len(text), 4))
                ],
            }
            for text in texts
        ],
    }
