"""The structured layout: gates on whole units, a budget that holds their expected size, a hard choice, deletion.

step 0 .. hold       dense: no noise, no budget; what units move is watched, and sets where their gates start
hold .. settle_at    soft gates; the target falls from 1 to `target` until `warmup`, a dual variable holds the expected size to it
settle_at .. end     the choice is hard; kept gates' scales (and a LoRA) recover
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparsmith import ranks
from sparsmith.errors import ScheduleTooShort
from sparsmith.methods.base import LossTerm, MethodPlan
from sparsmith.methods.finegates import account, health, planning, start
from sparsmith.methods.finegates.choose import choose
from sparsmith.methods.finegates.config import FineGatesConfig
from sparsmith.methods.finegates.forms import layout_of
from sparsmith.methods.finegates.gates import Gate, GateState, gates_of, linears_of, sites, state_of
from sparsmith.methods.finegates.graft import graft
from sparsmith.methods.finegates.layout import Layout, Roles
from sparsmith.methods.finegates.prune import fold_and_cut
from sparsmith.methods.finegates.size import aim_at, expected_share, sigma_at, steps_of
from sparsmith.ops.balance import sum_over_ranks
from sparsmith.ops.gates import SHIFT, budget_loss, dual_step, logit_of, ramp, soft_share

if TYPE_CHECKING:
    from sparsmith.anatomy import Anatomy, ModelShape


class StructuredLayout(Layout):
    def plan(self, config: FineGatesConfig, row: Anatomy, shape: ModelShape) -> MethodPlan:
        return planning.plan(config, row, shape)

    def check(self, config: FineGatesConfig, row: Anatomy, shape: ModelShape) -> None:
        planning.check(config, row, shape)

    def graft(self, model: nn.Module, config: FineGatesConfig, seed: int) -> None:
        graft(model, config, seed)

    def roles(self, model: nn.Module, config: FineGatesConfig) -> Roles:
        found: Roles = []
        for name, gate in gates_of(model):
            found += [(f"{name}.logit", gate.logit)] * config.learned
            found += [(f"{name}.scale", gate.scale)] * config.settle.train_scales
        return found

    def wants_gates(self, config: FineGatesConfig) -> bool:
        return config.cuts and (config.learned or config.settle.train_scales)

    def final_from(self, config: FineGatesConfig, total_steps: int) -> int:
        return steps_of(config, total_steps)[1] if config.cuts else 0

    def still_until(self, config: FineGatesConfig, total_steps: int) -> int:
        return steps_of(config, total_steps)[0]

    def check_steps(self, config: FineGatesConfig, total_steps: int) -> None:
        check_schedule(config, *steps_of(config, total_steps))

    def on_step(self, model: nn.Module, config: FineGatesConfig, state: GateState, total_steps: int) -> None:
        step = state.step
        hold, settle_at = steps_of(config, total_steps)
        if step == 0:
            check_schedule(config, hold, settle_at)
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
    def after_forward(self, model: nn.Module) -> None:
        """What was watched becomes the mean over ranks, so that all order their units alike; a mean, because DDP copies the first rank's
        buffers to all, and orders do not hang on the factor."""
        if ranks.world() == 1:
            return
        for linear in linears_of(model):
            if linear.watching:
                pulls = [gate.pull for gate in linear.children() if isinstance(gate, Gate)]
                for figure in (linear.input_sum, linear.input_square, linear.input_count, *pulls):
                    figure.copy_(sum_over_ranks(figure) / ranks.world())

    @torch.no_grad()
    def _dual(self, model: nn.Module, config: FineGatesConfig, state: GateState) -> float:
        excess = float(expected_share(model, config, state.sigma)) - float(state.aim)
        return dual_step(float(state.dual), excess, config.dual.lr, config.dual.max)

    def loss_terms(self, model: nn.Module, config: FineGatesConfig, state: GateState) -> dict[str, LossTerm]:
        if not config.learned:
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

    def words(self, metrics: Mapping[str, Any]) -> str:
        return health.words(metrics)

    def settle(self, model: nn.Module, config: FineGatesConfig) -> None:
        state = state_of(model)
        if state is not None and not is_settled(model):
            settle_gates(model, config, state.seed)

    def form(self, model: nn.Module, asked: str) -> str:
        return layout_of(model, asked).form

    def tables(self, model: nn.Module, form: str) -> Mapping[str, Any]:
        return account.tables(model, form)

    def prune(self, model: nn.Module, config: FineGatesConfig, form: str = "auto") -> nn.Module:
        return fold_and_cut(model, form)


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
                gate.settle(mask_of(kept, gate), reopen)
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
    check_room(config, way, settle_at - hold)


def check_room(config: FineGatesConfig, way: float, steps: int) -> None:
    """Refuse `steps` in which a logit cannot go as far as `way`.

    Raises:
        ScheduleTooShort.
    """
    if steps < way / config.gates.lr:
        raise ScheduleTooShort(
            "finegates.schedule",
            f"{steps} steps in which gates learn, at gates.lr {config.gates.lr:g}",
            f"at least {way / config.gates.lr:.0f} steps, or gates.lr {way / max(steps, 1):.2g} for {steps}",
            "Raise train.steps or gates.lr (or, in the structured layout, schedule.settle_at).",
        )


def mask_of(kept: tuple[int, ...], gate: Gate) -> Tensor:
    """(N,) True at the kept indices."""
    mask = torch.zeros_like(gate.kept)
    mask[list(kept)] = True
    return mask
