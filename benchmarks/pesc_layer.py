"""The cost of a PESC layer over the dense FFN that it wraps. `python -m benchmarks.pesc_layer`

One process, repeats of all candidates interleaved, so that a noisy machine disturbs them alike; a ratio is the median over repeats of
the ratio within one repeat. Training step: forward and backward, adapters and router trained, FFN frozen, gradient through it to the
input (also in the dense reference). Writes benchmarks/results/pesc_layer.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsmith.methods.pesc.layers import PescFFN, PescSettings
from sparsmith.ops.adapter_experts import grouped_experts, masked_experts
from sparsmith.ops.route_context import RouteContext

RESULT = Path(__file__).parent / "results" / "pesc_layer.json"
PATHS = ("auto", "masked", "grouped", "loop")
# the bounds that the project has set itself, as ratios
BOUNDS = {"forward": 1.20, "training": 1.35, "naive_over_pesc": 1.30}


class GatedFFN(nn.Module):
    """The FFN of a Llama block."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, width, bias=False)
        self.up_proj = nn.Linear(hidden, width, bias=False)
        self.down_proj = nn.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class NaiveLayer(nn.Module):
    """The layer as it is usually written: tokens repeated k times, a Python loop over experts with boolean masks, each expert's output
    added to h, gated, summed. Holds the parameters of a `PescFFN`."""

    def __init__(self, layer: PescFFN) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        pesc, scale = self.layer.pesc, self.layer.pesc.settings.adapter_scale
        routing = self.layer.route(x.reshape(-1, x.shape[-1]))
        h = self.layer.ffn(x)
        rows = h.reshape(-1, h.shape[-1]).repeat_interleave(routing.indices.shape[1], dim=0)
        chosen, out = routing.indices.reshape(-1), torch.empty_like(rows)
        for expert in range(pesc.down.shape[0]):
            mine = chosen == expert
            inner = F.gelu(F.linear(rows[mine], pesc.down[expert]))
            out[mine] = rows[mine] + scale * F.linear(inner, pesc.up[expert])
        gated = out.view(*routing.indices.shape, -1) * routing.gates.unsqueeze(-1)
        return gated.sum(dim=1).view_as(h)


def candidates(args: argparse.Namespace) -> dict[str, tuple[nn.Module, RouteContext]]:
    """The dense FFN and, around the same weights, a PESC layer for each path."""
    torch.manual_seed(0)
    ffn = GatedFFN(args.hidden, args.width).requires_grad_(False)
    settings = PescSettings(args.experts, args.top_k, args.adapter_dim, 0.25, layers=(0,))
    built: dict[str, tuple[nn.Module, RouteContext]] = {"dense": (ffn, RouteContext())}
    for path in PATHS:
        context = RouteContext()
        layer = PescFFN(ffn, replace(settings, path=path), 0, args.hidden, context)
        nn.init.normal_(layer.pesc.up, std=0.02)
        built[path] = (layer.train(), context)
    built["naive"] = (NaiveLayer(layer).train(), context)
    return built


def forward(layer: nn.Module, context: RouteContext, x: Tensor) -> None:
    with torch.no_grad():
        context.begin(None, None, None, (x.shape[0], x.shape[1]), 0)
        layer(x)
        context.clear()


def training_step(layer: nn.Module, context: RouteContext, x: Tensor, grad: Tensor) -> None:
    x = x.detach().requires_grad_()
    context.begin(None, None, None, (x.shape[0], x.shape[1]), 0)
    layer(x).backward(grad)
    context.clear()
    for parameter in layer.parameters():
        parameter.grad = None


def measure(tasks: dict[str, Callable[[], None]], repeats: int, warm_up: int = 3) -> dict[str, list[float]]:
    """Milliseconds of each task in each of the interleaved repeats."""
    times: dict[str, list[float]] = {name: [] for name in tasks}
    for repeat in range(warm_up + repeats):
        for name, task in tasks.items():
            start = time.perf_counter()
            task()
            if repeat >= warm_up:
                times[name].append((time.perf_counter() - start) * 1e3)
    return times


def summary(values: list[float]) -> dict[str, float]:
    """Median, smallest, quartiles."""
    first, median, third = statistics.quantiles(values, n=4)
    return {"median": median, "smallest": min(values), "quartile_1": first, "quartile_3": third}


def ratio(above: list[float], below: list[float]) -> float:
    """The median over repeats of the ratio within one repeat."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def smallest(task: Callable[[], object], repeats: int = 15) -> float:
    """Seconds of the fastest of several runs."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        task()
        times.append(time.perf_counter() - start)
    return min(times)


