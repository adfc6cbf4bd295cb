"""The cost of an upcycled layer, and the memory of a streamed conversion. `python -m benchmarks.upcycle_layer`

Three figures, each with the bound that the project has set itself:

1. forward of a top-2 layer of 8 experts as it trains (the default `experts_impl`, router included) over two dense FFNs of the same width,
   float32 and bfloat16, at the first number of --tokens;
2. a training step of the layer (forward, backward into routers, experts and input) with transformers' own `eager` experts over ours, at
   every number of --tokens: `eager` pays a price per expert and step, so its loss is the larger the fewer tokens a step has;
3. peak resident memory of `sm.convert` on a checkpoint of the shape of a Llama of 1B parameters, over that of converting a tiny one.

The layers run in one process, repeats of all candidates interleaved; a ratio is the median over repeats of the ratio within one repeat.
The conversion runs in a process of its own. Price: some minutes and 7 GB of disk under --work. Writes
benchmarks/results/upcycle_layer.json.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import sparsmith as sm
from benchmarks.pesc_layer import GatedFFN, machine, measure, ratio, summary
from sparsmith import durable
from sparsmith.exporting.streamed import Coming, StreamWriter
from sparsmith.methods.upcycle.layers import context_of, sparse_blocks

RESULT = Path(__file__).parent / "results" / "upcycle_layer.json"
IMPLEMENTATIONS = {"ours": "grouped_mm", "grouped_mm": "grouped_mm", "eager": "eager"}
"""What is measured -> `experts_impl`: what the default runs here, and transformers' own ways but `batched_mm`, which gathers an expert's
weights for every slot: 100 GB at 4,096 tokens."""
CONSTANT = 256 << 20
"""Bytes that a conversion may take beside two shards: temporaries of a tensor's check and cast, buffers of the hash."""
BOUNDS = {"forward_over_two_dense": 1.25, "eager_over_ours_training": 1.5, "extra_bytes": CONSTANT}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class TwoDense(nn.Module):
    """What a token's two experts would cost without routing."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.first, self.second = GatedFFN(hidden, width), GatedFFN(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) + self.second(x)


class Upcycled(nn.Module):
    """The FFN of a crafted block, with one of the ways to compute its experts."""

    def __init__(self, args: argparse.Namespace, way: str, dtype: torch.dtype, tokens: int) -> None:
        super().__init__()
        from transformers import AutoModelForCausalLM, LlamaConfig

        config = LlamaConfig(
            hidden_size=args.hidden,
            intermediate_size=args.width,
            num_hidden_layers=1,
            num_attention_heads=args.hidden // 64,
            vocab_size=64,
        )
        torch.manual_seed(0)
        settings = sm.UpcycleConfig(experts=args.experts, top_k=2, moe={"experts_impl": IMPLEMENTATIONS[way]})
        model = sm.craft(AutoModelForCausalLM.from_config(config), settings, proof=False).train()
        if way != "ours":
            model.config._experts_implementation = way
        self.context, self.shape = context_of(model), (1, tokens)
        self.ffn = sparse_blocks(model)[0][1]
        self.ffn.experts.to(dtype)  # the router keeps float32 masters

    def forward(self, x: Tensor) -> Tensor:
        self.context.begin(None, None, None, self.shape, 0)
        out = self.ffn(x)
        self.context.clear()
        return out[0] if isinstance(out, tuple) else out


@torch.no_grad()
def forward(layer: nn.Module, x: Tensor) -> None:
    layer(x)


def training_step(layer: nn.Module, x: Tensor, grad: Tensor) -> None:
    layer(x.detach().requires_grad_()).backward(grad)
    for parameter in layer.parameters():
        parameter.grad = None


def layers(args: argparse.Namespace, dtype: torch.dtype, tokens: int) -> dict[str, Any]:
    """Times and ratios of one number type and one number of tokens."""
    torch.manual_seed(0)
    built: dict[str, nn.Module] = {"two dense": TwoDense(args.hidden, args.width).to(dtype)}
    built |= {way: Upcycled(args, way, dtype, tokens) for way in IMPLEMENTATIONS}
    x, grad = (torch.randn(1, tokens, args.hidden, dtype=dtype) for _ in range(2))
    forwards = measure({n: lambda m=m: forward(m, x) for n, m in built.items()}, args.repeats, args.warm_up)
    found: dict[str, Any] = {
        "forward_ms": {n: summary(v) for n, v in forwards.items()},
        "forward_over_two_dense": {n: ratio(v, forwards["two dense"]) for n, v in forwards.items()},
        "dense_parameters": sum(p.numel() for p in built["two dense"].parameters()),
    }
    if str(dtype).removeprefix("torch.") in args.forward_only:
        return found
    steps = measure({n: lambda m=m: training_step(m, x, grad) for n, m in built.items()}, args.repeats, args.warm_up)
    return {
        **found,
        "training_ms": {n: summary(v) for n, v in steps.items()},
        "training_over_two_dense": {n: ratio(v, steps["two dense"]) for n, v in steps.items()},
        "eager_over_ours_training": ratio(steps["eager"], steps["ours"]),
    }


# ---------------------------------------------------------------- the conversion


def write_base(folder: Path, args: argparse.Namespace, *, tiny: bool = False) -> int:
    """A Llama of random weights in bfloat16, in shards; returns the bytes of the largest shard."""
    from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig

    hidden = 128 if tiny else args.base_hidden
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=2 if tiny else args.base_layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=max(1, hidden // 256),
        vocab_size=512 if tiny else args.base_vocab,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    with torch.device("meta"):
        shapes = {n: tuple(t.shape) for n, t in AutoModelForCausalLM.from_config(config).state_dict().items()}
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    GenerationConfig.from_model_config(config).save_pretrained(folder)
    coming = [Coming(name, shape) for name, shape in shapes.items()]
    with StreamWriter(folder, coming, torch.bfloat16, args.shard_mb * 10**6) as writer:
        for name, shape in coming:
            writer.write(name, (0.02 * torch.randn(shape)).to(torch.bfloat16))
        writer.finish()
    return max(file.stat().st_size for file in folder.glob("*.safetensors"))


def conversion(args: argparse.Namespace) -> dict[str, Any]:
    """Peak memory and seconds of a conversion in a process of its own; what it writes is removed."""
    work = Path(tempfile.mkdtemp(dir=args.work, prefix="upcycle-layer-"))
    try:
        durable.require_space(work, args.disk_gb * 10**9)
        write_base(work / "tiny", args, tiny=True)
        largest = write_base(work / "base", args)
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.upcycle_layer", "--child", str(work)], capture_output=True, text=True
        )
        if done.returncode:
            raise SystemExit(done.stderr)
        told = json.loads(done.stdout.splitlines()[-1])
        sizes = {kind: sum(f.stat().st_size for f in (work / kind).glob("*.safetensors")) for kind in ("base", "out")}
        bound = 2 * largest + CONSTANT
        return {
            **told,
            "base_bytes": sizes["base"],
            "out_bytes": sizes["out"],
            "largest_shard_bytes": largest,
            "extra_bytes": told["peak_bytes"] - told["baseline_bytes"],
            "bound_bytes": bound,
            "passed": told["peak_bytes"] - told["baseline_bytes"] <= bound,
        }
    finally:
        shutil.rmtree(work, ignore_errors=True)


def child(work: Path) -> None:
    """Convert a tiny base, then the large one, and tell the peaks."""
    config = sm.UpcycleConfig(experts=4, layers="every-2")
    sm.convert(work / "tiny", work / "tiny-out", config, proof=False)
    baseline = _peak()
    begun = time.perf_counter()
    report = sm.convert(work / "base", work / "out", config, proof=False)
    told = {"baseline_bytes": baseline, "peak_bytes": _peak(), "seconds": time.perf_counter() - begun}
    print(json.dumps({**told, "parameters": report.parameters}))


def _peak() -> int:
    """Largest resident memory so far, bytes; mapped pages of files count."""
    status = Path("/proc/self/status")
    if status.exists():  # `ru_maxrss` begins with the size of the process that started this one
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Every figure, as it is written."""
    torch.set_num_threads(args.threads)
    result: dict[str, Any] = {
        "command": "python -m benchmarks.upcycle_layer " + " ".join(sys.argv[1:]),
        "machine": machine(),
        "sizes": {k: v for k, v in vars(args).items() if k not in ("out", "work", "child")},
        "bounds": BOUNDS,
        "layers": {
            name: {str(tokens): layers(args, DTYPES[name], tokens) for tokens in args.tokens} for name in args.dtypes
        },
    }
    passed = {}
    for name, by_tokens in result["layers"].items():
        forward_ratio = by_tokens[str(args.tokens[0])]["forward_over_two_dense"]["ours"]
        passed[f"forward, {name}, {args.tokens[0]} tokens"] = forward_ratio <= BOUNDS["forward_over_two_dense"]
        for tokens, figures in by_tokens.items():
            if (training := figures.get("eager_over_ours_training")) is not None:
                passed[f"training, {name}, {tokens} tokens"] = training >= BOUNDS["eager_over_ours_training"]
    if not args.no_conversion:
        result["conversion"] = conversion(args)
        passed["conversion"] = result["conversion"]["passed"]
    return {**result, "passed": passed}


