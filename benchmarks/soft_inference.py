"""What depth buys when a SoFT model writes: sub-models, self-speculation, confidence exits. Exactness is checked, speed is measured.

    python -m benchmarks.soft_inference --model runs/soft/model [--recipe recipes/soft-stories3m.yaml] [--prompts 200] [--timed 6]

`--model` is a run, an exported folder, or (with `--exits 2,3,4,6`, to try the script) any base. Prompts are the recipe's held-out rows.
All candidates of a table take turns within each repeat, forwards and backwards, over the same prompts and number of tokens; a ratio is the
median of the ratios within one repeat. End tokens are ignored while timing, so that everybody writes as much, and heeded in the checks of
identity. Writes benchmarks/results/soft_inference.json and .md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsmith.app import facts
from sparsmith.app.recipes import load_recipe
from sparsmith.app.use import load_model
from sparsmith.crafting.apply import craft
from sparsmith.crafting.slices import at_depth, depths_of
from sparsmith.data import load_data
from sparsmith.evaluating.rows import sets_of
from sparsmith.inference import Generated, calibrate, generate
from sparsmith.inference.budget import depth_fraction
from sparsmith.inference.calibrate import weights_hash
from sparsmith.methods.soft.config import SoftConfig

OUT = Path(__file__).parent / "results" / "soft_inference.json"
DEPTH_BOUND = 1.10
"""A depth may take this much of its share by (n layer + head) / (N layer + head), in products per token."""
AGREEMENT = 0.98
Way = Callable[[Tensor], Generated]


# ---------------------------------------------------------------- prompts and timing


def prompts_of(recipe: Any, tokenizer: Any, count: int, room: int) -> list[list[int]]:
    """Held-out prompts, from every set in turn, that leave room for an answer."""
    data = load_data(recipe.data, tokenizer, seed=recipe.train.seed, rows_needed=0)
    columns = [[row.prompt_ids for row in one.rows if 0 < len(row.prompt_ids) <= room] for one in sets_of(data.eval)]
    turns = range(max(map(len, columns)))
    return [column[turn] for turn in turns for column in columns if turn < len(column)][:count]


def padded(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """(ids, mask), padded on the left."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in prompts])
    return ids, torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts])


def in_turn(ways: dict[str, Way], prompts: Sequence[Sequence[int]], repeats: int) -> dict[str, dict[str, Any]]:
    """Per way: seconds of each repeat over all prompts, one at a time, and what the last one gave."""
    rows: dict[str, dict[str, Any]] = {name: {"seconds": [], "out": []} for name in ways}
    for repeat in range(repeats + 1):
        order = list(ways) if repeat % 2 == 0 else list(ways)[::-1]
        for name in order:
            start = time.perf_counter()
            out = [ways[name](torch.tensor([prompt])) for prompt in prompts]
            if repeat:  # the first is warm-up
                rows[name]["seconds"].append(time.perf_counter() - start)
                rows[name]["out"] = out
    return rows


def ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """The median over repeats of the ratio within one repeat."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


# ---------------------------------------------------------------- the tables


class Session:
    """One model, its prompts and the options that all share."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        model, tokenizer, own = load_model(args.model)
        recipe = load_recipe(args.recipe, args.overrides) if args.recipe else own
        if args.exits:
            model = craft(model, SoftConfig(exits=tuple(map(int, args.exits.split(",")))), proof=False)
        self.model, self.depths = model.eval(), depths_of(model)
        self.layers, self.inner = self.depths[-1], self.depths[:-1]
        longest = getattr(model.config, "max_position_embeddings", None) or 1 << 20
        self.prompts = prompts_of(recipe, tokenizer, args.prompts, min(longest - args.new_tokens, 192))
        self.timed = self.prompts[: args.timed]

    def way(self, **options: Any) -> Way:
        """Text of a fixed length, whatever token comes."""
        options = {"max_new_tokens": self.args.new_tokens, "eos_token_id": None, "pad_token_id": 0, **options}
        model = options.pop("model", self.model)
        return lambda ids: generate(model, ids, return_stats=True, **options)

    def run(self, ways: dict[str, Way]) -> dict[str, dict[str, Any]]:
        return in_turn(ways, self.timed, self.args.repeats)

    def ms(self, row: dict[str, Any]) -> float:
        """Per token, prefill included."""
        return 1e3 * statistics.median(row["seconds"]) / (len(self.timed) * self.args.new_tokens)


