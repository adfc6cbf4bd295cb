"""Exit thresholds from data: how sure an exit must be to agree with the full model as often as asked.

The full model answers held-out prompts greedily; one pass over its answers gives every exit's choice and confidence after the very text
that the full model saw. Exits in ascending order, each on the tokens that did not leave at an earlier one: the smallest threshold of the
grid whose agreement has a one-sided 95 % Clopper-Pearson lower bound of at least `agreement`. An exit for which none has (too few tokens,
or too little agreement) is closed. The grid is searched at no extra level, so the bound is a rule for choosing, no simultaneous claim.

The result is kept as `soft_thresholds.json` and belongs to one model: the hash of its weights stands in it.

Shapes: B rows, S tokens.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsmith import anatomy, durable
from sparsmith.crafting.slices import depths_of
from sparsmith.crafting.tensors import content_hash
from sparsmith.errors import CheckpointError, CheckpointMismatch, UsageError
from sparsmith.inference.early_exit import exit_early
from sparsmith.inference.quiet import quiet
from sparsmith.inference.request import Request
from sparsmith.inference.runner import DepthRunner
from sparsmith.inference.sampling import Sampling, confidence
from sparsmith.inference.visits import chosen_visits
from sparsmith.manifests import refuse_newer
from sparsmith.ops.binomial import lower_bound

FILE = "soft_thresholds.json"
FORMAT_VERSION = 1
LEVEL = 0.95
CLOSED = 2.0
"""The threshold of an exit that no token takes."""
GRID = (*(round(0.30 + 0.01 * step, 2) for step in range(70)), 0.995, 0.999)


@dataclass(frozen=True)
class ExitRow:
    """What was found for one depth."""

    depth: int
    threshold: float
    """Above 1 = closed."""
    tokens: int
    """Tokens that arrived here."""
    left: int
    """Of them those that leave here."""
    agreed: int
    """Of those the ones whose choice is the full model's."""
    bound: float
    """Lower bound on the agreement of those that leave; 0 where closed."""


@dataclass(frozen=True)
class Calibration:
    """Thresholds of one model."""

    model_hash: str
    agreement: float
    layers: int
    prompts: int
    tokens: int
    seed: int
    exits: tuple[ExitRow, ...]
    mean_depth: float
    """Blocks per token that these thresholds will take on such prompts, each answer's first token at full depth."""

    @property
    def thresholds(self) -> dict[int, float]:
        return {row.depth: row.threshold for row in self.exits}


def weights_hash(model: nn.Module) -> str:
    """sha256 over names, shapes, types and content of the weights (the first MiB of each tensor)."""
    return content_hash(model.state_dict().items())


def choose(exits: Sequence[tuple[int, Tensor, Tensor]], layers: int, agreement: float) -> tuple[list[ExitRow], Tensor]:
    """Thresholds from what each exit said.

    Args:
        exits: (depth, confidence (T,) in [0, 1], agrees (T,) bool) in ascending order, over the same T tokens.

    Returns:
        A row per exit, and (T,) the depth at which each token leaves.
    """
    rows: list[ExitRow] = []
    total = len(exits[0][1]) if exits else 0
    left_at = torch.full((total,), layers)
    for depth, sure, agrees in exits:
        here = left_at == layers
        arrived = int(here.sum())
        row = ExitRow(depth, CLOSED, arrived, 0, 0, 0.0)
        for threshold in GRID:
            leaves = here & (sure >= threshold)
            count, right = int(leaves.sum()), int((leaves & agrees).sum())
            bound = lower_bound(right, count, LEVEL) if count else 0.0
            if bound >= agreement:
                row = ExitRow(depth, threshold, arrived, count, right, round(bound, 6))
                left_at[leaves] = depth
                break
        rows.append(row)
    return rows, left_at


