"""FineGates behind the contract of a method."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from sparsmith import anatomy, ranks
from sparsmith.errors import ScheduleTooShort
from sparsmith.methods.base import Batch, CraftContext, LossTerm, Method, MethodConfig, MethodPlan
from sparsmith.methods.finegates import health, planning, start
from sparsmith.methods.finegates.choose import choose
from sparsmith.methods.finegates.config import FineGatesConfig
from sparsmith.methods.finegates.gates import (
    Gate,
    GateState,
    draw_noise,
    gates_of,
    linears_of,
    silence,
    sites,
    state_of,
)
from sparsmith.methods.finegates.graft import graft
from sparsmith.methods.finegates.prune import fold_and_cut
from sparsmith.methods.finegates.size import aim_at, expected_share, sigma_at, steps_of
from sparsmith.ops.gates import SHIFT, budget_loss, dual_step, logit_of, ramp, soft_share

if TYPE_CHECKING:
    from sparsmith.anatomy import Anatomy, ModelShape
    from sparsmith.methods.base import LoraSettings

ROLE = "gate"


class FineGatesMethod(Method):
    name: ClassVar[str] = "finegates"
    title: ClassVar[str] = "FineGates: learned gates cut the model to size"
    paper: ClassVar[str] = "https://arxiv.org/abs/2412.12951"
    config_class: ClassVar[type[MethodConfig]] = FineGatesConfig
    reads_batches: ClassVar[bool] = False

    # what it is

    def plan(self, config: FineGatesConfig, anatomy: Anatomy, shape: ModelShape) -> MethodPlan:
        return planning.plan(config, anatomy, shape)

    def craft(self, model: nn.Module, config: FineGatesConfig, context: CraftContext) -> nn.Module:
        if not config.cuts:
            return model
        if anatomy.base_of(model) is model:
            anatomy.probe(model)
        planning.check(config, anatomy.anatomy_of(model), anatomy.shape_of(model.config))
        graft(model, config, context.seed)
        return model

    def roles(self, model: nn.Module, config: FineGatesConfig) -> dict[str, list[tuple[str, nn.Parameter]]]:
        found = []
        for name, gate in gates_of(model):
            found += [(f"{name}.logit", gate.logit)] * config.learned
            found += [(f"{name}.scale", gate.scale)] * config.settle.train_scales
        return {ROLE: found} if found else {}

    def wanted_roles(self, config: FineGatesConfig) -> tuple[str, ...]:
        return (ROLE,) if config.cuts and (config.learned or config.settle.train_scales) else ()

    def rates(self, config: FineGatesConfig) -> Mapping[str, float]:
        return {ROLE: config.gates.lr}

    def lora(self, config: FineGatesConfig, shape: ModelShape | None = None) -> LoraSettings | None:
        return config.lora

    def still_until(self, config: FineGatesConfig, total_steps: int) -> int:
        return steps_of(config, total_steps)[0]

    # the steps

    def check_steps(self, config: FineGatesConfig, total_steps: int) -> None:
        if config.cuts:
            check_schedule(config, *steps_of(config, total_steps))

    def on_step(self, model: nn.Module, config: FineGatesConfig, step: int, total_steps: int) -> None:
        state = state_of(model)
        if state is None:
            return
        hold, settle_at = steps_of(config, total_steps)
        if step == 0:
            check_schedule(config, hold, settle_at)
        state.step, state.micro, state.rank = step, 0, ranks.rank()
        settled = is_settled(model)
        if not settled and step >= settle_at:
            settle_gates(model, config, state.seed)
            settled = True
        elif config.learned and config.gates.start == "importance" and step >= hold and not bool(state.started):
            start.by_importance(model, config)
            state.started.fill_(True)
        progress = step / max(1, total_steps)
        if config.learned and not settled:
            if step > hold:  # what the last step has left, against what it aimed at
                state.dual.fill_(self._dual(model, config, state))
            state.aim.fill_(aim_at(config, progress))
            state.sigma.fill_(sigma_at(config, progress))
        state.learning = config.learned and not settled and step >= hold
        state.progress = progress
        for linear in linears_of(model):
            linear.watching = not settled and step < hold

    @torch.no_grad()
    def _dual(self, model: nn.Module, config: FineGatesConfig, state: GateState) -> float:
        excess = float(expected_share(model, config, state.sigma)) - float(state.aim)
        return dual_step(float(state.dual), excess, config.dual.lr, config.dual.max)

    def before_forward(self, model: nn.Module, config: FineGatesConfig, batch: Batch) -> None:
        state = state_of(model)
        if state is None or not model.training:
            return
        if state.learning and config.gates.noise_sigma > 0:
            draw_noise(model, config.gates.noise_sigma)
        elif state.micro == 0:
            silence(model)
        state.micro += 1

    def loss_terms(self, model: nn.Module, config: FineGatesConfig, batch: Batch) -> dict[str, LossTerm]:
        state = state_of(model)
        if state is None or not config.learned:
            return {}
        if not state.learning:  # before and after, the term is there and has nothing to say
            held = torch.stack([gate.values().mean() for _, gate in gates_of(model)]).mean()
            return {name: LossTerm(0.0 * held, 0.0) for name in self.wanted_terms(config)}
        excess = expected_share(model, config, state.sigma) - state.aim
        terms = {"budget": LossTerm(budget_loss(excess, state.dual, config.dual.quad), 1.0)}
        if config.gates.polarise:
            soft = torch.cat([gate.values() for _, gate in gates_of(model)])
            weight = config.gates.polarise * ramp(state.progress, config.schedule.hold, config.schedule.warmup)
            terms["polarise"] = LossTerm(soft_share(soft), weight)
        return terms

    def wanted_terms(self, config: FineGatesConfig) -> tuple[str, ...]:
        if not config.learned:
            return ()
        return ("budget", "polarise") if config.gates.polarise else ("budget",)

    def metrics(self, model: nn.Module, config: FineGatesConfig) -> dict[str, Any]:
        return health.read(model, config)

    def health(self, metrics: Mapping[str, Any]) -> str:
        return health.words(metrics)

    # the result

    def settle(self, model: nn.Module, config: FineGatesConfig) -> nn.Module:
        """The hard choice, where training has not come to it yet."""
        state = state_of(model)
        if state is not None and not is_settled(model):
            settle_gates(model, config, state.seed)
        return model

    def prune(self, model: nn.Module, config: FineGatesConfig) -> nn.Module:
        return fold_and_cut(model) if gates_of(model) else model

    def state(self, model: nn.Module, config: FineGatesConfig) -> dict[str, Tensor]:
        """Logits, scales and choices, the budget's lambda, and what was watched: a cut run goes on to the same bits."""
        found: dict[str, Tensor] = {}
        for name, module in model.named_modules():
            if isinstance(module, Gate):
                found[f"{name}.logit"], found[f"{name}.scale"] = module.logit.detach(), module.scale.detach()
            parts = ("input_sum", "input_square", "input_count")
            names = {Gate: ("kept", "settled", "pull"), GateState: ("dual", "sigma", "aim", "started")}.get(
                type(module), ()
            )
            names = names or (parts if module in linears_of(model) else ())
            found.update({f"{name}.{part}": getattr(module, part) for part in names})
        return found

    def cut(self, view: Any, config: FineGatesConfig, depth: int, layers: int) -> MethodConfig | None:
        """The blocks keep their gates; of a settled model nothing of the method is left."""
        return config if gates_of(view) else None


