"""Settings of upcycling: how a dense model becomes a mixture of experts, and how a mixture's routers are trained.

Papers: FLAN-MoE (arXiv 2305.14705) for routers, losses and freezing; sparse upcycling (2212.05055) for the start. The pair is our
extension: FLAN-MoE's models were pre-trained sparse.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from sparsmith.methods.base import LoraSettings, MethodConfig
from sparsmith.methods.block_choice import BlockChoice, block_indices
from sparsmith.recipe.strict import Clash, StrictModel

NonNegative = Annotated[float, Field(ge=0)]
Combine = Literal["renorm", "straight_through", "switch"]
_K_OF = {"top1": 1, "top2": 2}


class EcSettings(StrictModel):
    """Expert choice: each expert takes its best tokens of a row."""

    capacity_factor: Annotated[float, Field(ge=1)] = 2.0
    """c, experts per token on average: an expert takes ceil(c n / E) of a row's n tokens. At most E."""
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.99
    """How much of its threshold an expert keeps at every micro-batch; 1 - ema is what it takes of the batch's mean."""
    train_select: Literal["top_c", "threshold"] = "top_c"
    """How training chooses. `threshold`: as evaluation does, so that training is causal too; the first batch, which fits the thresholds,
    is chosen by top_c."""


class MoeSettings(StrictModel):
    """Routers, their losses, and what stays frozen."""

    router: Literal["top1", "top2", "topk", "expert_choice"] = "top2"
    """How many experts a token takes; must agree with `top_k`. `expert_choice`: the experts take tokens, as `ec` says; evaluation goes by
    thresholds, and the export has a model type of its own."""
    ec: EcSettings = EcSettings()
    combine: Combine | Literal["auto"] = "auto"
    """How their outputs are added. `renorm`: weights sum to 1; `straight_through` (top1): weight 1, with the gradient of its
    probability; `switch`: the raw probabilities, which is another function at step 0. `auto`: straight_through for top1, else renorm."""
    second_expert_drop: bool = False
    """GShard: while training keep a token's second expert with probability min(1, 2 w_2)."""
    capacity_factor: Annotated[float, Field(gt=0)] | None = None
    """While training an expert serves at most ceil(factor k S / E) slots of a row of S tokens; absent = nothing is dropped."""
    jitter: Annotated[float, Field(ge=0, le=0.1)] = 0.0
    """While training the router's input is multiplied by U(1 - jitter, 1 + jitter); the experts never see it."""
    expert_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """On the inner activations of the experts; 0.2 in the paper."""
    freeze_gate: bool = False
    """Routers stay as they start."""
    freeze_experts: bool = False
    freeze_moe: bool = False
    """Both."""
    freeze_dense: bool = False
    """All but routers and experts: this method does not train it."""
    balance_coef: NonNegative = 0.01
    """Weight of the load-balance loss, a mean over the sparse blocks. 0 with router expert_choice, whose loads are equal by choice."""
    z_coef: NonNegative = 0.001
    """Weight of the router z-loss."""
    balance_norm: Literal["tokens", "slots"] = "tokens"
    """`tokens`: k when balanced, E when collapsed; `slots`: 1 when balanced."""
    experts_impl: Literal["grouped_mm", "batched_mm", "eager"] = "grouped_mm"
    """transformers' way to compute the experts. Where a CPU trains, `grouped_mm` is one expert after the other with a backward of ours."""

    @model_validator(mode="before")
    @classmethod
    def _unbalanced(cls, data: Any) -> Any:
        """Expert choice has nothing to balance: the default weight becomes 0, one that is set is told by `clashes`."""
        if isinstance(data, Mapping) and data.get("router") == "expert_choice":
            return {"balance_coef": 0.0, **data}
        return data

    def clashes(self) -> Iterable[Clash]:
        yield from self._choice_clashes()
        yield from self._combine_clashes()
        yield from self._freeze_clashes()
        if self.expert_dropout and self.experts_impl == "eager":
            expected = "grouped_mm or batched_mm, as expert_dropout is set"
            yield Clash("experts_impl", "`eager`", expected, "Change `experts_impl`, or set expert_dropout to 0.")
        if not self.trains_gate:
            needs = "routers that are trained"
            yield from self.without_effect([k for k in ("balance_coef", "z_coef") if getattr(self, k) > 0], needs)
            yield from self.without_effect(["balance_norm"], needs)
        elif self.balance_coef == 0:
            yield from self.without_effect(["balance_norm"], "balance_coef above 0")

    def _choice_clashes(self) -> Iterable[Clash]:
        if not self.choosing:
            yield from self.without_effect(["ec"], "router expert_choice")
            return
        needs = "a router by which tokens choose: top1, top2 or topk"
        yield from self.without_effect(["combine", "capacity_factor", "second_expert_drop"], needs)
        if self.balance_coef:
            found = f"`{self.balance_coef:g}` with router expert_choice"
            yield Clash("balance_coef", found, "0: every expert takes as many tokens", "Remove `balance_coef`.")

    def _combine_clashes(self) -> Iterable[Clash]:
        if self.router == "top1" and self.combine == "renorm":
            expected = "`straight_through` or `switch`: one weight over its own sum is always 1, so no gradient reaches the router"
            yield Clash("combine", "`renorm` with one expert per token", expected, "Leave `combine` out.")
        if self.combine == "straight_through" and self.router not in ("top1", "expert_choice"):
            yield Clash("combine", "`straight_through`", "router top1", "Leave `combine` out.")
        if self.router == "top1":
            yield from self.without_effect(["second_expert_drop"], "router top2 or topk")

    def _freeze_clashes(self) -> Iterable[Clash]:
        if self.freeze_moe:
            yield from self.without_effect(["freeze_gate", "freeze_experts"], "freeze_moe false, as it means both")
            if self.freeze_dense:
                yield Clash("freeze_dense", "everything frozen", "something that trains", "Drop one of the freezes.")
        elif self.freeze_gate and self.freeze_experts and self.freeze_dense:
            yield Clash("freeze_dense", "everything frozen", "something that trains", "Drop one of the freezes.")

    @property
    def choosing(self) -> bool:
        """True where experts choose tokens."""
        return self.router == "expert_choice"

    @property
    def trains_gate(self) -> bool:
        return not (self.freeze_gate or self.freeze_moe)

    @property
    def trains_experts(self) -> bool:
        return not (self.freeze_experts or self.freeze_moe)

    @property
    def how(self) -> Combine:
        """`combine` without `auto`; experts that choose are weighted by `renorm`."""
        if self.combine != "auto":
            return self.combine
        return "straight_through" if self.router == "top1" else "renorm"

    @property
    def loss_weights(self) -> dict[str, float]:
        """Name of a loss term -> its weight, of those that are on."""
        weights = {"balance": self.balance_coef, "router_z": self.z_coef} if self.trains_gate else {}
        return {name: weight for name, weight in weights.items() if weight}


