"""The modules that PESC puts into a model: a router and E adapters around each block's FFN.

Paper: PESC (arXiv 2401.02731) Eq 7-10. Differs: see README.md. This file is part of full checkpoints, so it imports torch and the ops.

Shapes: B rows, S tokens per row, T = B*S tokens, D hidden, E experts, K per token, R adapter dim, G domains.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from sparsmith.ops.adapter_experts import grouped_experts, grouped_supported, loop_experts, masked_experts
from sparsmith.ops.cost import choose_path
from sparsmith.ops.route_context import RouteContext
from sparsmith.ops.routing import Routing, route_dense, route_hashed, route_learned


@dataclass(frozen=True)
class PescSettings:
    """Everything that the modules need, resolved (no `auto` left but the path), as it stands in a checkpoint's config."""

    num_experts: int
    top_k: int
    adapter_dim: int
    adapter_scale: float
    layers: tuple[int, ...]
    activation: str = "gelu"
    dropout: float = 0.0
    router: str = "learned"
    router_trainable: bool = True
    router_input_norm: str = "none"
    top1_gate: str = "straight_through"
    path: str = "auto"
    route_early: bool = False
    balance_alpha: float = 0.01
    balance_norm: str = "slots"
    router_z_coef: float = 0.0
    seed: int = 0
    blocks: str = "model.layers"
    """Dotted path of the blocks in the base."""
    ffn: str = "mlp"
    """Name of the FFN in a block."""

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PescSettings:
        """Strict: an unknown or missing key is an error."""
        unknown = set(values) - {f.name for f in fields(cls)}
        if unknown:
            raise ValueError(f"unknown keys in `pesc`: {sorted(unknown)}")
        return cls(**{**values, "layers": tuple(values["layers"])})

    def as_dict(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)} | {"layers": list(self.layers)}


class Router(nn.Module):
    """z = x W^T in float32, autocast off. A bare parameter, so that LoRA and quantisation tools cannot touch it."""

    def __init__(self, num_experts: int, hidden: int, device: torch.device | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, hidden, dtype=torch.float32, device=device))

    @torch.no_grad()
    def reset(self, generator: torch.Generator | None = None) -> None:
        """Uniform in +-1/sqrt(d)."""
        _uniform(self.weight, generator)

    def forward(self, x_TD: Tensor, input_norm: str = "none") -> Tensor:
        """(T, E) logits, float32 (float64 for float64 input)."""
        dtype = torch.promote_types(x_TD.dtype, torch.float32)
        with torch.autocast(x_TD.device.type, enabled=False):
            x_TD = x_TD.to(dtype)
            if input_norm == "rms":
                x_TD = x_TD * torch.rsqrt(x_TD.pow(2).mean(dim=-1, keepdim=True) + 1e-6)
            return x_TD @ self.weight.to(dtype).t()


