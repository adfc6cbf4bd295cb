"""Promise 10: crafting leaves the function as it was, bit for bit, on every family."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

import sparsmith as sm
from sparsmith.methods import registry
from tests.kit.cases import Configs, base_for, cases, largest_difference, logits
from tests.kit.tally import Tally


def run(folder: Path) -> Tally:
    """At full size: every method on every family, in float32 and bfloat16."""
    return trial(dtypes=(torch.float32, torch.bfloat16))


def _full(config: Configs) -> bool:
    """Whether the base itself trains: its tensors must be float32 then."""
    parts = config if isinstance(config, tuple) else (config,)
    return any(registry.of(one).trains_base(one) for one in parts)


def trial(
    of: Iterable[tuple[str, Configs, str]] | None = None, dtypes: tuple[torch.dtype, ...] = (torch.float32,)
) -> Tally:
    """Logits of five kinds of input before and after, without our own proof to help; the base that was handed in stays as it is."""
    tally, worst = Tally(), 0.0
    for what, config, family in of if of is not None else cases():
        for dtype in dtypes:
            base = base_for(config, family, dtype=torch.float32 if _full(config) else dtype)
            before = logits(base)
            crafted = sm.craft(base, config, proof=False)
            after, again = logits(crafted), logits(base)
            worst = max(worst, largest_difference(before, after))
            odd = [name for name in before if not torch.equal(before[name], after[name])]
            odd += [f"the base, {name}" for name in before if not torch.equal(before[name], again[name])]
            tally.case(not odd and not crafted.training, f"{what}, {dtype}: other logits for {', '.join(odd)}")
    tally.figures["largest difference"] = worst
    return tally