def calibrate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    agreement: float = 0.98,
    visit: Sequence[int] | None = None,
    max_new_tokens: int = 64,
    batch: int = 8,
    seed: int = 42,
) -> Calibration:
    """Thresholds for `exit_threshold=`.

    Args:
        model: a model with several depths.
        prompts: token ids, held out from training.
        agreement: share of the tokens that leave at an exit that shall be the full model's choice, in (0, 1).
        visit: the depths to calibrate; default as in `generate`.
        max_new_tokens: length of the answers.
        batch: prompts run together.
        seed: stands in the file; the order of prompts is drawn from it.

    Raises:
        UsageError: no prompts, an agreement outside (0, 1), or a model of one depth.
    """
    if not prompts or not 0 < agreement < 1:
        where, wrong = ("prompts", "none") if not prompts else ("agreement", f"{agreement}")
        raise UsageError(where, wrong, "held-out prompts and an agreement in (0, 1)", "Give both.")
    layers, depths = len(anatomy.blocks(model)), chosen_visits(model, visit)
    if not depths:
        raise UsageError("visit", f"depths {depths_of(model)}", "a depth below the full one", "Tune exits first.")
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed)).tolist()
    found: list[list[tuple[Tensor, Tensor]]] = []
    firsts = 0
    with quiet(model):
        for start in range(0, len(order), batch):
            request = _request(model, [prompts[index] for index in order[start : start + batch]], max_new_tokens)
            found.append(_exits_of(model, request, (*depths, layers)))
            firsts += request.rows
    columns = [
        (depth, torch.cat([rows[place][0] for rows in found]), torch.cat([rows[place][1] for rows in found]))
        for place, depth in enumerate(depths)
    ]
    rows, left_at = choose(columns, layers, agreement)
    tokens = len(left_at) + firsts
    mean = (left_at.double().sum().item() + firsts * layers) / max(1, tokens)
    return Calibration(weights_hash(model), agreement, layers, len(prompts), tokens, seed, tuple(rows), round(mean, 4))


def save(calibration: Calibration, target: str | Path) -> Path:
    """Into a file, or `soft_thresholds.json` of a folder."""
    file = _file_of(target)
    durable.write_json(file, {"format_version": FORMAT_VERSION, "level": LEVEL, **asdict(calibration)})
    return file


def load(source: Calibration | str | Path, model: nn.Module) -> Calibration:
    """A calibration, held against the model.

    Raises:
        CheckpointError: no readable file. CheckpointMismatch: made for other weights.
    """
    known = source if isinstance(source, Calibration) else _read(_file_of(source))
    own = weights_hash(model)
    if known.model_hash != own:
        raise CheckpointMismatch(
            str(source) if not isinstance(source, Calibration) else "calibration",
            f"thresholds of the model {known.model_hash[:12]}",
            f"thresholds of this model, {own[:12]}",
            "Calibrate this model.",
        )
    return known


def _file_of(target: str | Path) -> Path:
    return Path(target) / FILE if Path(target).is_dir() else Path(target)


def _read(file: Path) -> Calibration:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        refuse_newer(str(file), data.pop("format_version"), FORMAT_VERSION)
        data.pop("level", None)
        return Calibration(**{**data, "exits": tuple(ExitRow(**row) for row in data["exits"])})
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as fault:
        raise CheckpointError(
            str(file), f"no readable thresholds ({fault})", f"a {FILE} that calibrate wrote", "Calibrate the model."
        ) from fault


def _request(model: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> Request:
    """Prompts padded on the left."""
    config: Any = getattr(model, "generation_config", None)
    eos = getattr(config, "eos_token_id", None)
    ends = () if eos is None else tuple(eos) if isinstance(eos, list | tuple) else (int(eos),)
    width = max(map(len, prompts))
    pad = ends[0] if ends else 0
    ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in prompts], device=model.device)
    mask = torch.tensor([[False] * (width - len(row)) + [True] * len(row) for row in prompts], device=model.device)
    return Request(ids, None if bool(mask.all()) else mask, max_new_tokens, ends, pad, Sampling())


def _exits_of(model: nn.Module, request: Request, depths: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    """Per exit (confidence (T,), agrees (T,)) over the answers' tokens but the first, which are read at full depth."""
    ids, stats = exit_early(model, request, {})
    start = request.ids.shape[1]
    runner = DepthRunner(model, depths, mask=request.mask, room=ids.shape[1])
    states = [state[:, start:] for state in runner.prefill(ids[:, :-1])]
    counted = torch.zeros(ids.shape[0], max(0, ids.shape[1] - 1 - start), dtype=torch.bool, device=ids.device)
    for row, left in enumerate(stats.depths):
        counted[row, : len(left) - 1] = True
    own = runner.logits(len(depths) - 1, states[-1][counted]).argmax(dim=-1)
    found = []
    for place in range(len(depths) - 1):
        logits = runner.logits(place, states[place][counted])
        found.append((confidence(logits).cpu(), (logits.argmax(dim=-1) == own).cpu()))
    return found