class PescAdapters(nn.Module):
    """The stacked adapters and the router of one block. U = 0 at the start, so the block computes what it did before."""

    sparsmith_grafted = True

    def __init__(self, settings: PescSettings, hidden: int, device: torch.device | None = None) -> None:
        super().__init__()
        experts, dim = settings.num_experts, settings.adapter_dim
        self.settings = settings
        self.last_path = ""
        """The compute path of the last forward."""
        self.down = nn.Parameter(torch.empty(experts, dim, hidden, dtype=torch.float32, device=device))
        self.up = nn.Parameter(torch.empty(experts, hidden, dim, dtype=torch.float32, device=device))
        self.router = Router(experts, hidden, device) if settings.router == "learned" else None
        if self.router is not None:
            self.router.weight.requires_grad_(settings.router_trainable)

    @torch.no_grad()
    def reset(self, layer: int) -> None:
        """Fresh weights from the stream of (seed, layer): D and W_r uniform in +-1/sqrt(d), U zero."""
        if self.down.is_meta:
            return
        generator = torch.Generator().manual_seed((self.settings.seed + 0x9E3779B1 * (layer + 1)) % 2**63)
        _uniform(self.down, generator)
        self.up.zero_()
        if self.router is not None:
            self.router.reset(generator)

    def path_for(self, h_TD: Tensor) -> str:
        """The compute path for this many tokens on this device."""
        wanted = self.settings.path
        if wanted != "auto":
            return wanted
        experts, dim, hidden = self.down.shape
        if not grouped_supported(hidden, dim):
            return "masked"
        if self.training and self.settings.dropout > 0:
            return "grouped"
        return choose_path(
            h_TD.device.type,
            tokens=h_TD.shape[0],
            num_experts=experts,
            k=experts if self.settings.router == "dense" else self.settings.top_k,
            adapter_dim=dim,
            hidden=hidden,
            width=h_TD.element_size(),
        )

    def forward(self, h_TD: Tensor, routing: Routing) -> Tensor:
        """y = h + s * sum_i g_i U_i act(D_i h), in h's number type; weights are cast from their float32 masters."""
        settings = self.settings
        self.last_path = path = self.path_for(h_TD)
        dropout = settings.dropout if self.training else 0.0
        with torch.autocast(h_TD.device.type, enabled=False):
            down, up = self.down.to(h_TD.dtype), self.up.to(h_TD.dtype)
            gates_TK = routing.gates * settings.adapter_scale
            if path == "masked":
                return masked_experts(h_TD, down, up, routing.indices, gates_TK, activation=settings.activation)
            compute = grouped_experts if path == "grouped" else loop_experts
            return compute(h_TD, down, up, routing.indices, gates_TK, activation=settings.activation, dropout=dropout)


@torch.no_grad()
def _uniform(weight: Tensor, generator: torch.Generator | None) -> None:
    """Uniform in +-1/sqrt(last dimension), drawn on the CPU so that every device starts alike."""
    if weight.is_meta:
        return
    bound = 1 / math.sqrt(weight.shape[-1])
    weight.copy_(torch.empty(weight.shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator))


class PescFFN(nn.Module):
    """Takes the place of a block's FFN: the original as `ffn`, computed once, and `pesc` beside it."""

    def __init__(self, ffn: nn.Module, settings: PescSettings, layer: int, hidden: int, context: RouteContext) -> None:
        super().__init__()
        weight = next(ffn.parameters(), None)
        self.ffn = ffn
        self.pesc = PescAdapters(settings, hidden, None if weight is None else weight.device)
        self.layer = layer
        self.context = context
        self.pesc.reset(layer)

    def route(self, x_TD: Tensor) -> Routing:
        """Experts and gates of each token, and their entry in the context."""
        settings, context = self.pesc.settings, self.context
        dtype = torch.promote_types(x_TD.dtype, torch.float32)
        if self.pesc.router is not None:
            logits_TE = self.pesc.router(x_TD, settings.router_input_norm)
            routing = route_learned(
                logits_TE, settings.top_k, straight_through=settings.top1_gate == "straight_through"
            )
        elif settings.router == "dense":
            routing = route_dense(x_TD.shape[0], settings.num_experts, x_TD.device, dtype)
        else:
            hashed = settings.router == "hash"
            keys_T = _keys(context, hashed, x_TD)
            seed = 0 if hashed else settings.seed
            routing = route_hashed(
                keys_T, settings.top_k, settings.num_experts, seed=seed, layer=self.layer, dtype=dtype
            )
        context.record(self.layer, routing, settings.num_experts, self.training or context.handed is not None)
        return routing

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        early = self.pesc.settings.route_early
        routing = self.route(x_TD) if early else None
        h = self.ffn(hidden_states, *args, **kwargs)
        if routing is None:
            routing = self.route(x_TD)
        return self.pesc(h.reshape(x_TD.shape[0], -1), routing).view_as(h)


def _keys(context: RouteContext, hashed: bool, x_TD: Tensor) -> Tensor:
    keys_T = context.ids if hashed else context.positions
    if keys_T is None or keys_T.shape[0] != x_TD.shape[0]:
        need = "token ids: call the model with `input_ids`" if hashed else "positions: call the whole model"
        raise ValueError(f"The {'hash' if hashed else 'random'} router needs {need}.")
    return keys_T.to(x_TD.device)


def adapters_of(model: nn.Module) -> list[tuple[str, PescAdapters]]:
    """(name, module) of every block's adapters, in order."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, PescAdapters)]