@torch.no_grad()
def device_row(args: argparse.Namespace) -> dict[str, float]:
    """The figures of `sparsmith.ops.cost.DeviceRow`, fastest of 15 runs each.

    phi: the product h D^T of the masked path. eta: the grouped product's rate over phi. beta: bytes read and written by gathering the
    T*k rows. lambda: a forward of each path over one token, less the time that its weights need at beta.
    """
    tokens, hidden, experts, dim, k = args.tokens, args.hidden, args.experts, args.adapter_dim, args.top_k
    h, down, up = torch.randn(tokens, hidden), torch.randn(experts, dim, hidden), torch.randn(experts, hidden, dim)
    rows, token = torch.randn(tokens * k, hidden), torch.randint(0, tokens, (tokens * k,))
    offsets = (torch.arange(1, experts + 1) * (tokens * k // experts)).to(torch.int32)
    wide = smallest(lambda: h @ down.view(-1, hidden).t())
    narrow = smallest(lambda: F.grouped_mm(rows, down.transpose(1, 2), offs=offsets))
    phi = 2 * tokens * hidden * experts * dim / wide
    beta = 2 * 4 * tokens * k * hidden / smallest(lambda: h.index_select(0, token))
    indices, gates = torch.arange(k)[None], torch.full((1, k), 1 / k)
    single = {p: smallest(lambda p=p: p(h[:1], down, up, indices, gates)) for p in (masked_experts, grouped_experts)}
    weights = 2 * 4 * hidden * dim / beta
    return {
        "phi": phi,
        "beta": beta,
        "eta": 2 * tokens * k * hidden * dim / narrow / phi,
        "lambda_masked": max(0.0, single[masked_experts] - experts * weights),
        "lambda_grouped": max(0.0, single[grouped_experts] - k * weights),
    }


def machine() -> dict[str, str | int]:
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        name = next(
            (x.split(":")[1].strip() for x in cpuinfo.read_text().splitlines() if x.startswith("model name")), name
        )
    return {
        "processor": name,
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def run(args: argparse.Namespace) -> dict:
    """Every figure, as it is written."""
    torch.set_num_threads(args.threads)
    built = candidates(args)
    x, grad = torch.randn(1, args.tokens, args.hidden), torch.randn(1, args.tokens, args.hidden)
    forwards = measure({n: lambda m=m, c=c: forward(m, c, x) for n, (m, c) in built.items()}, args.repeats)
    steps = measure({n: lambda m=m, c=c: training_step(m, c, x, grad) for n, (m, c) in built.items()}, args.repeats)
    auto, _ = built["auto"]
    ratios = {
        "forward": {n: ratio(v, forwards["dense"]) for n, v in forwards.items()},
        "training": {n: ratio(v, steps["dense"]) for n, v in steps.items()},
        "naive_over_pesc": ratio(steps["naive"], steps["auto"]),
    }
    passed = {
        "forward": ratios["forward"]["auto"] <= BOUNDS["forward"],
        "training": ratios["training"]["auto"] <= BOUNDS["training"],
        "naive_over_pesc": ratios["naive_over_pesc"] >= BOUNDS["naive_over_pesc"],
    }
    return {
        "command": "python -m benchmarks.pesc_layer",
        "machine": machine(),
        "sizes": {k: v for k, v in vars(args).items() if k != "out"},
        "device_row": device_row(args),
        "auto_takes": auto.pesc.path_for(x.reshape(args.tokens, -1)),
        "forward_ms": {n: summary(v) for n, v in forwards.items()},
        "training_ms": {n: summary(v) for n, v in steps.items()},
        "ratios": ratios,
        "bounds": BOUNDS,
        "passed": passed,
    }


def table(result: dict) -> str:
    lines = [f"{'':10}{'forward ms':>12}{'x dense':>9}{'training ms':>13}{'x dense':>9}"]
    for name in result["forward_ms"]:
        forward_ms, step_ms = result["forward_ms"][name]["median"], result["training_ms"][name]["median"]
        ratios = result["ratios"]
        lines.append(
            f"{name:10}{forward_ms:12.2f}{ratios['forward'][name]:9.3f}{step_ms:13.2f}{ratios['training'][name]:9.3f}"
        )
    lines.append(f"auto takes {result['auto_takes']}; naive / auto in training {ratios['naive_over_pesc']:.2f}")
    lines.append("device row " + ", ".join(f"{name} {value:.2e}" for name, value in result["device_row"].items()))
    lines.append(f"bounds {result['bounds']}: {result['passed']}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("hidden", 768), ("width", 2048), ("experts", 8), ("top-k", 2), ("adapter-dim", 64)):
        parser.add_argument(f"--{name}", type=int, default=default)
    for name, default in (("tokens", 1024), ("threads", 2), ("repeats", 61)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    result = run(args)
    print(table(result))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written: {args.out}")


if __name__ == "__main__":
    main()
