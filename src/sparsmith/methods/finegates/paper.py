"""The paper layout: a gate on every row and every column of every linear of the blocks, the paper's penalty, no schedule.

    L = L_task + lambda * mean over linears of L_s
    L_s = 1/2 (|mean P(row open) - (1 - s)| + |mean P(column open) - (1 - s)|)

It is here to be compared with: gates of neighbouring linears are not tied, so little of what closes can be deleted (`paper_cut.py`), and at
the start hardly a gate is reached by the task's gradient (figure `reached`): the penalty moves them all down together first.

Paper: FineGates (arXiv 2412.12951) with the formulas of its released code. Different here, and not switchable: no bias is created, head and
embeddings carry no gate, the base weight stays a registered parameter, a LoRA lies inside both gates and sees their draw.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparsmith import anatomy
from sparsmith.errors import LayoutMismatch, MethodError
from sparsmith.methods.base import LossTerm, MethodPlan, ModuleChange
from sparsmith.methods.finegates import account
from sparsmith.methods.finegates.biases import ROLE as BIAS
from sparsmith.methods.finegates.biases import bias_count
from sparsmith.methods.finegates.config import FineGatesConfig
from sparsmith.methods.finegates.gates import GateState, gates_of
from sparsmith.methods.finegates.layout import Layout, Roles
from sparsmith.methods.finegates.paper_cut import counted, deletable, fold_and_delete, kept, living
from sparsmith.methods.finegates.paper_gates import START, PaperLinear, paper_linears
from sparsmith.methods.finegates.places import parent_of
from sparsmith.methods.finegates.structured import check_room
from sparsmith.ops.gates import SHIFT, gate_values, logit_of

if TYPE_CHECKING:
    from sparsmith.anatomy import Anatomy, ModelShape


class PaperLayout(Layout):
    def plan(self, config: FineGatesConfig, row: Anatomy, shape: ModelShape) -> MethodPlan:
        sides = sum(i + o for i, o in shape.linears.values())
        biases = bias_count(config, row, shape)
        names = ", ".join(path.rsplit(".", 1)[-1] for path in shape.linears)
        what = f"row and column gates on {names}: {sides:,} a block"
        return MethodPlan(
            changes=(ModuleChange(f"{row.blocks}.{{0..{shape.layers - 1}}}", what, shape.layers * len(shape.linears)),),
            added={},
            trained={"gate": shape.layers * sides, **({BIAS: biases} if biases else {})},
            activation_floats=shape.layers * sides,
            notes=(
                f"target sparsity of rows and of columns {config.paper.s:g}: no share of parameters, and no promise of one",
                "what can be deleted is learned and told when the model is settled; until then nothing is counted as removed",
                "nearly all noisy gates begin inside the clamp's flat part: the log says what share the task's gradient reaches",
            ),
        )

    def graft(self, model: nn.Module, config: FineGatesConfig, seed: int) -> None:
        if gates_of(model):
            raise MethodError("finegates", "a model with gates already", "a model without", "Settle it first.")
        shape, index = anatomy.shape_of(model), 0
        for block in anatomy.blocks(model):
            for path, (inputs, outputs) in shape.linears.items():
                parent, name = parent_of(block, path)
                linear = getattr(parent, name)
                gated = PaperLinear(linear, name, inputs, outputs, (seed, index))
                gated.watching = config.paper.kurtosis
                setattr(parent, name, gated.train(linear.training))
                index += 1
        base: Any = anatomy.base_of(model)
        base.finegates = GateState(seed, next(model.parameters()).device)

    def roles(self, model: nn.Module, config: FineGatesConfig) -> Roles:
        return [(f"{name}.logit", gate.logit) for name, gate in gates_of(model)]

    def check_steps(self, config: FineGatesConfig, total_steps: int) -> None:
        check_room(config, 3 * (START - logit_of(-SHIFT)), total_steps)

    def noise_sigma(self, config: FineGatesConfig) -> float:
        return config.paper.noise_sigma

    def on_step(self, model: nn.Module, config: FineGatesConfig, state: GateState, total_steps: int) -> None:
        if state.step == 0:
            self.check_steps(config, total_steps)
        state.learning, state.progress = True, state.step / max(1, total_steps)

    def loss_terms(self, model: nn.Module, config: FineGatesConfig, state: GateState) -> dict[str, LossTerm]:
        return {"penalty": LossTerm(penalty(model, config), config.paper.weight)}

    def wanted_terms(self, config: FineGatesConfig) -> tuple[str, ...]:
        return ("penalty",)

    @torch.no_grad()
    def metrics(self, model: nn.Module, config: FineGatesConfig) -> dict[str, Any]:
        """Flat: fractions of closed, soft and open gates, the share that the task's gradient reaches, mean omega of rows and of columns,
        shares removed as counted and as deletable in a stock class. Nested: living units and groups by block."""
        linears = [linear for _, linear in paper_linears(model)]
        if not linears:
            return {}
        found: dict[str, Any] = dict(_fractions(linears))
        for side in ("rows", "columns"):
            found[f"mean/{side}"] = float(torch.cat([getattr(one, side).folded() for one in linears]).mean())
        row, shape = anatomy.anatomy_of(model), anatomy.shape_of(model)
        blocks, (removed, every) = living(model), counted(model)
        found["counted"] = removed / every
        body = shape.attention_params + shape.ffn_params
        found["deletable"] = deletable(kept(blocks, row, shape), row, shape) / body
        found["table/living_units"] = [len(block.units) for block in blocks]
        found["table/living_groups"] = [len(block.groups) for block in blocks]
        return found

    def words(self, metrics: Mapping[str, Any]) -> str:
        """`closed 11% soft 86% reached 0.9%`."""
        if "counted" not in metrics:
            return ""
        return f"closed {metrics['closed']:.0%} soft {metrics['soft']:.0%} reached {metrics['reached']:.1%}"

    def settle(self, model: nn.Module, config: FineGatesConfig) -> None:
        """Nothing to choose: without noise a gate with mu <= -1/2 is 0 already, and a soft one is folded as it is."""

    def form(self, model: nn.Module, asked: str) -> str:
        """A stock class as wide as the widest block, and no other form."""
        if asked not in ("auto", "uniform"):
            mend = "Leave the form out, or use layout structured."
            raise LayoutMismatch(f"form {asked}", "the paper's layout", "form uniform", mend)
        return "uniform"

    def tables(self, model: nn.Module, form: str) -> Mapping[str, Any]:
        row, shape = anatomy.anatomy_of(model), anatomy.shape_of(model)
        gone = deletable(kept(living(model), row, shape), row, shape)
        return {"accounting": account.columns(model, form, counted(model), {"units and groups": gone})}

    def prune(self, model: nn.Module, config: FineGatesConfig, form: str = "auto") -> nn.Module:
        return fold_and_delete(model)


def penalty(model: nn.Module, config: FineGatesConfig) -> Tensor:
    """Scalar: the mean of L_s over all gated linears, whatever their size."""
    parts = [linear.penalty(config.paper.s, config.paper.kurtosis) for _, linear in paper_linears(model)]
    return torch.stack(parts).mean()


def _fractions(linears: list[PaperLinear]) -> dict[str, float]:
    gates = [gate for one in linears for gate in (one.rows, one.columns)]
    value = torch.cat([gate_values(gate.logit) for gate in gates])
    drawn = torch.cat([torch.tanh(gate.logit) + gate.noise + SHIFT for gate in gates])
    masks = {"closed": value <= 0, "soft": (value > 0) & (value < 1), "open": value >= 1}
    masks["reached"] = (drawn > 0) & (drawn < 1)
    return {name: float(mask.float().mean()) for name, mask in masks.items()}
