"""What upcycling adds and what a token then costs, from configs alone."""

from __future__ import annotations

from typing import Any

from sparsmith import anatomy
from sparsmith.methods.base import MethodPlan, ModuleChange
from sparsmith.methods.upcycle import switch
from sparsmith.methods.upcycle.config import UpcycleConfig
from sparsmith.methods.upcycle.convert import idle_params


def plan(config: UpcycleConfig, base: Any, made: Any) -> MethodPlan:
    """Exact counts.

    Args:
        base: the base's config. made: the config of what comes out; the base's own where nothing is converted.
    """
    before = anatomy.shape_of(base)
    if not config.sparse:
        note = f"control dense: the base as it is, {before.total_params:,} parameters trained"
        notes = (note, *_pair_notes(before))
        return MethodPlan(changes=(), added={}, trained={"dense": before.total_params}, notes=notes)
    if switch.is_switch(base):
        switch.check(config)
    after = anatomy.shape_of(made)
    sparse = after.sparse
    assert sparse is not None
    idle = idle_params(made)
    of_experts = sparse.expert_params + (sparse.shared_params if sparse.shared else 0)
    dense = after.total_params - of_experts - sparse.router_params - idle
    counts = {
        "router": sparse.router_params if config.moe.trains_gate else 0,
        "expert": of_experts if config.tune == "full" and config.moe.trains_experts else 0,
        "dense": dense if config.trains_dense else 0,
    }
    grown = after.total_params - before.total_params
    added = {"expert": grown - sparse.router_params - idle, "router": sparse.router_params, "idle": idle}
    by = f"expert choice of {sparse.top_k:g} per token" if config.choosing else f"top-{sparse.top_k} router"
    what = (
        f"FFN -> {sparse.experts} experts of width {sparse.width}, {by} ({config.moe.how}), "
        f"{type(made).__name__.removesuffix('Config')}"
    )
    return MethodPlan(
        changes=(ModuleChange(_where(made, sparse.blocks), what, len(sparse.blocks)),) if config.converts else (),
        added=added if config.converts else {},
        inactive=sparse.inactive_params,
        trained={role: count for role, count in counts.items() if count},
        flops_forward=2 * (after.linear_weights - before.linear_weights) if config.converts else 0,
        activation_floats=_floats(sparse, before.ffn_width) if config.converts else 0,
        notes=(*_notes(config, before, after), *_pair_notes(after)),
    )


def _where(made: Any, blocks: tuple[int, ...]) -> str:
    row = anatomy.of(made)
    if blocks == tuple(range(blocks[0], blocks[-1] + 1)) and len(blocks) > 1:
        listed = f"{{{blocks[0]}..{blocks[-1]}}}"
    else:
        listed = "{" + ",".join(map(str, blocks)) + "}"
    return f"{row.blocks}.{listed}.{row.ffn}"


def _floats(sparse: anatomy.SparseShape, width: int) -> int:
    """Kept for the backward beyond a dense FFN's four tensors: each taken expert's, and the sorted inputs and outputs."""
    each = 4 * sparse.width * sparse.top_k + 2 * sparse.hidden * sparse.top_k - 4 * width
    return round(len(sparse.blocks) * each)


def _pair_notes(shape: anatomy.ModelShape) -> tuple[str, ...]:
    """What an encoder-decoder's figures are of."""
    if not isinstance(shape, anatomy.PairShape):
        return ()
    scores = "its attention is computed with score matrices, which the memory's activations do not hold"
    return (
        f"encoder-decoder: a token that is read passes {shape.input_weights:,} weights, one that is written {shape.output_weights:,}; "
        "FLOPs per token are the mean of a row that is half read and half written, and active parameters are those of one of each together",
        *([scores] if shape.sparse else []),
    )


def _notes(config: UpcycleConfig, before: anatomy.ModelShape, after: anatomy.ModelShape) -> tuple[str, ...]:
    notes, sparse = [], after.sparse
    assert sparse is not None
    active = after.total_params - sparse.inactive_params
    if config.converts:
        share = after.linear_weights / before.linear_weights
        notes.append(
            f"{before.total_params:,} parameters become {after.total_params:,}, of which {active:,} serve one token; the products of "
            f"its blocks cost {share:.2f}x the donor's" + ("" if share > 1.05 else ", a FLOP-matched twin")
        )
    if config.choosing:
        how = config.moe.ec.train_select
        notes.append(
            f"expert choice: {sparse.top_k:g} experts take a token on average (moe.ec.capacity_factor), and active parameters and FLOPs "
            f"are of that mean; a token that none takes has its most probable one. Training chooses by {how}, evaluation by thresholds "
            "that are fitted meanwhile; the export has the model type sparsmith_ec and its own code, as no stock architecture computes it"
        )
    if config.copy_noise:
        notes.append(
            f"copy_noise {config.copy_noise:g}: the start is not the donor's function; the proof tells by how much"
        )
    if config.moe.how == "switch" and config.converts:
        notes.append(
            "combine switch: raw probabilities scale the experts down, so the start is not the donor's function"
        )
    if config.converts and not config.moe.trains_experts and config.moe.trains_gate:
        notes.append(
            "freeze_experts on identical copies: whatever the router chooses computes the same, so it learns balance alone"
        )
    if config.moe.second_expert_drop or config.moe.capacity_factor is not None:
        notes.append("slots are dropped while training; evaluation and the export drop nothing")
    if config.allow_16bit_experts:
        notes.append(
            f"beside an nf4 base the experts stay as they are: {2 * sparse.expert_params:,} bytes of them in 16 bits, and twice that "
            "in float32"
        )
    return tuple(notes)
