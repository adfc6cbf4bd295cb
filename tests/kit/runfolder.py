"""A run folder as a tuning would leave it, made of seeded numbers: for tests of the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from sparsmith.bootstrap import RowScores
from sparsmith.evaluating import EvalResult

DOMAINS = ("maths", "text", "code")
LAYERS, EXPERTS, STEPS = 6, 8, 300
NASTY = "<script>alert('x')</script> & \"quotes\" <img src=x onerror=alert(1)>"


def make_run(root: Path, *, control: bool = False, seed: int = 0, lift: float = 1.0) -> Path:
    """Write a whole run; `control` = a dense LoRA run without experts; `lift` scales what was learned."""
    root.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    (root / "recipe.yaml").write_text(_recipe(control), encoding="utf-8")
    _write(root / "run.json", _facts(seed))
    _write(root / "plan.json", _plan(control))
    _write(root / "data.json", _data())
    (root / "metrics.jsonl").write_text(
        "".join(json.dumps(p) + "\n" for p in _metrics(rng, control, lift)), encoding="utf-8"
    )
    base, tuned = _result(0.0), _result(lift)
    _write(root / "eval.json", {"base": base.to_json(), "tuned": tuned.to_json()})
    _write(root / "samples.json", _samples(control))
    _write(root / "proof.json", _proof(control))
    if not control:
        _write(root / "tables.json", {"pesc": _tables(rng)})
    return root


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def _recipe(control: bool) -> str:
    method = "  control: dense_lora\n" if control else "  num_experts: 8\n  top_k: 2\n  adapter_dim: 64\n"
    sources = "".join(
        f"  - name: {d}\n    domain: {d}\n    path: rows/{d}.jsonl.gz\n    rate: 1.0\n    cap: 30000\n" for d in DOMAINS
    )
    return (
        "model:\n  path: ./models/stories-3m\n  dtype: float32\n  quant: none\nmethods:\n- method: pesc\n"
        + method
        + "data:\n  train:\n"
        + sources
        + "  max_length: 512\n  packing: true\n  mixing: balanced\n"
        + "train:\n  steps: 300\n  batch_size: 16\n  learning_rate: 0.003\n  seed: 42\noutput: runs/pesc\n"
    )


def _facts(seed: int) -> dict[str, Any]:
    return {
        "sparsmith": "0.1.0",
        "methods": ["pesc"],
        "versions": {"python": "3.11.7", "torch": "2.13.0", "transformers": "5.23.0", "peft": "0.21.2"},
        "machine": {
            "system": "Linux x86_64",
            "processor": "Some Processor 2.4 GHz",
            "cores": 2,
            "threads": 1,
            "gpus": [],
            "memory_gb": 24.7,
        },
        "command": "sparsmith tune recipe.yaml",
        "seed": seed,
        "steps": STEPS,
        "rows": 4800,
        "tokens_trained": 612_480,
        "train_seconds": 183.2,
        "seconds": 241.7,
        "started": "2026-01-05T09:12:44+00:00",
        "finished": "2026-01-05T09:16:46+00:00",
    }


def _plan(control: bool) -> dict[str, Any]:
    trained = {"lora": 331_776} if control else {"adapter": 1_179_648, "router": 18_432, "lora": 331_776}
    what = (
        "LoRA r 8 on the attention and FFN linears"
        if control
        else "FFN -> shared FFN + 8 adapters (r 64), top-2 router"
    )
    base, total = 3_391_104, 3_391_104 + sum(trained.values())
    weights, cases = 4 * total, ("low", "expected", "high")
    activations = dict(zip(cases, (21_000_000, 42_000_000, 84_000_000)))
    fixed = {"weights": weights, "gradients": 4 * sum(trained.values()), "optimizer": 8 * sum(trained.values())}
    return {
        "base": "/somewhere/models/stories-3m",
        "methods": ["pesc"],
        "changes": [{"where": "model.layers.{0..5}.mlp", "what": what, "count": 6}],
        "parameters": {
            "base": base,
            "total": total,
            "active": total - (0 if control else 884_736),
            "trained": trained,
            "trained_total": sum(trained.values()),
        },
        "memory": {
            **fixed,
            "activations": activations,
            "total": {c: sum(fixed.values()) + activations[c] for c in cases},
        },
        "flops_per_token": {
            "base_forward": 7_812_096,
            "forward": 8_110_000,
            "training": 22_000_000,
            "context": 256,
            "overhead": 8_110_000 / 7_812_096,
        },
        "disk": {"delta": 6_119_424, "trainer_checkpoint": 18_358_272, "export": 19_683_840},
        "notes": [],
    }


def _data() -> dict[str, Any]:
    def counts(domain: str, read: int, share: float | None) -> dict[str, Any]:
        kept = read - 31 - 4
        more = {} if share is None else {"share": share}
        return {
            "read": read,
            "rejected": 4,
            "over_long": 31,
            "all_masked": 0,
            "kept": kept,
            "tokens": kept * 128,
            "trained_tokens": kept * 40,
            "domain": domain,
            **more,
        }

    return {
        "domains": list(DOMAINS),
        "counts": {
            "train": {d: counts(d, 7473 + 900 * i, 1 / 3) for i, d in enumerate(DOMAINS)},
            "eval": {d: counts(d, 235, None) for d in DOMAINS},
        },
        "fingerprints": {f"/somewhere/rows/{d}.jsonl.gz": f"{i}9f2c7e4b1a0d6835" * 4 for i, d in enumerate(DOMAINS)},
    }


def _metrics(rng: np.random.Generator, control: bool, lift: float) -> list[dict[str, Any]]:
    points: list[dict[str, Any]] = []
    floor = {"maths": 2.1, "text": 2.9, "code": 2.4}
    for step in range(0, STEPS + 1, 10):
        fall = {d: floor[d] + (5.2 - floor[d]) * np.exp(-lift * step / 70) for d in DOMAINS}
        if step % 50 == 0:
            points.append({"step": step, "eval_loss": fall, "eval_domain_loss": {d: x + 0.05 for d, x in fall.items()}})
        if step == 0:
            continue
        losses = {d: float(x + rng.normal(0, 0.09)) for d, x in fall.items()}
        task = float(np.mean(list(losses.values())))
        settle = np.exp(-step / 90)
        health = {"gradient/lora": float(0.4 + settle * rng.random())}
        terms = {"task": task}
        if not control:
            terms["pesc.balance"] = float(1.02 + 0.4 * settle + 0.02 * rng.random())
            health |= {
                "pesc/load_max": float(1.35 + 1.6 * settle + 0.2 * rng.random()),
                "pesc/load_min": float(0.72 - 0.6 * settle + 0.05 * rng.random()),
                "pesc/load_entropy": float(0.985 - 0.12 * settle),
                "pesc/dead_experts": float(int(5 * settle)),
                "gradient/adapter": float(0.3 + settle * rng.random()),
                "gradient/router": float(0.02 + 0.1 * settle * rng.random()),
            }
        points.append(
            {
                "step": step,
                "loss": task,
                "grad_norm": float(0.5 + settle),
                "learning_rate": 3e-3 * min(1, step / 20),
                "tokens_per_second": float(3300 + 90 * rng.normal()),
                "terms": terms,
                "domain_loss": losses,
                "health": health,
            }
        )
    return points


def _result(lift: float) -> EvalResult:
    rows: dict[str, dict[str, RowScores]] = {}
    for index, domain in enumerate(DOMAINS):
        rng = np.random.default_rng(index)
        weight, hard = rng.integers(4, 60, 200), rng.normal(0, 0.35, 200)
        loss = (4.9 + 0.2 * index - 2.3 * lift + hard) * weight
        ones = (1.0,) * 200
        hits = (rng.random(200) < 0.02 + 0.52 * lift - 0.1 * index * lift).astype(float)
        rows[domain] = {
            "loss": RowScores(tuple(loss), tuple(map(float, weight))),
            "exact_match": RowScores(tuple(hits), ones),
            "finished": RowScores(tuple((rng.random(200) < 0.1 + 0.88 * lift).astype(float)), ones),
        }
        if domain == "text":
            ranked = (rng.random(200) < 0.5 + 0.35 * lift).astype(float)
            rows[domain] |= {"rank": RowScores(tuple(ranked), ones), "rank_by_token": RowScores(tuple(ranked), ones)}
    names = {domain: domain for domain in DOMAINS}
    return EvalResult.of(
        rows, names, seed=42, resamples=500, fingerprints={domain: f"{domain}-rows" for domain in DOMAINS}
    )


def _tables(rng: np.random.Generator) -> dict[str, Any]:
    load = rng.dirichlet(np.full(EXPERTS, 9.0), (len(DOMAINS), LAYERS))
    for domain in range(len(DOMAINS)):
        load[domain, LAYERS // 2 :, 2 * domain : 2 * domain + 2] *= 2.6
    load /= load.sum(-1, keepdims=True)
    return {
        "load": load.mean(0).tolist(),
        "layers": list(range(LAYERS)),
        "load_by_domain": load.tolist(),
        "domains": list(DOMAINS),
    }


def _samples(control: bool) -> list[dict[str, str]]:
    story = "Once upon a time there was a little girl who lived in a house with a big garden and she liked to play"
    asked = (
        ("maths", "A box holds 6 eggs. How many eggs are in 3 boxes?", "18", story, "17" if control else "18"),
        ("text", f"Reverse the words: red green {NASTY}", "green red", "", "green red"),
        ("code", "What does `[x * 2 for x in range(3)]` give in Python?", "[0, 2, 4]", "the the the", "[0, 2, 4]"),
    )
    return [
        {
            "domain": domain,
            "set": domain,
            "prompt": f"### Human:\n{prompt}\n### Assistant:\n",
            "reference": reference,
            "base": base,
            "tuned": tuned,
        }
        for domain, prompt, reference, base, tuned in asked
    ]


def _proof(control: bool) -> dict[str, Any]:
    roles = {"lora": 331_776} if control else {"adapter": 1_179_648, "router": 18_432, "lora": 331_776}
    counted = {"check": "trained parameters by role equal the plan", "value": roles, "passed": True}
    moved = {role: 0.01 * (i + 1.234) for i, role in enumerate(roles)}
    logits = {"check": "craft leaves the logits unchanged", "bitwise": True, "value": 0.0, "limit": 0.0, "passed": True}
    return {
        "craft": {**logits, "trained": counted},
        "during": {"check": "every trained role moved", "step": 20, "value": moved, "limit": 0.0, "passed": True},
        "export": {"check": "a clean process gives the same logits", "value": 4.77e-7, "limit": 1e-5, "passed": True},
    }