class ExpertLora(LoraSettings):
    """The LoRA on attention and on every expert. The library that adapts stacked experts has no dropout there."""

    r: Annotated[int, Field(gt=0)] = 16
    alpha: Annotated[float, Field(gt=0)] = 16
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0


class UpcycleConfig(MethodConfig):
    """Each chosen FFN becomes E identical experts behind a new router, and the mixture is tuned whole."""

    tasks: ClassVar[tuple[str, ...]] = ("causal_lm", "seq2seq")
    method: Literal["upcycle"] = "upcycle"
    donor: Literal["dense", "sparse"] = "dense"
    """`sparse`: the base is a mixture already (pre-trained sparse, or upcycled before): nothing is converted, only tuned."""
    control: Literal["none", "dense"] = "none"
    """`dense`: the dense twin: the base as it is, tuned whole on the same rows."""
    experts: Annotated[int, Field(ge=2)] = 8
    """E."""
    top_k: Annotated[int, Field(ge=1)] = 2
    """k, experts per token. With two a token costs more than in the dense model; the plan says by how much."""
    layers: BlockChoice = "all"
    """Blocks that become sparse: `all`, `every-n` (blocks n-1, 2n-1, ...), or a list of indices."""
    copy_noise: NonNegative = 0.0
    """Standard deviation of noise on the copies, relative to that of each weight matrix. Above 0 the start is another function."""
    router_init_std: Annotated[float, Field(gt=0)] = 0.02
    target: Literal["auto", "mixtral", "qwen2_moe", "qwen3_moe", "flex_olmo"] = "auto"
    """The stock architecture that comes out; `auto` = the first that says the donor's function exactly."""
    tune: Literal["full", "lora"] = "full"
    """`lora`: routers whole; a LoRA on attention and on every expert."""
    lora: ExpertLora = ExpertLora()
    allow_16bit_experts: bool = False
    """Let an NF4 base keep its experts in 16 bits: the library that packs it leaves stacked experts as they are."""
    moe: MoeSettings = MoeSettings()

    def clashes(self) -> Iterable[Clash]:
        if self.control == "dense":
            yield from self._dense_clashes()
            return
        converting = ("experts", "top_k", "layers", "copy_noise", "router_init_std", "target")
        if self.donor == "sparse":
            yield from self.without_effect(converting, "donor dense")
        else:
            yield from self._donor_clashes()
        yield from self._tune_clashes()

    def _dense_clashes(self) -> Iterable[Clash]:
        keys = ("donor", "experts", "top_k", "layers", "copy_noise", "router_init_std", "target", "tune", "lora", "moe")
        yield from self.without_effect((*keys, "allow_16bit_experts"), "control none")

    def _donor_clashes(self) -> Iterable[Clash]:
        yield from self.without_effect(["allow_16bit_experts"], "donor sparse")
        if self.moe.choosing:
            yield from self.without_effect(["top_k"], "a router by which tokens choose; see moe.ec.capacity_factor")
            if self.moe.ec.capacity_factor > self.experts:
                expected = f"at most experts, which is {self.experts}"
                found = f"`{self.moe.ec.capacity_factor:g}`"
                yield Clash("moe.ec.capacity_factor", found, expected, "Lower it; a token takes so many on average.")
            return
        if self.top_k > self.experts:
            yield Clash("top_k", f"`{self.top_k}`", f"at most experts, which is {self.experts}", "Lower `top_k`.")
        k = _K_OF.get(self.moe.router)
        if k not in (None, self.top_k):
            fitting = next((name for name, n in _K_OF.items() if n == self.top_k), "topk")
            yield Clash("moe.router", f"`{self.moe.router}`", f"`{fitting}`, as top_k is {self.top_k}", "Change one.")
        if self.moe.router == "topk" and self.top_k == 1:
            yield Clash("moe.router", "`topk` with top_k 1", "`top1`", "Write `moe: {router: top1}`.")

    def _tune_clashes(self) -> Iterable[Clash]:
        if self.tune == "full":
            yield from self.without_effect(["lora", "allow_16bit_experts"], "tune lora")
            return
        if not self.lora.enabled:
            yield Clash("lora.enabled", "`False`", "true, as tune is lora", "Enable it, or take tune full.")
        if self.lora.dropout:
            expected = "0: the library that adapts stacked experts has no dropout there"
            yield Clash("lora.dropout", f"`{self.lora.dropout:g}`", expected, "Set it to 0.")
        needs = "tune full, as a LoRA leaves experts and dense parts frozen"
        for key in self.moe.changed("freeze_experts", "freeze_moe", "freeze_dense"):
            yield Clash(f"moe.{key}", "a setting that has no effect here", needs, f"Remove `moe.{key}`.")

    def block_indices(self, layers: int) -> tuple[int, ...]:
        """The blocks that become sparse, of a model with `layers` blocks. Raises `MethodError` for one that is not there."""
        return block_indices(self.layers, layers, "upcycle.layers")

    @property
    def sparse(self) -> bool:
        """False for the dense twin."""
        return self.control == "none"

    @property
    def choosing(self) -> bool:
        """True where experts choose tokens."""
        return self.sparse and self.moe.choosing

    @property
    def converts(self) -> bool:
        return self.sparse and self.donor == "dense"

    @property
    def trains_dense(self) -> bool:
        """Attention, norms, embeddings, head and dense FFNs."""
        return not self.sparse or (self.tune == "full" and not self.moe.freeze_dense)
