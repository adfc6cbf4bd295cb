"""Settings of SoFT. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from sparsmith.errors import MethodError
from sparsmith.methods.base import LoraSettings, MethodConfig
from sparsmith.methods.soft.schedule import auto_exits, exit_weights, paper_exits
from sparsmith.recipe.strict import Clash, StrictModel

if TYPE_CHECKING:
    from sparsmith.anatomy import ModelShape


class KlSettings(StrictModel):
    """Distillation of the exits from the model's own full depth: (1 - weight) CE + weight T^2 KL(full || exit)."""

    weight: Annotated[float, Field(gt=0, le=1)] = 0.5
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """T, > 0."""


class CrossEntropySettings(StrictModel):
    """How the losses of the exits are computed; never changes them by more than rounding."""

    impl: Literal["auto", "fused", "torch", "checkpoint"] = "auto"
    """`fused`: chunks of tokens whose gradients are made in the forward (fastest; also under FSDP, where the head is gathered once);
    `torch`: the library's chunked `linear_cross_entropy` (needs a bare head: no KL, softcap or bias); `checkpoint`: chunks computed again
    in the backward. `auto` = `fused`."""
    chunk: Annotated[int, Field(gt=0)] = 1024
    """Tokens whose logits exist at once."""


class GuardSettings(StrictModel):
    """What the full model may lose to the control that was tuned on the same rows without exits."""

    max_loss_gap: Annotated[float, Field(ge=0)] = 0.02
    """Nats of held-out loss; above it `tune` ends with the code of a failed proof, after everything is saved."""


PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "keep_full": {"trunk": "frozen", "kl": {"weight": 0.5}},
}
"""Preset -> the settings that it stands for; whatever is set beside it counts more."""

SOFT_LORA = LoraSettings(r=64, alpha=64, dropout=0.0)