def plain_and_depths(session: Session) -> dict[str, Any]:
    """transformers' generate and our loop at full depth, and each depth by either."""
    ways: dict[str, Way] = {"transformers": session.way(), "ours": session.way(exit_threshold=2.0)}
    for depth in session.inner:
        ways[f"transformers at {depth}"] = session.way(depth=depth)
        ways[f"ours at {depth}"] = session.way(model=at_depth(session.model, depth), exit_threshold=2.0)
    rows = session.run(ways)
    context = round(statistics.mean(map(len, session.timed))) + session.args.new_tokens
    depths = []
    for depth in session.inner:
        share = depth_fraction(session.model, depth, context)
        for name in ("transformers", "ours"):
            measured = ratio(rows[f"{name} at {depth}"]["seconds"], rows[name]["seconds"])
            depths.append(
                {
                    "depth": depth,
                    "engine": name,
                    "ms_per_token": session.ms(rows[f"{name} at {depth}"]),
                    "of_full": measured,
                    "predicted": share,
                    "over_predicted": measured / share,
                    "within_bound": measured <= DEPTH_BOUND * share,
                }
            )
    return {
        "ms_per_token": {name: session.ms(rows[name]) for name in ("transformers", "ours")},
        "ours_over_transformers": ratio(rows["ours"]["seconds"], rows["transformers"]["seconds"]),
        "depths": depths,
    }


def speculation(session: Session) -> list[dict[str, Any]]:
    """Exit x K x bonus, each against plain text by the same engine; transformers' own at equal exit and draft length."""
    ways: dict[str, Way] = {"ours": session.way(exit_threshold=2.0), "transformers": session.way()}
    settings: dict[str, dict[str, Any]] = {}
    confidence = session.args.stop_confidence
    for depth in session.inner:
        for length in session.args.draft_lens:
            for bonus in (True, False, "auto"):
                name = f"exit {depth}, K {length}, bonus {bonus}"
                settings[name] = {"exit": depth, "draft_len": length, "bonus": bonus, "stop_confidence": confidence}
                ways[name] = session.way(self_speculative=settings[name])
            ways[f"transformers' {depth}:{length}"] = session.way(
                self_speculative={"exit": depth, "draft_len": length, "stop_confidence": confidence}, engine="hf"
            )
    rows = session.run(ways)
    text = [out.ids.tolist() for out in rows["ours"]["out"]]
    found = []
    for name, one in settings.items():
        row, theirs = rows[name], rows[f"transformers' {one['exit']}:{one['draft_len']}"]
        stats = [out.stats for out in row["out"]]
        drafted = sum(s.drafted for s in stats)
        found.append(
            {
                **one,
                "ms_per_token": session.ms(row),
                "speed_up": ratio(rows["ours"]["seconds"], row["seconds"]),
                "speed_up_over_transformers_plain": ratio(rows["transformers"]["seconds"], row["seconds"]),
                "over_assistant_early_exit": ratio(theirs["seconds"], row["seconds"]),
                "acceptance": sum(s.accepted for s in stats) / max(1, drafted),
                "early_passes_per_token": sum(s.early_passes for s in stats) / sum(s.emitted for s in stats),
                "full_passes_per_token": sum(s.full_passes for s in stats) / sum(s.emitted for s in stats),
                "same_text": [out.ids.tolist() for out in row["out"]] == text,
            }
        )
    return found


