"""Settings of FineGates. Building one checks every combination; what a family allows is checked against a model (`families.py`).

Paper: FineGates (arXiv 2412.12951, arXiv 2602.09169). What differs and why stands in this folder's README.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, ClassVar, Literal

from pydantic import ConfigDict, Field, field_validator

from sparsmith.methods.base import LoraSettings, MethodConfig
from sparsmith.recipe.strict import Clash, StrictModel

Fraction = Annotated[float, Field(gt=0, lt=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Baseline = Literal["importance", "flap_like", "magnitude", "random", "lora"]


class GateSettings(StrictModel):
    """What is gated, and how a gate behaves."""

    ffn: bool = True
    """A gate for each intermediate channel of the FFN."""
    attention: Literal["none", "kv_groups", "kv_groups+q_heads"] = "kv_groups"
    """A gate for each group of heads that share keys and values; `+q_heads`: and for each query head inside a group. Families in which
    heads cannot be deleted exactly fall back to `none`, and the plan says why."""
    blocks: bool = False
    """A gate for each attention and FFN sub-block as a whole."""
    noise_sigma: NonNegative = 0.0
    """Standard deviation of the training noise; 0 = deterministic gates."""
    reg_sigma: tuple[Positive, Positive] = (0.25, 0.1)
    """sigma of P(open), from the start to the settling; the paper layout keeps the paper's 0.5."""
    start: Literal["importance", "level"] = "importance"
    """`importance`: after `schedule.hold` at the cut, in the order of what each unit moves and of what the task feels of it; `level`: all
    alike at `init_mu`."""
    band: Positive = 0.15
    """Share of the units around the cut that start soft; start importance only."""
    init_mu: Annotated[float, Field(gt=-1, lt=1)] = 0.52
    """Where mu starts with start level; the paper layout draws its logits from N(1, 0.1^2) instead."""
    lr: Positive = 5e-2
    """Learning rate of the gates, with no weight decay."""
    polarise: NonNegative = 0.0
    """Weight of the mean of omega (1 - omega), ramped with the target."""

    def clashes(self) -> Iterable[Clash]:
        if self.start == "importance":
            yield from self.without_effect(["init_mu"], "start level")
        else:
            yield from self.without_effect(["band"], "start importance")


class Schedule(StrictModel):
    """Fractions of all steps: dense until `hold`; the target falls until `warmup`; gates become hard at `settle_at`; then recovery."""

    hold: Share = 0.03
    warmup: Share = 0.05
    settle_at: Share = 0.13

    def clashes(self) -> Iterable[Clash]:
        if not self.hold <= self.warmup <= self.settle_at:
            found = f"{self.hold:g}, {self.warmup:g}, {self.settle_at:g}"
            yield Clash("settle_at", found, "hold <= warmup <= settle_at", "Put them in order.")


class Dual(StrictModel):
    """The controller that holds the expected size at the target: an augmented Lagrangian."""

    lr: Positive = 1.0
    quad: NonNegative = 10.0
    max: Positive = 100.0


class PaperSettings(StrictModel):
    """The paper's own penalty; `layout: paper` only."""

    model_config = ConfigDict(**{**StrictModel.model_config, "populate_by_name": True, "serialize_by_alias": True})
    s: Fraction = 0.4
    """Target sparsity of rows and of columns."""
    weight: NonNegative = Field(default=50.0, alias="lambda")
    noise_sigma: NonNegative = 0.1
    """Standard deviation of the training noise; 0 = deterministic gates."""
    kurtosis: bool = False
    """Weight a side's gates by the kurtosis of what they see."""


class SettleSettings(StrictModel):
    """How soft gates become hard."""

    scope: Literal["uniform", "global"] = "uniform"
    """`uniform`: every layer keeps as many units; `global`: one threshold over all layers, so layers differ."""
    unit: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """FFN widths are multiples of it. `auto`: 256 where the FFN is 4,096 wide or more, else the power of two near 1/16 of it."""
    min_keep: Annotated[int, Field(ge=1)] = 1
    """Units that every layer keeps at least."""
    survivors: Literal["reopen", "keep"] = "reopen"
    """`reopen`: kept gates become 1; `keep`: they stay at their soft value."""
    train_scales: bool = True
    """Train the kept gates' values in (0, 1] while recovering."""


