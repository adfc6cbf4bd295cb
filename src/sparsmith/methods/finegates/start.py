"""Where learned gates start: at the cut, in the order of importance, so that learning decides the units that are in doubt.

A gate that starts open like all others needs hundreds of steps before the task tells it from its neighbours. What was watched while
the gates were open (`scores.importance`) already orders them well: the rank r of a unit in its layer sets

    mu = (r - (1 - kept)) / band, within [-0.9, 0.9],

so that units far below the cut start closed, those far above it open, and a band around it soft. From there the task loss and the budget
move them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparsmith import anatomy
from sparsmith.methods.finegates.config import FineGatesConfig
from sparsmith.methods.finegates.gates import sites
from sparsmith.methods.finegates.planning import expected
from sparsmith.methods.finegates.scores import importance

FURTHEST = 0.9


@torch.no_grad()
def by_importance(model: nn.Module, config: FineGatesConfig) -> None:
    """Set every unit's logit from its rank; sub-block gates stay where they are."""
    row, shape = anatomy.anatomy_of(model), anatomy.shape_of(model)
    groups, width = expected(config, row, shape)
    kept = {"units": width / shape.ffn_width, "groups": groups / shape.kv_heads, "heads": 1.0}
    blocks = sites(model)
    for kind, share in kept.items():
        scores = [importance(site, kind) for site in blocks if site.gate(kind) is not None]
        if not scores:
            continue
        table_LN = torch.stack(scores)
        ranks_LN = rank_all(table_LN) if config.settle.scope == "global" else rank_each(table_LN)
        mu_LN = ((ranks_LN - (1 - share)) / config.gates.band).clamp(-FURTHEST, FURTHEST)
        for site, mu_N in zip(blocks, mu_LN):
            gate = site.gate(kind)
            if gate is not None:
                gate.logit.copy_(torch.atanh(mu_N))


def rank_each(table_LN: Tensor) -> Tensor:
    """(L, N) place of each entry in its row, in (0, 1), the largest last."""
    return (table_LN.argsort(1).argsort(1) + 0.5) / table_LN.shape[1]


def rank_all(table_LN: Tensor) -> Tensor:
    """The same over all rows."""
    return rank_each(table_LN.reshape(1, -1)).view_as(table_LN)