def table(result: dict[str, Any]) -> str:
    lines = []
    found_layers = [(f"{name} {n}", one) for name, by in result["layers"].items() for n, one in by.items()]
    for name_tokens, figures in found_layers:
        kinds = [kind for kind in ("forward", "training") if f"{kind}_ms" in figures]
        lines.append(f"{name_tokens:14}" + "".join(f"{kind + ' ms':>13}{'x dense':>9}" for kind in kinds))
        for name in figures["forward_ms"]:
            cells = [(figures[f"{kind}_ms"][name]["median"], figures[f"{kind}_over_two_dense"][name]) for kind in kinds]
            lines.append(f"{name:14}" + "".join(f"{ms:13.2f}{times:9.3f}" for ms, times in cells))
        if "training" in kinds:
            lines.append(f"eager / ours in training {figures['eager_over_ours_training']:.2f}")
    if found := result.get("conversion"):
        extra, bound = found["extra_bytes"] / 1e6, found["bound_bytes"] / 1e6
        lines.append(f"conversion: {extra:,.0f} MB over the baseline, bound {bound:,.0f} MB; {found['seconds']:.1f} s")
    return "\n".join([*lines, f"passed: {result['passed']}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("hidden", 768), ("width", 2048), ("experts", 8), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    for name, default in (("repeats", 7), ("warm-up", 2), ("base-hidden", 2048), ("base-layers", 16)):
        parser.add_argument(f"--{name}", type=int, default=default)
    for name, default in (("base-vocab", 32000), ("shard-mb", 400), ("disk-gb", 9)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 1024])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--forward-only", nargs="*", choices=DTYPES, default=[], help="no training step in these")
    parser.add_argument("--no-conversion", action="store_true")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child)
        return
    result = run(args)
    print(table(result))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written: {args.out}")


if __name__ == "__main__":
    main()
