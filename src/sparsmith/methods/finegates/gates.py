"""The gates as modules, where they stand in a model, and what is remembered between forwards.

A gated linear takes the linear's place and holds it under its own name (`mlp.down_proj` -> `mlp.down_proj.down_proj`), so that a LoRA that
is put on the linear later lies behind the gates: gates and adapter see the same input, with the same noise. Base weights are untouched,
so 4-bit linears work too.

    FFN units      omega on the input of the FFN's last linear
    head groups    omega on the input of attention's last linear, one value for all channels of the heads
    sub-blocks     omega on what attention or FFN adds to the residual stream: behind the norm, where there is one

Shape letters: N gates, C input channels of a linear, B, S tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from sparsmith import anatomy
from sparsmith.methods.finegates.places import Place, places_of
from sparsmith.ops.gates import SHIFT, gate_values, logit_of, straight_clamp
from sparsmith.seeds import torch_generator

LOWEST = 0.01
"""Smallest scale of a kept gate: 0 would be a cut that nobody chose."""
NOISE = "finegates.noise"


class Gate(nn.Module):
    """N gates. Until they are settled omega = clamp(tanh(logit) + noise + 1/2, 0, 1); afterwards kept * scale.

    Args:
        size: N.
        init_mu: where mu starts.
        device: of the model.
    """

    sparsmith_grafted = True

    def __init__(self, size: int, init_mu: float, device: torch.device | None = None) -> None:
        super().__init__()
        self.logit = nn.Parameter(torch.full((size,), logit_of(init_mu), device=device))
        self.scale = nn.Parameter(torch.ones(size, device=device))
        self.register_buffer("kept", torch.ones(size, dtype=torch.bool, device=device))
        self.register_buffer("settled", torch.zeros((), dtype=torch.bool, device=device))
        self.register_buffer("noise", torch.zeros(size, device=device), persistent=False)
        self.register_buffer("pull", torch.zeros(size, device=device))

    kept: Tensor
    settled: Tensor
    noise: Tensor
    pull: Tensor
    """Sum over the tokens that were watched of (dL/d omega)^2, token by token: the diagonal of the empirical Fisher information."""

    @property
    def size(self) -> int:
        return self.logit.numel()

    def values(self) -> Tensor:
        """(N,) omega, float32; noise in training mode only."""
        soft = gate_values(self.logit, self.noise if self.training else None)
        hard = self.kept * straight_clamp(self.scale, LOWEST, 1.0)
        return torch.where(self.settled, hard, soft)

    @torch.no_grad()
    def settle(self, kept: Tensor, reopen: bool) -> None:
        """Make the choice hard. `reopen`: kept gates become 1, else they stay at their soft value."""
        soft = gate_values(self.logit)
        self.scale.copy_(torch.where(kept, torch.ones_like(soft) if reopen else soft.clamp(min=LOWEST), 1.0))
        self.kept.copy_(kept)
        self.settled.fill_(True)

    def folded(self) -> Tensor:
        """(N,) what settling multiplies into the weights: 0 where closed."""
        if bool(self.settled):
            return (self.kept * self.scale.clamp(LOWEST, 1.0)).detach()
        return gate_values(self.logit).detach()


class GatedLinear(nn.Module):
    """y = omega_block * linear(omega_in * x). `linear` keeps its own name inside.

    Args:
        linear: any linear, quantised or not.
        name: its attribute name, which the wrapper takes over.
        channels: C.
    """

    def __init__(self, linear: nn.Module, name: str, channels: int, device: torch.device | None = None) -> None:
        super().__init__()
        self.name, self.channels = name, channels
        self.add_module(name, linear)
        self.register_buffer("input_sum", torch.zeros(channels, device=device))
        self.register_buffer("input_square", torch.zeros(channels, device=device))
        self.register_buffer("input_count", torch.zeros((), device=device))
        self.watching = False
        """While True, sums of the inputs and the gates' gradients are kept, for scores of units that no gate has learned yet."""

    input_sum: Tensor
    input_square: Tensor
    input_count: Tensor

    @property
    def linear(self) -> nn.Module:
        return cast(nn.Module, self._modules[self.name])

    def input_gate(self) -> Tensor | None:
        """(C,) omega of every input channel; None without gates on the input."""
        return None

    def forward(self, x_BSC: Tensor) -> Tensor:
        gate_C = self.input_gate()
        gated_BSC = x_BSC if gate_C is None else x_BSC * gate_C.to(x_BSC.dtype)
        if self.watching and self.training:
            self._watch(x_BSC.detach(), gated_BSC)
        y_BSD = self.linear(gated_BSC)
        block: Any = self._modules.get("block")
        return y_BSD if block is None else y_BSD * block.values().to(y_BSD.dtype)

    @torch.no_grad()
    def _watch(self, x_BSC: Tensor, gated_BSC: Tensor) -> None:
        x_TC = x_BSC.reshape(-1, x_BSC.shape[-1]).float()
        self.input_sum += x_TC.sum(0)
        self.input_square += x_TC.square().sum(0)
        self.input_count += x_TC.shape[0]
        if gated_BSC.requires_grad:
            gated_BSC.register_hook(lambda gradient: self._pull(x_TC, gradient))

    @torch.no_grad()
    def _pull(self, x_TC: Tensor, gradient_BSC: Tensor) -> None:
        """A gate's gradient of one token is the input times its gradient, summed over the gate's channels."""
        each_TC = x_TC * gradient_BSC.reshape(x_TC.shape).float()
        for name in ("units", "groups", "heads"):
            gate: Any = self._modules.get(name)
            if gate is not None:
                gate.pull += each_TC.view(len(x_TC), gate.size, -1).sum(-1).square().sum(0)

    def input_variance(self) -> Tensor:
        """(C,) of what was watched."""
        mean = self.input_sum / self.input_count.clamp(min=1)
        return (self.input_square / self.input_count.clamp(min=1) - mean.square()).clamp(min=0)

    def input_rms(self) -> Tensor:
        """(C,) root mean square of what was watched; ones where nothing was."""
        mean = self.input_square / self.input_count.clamp(min=1)
        return torch.where(self.input_count > 0, mean.sqrt(), torch.ones_like(mean))


