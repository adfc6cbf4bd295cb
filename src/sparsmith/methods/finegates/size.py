"""The size of a gated model: expected while gates are open or soft, exact once they are settled; and the controller that holds it.

Spec of the objective: L = L_task + lambda Delta + quad / 2 max(Delta, 0)^2 + polarise term, Delta = R - rho(t); R is the expected cost over
the base, with products over nested gates: a group's gate covers its query heads', a sub-block's gate covers its content.

Shapes: L layers, I FFN channels, G key-value groups, H query heads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparsmith import anatomy
from sparsmith.methods.finegates.config import FineGatesConfig
from sparsmith.methods.finegates.families import Costs
from sparsmith.methods.finegates.gates import KINDS, Gate, sites
from sparsmith.ops.gates import open_probability, ramp

OfGate = Callable[[Gate], Tensor]


@dataclass(frozen=True)
class Sizes:
    """Costs of a model and how its parts add up."""

    costs: Costs
    layers: int
    groups: int
    heads: int
    units: int
    attention_rest: float
    """Of one block's attention: what no unit's gate covers (output bias)."""
    ffn_rest: float
    outside: float
    """Part of the base outside the blocks' linears (target_of: total)."""

    @classmethod
    def of(cls, config: FineGatesConfig, model: nn.Module) -> Sizes:
        return cls.from_shape(config, anatomy.anatomy_of(model), anatomy.shape_of(model))

    @classmethod
    def from_shape(cls, config: FineGatesConfig, row: anatomy.Anatomy, shape: anatomy.ModelShape) -> Sizes:
        costs = Costs.of(config, row, shape)
        per = 2 if config.target_unit == "flops" else 1
        scores = 4 * shape.heads * shape.head_dim * config.flops_context if per == 2 else 0
        attention = per * shape.attention_params / shape.layers + scores
        ffn = per * shape.ffn_params / shape.layers
        inside = shape.layers * (attention + ffn)
        return cls(
            costs,
            shape.layers,
            shape.kv_heads,
            shape.heads,
            shape.ffn_width,
            attention - costs.attention(shape.kv_heads, shape.heads),
            ffn - shape.ffn_width * costs.unit,
            costs.base - inside,
        )

    def share(self, tables: Mapping[str, Tensor]) -> Tensor:
        """Scalar in (0, 1]: cost over the base's.

        Args:
            tables: kind -> (L, n) open probabilities (or 0 and 1); a kind that is not there is open.
        """
        costs = self.costs
        some = next(iter(tables.values()))
        full = some.new_ones((self.layers,))
        ffn_L = costs.unit * (tables["units"].sum(1) if "units" in tables else self.units * full) + self.ffn_rest
        groups_LG = tables.get("groups")
        groups_LG = some.new_ones((self.layers, self.groups)) if groups_LG is None else groups_LG
        heads_LH = tables.get("heads")
        heads_LH = some.new_ones((self.layers, self.heads)) if heads_LH is None else heads_LH
        in_group_LG = heads_LH.view(self.layers, self.groups, -1).sum(2)
        attention_L = (groups_LG * (costs.group + costs.head * in_group_LG)).sum(1) + self.attention_rest
        ffn_L = ffn_L * tables["ffn_block"][:, 0] if "ffn_block" in tables else ffn_L
        attention_L = attention_L * tables["attention_block"][:, 0] if "attention_block" in tables else attention_L
        return ((ffn_L + attention_L).sum() + self.outside) / costs.base

    def plain_share(self, groups: int, heads: int, units: int) -> float:
        """The same, of a model whose every layer keeps as much."""
        each = self.costs.attention(groups, heads) + self.attention_rest + units * self.costs.unit + self.ffn_rest
        return (self.layers * each + self.outside) / self.costs.base


def tables_of(model: nn.Module, read: OfGate) -> dict[str, Tensor]:
    """Kind -> (L, n) of a figure of every gate, for the kinds that the model has in every block."""
    found = {}
    blocks = sites(model)
    for kind in KINDS:
        gates = [gate for site in blocks if (gate := site.gate(kind)) is not None]
        if gates:
            found[kind] = torch.stack([read(gate) for gate in gates])
    return found


def expected_share(model: nn.Module, config: FineGatesConfig, sigma: float | Tensor) -> Tensor:
    """R: the expected share of the base that remains, with a gradient to the gates."""
    tables = tables_of(model, lambda gate: gate.logit)
    return Sizes.of(config, model).share({kind: open_probability(t, sigma) for kind, t in tables.items()})


def kept_share(model: nn.Module, config: FineGatesConfig) -> float:
    """The share that the settled choice keeps."""
    return float(Sizes.of(config, model).share(tables_of(model, lambda gate: gate.kept.double())))


def aim_at(config: FineGatesConfig, progress: float) -> float:
    """rho(t): 1 until `hold`, then linear down to the target at `warmup`."""
    schedule = config.schedule
    return 1.0 - (1.0 - config.target) * ramp(progress, schedule.hold, schedule.warmup)


def sigma_at(config: FineGatesConfig, progress: float) -> float:
    """sigma_r(t): linear over the phase in which the budget is held."""
    start, end = config.gates.reg_sigma
    schedule = config.schedule
    return start + (end - start) * ramp(progress, schedule.hold, schedule.settle_at)


def steps_of(config: FineGatesConfig, total: int) -> tuple[int, int]:
    """(first step with noise and budget, first step with hard gates) of a run of `total` steps. A rival is cut at the end of `hold`."""
    hold = round(config.schedule.hold * total)
    return hold, (round(config.schedule.settle_at * total) if config.learned else hold)