@torch.no_grad()
def identity(session: Session) -> dict[str, Any]:
    """All prompts, six settings: greedy by speculation against transformers' greedy, token by token.

    A text that differs is looked into: the full model's margin between the two tokens where they part. Sums in another order move logits
    by about 1e-5 in float32, so only a larger margin would be a fault.
    """
    first, last = session.inner[0], session.inner[-1]
    settings = [
        (first, 2, True),
        (first, 4, False),
        (first, 6, "auto"),
        (last, 2, False),
        (last, 4, True),
        (last, 6, "auto"),
    ]
    differ: list[dict[str, Any]] = []
    compared = 0
    for start in range(0, len(session.prompts), 8):
        ids, mask = padded(session.prompts[start : start + 8])
        options = {"attention_mask": mask, "max_new_tokens": session.args.new_tokens, "pad_token_id": 0}
        expected = generate(session.model, ids, **options)
        for exit, length, bonus in settings:
            one = {"exit": exit, "draft_len": length, "bonus": bonus}
            out = generate(session.model, ids, self_speculative=one, **options)
            for row in range(len(ids)):
                compared += 1
                if not torch.equal(out[row], expected[row, : out.shape[1]]):
                    differ.append(
                        {**one, "prompt": start + row, **_margin(session.model, out[row], expected[row], mask[row])}
                    )
    return {"texts": compared, "prompts": len(session.prompts), "settings": len(settings), "different": differ}


def _margin(model: Any, found: Tensor, expected: Tensor, mask: Tensor) -> dict[str, float]:
    length = min(len(found), len(expected))
    place = int((found[:length] != expected[:length]).nonzero()[0])
    logits = model(input_ids=expected[len(mask) - int(mask.sum()) : place][None]).logits[0, -1]
    return {"token": place - len(mask), "margin": float((logits[expected[place]] - logits[found[place]]).abs())}


def exits(session: Session) -> dict[str, Any]:
    """Thresholds from one half of the prompts, text and agreement on the other."""
    half = len(session.prompts) // 2
    found = calibrate(
        session.model, session.prompts[:half], agreement=AGREEMENT, max_new_tokens=session.args.new_tokens
    )
    policies: dict[str, Any] = {f"calibrated for {AGREEMENT}": found.thresholds, "0.9": 0.9, "0.7": 0.7}
    timed, session.timed = session.timed, session.prompts[half : half + session.args.timed]
    ways = {"ours": session.way(exit_threshold=2.0), **{n: session.way(exit_threshold=t) for n, t in policies.items()}}
    rows = session.run(ways)
    session.timed = timed
    table = []
    for name, policy in policies.items():
        table.append(
            {
                "thresholds": name,
                "tokens_per_second": 1e3 / session.ms(rows[name]),
                "speed_up": ratio(rows["ours"]["seconds"], rows[name]["seconds"]),
                **_on_all(session, policy, session.prompts[half:]),
            }
        )
    return {
        "calibration": {"thresholds": found.thresholds, "mean_depth": found.mean_depth, "tokens": found.tokens},
        "table": table,
    }


