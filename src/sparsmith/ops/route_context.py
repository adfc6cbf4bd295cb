"""What the routers of one model share during a forward, and what they have counted since the last reading.

This file is part of full checkpoints: it imports torch and the ops only.

Shapes: B rows, S tokens per row, T = B*S tokens, E experts, K per token, G domains.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparsmith.ops.balance import balance_loss, expert_counts, several_ranks, sum_over_ranks, z_loss
from sparsmith.ops.routing import Routing

# G: domains told apart in the statistics. A fixed number, because counting them would wait for the device.
DOMAIN_SLOTS = 32


@dataclass
class RouteContext:
    """What the routers of one model share during one forward, and what they have counted since the last reading.

    One per model. `begin` opens a forward, `record` is called by every layer, `clear` closes it. A layer that is computed again
    (gradient checkpointing) finds its entry and leaves it: the first forward's tensors carry the gradient.
    """

    mask: Tensor | None = None
    """(T,) bool, False = padding"""
    ids: Tensor | None = None
    """(T,) token ids"""
    positions: Tensor | None = None
    """(T,)"""
    domain: Tensor | None = None
    """(T,) index of the token's domain, -1 = none"""
    layers: dict[int, Routing] = field(default_factory=dict)
    shape: tuple[int, int] = (0, 0)
    """(B, S)"""
    handed: Any = None
    """(token_mask, ids, positions, domain) given for the next forward, shapes (B, S)."""
    open: bool = False
    groups: Tensor | None = None
    """(T, G+1) 1 where a token is of the domain; the last column is for tokens of none; all 0 for padding"""
    counts: dict[int, Tensor] = field(default_factory=dict)
    """layer -> (G+1, E) slots taken since the last reading"""
    terms: dict[str, list[Tensor]] = field(default_factory=dict)
    """name -> detached values since the last reading; of several ranks, each holds its part of a value"""
    router_grads: list[Tensor] = field(default_factory=list)
    """The router's gradient norm in each layer, of the last backward"""

    def __deepcopy__(self, memo: dict[int, Any]) -> RouteContext:
        """A copied model starts with a context of its own: what is held here belongs to a forward of the original."""
        return type(self)()

    def __reduce__(self):
        """A copied or pickled model starts with an empty context: what one forward left belongs to its own graph."""
        return (type(self), ())

    def hand(self, mask: Tensor | None, ids: Tensor, positions: Tensor | None, domain: Tensor | None) -> None:
        """Give the next forwards over `ids` their mask, positions and domains, (B, S) each."""
        self.handed = (mask, ids, positions, domain)

    def begin(
        self, ids: Tensor | None, mask: Tensor | None, positions: Tensor | None, shape: tuple[int, int], past: int
    ) -> None:
        """Open a forward over (B, S) = `shape` tokens of which `past` come before in a cache."""
        self.layers, self.open, self.domain, self.groups, self.shape = {}, True, None, None, shape
        if self.handed is not None and tuple(self.handed[1].shape) == shape and past == 0:
            mask, ids, handed_positions, domain = self.handed
            positions = handed_positions if handed_positions is not None else positions
            self.domain = None if domain is None else domain.reshape(-1)
        fits = isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[0] == shape[0] and mask.shape[1] >= shape[1]
        mask = (
            mask.bool() if fits and mask is not None else None
        )  # a prepared 4-d mask, or a dict of them, says nothing here
        if positions is None or positions.dim() != 2:
            positions = _positions(mask, shape, past, ids)
        self.mask = None if mask is None else mask[:, -shape[1] :].reshape(-1)
        self.ids = None if ids is None else ids.reshape(-1)
        self.positions = positions.expand(shape).reshape(-1)

    def record(self, layer: int, routing: Routing, num_experts: int, count: bool) -> None:
        """Keep a layer's decision; count its load where asked. A layer that is already there is left."""
        if not self.open or layer in self.layers:
            return
        self.layers[layer] = routing
        if count:
            self._count(layer, routing.indices, num_experts)

    def _count(self, layer: int, indices_TK: Tensor, num_experts: int) -> None:
        taken_TE = torch.zeros(indices_TK.shape[0], num_experts, device=indices_TK.device).scatter(1, indices_TK, 1.0)
        self.count_taken(layer, taken_TE)

    @torch.no_grad()
    def count_taken(self, layer: int, taken_TE: Tensor) -> None:
        """Add the slots of a forward, 1 where an expert takes a token, to those of the window."""
        if self.groups is None:
            self.groups = _groups(self.domain, self.mask, taken_TE)
        rows = self.groups.to(taken_TE.device).t() @ taken_TE
        known = self.counts.get(layer)
        self.counts[layer] = rows if known is None else known.add_(rows)

    def losses(self, norm: str, over_ranks: bool = False) -> dict[str, Tensor]:
        """`balance` and `router_z` of the forward that has just run, each the mean over layers; nothing without router logits.
        `norm` is `balance_loss`'s.

        With `over_ranks`, the means are over the tokens of all ranks' forwards, and a value is this rank's part of the sum.
        """
        routings = [(routing.logits, routing.indices) for routing in self.layers.values() if routing.logits is not None]
        if not routings:
            return {}
        device, balance, router_z = routings[0][0].device, [], []
        totals = self._totals(routings) if over_ranks and several_ranks() else [None] * len(routings)
        for (logits, indices), counts_E in zip(routings, totals):
            mask = None if self.mask is None else self.mask.to(logits.device)
            counts_E = None if counts_E is None else counts_E.to(logits.device)
            tokens = None if counts_E is None else counts_E.sum().clamp(min=1) / indices.shape[-1]
            balance.append(balance_loss(logits, indices, mask, norm=norm, all_counts_E=counts_E).to(device))
            router_z.append(z_loss(logits, mask, tokens).to(device))
        return {"balance": torch.stack(balance).mean(), "router_z": torch.stack(router_z).mean()}

    @torch.no_grad()
    def _totals(self, routings: list[tuple[Tensor, Tensor]]) -> list[Tensor | None]:
        """Each layer's slots per expert over all ranks: one message for all layers."""
        device = routings[0][0].device
        rows = [
            expert_counts(i, z.shape[-1], None if self.mask is None else self.mask.to(z.device)) for z, i in routings
        ]
        return list(sum_over_ranks(torch.stack([row.to(device) for row in rows])))

    def note(self, name: str, value: Tensor) -> None:
        """Keep a figure (on its device) for the next reading."""
        self.terms.setdefault(name, []).append(value.detach())

    def clear(self) -> None:
        """Drop what belongs to one forward. Counts stay until they are read."""
        self.layers, self.handed, self.open = {}, None, False
        self.mask = self.ids = self.positions = self.domain = self.groups = None

    def reset_window(self) -> None:
        self.counts, self.terms, self.router_grads = {}, {}, []


def _groups(domain_T: Tensor | None, mask_T: Tensor | None, taken_TE: Tensor) -> Tensor:
    """(T, G+1) membership; a domain index out of range counts as none."""
    tokens, device = taken_TE.shape[0], taken_TE.device
    if domain_T is None:
        column_T = torch.full((tokens,), DOMAIN_SLOTS, device=device)
    else:
        domain_T = domain_T.to(device)
        column_T = torch.where((domain_T < 0) | (domain_T >= DOMAIN_SLOTS), DOMAIN_SLOTS, domain_T)
    groups = (column_T[:, None] == torch.arange(DOMAIN_SLOTS + 1, device=device)).to(torch.float32)
    return groups if mask_T is None else groups * mask_T.to(device)[:, None]


def _positions(mask: Tensor | None, shape: tuple[int, int], past: int, ids: Tensor | None) -> Tensor:
    """(B, S) or (1, S): the place of each token, padding on the left not counted."""
    if mask is not None and mask.shape[1] == shape[1] + past:
        return (mask.long().cumsum(dim=-1) - 1).clamp(min=0)[:, past:]
    device = ids.device if ids is not None else (mask.device if mask is not None else None)
    return torch.arange(past, past + shape[1], device=device)[None]
