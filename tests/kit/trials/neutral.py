"""Promise 10: crafting leaves the function as it was, bit for bit, on every family; where a method's algebra sums in another order
(`Method.rounding`), to the last places of the number type."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

import sparsmith as sm
from sparsmith.methods import registry
from sparsmith.methods.base import Method
from tests.kit.cases import Configs, base_for, cases, largest_difference, logits
from tests.kit.tally import Tally

ROUNDED = {torch.float32: 1e-5, torch.bfloat16: 6e-2}
"""Of the largest logit (at least 1)."""


def run(folder: Path) -> Tally:
    """At full size: every method on every family, in float32 and bfloat16."""
    return trial(dtypes=(torch.float32, torch.bfloat16))


def _full(config: Configs) -> bool:
    """Whether the base itself trains: its tensors must be float32 then."""
    parts = config if isinstance(config, tuple) else (config,)
    return any(registry.of(one).trains_base(one) for one in parts)


def _sums_anew(config: Configs) -> bool:
    """Whether a method says that it sums in another order."""
    parts = config if isinstance(config, tuple) else (config,)
    return any(registry.of(one).rounding > Method.rounding for one in parts)


def trial(
    of: Iterable[tuple[str, Configs, str]] | None = None, dtypes: tuple[torch.dtype, ...] = (torch.float32,)
) -> Tally:
    """Logits of five kinds of input before and after, without our own proof to help; the base that was handed in stays as it is."""
    tally, worst, rounded = Tally(), 0.0, 0.0
    for what, config, family in of if of is not None else cases():
        for dtype in dtypes:
            base = base_for(config, family, dtype=torch.float32 if _full(config) else dtype)
            before = logits(base)
            crafted = sm.craft(base, config, proof=False)
            after, again = logits(crafted), logits(base)
            if _sums_anew(config):
                limit = ROUNDED[next(iter(before.values())).dtype]
                apart = {
                    n: (before[n] - after[n]).abs().max().item() / max(before[n].abs().max().item(), 1.0)
                    for n in before
                }
                rounded = max(rounded, *apart.values())
                odd = [name for name, gap in apart.items() if not gap <= limit]
            else:
                worst = max(worst, largest_difference(before, after))
                odd = [name for name in before if not torch.equal(before[name], after[name])]
            odd += [f"the base, {name}" for name in before if not torch.equal(before[name], again[name])]
            tally.case(not odd and not crafted.training, f"{what}, {dtype}: other logits for {', '.join(odd)}")
    tally.figures |= {"largest difference": worst, "largest difference by rounding": rounded}
    return tally
