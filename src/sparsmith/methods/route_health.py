"""The router's health over a window of steps, read from what the route context has counted.

Reading is the only moment when figures leave their device. Under distributed training every rank must read: counts are summed over all.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sparsmith.ops.balance import load_entropy, sum_over_ranks
from sparsmith.ops.route_context import RouteContext
from sparsmith.ops.shards import whole

# an expert is dead when its share stays below a tenth of an even one
_DEAD = 0.1


def read(context: RouteContext) -> dict[str, Any]:
    """Figures since the last call, and a fresh window.

    `load_max`, `load_min`: largest and smallest load of any expert times E (1 = even). `load_entropy`: mean over layers of the load's
    entropy over ln E. `dead_experts`: a count over all layers. `balance`, `router_z`, ...: mean values of what was noted.
    `router_grad_norm`: over all layers, before clipping. `table/load` (layers x E) and `table/load_by_domain`
    (domains up to the last one met x layers x E) are shares that sum to 1 over E; `table/layers` names the blocks.
    """
    figures = _loads(context)
    for name, values in context.terms.items():
        figures[name] = float(sum_over_ranks(torch.stack(values).mean()))
    if context.router_grads:
        last = torch.stack([whole(norm).float().cpu() for norm in context.router_grads])
        figures["router_grad_norm"] = float(last.norm())
        figures["table/router_grad_norm"] = last.tolist()
    context.reset_window()
    return figures


def _loads(context: RouteContext) -> dict[str, Any]:
    if not context.counts:
        return {}
    layers = sorted(context.counts)
    device = context.counts[layers[0]].device
    counts_LGE = sum_over_ranks(torch.stack([context.counts[layer].to(device) for layer in layers])).float().cpu()
    total_LE = counts_LGE.sum(dim=1)
    share_LE = _shares(total_LE)
    experts = share_LE.shape[-1]
    figures: dict[str, Any] = {
        "load_max": float(share_LE.max() * experts),
        "load_min": float(share_LE.min() * experts),
        "load_entropy": float(load_entropy(total_LE).mean()),
        "dead_experts": int((share_LE < _DEAD / experts).sum()),
        "table/load": share_LE.tolist(),
        "table/layers": layers,
    }
    by_domain_GLE = counts_LGE[:, :-1].transpose(0, 1)
    met = by_domain_GLE.sum(dim=(1, 2)).nonzero()
    if len(met):
        figures["table/load_by_domain"] = _shares(by_domain_GLE[: int(met[-1]) + 1]).tolist()
    return figures


def _shares(counts: Tensor) -> Tensor:
    return counts / counts.sum(dim=-1, keepdim=True).clamp(min=1)


def words(metrics: Mapping[str, Any]) -> str:
    """For the progress bar: `grouped load 0.62-1.81, entropy 0.97`."""
    if "load_max" not in metrics:
        return ""
    paths = sorted(set(metrics.get("table/paths", ())))
    text = f"{'/'.join(paths)} load {metrics['load_min']:.2f}-{metrics['load_max']:.2f}, entropy {metrics['load_entropy']:.2f}"
    text = text.lstrip()
    return text + (f", {metrics['dead_experts']} dead" if metrics["dead_experts"] else "")