class SoftConfig(MethodConfig):
    """Sorted fine-tuning: the losses of several depths in one forward (Sorted LLaMA, arXiv 2309.08968)."""

    method: Literal["soft"] = "soft"
    preset: Literal["paper", "keep_full"] | None = None
    """A set of settings by name: `paper` = Eq. 1, the defaults; `keep_full` = of our trials the one whose full depth loses nothing, for a
    base that is tuned already: trunk frozen, KL of weight 0.5. Settings beside it count more."""
    exits: tuple[Annotated[int, Field(ge=1)], ...] | Literal["auto", "paper"] = "auto"
    """Depths in blocks; the full depth must be one. `auto` = N/4, 3N/8, ... N; `paper` = 3N/10, 4N/10, ... N."""
    weights: Literal["uniform", "linear", "sum_l", "full_boost"] = "uniform"
    """omega of each exit; `uniform` is the paper's Eq. 1."""
    e_scale: Annotated[float, Field(gt=0)] = 0.2
    """Of `sum_l`."""
    boost: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Of `full_boost`: omega of the full depth."""
    schedule: Literal["all", "sandwich", "sampled", "rotational"] = "all"
    """Which exits a micro-batch computes."""
    sandwich_weights: Literal["unbiased", "half"] = "unbiased"
    rotation: Annotated[int, Field(ge=2)] = 4
    """Period of `rotational`, in optimiser steps."""
    kl: KlSettings | None = None
    layer_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Largest chance that a block is left out of a micro-batch (LayerSkip's curve over the depth)."""
    trunk: Literal["shared", "frozen"] = "shared"
    """`shared`: the paper's method. `frozen`: the full model stays bitwise as it is and every inner exit gets one more block of the model's
    own kind, started from the next block (after Balcony, arXiv 2503.05005); a slice at exit n then has n + 1 blocks."""
    tune: Literal["full", "lora", "qlora"] = "full"
    """What trains of a shared trunk. `qlora` = LoRA on a base of `model.quant: nf4`."""
    lora: LoraSettings = SOFT_LORA
    """Of `tune: lora` and `qlora`."""
    train_norm: bool = True
    """The final norm trains too, under LoRA."""
    head: Literal["auto", "train", "freeze"] = "auto"
    """`auto`: the head trains in `full` and is frozen under LoRA."""
    untie: bool = False
    """Give a head that is tied to the embeddings weights of its own, so that it can train under LoRA; V * d parameters more."""
    ce: CrossEntropySettings = CrossEntropySettings()
    arm: Literal["soft", "sft", "ict"] = "soft"
    """`sft`: the loss of the full depth alone; `ict`: a frozen trunk with a head of its own at each inner exit. The paper's rivals; used by
    `sparsmith protocol soft` and for the control."""
    control: str = "train"
    """The run without exits that the full depth is held against: `train` = tuned beside this run on the same rows, or a run's folder."""
    guard: GuardSettings = GuardSettings()

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, given: Any) -> Any:
        name = given.get("preset") if isinstance(given, dict) else None
        return {**PRESETS.get(name, {}), **given} if isinstance(name, str) else given

    @field_validator("exits", mode="before")
    @classmethod
    def _exits(cls, value: Any) -> Any:
        if isinstance(value, (list, tuple, range)):
            value = tuple(value)
            if not value or len(set(value)) != len(value):
                raise ValueError("exits names at least one depth, each once")
            return tuple(sorted(value)) if all(isinstance(n, int) for n in value) else value
        return value

    def clashes(self) -> Iterable[Clash]:
        yield from _loss_clashes(self)
        yield from _trunk_clashes(self)
        if self.arm != "soft":
            keys = ["weights", "schedule", "kl", "layer_dropout", "trunk", "control", "guard"]
            yield from self.without_effect(keys, "arm soft")

    def depths(self, layers: int) -> tuple[int, ...]:
        """The exits of a model with `layers` blocks, ascending.

        Raises:
            MethodError: an exit beyond the last block, or the full depth missing.
        """
        if self.exits == "auto":
            return auto_exits(layers)
        if self.exits == "paper":
            return paper_exits(layers)
        exits = tuple(n for n in self.exits if isinstance(n, int))
        if exits[-1] > layers:
            raise MethodError(
                "soft.exits", str(list(exits)), f"depths from 1 to {layers}", f"The model has {layers} blocks."
            )
        if exits[-1] != layers:
            raise MethodError(
                "soft.exits",
                str(list(exits)),
                f"a list that holds the full depth {layers}",
                f"Add {layers}: the full model is a sub-model too.",
            )
        return exits

    def omega(self, layers: int) -> dict[int, float]:
        """The weights of the exits that have a loss with a gradient."""
        exits = self.depths(layers)
        if self.arm == "sft":
            return {layers: 1.0}
        if self.trunk == "frozen" or self.arm == "ict":
            inner = exits[:-1]
            if not inner:
                raise MethodError(
                    "soft.exits", str(list(exits)), "an exit below the full depth", "Add one, or use trunk shared."
                )
            kind = "uniform" if self.weights == "full_boost" else self.weights
            full = exit_weights(kind, exits, e_scale=self.e_scale, boost=self.boost)
            total = sum(full[n] for n in inner)
            return {n: full[n] / total for n in inner}
        return exit_weights(self.weights, exits, e_scale=self.e_scale, boost=self.boost)

    def check_exits(self, layers: int) -> None:
        """Refuse settings that these exits leave without effect.

        Raises:
            MethodError: an exit of weight 0; weights, schedule, KL or layer dropout for the full depth alone.
        """
        idle = [n for n, weight in self.omega(layers).items() if weight <= 0]
        if idle:
            raise MethodError(
                "soft.weights",
                f"`{self.weights}`, which gives exit {idle[0]} the weight 0",
                "a loss at every exit",
                f"Leave exit {idle[0]} out, or take other weights.",
            )
        if self.arm == "soft" and self.depths(layers) == (layers,):
            found = self.changed("weights", "schedule", "kl")
            if found:
                raise MethodError(
                    f"soft.{found[0]}",
                    f"set, with the full depth {layers} as the only exit",
                    "an exit below the full depth",
                    f"Add one to `exits`, or remove `{found[0]}`.",
                )

    @property
    def frozen_trunk(self) -> bool:
        """Only what the exits own is trained."""
        return self.trunk == "frozen" or self.arm == "ict"

    @property
    def low_rank(self) -> bool:
        return self.tune != "full" and not self.frozen_trunk

    @property
    def trains_head(self) -> bool:
        if self.frozen_trunk:
            return False
        return self.head == "train" or (self.head == "auto" and self.tune == "full")

    def num_params(self, shape: ModelShape) -> dict[str, int]:
        """Parameters that crafting adds, by role."""
        inner = len(self.depths(shape.layers)) - 1
        if self.arm == "ict":
            return {"exit_head": inner * shape.vocab * shape.hidden}
        if self.trunk == "frozen":
            return {"exit_block": inner * block_params(shape)}
        return {"head": shape.vocab * shape.hidden} if self.untie and shape.tied else {}

    def num_trained(self, shape: ModelShape) -> dict[str, int]:
        """Trained parameters by role, the LoRA's apart."""
        if self.frozen_trunk:
            return self.num_params(shape)
        counts: dict[str, int] = {}
        if self.tune == "full":
            counts["block"] = blocks_params(shape)
            if not shape.tied or self.trains_head:
                counts["embedding"] = shape.embedding_params
            elif shape.positions:
                counts["embedding"] = shape.positions * shape.hidden
        if self.tune == "full" or self.train_norm:
            counts["norm"] = final_norm_params(shape)
        if self.trains_head and (not shape.tied or self.untie):
            counts["head"] = shape.vocab * shape.hidden
        return counts