def is_settled(model: nn.Module) -> bool:
    """True once the choice is hard."""
    found = gates_of(model)
    return bool(found) and bool(found[0][1].settled)


def settle_gates(model: nn.Module, config: FineGatesConfig, seed: int) -> None:
    """Choose, and hold to the choice: closed gates are 0 from here on."""
    choice = choose(model, config, seed)
    reopen = config.settle.survivors == "reopen" or not config.learned
    for layer, site in enumerate(sites(model)):
        kinds = {"units": choice.units[layer], "groups": choice.groups[layer], "heads": choice.heads[layer]}
        for kind, kept in kinds.items():
            gate = site.gate(kind)
            if gate is not None:
                gate.settle(_mask(kept, gate), reopen)
        for kind, is_open in (("attention_block", choice.attention_open), ("ffn_block", choice.ffn_open)):
            gate = site.gate(kind)
            if gate is not None:
                gate.settle(torch.full_like(gate.kept, is_open[layer]), reopen)
    state = state_of(model)
    if state is not None:
        state.learning = False


def check_schedule(config: FineGatesConfig, hold: int, settle_at: int) -> None:
    """Adam moves a logit by about its rate in a step: there must be room to close, and steps to watch where a start or a rival needs them.

    Raises:
        ScheduleTooShort.
    """
    watches = config.gates.start == "importance" if config.learned else config.baseline in ("importance", "flap_like")
    if watches and hold < 1:
        raise ScheduleTooShort(
            "finegates.schedule.hold",
            f"`{config.schedule.hold:g}` of the steps, which is none",
            "at least one step in which units are watched",
            "Raise schedule.hold or train.steps.",
        )
    if not config.learned:
        return
    closed = logit_of(-SHIFT)
    way = -closed if config.gates.start == "importance" else 3 * (logit_of(config.gates.init_mu) - closed)
    steps = settle_at - hold
    if steps < way / config.gates.lr:
        raise ScheduleTooShort(
            "finegates.schedule",
            f"{steps} steps between hold and settle_at at gates.lr {config.gates.lr:g}",
            f"at least {way / config.gates.lr:.0f} steps, or gates.lr {way / max(steps, 1):.2g} for {steps}",
            "Raise train.steps, schedule.settle_at or gates.lr.",
        )


def _mask(kept: tuple[int, ...], gate: Gate) -> Tensor:
    mask = torch.zeros_like(gate.kept)
    mask[list(kept)] = True
    return mask


FINEGATES = FineGatesMethod()
