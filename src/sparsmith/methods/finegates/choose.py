"""Which units stay: the hard choice that settling makes of learned logits or of a rival's scores.

uniform   every layer keeps the same number of groups g and of FFN units K: g is the rounded mean of the groups that stayed open, K the
          largest multiple of the unit that fits the target
global    one threshold over all layers, then each layer rounded to the unit

Ties are broken by how much a unit moves (input RMS times the norm of its column), then by index.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparsmith import anatomy
from sparsmith.anatomy import Anatomy
from sparsmith.errors import MethodError, TargetUnreachable
from sparsmith.methods.finegates.config import FineGatesConfig
from sparsmith.methods.finegates.families import kept_groups_allowed, unit_of
from sparsmith.methods.finegates.gates import GatedLinear, Site, closed_at, sites
from sparsmith.methods.finegates.scores import baseline_scores, movement
from sparsmith.methods.finegates.size import Sizes


@dataclass(frozen=True)
class Choice:
    """Kept indices per layer, ascending, by kind."""

    units: tuple[tuple[int, ...], ...]
    groups: tuple[tuple[int, ...], ...]
    heads: tuple[tuple[int, ...], ...]
    """Query heads, as indices into all heads of the model as it was."""
    attention_open: tuple[bool, ...]
    ffn_open: tuple[bool, ...]


def choose(model: nn.Module, config: FineGatesConfig, seed: int = 42) -> Choice:
    """The choice for a model whose gates are learned, or whose rival's scores can be told.

    Raises:
        TargetUnreachable: with the interval that can be reached. MethodError: a rival's score of what no one has watched.
    """
    blocks, sizes = sites(model), Sizes.of(config, model)
    _require_watched(blocks, config)
    row, shape = anatomy.anatomy_of(model), anatomy.shape_of(model)
    scores = [_scores(site, config, row, seed, layer) for layer, site in enumerate(blocks)]
    ties = [{kind: _ties(site, kind) for kind in score} for site, score in zip(blocks, scores)]
    attention_open = tuple(_open(site, "attention_block") for site in blocks)
    ffn_open = tuple(_open(site, "ffn_block") for site in blocks)
    per_group = shape.heads // shape.kv_heads
    order = [{k: _order(s, t[k]) for k, s in score.items()} for score, t in zip(scores, ties)]
    gated = "groups" in scores[0]
    heads_each = _heads_each(blocks, per_group) if "heads" in scores[0] else per_group
    if config.settle.scope == "uniform":
        allowed = kept_groups_allowed(row, shape) if gated else (shape.kv_heads,)
        wanted = _open_groups(blocks, config) if gated else shape.kv_heads
        groups_each, width = fit(config, sizes, allowed, wanted, heads_each, sum(attention_open), sum(ffn_open))
        groups = [_top(o["groups"], groups_each) if gated else tuple(range(shape.kv_heads)) for o in order]
        units = [_top(o["units"], width) if "units" in o else tuple(range(shape.ffn_width)) for o in order]
    else:
        groups = [
            _open_of(site, "groups", o, config) if gated else tuple(range(shape.kv_heads))
            for site, o in zip(blocks, order)
        ]
        units = _global_units(config, sizes, scores, order, groups, heads_each, attention_open, ffn_open)
    heads = [_heads(o.get("heads"), g, per_group, heads_each) for o, g in zip(order, groups)]
    return Choice(tuple(units), tuple(groups), tuple(heads), attention_open, ffn_open)


def fit(
    config: FineGatesConfig,
    sizes: Sizes,
    allowed: tuple[int, ...],
    wanted: float,
    heads_each: int,
    attention_blocks: int | None = None,
    ffn_blocks: int | None = None,
) -> tuple[int, int]:
    """(groups, FFN width) that every layer keeps: of the allowed counts the one nearest to `wanted` with which the target can be met.

    Raises:
        TargetUnreachable.
    """
    attention_blocks = sizes.layers if attention_blocks is None else attention_blocks
    ffn_blocks = sizes.layers if ffn_blocks is None else ffn_blocks
    unit, costs = unit_of(config, sizes.units), sizes.costs
    least = config.settle.min_keep * unit if config.gates.ffn else sizes.units
    goal = config.target * costs.base - sizes.outside

    def left(groups: int) -> float:
        """What the FFNs may cost beside so many groups."""
        attention = costs.attention(groups, groups * heads_each) + sizes.attention_rest
        return goal - attention_blocks * attention - ffn_blocks * sizes.ffn_rest

    for groups in sorted(allowed, key=lambda g: (abs(g - wanted), -g)):
        raw = left(groups) / (max(1, ffn_blocks) * costs.unit)
        width = int(raw // unit) * unit if config.gates.ffn else sizes.units
        if least <= width <= sizes.units and raw >= (0 if config.gates.ffn else sizes.units):
            return groups, min(width, sizes.units)
        if width > sizes.units and groups == max(allowed):
            return groups, sizes.units
    low = sizes.plain_share(min(allowed), min(allowed) * heads_each, least)
    high = sizes.plain_share(max(allowed), max(allowed) * heads_each, sizes.units)
    raise TargetUnreachable(
        "finegates.target",
        f"{config.target:g} of the {config.target_of}'s {config.target_unit}",
        f"between {low:.3f} and {high:.3f}, which these gates can reach with FFN widths in steps of {unit}",
        "Change `target`, lower settle.unit or settle.min_keep, or gate more (gates.attention, gates.blocks).",
    )


def _require_watched(blocks: list[Site], config: FineGatesConfig) -> None:
    """A score of inputs that were never seen would order units by their index."""
    if config.baseline not in ("importance", "flap_like"):
        return
    for holder in (linear for site in blocks for linear in (site.ffn, site.attention) if linear is not None):
        if not bool(holder.input_count > 0):
            raise MethodError(
                f"finegates.baseline {config.baseline}",
                "a model whose units were not watched in any step",
                "at least one training step within schedule.hold",
                "Tune the model before it is settled.",
            )


def _scores(site: Site, config: FineGatesConfig, row: Anatomy, seed: int, layer: int) -> dict[str, Tensor]:
    """Kind -> (n,) larger = keep."""
    found = {}
    for kind in ("units", "groups", "heads"):
        gate = site.gate(kind)
        if gate is not None and config.baseline is None:
            found[kind] = torch.tanh(gate.logit.detach()).cpu()
        elif gate is not None:
            found[kind] = baseline_scores(str(config.baseline), site, kind, row, seed, layer).cpu()
    return found


def _ties(site: Site, kind: str) -> Tensor:
    holder: GatedLinear | None = site.ffn if kind == "units" else site.attention
    gate = site.gate(kind)
    assert holder is not None and gate is not None
    return movement(holder, gate.size).cpu()


def _order(score: Tensor, tie: Tensor) -> list[int]:
    """Indices, the best first."""
    return sorted(range(len(score)), key=lambda i: (-score[i].item(), -tie[i].item(), i))


def _top(order: list[int], count: int) -> tuple[int, ...]:
    return tuple(sorted(order[:count]))


def _open(site: Site, kind: str) -> bool:
    gate = site.gate(kind)
    return gate is None or bool(torch.tanh(gate.logit.detach())[0] > closed_at())


def _open_of(site: Site, kind: str, order: dict[str, list[int]], config: FineGatesConfig) -> tuple[int, ...]:
    """The groups that are open, the best one where none is; of a rival, the best of the target's share."""
    gate = site.gate(kind)
    assert gate is not None
    if not config.learned:
        return _top(order[kind], max(1, round(config.target * gate.size)))
    found = tuple(torch.nonzero(torch.tanh(gate.logit.detach()) > closed_at()).flatten().tolist())
    return found or _top(order[kind], 1)


