"""Expert choice behind the contract: what the method answers where its experts choose."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from sparsmith import anatomy
from sparsmith.anatomy.experts import MEAN_TAKEN
from sparsmith.anatomy.rows import base_config
from sparsmith.errors import LayoutMismatch, MethodError
from sparsmith.methods.upcycle.config import UpcycleConfig
from sparsmith.ops.balance import sum_over_ranks

DISAGREEMENT = 0.1
"""Share of (token, expert) decisions on which training and evaluation may differ without a warning (spec 4.2)."""
STOCK = "router expert_choice, which no stock architecture computes: their tokens take experts"


def mean_config(made: Any, config: UpcycleConfig) -> Any:
    """A copy of a mixture's config that says how many experts a token takes on average."""
    made = copy.deepcopy(base_config(made))
    setattr(made, MEAN_TAKEN, config.moe.ec.capacity_factor)
    return made


def wrapped(model: Any, config: UpcycleConfig) -> Any:
    """The stock mixture inside the model type whose experts choose. The mixture's modules are reused."""
    # the model class brings the library's generation code: seconds that planning need not pay
    from sparsmith.methods.upcycle.modeling import SparsmithEcConfig, SparsmithEcForCausalLM

    row, experts = anatomy.of(model.config), anatomy.sparse_shape(model.config)
    assert experts is not None
    ec = config.moe.ec
    if ec.capacity_factor > experts.experts:
        raise MethodError(
            "upcycle.moe.ec.capacity_factor",
            f"`{ec.capacity_factor:g}`",
            f"at most {experts.experts}, the experts of this model",
            "Lower it; a token takes so many on average.",
        )
    setattr(model.config, MEAN_TAKEN, ec.capacity_factor)
    settings = {
        "capacity_factor": ec.capacity_factor,
        "ema": ec.ema,
        "train_select": ec.train_select,
        "jitter": config.moe.jitter,
        "z_coef": config.moe.loss_weights.get("router_z", 0.0),
        "blocks": row.blocks,
        "ffn": row.ffn,
        "experts": row.experts,
        "router": row.router,
    }
    made = SparsmithEcConfig(base_config=model.config, expert_choice=settings, dtype=model.config.dtype)
    crafted = SparsmithEcForCausalLM(made, base=model)
    crafted.config.architectures = [type(crafted).__name__]
    for _, ffn in crafted.sparse_blocks():
        router = ffn.choice_router()
        if not router.weight.is_meta:  # float32 also where it is frozen: thresholds are held against its probabilities
            router.weight.data = router.weight.data.float()
            router.thresholds = router.thresholds.float()
        for part in (router, getattr(ffn, row.experts)):
            part.sparsmith_grafted = True  # until it is settled: another method leaves these to this one
    return crafted.train(model.training)


def refuse_wrapped(model: nn.Module) -> None:
    """A model that is of the own type already must not be crafted again: a delta of it would hold its thresholds apart from it."""
    if getattr(model.config, "model_type", "") == "sparsmith_ec":
        raise MethodError(
            "upcycle",
            "a model whose experts choose already",
            "a stock model",
            "Resume its run, or load its checkpoint with sparsmith.load.",
        )


def thresholds_of(model: Any) -> dict[str, Tensor]:
    """Name in the crafted model -> thresholds (E,) of every sparse block."""
    end = f".{model.settings.router}.thresholds"
    return {name: buffer for name, buffer in model.named_buffers() if name.endswith(end)}


def routers_of(model: Any) -> dict[str, Tensor]:
    """Name in the crafted model -> the router's weight."""
    names = [name.removesuffix("thresholds") + "weight" for name in thresholds_of(model)]
    return {name: model.get_parameter(name) for name in names}


def seeing_ahead(model: nn.Module) -> AbstractContextManager[None]:
    """`expert_choice.seeing_ahead`."""
    from sparsmith.methods.upcycle import expert_choice

    return expert_choice.seeing_ahead(model)


def follow(context: Any) -> None:
    """Let the thresholds take in the forward that has just run."""
    context.settle_thresholds()


@torch.no_grad()
def figures(context: Any) -> dict[str, Any]:
    """Of the forwards since the last reading; call it before the window is reset.

    `experts_per_token`, `without_taker` (share of tokens that no expert took of itself): means over blocks. `disagreement`: the largest
    share of (token, expert) decisions, over blocks, on which training and evaluation differ; absent until there are thresholds.
    `table/...`: each by block.
    """
    if not context.tallies:
        return {}
    blocks = sorted(context.tallies)
    device = context.tallies[blocks[0]].device
    tally_L5 = sum_over_ranks(torch.stack([context.tallies[block].to(device) for block in blocks])).cpu()
    tokens, taken, alone, differ, compared = tally_L5.unbind(dim=1)
    tokens = tokens.clamp(min=1)
    found: dict[str, Any] = {
        "experts_per_token": float((taken / tokens).mean()),
        "without_taker": float((alone / tokens).mean()),
        "table/experts_per_token": (taken / tokens).tolist(),
        "table/without_taker": (alone / tokens).tolist(),
    }
    if bool((compared > 0).all()):
        found["disagreement"] = float((differ / compared).max())
        found["table/disagreement"] = (differ / compared).tolist()
    return found


def words(metrics: Mapping[str, Any]) -> str:
    """For the progress bar."""
    if "disagreement" not in metrics:
        return ""
    return f", evaluation chooses otherwise in {metrics['disagreement']:.1%}"


def warnings(metrics: Mapping[str, Any]) -> dict[str, str]:
    """What a user must be told of the last figures, by block."""
    found = {}
    for block, share in zip(metrics.get("table/layers", ()), metrics.get("table/disagreement", ())):
        if share > DISAGREEMENT:
            found[f"disagreement {block}"] = (
                f"upcycle: in block {block} evaluation chooses otherwise than training in {share:.1%} of its (token, expert) decisions, "
                f"more than {DISAGREEMENT:.0%}: held-out losses are of another routing than the trained one. More steps, a lower "
                "moe.ec.ema or moe.ec.train_select `threshold` bring the two together."
            )
    return found


def refuse_stock(asked: str) -> None:
    """Raises:
    LayoutMismatch: a form of export is asked for by name.
    """
    if asked != "auto":
        raise LayoutMismatch(f"form {asked}", STOCK, "the model type of its own", "Leave the form out.")


CAUTION = (
    "Experts chose their tokens while this was trained, each the best of a whole text; here each token is judged alone, by thresholds that "
    "followed that choice. No stock architecture computes it: the folder brings its own code."
)
