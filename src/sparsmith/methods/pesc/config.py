"""Settings of PESC. Building one checks every combination; the counts need only a `ModelShape`.

Paper: PESC (arXiv 2401.02731). Defaults are the published 8-expert models' (E 8, k 2, r 512, s 0.25), with the balance loss on.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from sparsmith.errors import MethodError
from sparsmith.methods.base import LoraSettings, MethodConfig
from sparsmith.methods.block_choice import BlockChoice, block_indices
from sparsmith.recipe.strict import Clash

if TYPE_CHECKING:
    from sparsmith.anatomy import ModelShape

Control = Literal["none", "single_adapter", "equal_lora", "dense_lora"]


class PescConfig(MethodConfig):
    """Experts as small adapters on the output of each block's shared FFN, chosen per token by a router."""

    method: Literal["pesc"] = "pesc"
    num_experts: Annotated[int, Field(ge=2)] = 8
    """E."""
    top_k: Annotated[int, Field(ge=1)] = 2
    """k, experts per token."""
    adapter_dim: Annotated[int, Field(ge=8)] | Literal["auto"] = 512
    """r, width of an expert; a multiple of 8. `auto` = hidden size / 8 rounded to 16, from 16 to 512."""
    adapter_scale: Annotated[float, Field(gt=0)] = 0.25
    """s, the factor on what the experts add. 0.25 is what the published checkpoints carry."""
    adapter_activation: Literal["gelu", "gelu_tanh", "silu"] = "gelu"
    """`gelu` is the exact (erf) form."""
    adapter_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """On the experts' input, for each (token, expert) on its own. 0.1 in the released code."""
    layers: BlockChoice = "all"
    """`all`, `every-n` (blocks n-1, 2n-1, ...), or a list of block indices."""
    router: Literal["learned", "random", "hash", "dense"] = "learned"
    """`random`: by position; `hash`: by token id; `dense`: every expert, gate 1/E. Controls for the value of learned routing."""
    router_trainable: bool = True
    """False freezes a learned router at its start, a control."""
    router_input_norm: Literal["auto", "none", "rms"] = "auto"
    """Weightless RMS norm on the router's input; `auto` = `rms` only where the FFN reads an un-normed residual (OLMo2)."""
    top1_gate: Literal["straight_through", "none"] = "straight_through"
    """k = 1 only: how the router gets a gradient although its one gate is the constant 1. `none`: it gets none from the task."""
    path: Literal["auto", "masked", "grouped", "loop"] = "auto"
    """How it is computed; never changes the function. `loop` is the slow reference."""
    route_early: bool = False
    """Route before the FFN runs instead of after it. Same result to the bit."""
    balance_alpha: Annotated[float, Field(ge=0)] = 0.01
    """Weight of the load-balance loss."""
    balance_norm: Literal["slots", "tokens"] = "slots"
    """`slots`: 1 when balanced; `tokens`: k when balanced."""
    router_z_coef: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the router z-loss."""
    control: Control = "none"
    """Comparison in place of the experts: `single_adapter` (one of width k*r, scale s/k), `equal_lora` (LoRA with as many trained
    parameters), `dense_lora` (the LoRA alone)."""
    lora: LoraSettings = LoraSettings()

    def clashes(self) -> Iterable[Clash]:
        yield from _size_clashes(self)
        yield from _router_clashes(self)
        yield from _control_clashes(self)

    def dim(self, hidden: int) -> int:
        """r for this hidden size."""
        if self.adapter_dim != "auto":
            return self.adapter_dim
        return min(512, max(16, round(hidden / 8 / 16) * 16))

    def block_indices(self, layers: int) -> tuple[int, ...]:
        """The blocks that get experts, of a model with `layers` blocks. Raises `MethodError` for one that is not there."""
        return block_indices(self.layers, layers, "pesc.layers")

    @property
    def has_adapters(self) -> bool:
        """False where the model stays a stock one with a LoRA."""
        return self.control in ("none", "single_adapter")

    @property
    def has_router(self) -> bool:
        return self.control == "none" and self.router == "learned"

    @property
    def trains_router(self) -> bool:
        return self.has_router and self.router_trainable

    @property
    def balance_weight(self) -> float:
        """`balance_alpha` where there is a router to balance, else 0."""
        return self.balance_alpha if self.trains_router else 0.0

    @property
    def z_weight(self) -> float:
        return self.router_z_coef if self.trains_router else 0.0

    def expert_sizes(self, hidden: int) -> tuple[int, int, int, float]:
        """(E, k, r, s) as built: a single adapter is one expert of width k*r and scale s/k."""
        dim = self.dim(hidden)
        if self.control == "single_adapter":
            return 1, 1, self.top_k * dim, self.adapter_scale / self.top_k
        active = self.num_experts if self.router == "dense" else self.top_k
        return self.num_experts, active, dim, self.adapter_scale

    def num_params(self, shape: ModelShape) -> dict[str, int]:
        """Added parameters by role: 2 r d E per block, and d E for a router."""
        if not self.has_adapters:
            return {}
        experts, _, dim, _ = self.expert_sizes(shape.hidden)
        blocks = len(self.block_indices(shape.layers))
        counts = {"adapter": 2 * dim * shape.hidden * experts * blocks}
        if self.has_router:
            counts["router"] = shape.hidden * experts * blocks
        return counts

    def num_active_params(self, shape: ModelShape) -> int:
        """Added parameters that one token uses."""
        if not self.has_adapters:
            return 0
        experts, active, _, _ = self.expert_sizes(shape.hidden)
        counts = self.num_params(shape)
        return counts["adapter"] // experts * active + counts.get("router", 0)

    def flops_per_token(self, shape: ModelShape) -> int:
        """Extra forward FLOPs per token: 4 k r d + 2 d E per block (2 per multiply-add)."""
        if not self.has_adapters:
            return 0
        experts, active, dim, _ = self.expert_sizes(shape.hidden)
        router = 2 * shape.hidden * experts if self.has_router else 0
        return len(self.block_indices(shape.layers)) * (4 * active * dim * shape.hidden + router)

    def lora_params(self, shape: ModelShape, r: int | None = None) -> int:
        """Parameters of the LoRA: r (in + out) for each targeted linear."""
        if not self.lora.enabled:
            return 0
        names = None if self.lora.targets == "all-linear" else set(_as_tuple(self.lora.targets))
        widths = sum(i + o for n, (i, o) in shape.linears.items() if names is None or n.rsplit(".", 1)[-1] in names)
        return shape.layers * (self.lora.r if r is None else r) * widths

    def lora_for(self, shape: ModelShape | None) -> LoraSettings | None:
        """The LoRA to inject. `equal_lora` needs the shape: r' = round(r * trained / LoRA), alpha / r kept."""
        if not self.lora.enabled:
            return None
        if self.control != "equal_lora":
            return self.lora
        if shape is None:
            raise MethodError("pesc.control", "equal_lora without a model", "a model shape", "Pass the model's shape.")
        mirrored = self.model_copy(update={"control": "none"})
        added = mirrored.num_params(shape)
        trained = added["adapter"] + (added.get("router", 0) if mirrored.trains_router else 0)
        r = round(self.lora.r * (trained + self.lora_params(shape)) / self.lora_params(shape))
        return self.lora.model_copy(update={"r": r, "alpha": self.lora.alpha * r / self.lora.r})


