"""Parameter groups with learning rates of their own."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from sparsmith.methods.base import Method


def own_rates(optimizer: Any, model: nn.Module, parts: Iterable[tuple[Method, Any]]) -> None:
    """Move every role that names a rate (`Method.rates`) into a group of its own, once; the schedule then scales that rate too."""
    for method, config in parts:
        roles = method.roles(model, config)
        for role, rate in method.rates(config).items():
            wanted = {id(parameter) for _, parameter in roles.get(role, ())}
            if not wanted or any(group.get("role") == role for group in optimizer.param_groups):
                continue
            moved = []
            for group in optimizer.param_groups:
                moved += [p for p in group["params"] if id(p) in wanted]
                group["params"] = [p for p in group["params"] if id(p) not in wanted]
            optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
            optimizer.add_param_group({"params": moved, "lr": rate, "weight_decay": 0.0, "role": role})
