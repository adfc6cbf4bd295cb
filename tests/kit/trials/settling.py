"""Promise 13: settling tells the truth: the settled model computes what the soft one did, and its counts are a recount."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

import sparsmith as sm
from sparsmith.crafting.lora import lora_parameters
from sparsmith.crafting.record import record_of
from sparsmith.crafting.settle import settle_report
from sparsmith.exporting.model_card import count_parameters
from tests.kit.cases import Configs, base_config_for, cases, largest_difference, logits, trained_like
from tests.kit.tally import Tally

LIMIT = 1e-5


def run(folder: Path) -> Tally:
    """At full size: every method on every family."""
    return trial()


def trial(of: Iterable[tuple[str, Configs, str]] | None = None) -> Tally:
    """Settle each case and compare with the soft model, in evaluation mode, where every choice is the deterministic one."""
    tally, worst = Tally(), 0.0
    for what, config, family in of if of is not None else cases():
        soft = trained_like(config, family)
        for method, settings in record_of(
            soft
        ).parts:  # a choice is the method's own affair: what is held here comes after it
            soft = method.settle(soft, settings)
        plan = sm.plan(base_config_for(config, family), config)
        matrices = sum(name.split(".")[-3] == "lora_A" for name, _ in lora_parameters(soft))
        settled = sm.settle(copy.deepcopy(soft))
        difference = largest_difference(logits(soft), logits(settled))
        worst, report, told = max(worst, difference), settle_report(settled), count_parameters(settled)
        recount = sum(p.numel() for p in settled.parameters())
        faults = {
            f"logits differ by {difference:.2e}": difference <= LIMIT,
            f"{matrices} LoRA matrices, {len(report.merged)} reported": len(report.merged) == matrices,
            "a LoRA is left": not lora_parameters(settled) and not any("lora" in n for n, _ in settled.named_modules()),
            f"{recount:,} numbers, {plan.total_params:,} planned": recount == plan.total_params,
            f"told {told}": told["total"] == recount and told["active"] == plan.active_params,
            "the figure of the drift is not the drift": report.merge is None or _is_drift(soft, settled, report.merge),
        }
        tally.case(all(faults.values()), f"{what}: {'; '.join(text for text, held in faults.items() if not held)}")
    tally.figures["largest difference"] = worst
    return tally


def _is_drift(soft: nn.Module, settled: nn.Module, told: object) -> bool:
    from sparsmith.crafting.neutral import probe_logits

    before, after = probe_logits(soft, 42), probe_logits(settled, 42)
    assert before is not None and after is not None
    return torch.isclose(
        (before - after).abs().max(), torch.tensor(told.max_logit_difference), rtol=0, atol=1e-9
    ).item()  # type: ignore[attr-defined]