def _as_tuple(targets: str | tuple[str, ...]) -> tuple[str, ...]:
    return (targets,) if isinstance(targets, str) else tuple(targets)


def _size_clashes(config: PescConfig) -> Iterable[Clash]:
    if config.top_k > config.num_experts:
        yield Clash(
            "top_k", f"`{config.top_k}`", f"at most num_experts, which is {config.num_experts}", "Lower `top_k`."
        )
    if config.adapter_dim != "auto" and config.adapter_dim % 8:
        near = config.adapter_dim // 8 * 8 or 8
        yield Clash("adapter_dim", f"`{config.adapter_dim}`", "a multiple of 8", f"Take {near}.")
    if config.adapter_dropout > 0 and config.path == "masked":
        expected = "`grouped` or `auto`, as adapter_dropout draws for each (token, expert)"
        yield Clash("path", "`masked`", expected, "Change `path`, or set adapter_dropout to 0.")


def _router_clashes(config: PescConfig) -> Iterable[Clash]:
    """Settings that would be without effect are refused when they differ from their default."""
    learned = config.router == "learned"
    if config.router == "dense" and config.changed("top_k") and config.top_k != config.num_experts:
        yield Clash("top_k", f"`{config.top_k}`", "no top_k, as router dense takes every expert", "Remove `top_k`.")
    if config.top_k > 1 or not learned:
        yield from config.without_effect(["top1_gate"], "top_k 1 and a learned router")
    if not learned:
        yield from config.without_effect(["router_trainable", "router_input_norm"], "router learned")
    if not (learned and config.router_trainable):
        yield from config.without_effect(
            [name for name in ("balance_alpha", "router_z_coef") if getattr(config, name) > 0],
            "a router that is trained",
        )
    elif config.balance_alpha == 0:
        yield from config.without_effect(["balance_norm"], "balance_alpha above 0")


def _control_clashes(config: PescConfig) -> Iterable[Clash]:
    if config.control in ("equal_lora", "dense_lora") and not config.lora.enabled:
        expected = f"true, as control {config.control} trains the LoRA alone"
        yield Clash("lora.enabled", "`False`", expected, "Enable the LoRA, or change `control`.")
    if config.control == "single_adapter":
        yield from config.without_effect(["router", "router_trainable"], "a control with a router")