def _on_all(session: Session, policy: Any, prompts: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Histogram, mean depth and agreement with the full model on the same text, end tokens heeded."""
    histogram: dict[int, int] = {}
    agreed = 0.0
    for start in range(0, len(prompts), 8):
        ids, mask = padded(prompts[start : start + 8])
        options = {"attention_mask": mask, "max_new_tokens": session.args.new_tokens, "pad_token_id": 0}
        stats = generate(session.model, ids, exit_threshold=policy, agreement=True, return_stats=True, **options).stats
        tokens = sum(stats.histogram.values())
        agreed += stats.agreement * tokens
        for depth, count in stats.histogram.items():
            histogram[depth] = histogram.get(depth, 0) + count
    tokens = sum(histogram.values())
    early = tokens - histogram[session.layers]
    return {
        "histogram": histogram,
        "mean_depth": sum(depth * count for depth, count in histogram.items()) / tokens,
        "agreement": agreed / tokens,
        # a token read at full depth agrees by itself
        "agreement_of_those_that_left": 1 - (tokens - agreed) / early if early else None,
    }


# ---------------------------------------------------------------- the report


def report(result: dict[str, Any]) -> str:
    """The tables, as Markdown."""
    plain, bound = result["plain"], result["bounds"]["depth"]
    lines = [
        "# SoFT when writing",
        "",
        f"`{result['command']}` on {result['machine']['processor']}, {result['machine']['threads']} threads; model "
        f"{result['model']['name']}, exits {result['model']['depths']}. One prompt at a time, {result['sizes']['new_tokens']} tokens.",
        "",
        f"Plain: transformers {plain['ms_per_token']['transformers']:.2f} ms per token, ours {plain['ms_per_token']['ours']:.2f} "
        f"({plain['ours_over_transformers']:.2f}x).",
        "",
        f"| depth | engine | ms/token | of full | (n layer + head)/(N layer + head) | over it, bound {bound} |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['depth']} | {r['engine']} | {r['ms_per_token']:.2f} | {r['of_full']:.3f} | {r['predicted']:.3f} | "
        f"{r['over_predicted']:.3f} |"
        for r in plain["depths"]
    ]
    lines += [
        "",
        "| exit | K | bonus | ms/token | speed-up | over assistant_early_exit | acceptance | early passes | full passes | same text |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['exit']} | {r['draft_len']} | {r['bonus']} | {r['ms_per_token']:.2f} | {r['speed_up']:.2f}x | "
        f"{r['over_assistant_early_exit']:.2f}x | {r['acceptance']:.2f} | {r['early_passes_per_token']:.2f} | "
        f"{r['full_passes_per_token']:.2f} | {'yes' if r['same_text'] else 'no'} |"
        for r in result["speculation"]
    ]
    same = result["identity"]
    worst = max((row["margin"] for row in same["different"]), default=0.0)
    lines += [
        "",
        f"Identity: {same['texts'] - len(same['different'])} of {same['texts']} texts ({same['prompts']} prompts, {same['settings']} "
        f"settings) are transformers' greedy text; largest margin where one differs: {worst:.1e}.",
        "",
        "| thresholds | tokens/s | speed-up | mean depth | agreement | of those that left | tokens by depth |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in result["exits"]["table"]:
        left = "-" if r["agreement_of_those_that_left"] is None else f"{r['agreement_of_those_that_left']:.3f}"
        lines.append(
            f"| {r['thresholds']} | {r['tokens_per_second']:.0f} | {r['speed_up']:.2f}x | {r['mean_depth']:.2f} | "
            f"{r['agreement']:.3f} | {left} | {r['histogram']} |"
        )
    return "\n".join([*lines, ""])


def run(args: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(args.threads)
    started, session = time.perf_counter(), Session(args)
    result: dict[str, Any] = {
        "command": facts.command(),
        "machine": facts.machine(),
        "versions": facts.versions(),
        "model": {"name": Path(args.model).name, "hash": weights_hash(session.model), "depths": list(session.depths)},
        "sizes": {
            "prompts": len(session.prompts),
            "timed": len(session.timed),
            "new_tokens": args.new_tokens,
            "repeats": args.repeats,
        },
        "bounds": {"depth": DEPTH_BOUND, "agreement": AGREEMENT},
    }
    for name, measure in (
        ("plain", plain_and_depths),
        ("speculation", speculation),
        ("identity", identity),
        ("exits", exits),
    ):
        result[name] = measure(session)
        print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--model", required=True, help="a run, an exported folder, or a base with --exits")
    parser.add_argument("--recipe", help="whose held-out rows are the prompts; default: the run's own")
    parser.add_argument("--exits", help="for a base: depths to read it out at, as 2,3,4,6")
    parser.add_argument("--draft-lens", type=lambda text: [int(n) for n in text.split(",")], default=[2, 4, 6])
    for name, default in (("prompts", 200), ("timed", 4), ("new-tokens", 40), ("repeats", 3), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--stop-confidence", type=float, default=0.4)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("overrides", nargs="*", help="of the recipe, as key=value")
    args = parser.parse_args()
    result = run(args)
    text = report(result)
    print(text)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    args.out.with_suffix(".md").write_text(text, encoding="utf-8")
    print(f"written: {args.out}")


if __name__ == "__main__":
    main()