def final_norm_params(shape: ModelShape) -> int:
    return shape.final_norm_params


def blocks_params(shape: ModelShape) -> int:
    """Parameters of all blocks, without experts and their routers, which another method trains."""
    norms = shape.norm_params - shape.final_norm_params
    return shape.attention_params + shape.ffn_params + norms - shape.idle_biases


def block_params(shape: ModelShape) -> int:
    """Parameters of one block of a dense model."""
    return blocks_params(shape) // shape.layers


def _loss_clashes(config: SoftConfig) -> Iterable[Clash]:
    if config.weights != "sum_l":
        yield from config.without_effect(["e_scale"], "weights sum_l")
    if config.weights != "full_boost":
        yield from config.without_effect(["boost"], "weights full_boost")
    if config.schedule != "sandwich":
        yield from config.without_effect(["sandwich_weights"], "schedule sandwich")
    elif config.sandwich_weights == "half":
        yield from config.without_effect(["weights"], "sandwich_weights unbiased")
    if config.schedule != "rotational":
        yield from config.without_effect(["rotation"], "schedule rotational")
    if config.schedule == "sampled" and config.kl is not None:
        yield Clash(
            "kl",
            "set",
            "none, as schedule sampled does not run the full depth that it would learn from",
            "Remove `kl`, or take another schedule.",
        )
    if config.ce.impl == "torch" and config.kl is not None:
        yield Clash("ce.impl", "`torch`", "`fused` or `checkpoint`, as kl is set", "Set ce.impl to auto.")


def _trunk_clashes(config: SoftConfig) -> Iterable[Clash]:
    if config.frozen_trunk:
        keys = ["tune", "lora", "train_norm", "head", "untie", "layer_dropout"]
        yield from config.without_effect(keys, "a trunk that trains (trunk shared, arm soft or sft)")
        if config.trunk == "frozen":
            yield from config.without_effect(["control", "guard"], "trunk shared, as the full depth cannot change")
            if config.weights == "full_boost":
                yield Clash("weights", "`full_boost`", "other weights, as the full depth has no loss", "Change it.")
            if config.schedule in ("sampled", "rotational"):
                yield Clash("schedule", f"`{config.schedule}`", "`all` or `sandwich` with trunk frozen", "Change it.")
    elif config.tune == "full":
        yield from config.without_effect(["lora", "train_norm", "untie"], "tune lora or qlora")
    elif not config.lora.enabled:
        yield Clash("lora.enabled", "`False`", f"true, as tune is `{config.tune}`", "Enable it, or take tune full.")
    if config.untie and not config.trains_head:
        yield from config.without_effect(["untie"], "head train")
