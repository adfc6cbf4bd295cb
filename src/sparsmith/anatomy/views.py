"""Views: the same modules seen as a model of fewer blocks. Nothing is copied, changed or patched.

A view is a shallow copy of the model whose list of blocks and whose config are its own and whose every module is the model's. The family's
own forward then runs it, so masks, rotary positions and sliding windows are the family's, and two threads may hold two views of one model.

    first_blocks(model, n)      a causal LM of blocks 1..n, with the model's final norm and head: what a checkpoint cut at n would be
    backbone_of(model, ...)     a decoder over any run of blocks, fed with hidden states, without the final norm
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from sparsmith import anatomy
from sparsmith.anatomy.rows import LAYER_LISTS


class _NoPositions(nn.Module):
    """In the place of learned position embeddings where hidden states come in that hold them already."""

    def forward(self, position_ids: Tensor) -> Tensor:
        return torch.zeros((), device=position_ids.device)


def first_blocks(model: nn.Module, depth: int, tail: Sequence[nn.Module] = ()) -> Any:
    """A causal LM of the first `depth` blocks, then the blocks of `tail`, then the model's own final norm and head.

    Args:
        model: a causal LM, base or crafted.
        depth: blocks that are kept, from 1 to all.
        tail: blocks of the model's own kind that stand in the place of the next ones.
    """
    blocks = [*list(anatomy.blocks(model))[:depth], *tail]
    base = anatomy.base_of(model)
    view = _shallow(base)
    _put(view, anatomy.anatomy_of(model).blocks, nn.ModuleList(blocks))
    _set_config(view, cut_config(base.config, range(len(blocks))))
    if base is model:
        return view
    outer = _shallow(model)
    outer._modules["base"] = view
    config: Any = copy.copy(model.config)
    config.base_config = view.config
    config.num_hidden_layers = len(blocks)
    outer.config = config
    return outer


def backbone_of(
    model: nn.Module, blocks: Sequence[nn.Module], like: Sequence[int], *, embeds: bool = False, normed: bool = False
) -> Any:
    """A decoder over `blocks`.

    Args:
        model: a causal LM, base or crafted.
        blocks: the blocks to run, in order.
        like: for each of them the index of the model's block whose kind (full or sliding attention) it is of.
        embeds: True where token ids come in; False where hidden states do, as `inputs_embeds`.
        normed: apply the final norm.
    """
    row, base = anatomy.anatomy_of(model), anatomy.base_of(model)
    root = row.blocks.split(".")[0]
    view = _shallow(cast(nn.Module, anatomy.backbone(model)))
    inside = {path: path.removeprefix(f"{root}.") for path in (row.blocks, row.norm, row.positions)}
    _put(view, inside[row.blocks], nn.ModuleList(blocks))
    if not normed:
        _put(view, inside[row.norm], nn.Identity())
    if row.positions and not embeds:
        _put(view, inside[row.positions], _NoPositions())
    _set_config(view, cut_config(base.config, like))
    return view


def cut_config(config: Any, like: Sequence[int]) -> Any:
    """The config of a model whose blocks are those at the indices `like`; per-layer lists are cut with them."""
    cut = copy.copy(config)
    layers = config.num_hidden_layers
    for name in LAYER_LISTS:
        known = getattr(config, name, None)
        if isinstance(known, (list, tuple)) and len(known) == layers:
            cut.__dict__[name] = [known[index] for index in like]
    window = getattr(config, "max_window_layers", None)
    if window is not None:
        cut.__dict__["max_window_layers"] = min(window, len(like))
    if getattr(config, "mlp_only_layers", None) is not None:  # indices of dense blocks, counted anew
        dense = set(range(layers)) - set(_sparse_blocks(config))
        cut.__dict__["mlp_only_layers"] = [place for place, index in enumerate(like) if index in dense]
        cut.__dict__["decoder_sparse_step"] = 1
    cut.__dict__[config.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = len(like)
    return cut


def _sparse_blocks(config: Any) -> tuple[int, ...]:
    shape = anatomy.sparse_shape(config)
    return shape.blocks if shape is not None else tuple(range(config.num_hidden_layers))


def _set_config(view: Any, config: Any) -> None:
    """On the view and on its decoder, which has a config of its own."""
    for node in (view, *view.__dict__["_sparsmith_own"].values()):
        node.config = config


def _shallow(module: nn.Module) -> Any:
    """The same object once more, with a dictionary of children of its own."""
    view = copy.copy(module)
    view.__dict__["_modules"] = dict(module._modules)
    view.__dict__["_sparsmith_own"] = {}
    return view


def _put(view: Any, path: str, module: nn.Module) -> None:
    """Set `view.a.b = module`, copying `a` shallowly so that the model keeps its own `b`."""
    *steps, last = path.split(".")
    node = view
    for step in steps:
        own = node.__dict__["_sparsmith_own"]
        if step not in own:
            own[step] = node._modules[step] = _shallow(node._modules[step])
        node = own[step]
    node._modules[last] = module