def _open_groups(blocks: list[Site], config: FineGatesConfig) -> float:
    """Mean number of groups that stayed open; of a rival, the target's share of all."""
    gates = [gate for site in blocks if (gate := site.gate("groups")) is not None]
    if not config.learned:
        return config.target * gates[0].size
    counts = [(torch.tanh(gate.logit.detach()) > closed_at()).sum().item() for gate in gates]
    return sum(counts) / len(counts)


def _heads_each(blocks: list[Site], per_group: int) -> int:
    """Query heads that every group keeps: the rounded mean of the open ones, at least one."""
    gates = [gate for site in blocks if (gate := site.gate("heads")) is not None]
    shares = [(torch.tanh(gate.logit.detach()) > closed_at()).float().mean().item() for gate in gates]
    return max(1, round(per_group * sum(shares) / len(shares)))


def _heads(order: list[int] | None, groups: tuple[int, ...], per_group: int, each: int) -> tuple[int, ...]:
    found: list[int] = []
    for group in groups:
        own = range(group * per_group, (group + 1) * per_group)
        found += list(own) if order is None else sorted([h for h in order if h in own][:each])
    return tuple(found)


def _global_units(
    config: FineGatesConfig,
    sizes: Sizes,
    scores: list[dict[str, Tensor]],
    order: list[dict[str, list[int]]],
    groups: list[tuple[int, ...]],
    heads_each: int,
    attention_open: tuple[bool, ...],
    ffn_open: tuple[bool, ...],
) -> list[tuple[int, ...]]:
    """Each layer in whole units of channels, the chunks with the best mean score first, while they fit the target."""
    if "units" not in scores[0]:
        return [tuple(range(sizes.units)) for _ in order]
    unit, least = unit_of(config, sizes.units), config.settle.min_keep
    spent = sizes.outside + sum(ffn_open) * sizes.ffn_rest
    spent += sum(
        sizes.costs.attention(len(g), len(g) * heads_each) + sizes.attention_rest
        for g, on in zip(groups, attention_open)
        if on
    )
    room = int((config.target * sizes.costs.base - spent) / (sizes.costs.unit * unit))
    chunks = []
    for layer, (score, places) in enumerate(zip(scores, order)):
        if ffn_open[layer]:
            values = score["units"][places["units"]]
            chunks += [
                (-part.mean().item(), layer, n) for n, part in enumerate(values.split(unit)) if len(part) == unit
            ]
    forced = [chunk for chunk in chunks if chunk[2] < least]
    free = sorted(chunk for chunk in chunks if chunk[2] >= least)
    if room < len(forced):
        raise TargetUnreachable(
            "finegates.target",
            f"{config.target:g}",
            f"at least {(spent + len(forced) * unit * sizes.costs.unit) / sizes.costs.base:.3f} with these gates and settle.min_keep",
            "Raise `target`, or lower settle.unit or settle.min_keep.",
        )
    width = [0] * len(order)
    for _, layer, _ in forced + free[: room - len(forced)]:
        width[layer] += unit
    return [_top(places["units"], n) for places, n in zip(order, width)]