class FineGatesConfig(MethodConfig):
    """A physically smaller model, cut by learned gates while it is tuned."""

    tasks: ClassVar[tuple[str, ...]] = ("causal_lm", "seq_cls")
    method: Literal["finegates"] = "finegates"
    layout: Literal["structured", "paper"] = "structured"
    """`structured`: gates on whole units that can be deleted; `paper`: row and column gates on every linear, for comparison."""
    gates: GateSettings = GateSettings()
    target: Fraction = 0.8
    """Share that *remains*."""
    target_of: Literal["body", "total"] = "body"
    """Of the linear weights of the blocks, or of all parameters."""
    target_unit: Literal["params", "flops"] = "params"
    flops_context: Annotated[int, Field(ge=1)] = 2048
    """Tokens attended to, for `target_unit: flops`."""
    schedule: Schedule = Schedule()
    dual: Dual = Dual()
    paper: PaperSettings = PaperSettings()
    lora: LoraSettings | None = None
    """A LoRA that trains beside the gates and while recovering."""
    head_lr: Positive = 1e-3
    """Learning rate of the classifier; task seq_cls only."""
    train_bias: Literal["auto"] | bool = "auto"
    """Train the biases of gated linears. `auto`: in the paper layout with task seq_cls."""
    settle: SettleSettings = SettleSettings()
    baseline: Baseline | None = None
    """A rival in place of the learned gates, with the same cut, recovery and export: `importance` (the order that learned gates start
    from, and no learning), `flap_like`, `magnitude`, `random`; `lora` cuts nothing. It is cut at the end of `schedule.hold`."""

    @field_validator("target", mode="after")
    @classmethod
    def _target(cls, value: float) -> float:
        return float(value)

    def clashes(self) -> Iterable[Clash]:
        yield from _layout_clashes(self)
        yield from _baseline_clashes(self)
        gates = self.gates
        if self.layout == "structured" and not gates.ffn and gates.attention == "none" and not gates.blocks:
            yield Clash("gates.ffn", "`false`, and no other gates", "at least one kind of gate", "Set gates.ffn true.")
        if not gates.ffn:
            yield from self._only_with_ffn()
        if self.target_unit == "params":
            yield from self.without_effect(["flops_context"], "target_unit flops")

    def _only_with_ffn(self) -> Iterable[Clash]:
        for key in self.settle.changed("unit", "min_keep"):
            found = f"`{getattr(self.settle, key)}`, which has no effect here"
            yield Clash(f"settle.{key}", found, "gates.ffn true", f"Remove `settle.{key}`.")

    @property
    def learned(self) -> bool:
        """True where gates are learned, and not a rival's choice."""
        return self.baseline is None

    @property
    def cuts(self) -> bool:
        """False for the dense rival."""
        return self.baseline != "lora"

    @property
    def structured(self) -> bool:
        return self.layout == "structured"


_STRUCTURED_GATES = ("ffn", "attention", "blocks", "noise_sigma", "reg_sigma", "start", "band", "init_mu", "polarise")


def _layout_clashes(config: FineGatesConfig) -> Iterable[Clash]:
    if config.layout == "structured":
        yield from config.without_effect(["paper"], "layout paper")
        return
    needs = "layout structured"
    yield from config.without_effect(["target", "target_of", "target_unit", "dual"], needs)
    for key in config.gates.changed(*_STRUCTURED_GATES):
        yield Clash(f"gates.{key}", "a setting that has no effect here", needs, f"Remove `gates.{key}`.")
    for key in config.settle.changed("scope", "unit", "min_keep", "survivors", "train_scales"):
        yield Clash(f"settle.{key}", "a setting that has no effect here", needs, f"Remove `settle.{key}`.")
    for key in config.schedule.changed("hold", "warmup", "settle_at"):
        yield Clash(f"schedule.{key}", "a setting that has no effect here", needs, f"Remove `schedule.{key}`.")
    if config.baseline is not None:
        yield Clash("baseline", f"`{config.baseline}`", "no baseline in the paper's layout", "Use layout structured.")


def _baseline_clashes(config: FineGatesConfig) -> Iterable[Clash]:
    """A rival has no gates to learn: settings of learning would be without effect."""
    if config.baseline is None:
        return
    needs = "learned gates (no baseline)"
    learning = ("noise_sigma", "reg_sigma", "start", "band", "init_mu", "polarise")
    for key in config.gates.changed(*learning):
        yield Clash(f"gates.{key}", "a setting that has no effect here", needs, f"Remove `gates.{key}`.")
    yield from config.without_effect(["dual"], needs)
    if config.cuts:
        yield from _rival_clashes(config, needs)
    if config.baseline == "lora":
        yield from config.without_effect(["target", "target_of", "target_unit", "settle", "gates", "schedule"], needs)
        if config.lora is None or not config.lora.enabled:
            yield Clash("lora", "no LoRA", "a LoRA, which is all that this rival trains", "Give `lora: {r: 16}`.")


def _rival_clashes(config: FineGatesConfig, needs: str) -> Iterable[Clash]:
    """A rival scores FFN channels and groups of heads, and is cut at the end of `hold`, open from then on."""
    schedule = config.schedule
    for key in schedule.changed("warmup", "settle_at"):
        if getattr(schedule, key) != schedule.hold:  # what must be raised so that a late hold is in order says nothing
            yield Clash(f"schedule.{key}", "a setting that has no effect here", needs, f"Remove `schedule.{key}`.")
    for key in config.settle.changed("survivors"):
        yield Clash(f"settle.{key}", "a setting that has no effect here", needs, f"Remove `settle.{key}`.")
    if config.gates.blocks:
        yield Clash("gates.blocks", "`true`, which no rival scores", needs, "Remove `gates.blocks`.")
    if config.gates.attention == "kv_groups+q_heads":
        yield Clash("gates.attention", "query heads, which no rival scores", "`kv_groups` or `none`", "Take kv_groups.")
    if not config.settle.train_scales:
        for key in config.gates.changed("lr"):
            yield Clash(f"gates.{key}", "a rate for nothing that trains", "settle.train_scales true", "Remove it.")