class GatedFFN(GatedLinear):
    """The FFN's last linear behind one gate per intermediate channel (`units`)."""

    def input_gate(self) -> Tensor | None:
        units: Any = self._modules.get("units")
        return None if units is None else units.values()


class GatedAttention(GatedLinear):
    """Attention's last linear behind a gate per key-value group (`groups`) and, where asked for, per query head (`heads`).

    The heads of a group lie side by side: channel c belongs to head c // h and to group c // (h * H / G).
    """

    head_dim = 0
    """h, set when the gates are put in."""

    def input_gate(self) -> Tensor | None:
        value: Tensor | None = None
        for name in ("groups", "heads"):
            gate: Any = self._modules.get(name)
            if gate is not None:
                own = gate.values().repeat_interleave(self.channels // gate.size)
                value = own if value is None else value * own
        return value


class GatedNorm(nn.Module):
    """y = omega_block * norm(x): a sub-block's gate where a norm stands between it and the residual stream."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x_BSD: Tensor) -> Tensor:
        y_BSD = self.norm(x_BSD)
        return y_BSD * cast(Gate, self.block).values().to(y_BSD.dtype)


class GateState(nn.Module):
    """What the whole model remembers. It lies on the model as `finegates` until it is settled."""

    sparsmith_grafted = True

    def __init__(self, seed: int, device: torch.device | None = None) -> None:
        super().__init__()
        self.register_buffer("dual", torch.zeros((), device=device))
        self.register_buffer("sigma", torch.zeros((), device=device))
        self.register_buffer("aim", torch.ones((), device=device))
        self.register_buffer("started", torch.zeros((), dtype=torch.bool, device=device))
        self.seed, self.step, self.micro, self.rank = seed, 0, 0, 0
        self.learning, self.progress = False, 0.0

    started: Tensor
    """True once the logits have taken their start from what was watched."""
    dual: Tensor
    """lambda of the budget."""
    sigma: Tensor
    """sigma_r of this step."""
    aim: Tensor
    """rho(t): the share that shall remain at this step."""


@dataclass(frozen=True)
class Site:
    """The gates of one block; None where there are none."""

    ffn: GatedFFN | None
    attention: GatedAttention | None
    ffn_norm: GatedNorm | None
    attention_norm: GatedNorm | None
    ffn_places: tuple[Place, ...]
    attention_places: tuple[Place, ...]
    """Who holds each linear; the outward one is the last."""

    def gate(self, kind: str) -> Gate | None:
        """`units`, `groups`, `heads`, `attention_block` or `ffn_block`."""
        holder: Any
        if kind == "units":
            holder, name = self.ffn, "units"
        elif kind in ("groups", "heads"):
            holder, name = self.attention, kind
        elif kind == "ffn_block":
            holder, name = self.ffn_norm or self.ffn, "block"
        else:
            holder, name = self.attention_norm or self.attention, "block"
        found = holder._modules.get(name) if holder is not None else None
        return cast("Gate | None", found)


KINDS = ("units", "groups", "heads", "attention_block", "ffn_block")


def sites(model: nn.Module) -> list[Site]:
    """Of every block, in order."""
    row = anatomy.anatomy_of(model)
    found = []
    for block in anatomy.blocks(model):
        ffn, attention = places_of(block, row, "ffn"), places_of(block, row, "attention")
        last_ffn, last_attention = (getattr(*places[-1], None) for places in (ffn, attention))
        ffn_norm, attention_norm = (_gated_norm(block, name) for name in (row.ffn_out_norm, row.attention_out_norm))
        found.append(
            Site(
                last_ffn if isinstance(last_ffn, GatedFFN) else None,
                last_attention if isinstance(last_attention, GatedAttention) else None,
                ffn_norm,
                attention_norm,
                ffn,
                attention,
            )
        )
    return found


def _gated_norm(block: nn.Module, name: str) -> GatedNorm | None:
    found = getattr(block, name, None) if name else None
    return found if isinstance(found, GatedNorm) else None


def gates_of(model: nn.Module) -> list[tuple[str, Gate]]:
    """(name, module) of every gate, in order; none on a settled model."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, Gate)]


def linears_of(model: nn.Module) -> list[GatedLinear]:
    return [module for module in model.modules() if isinstance(module, GatedLinear)]


def state_of(model: nn.Module) -> GateState | None:
    """None on a settled model."""
    return cast("GateState | None", getattr(anatomy.base_of(model), "finegates", None))


@torch.no_grad()
def draw_noise(model: nn.Module, sigma: float) -> None:
    """One draw for every gate of this micro-batch, from a stream of (seed, step, micro-batch, rank): resuming needs no generator,
    recomputed activations see the same draw, and nobody else's numbers move."""
    state = state_of(model)
    if state is None:
        return
    found = [gate for _, gate in gates_of(model)]
    draws = torch.randn(
        sum(gate.size for gate in found),
        generator=torch_generator(state.seed, NOISE, state.step, state.micro, state.rank),
    )
    parts: Iterator[Tensor] = iter((draws * sigma).split([gate.size for gate in found]))
    for gate in found:
        gate.noise.copy_(next(parts))


def silence(model: nn.Module) -> None:
    """No noise until the next draw."""
    for _, gate in gates_of(model):
        gate.noise.zero_()


def closed_at() -> float:
    """mu at and below which a gate is closed."""
    return -SHIFT
