"""The weights: every tensor is copied, each chosen FFN E times, and routers are drawn.

One rule serves the model in memory and the streaming conversion of files: what a tensor becomes depends on its name, the settings and the
seed alone. Shapes: E experts, D hidden, W inner width.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparsmith import anatomy
from sparsmith.anatomy.rows import base_config
from sparsmith.methods.upcycle.config import UpcycleConfig
from sparsmith.seeds import torch_generator

LINEARS = ("gate_proj", "up_proj", "down_proj")
_MIXTRAL = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}  # what this family's files call them


class Place(NamedTuple):
    """Where an FFN's weight lies."""

    block: int
    linear: str
    """One of `LINEARS`."""


def place_of(name: str, config: Any, chosen: tuple[int, ...]) -> Place | None:
    """The FFN weight that a dense tensor's name means, if its block becomes sparse.

    Args:
        config: of the dense model. chosen: indices of the blocks that become sparse.
    """
    row = anatomy.of(config)
    found = re.fullmatch(rf"{re.escape(row.blocks)}\.(\d+)\.{row.ffn}\.({'|'.join(LINEARS)})\.weight", name)
    if found is None or int(found[1]) not in chosen:
        return None
    return Place(int(found[1]), found[2])


def copies(weight: Tensor, place: Place, config: UpcycleConfig, seed: int) -> Tensor:
    """(E, out, in): the experts' weights of one linear."""
    if not config.copy_noise or weight.is_meta:
        return weight.detach().expand(config.experts, *weight.shape)
    return torch.stack([expert_copy(weight, place, expert, config, seed) for expert in range(config.experts)])


def expert_copy(weight: Tensor, place: Place, expert: int, config: UpcycleConfig, seed: int) -> Tensor:
    """(out, in): one expert's weight of one linear; without noise the donor's tensor itself."""
    if not config.copy_noise or weight.is_meta:
        return weight.detach()
    wide = weight.detach().float()
    scale = config.copy_noise * wide.std()
    return (wide + scale * _noise(wide, place, expert, seed).to(wide.device)).to(weight.dtype)


def _noise(like: Tensor, place: Place, expert: int, seed: int) -> Tensor:
    name = f"upcycle.noise.{place.block}.{place.linear}.{expert}"
    return torch.randn(like.shape, generator=torch_generator(seed, name))


def expert_name(made: Any, place: Place, expert: int) -> str:
    """Name in the files, which readers of every age know, of one expert's weight. `made`: the mixture's config."""
    linear = _MIXTRAL[place.linear] if made.model_type == "mixtral" else place.linear
    return f"{_home(made, place.block)}.experts.{expert}.{linear}.weight"


def router_name(made: Any, block: int) -> str:
    """Name in the files of a block's router."""
    return f"{_home(made, block)}.{anatomy.of(made).router}.weight"


def _home(made: Any, block: int) -> str:
    row = anatomy.of(made)
    return f"{row.blocks}.{block}.{'block_sparse_moe' if made.model_type == 'mixtral' else row.ffn}"


def router_weight(block: int, hidden: int, config: UpcycleConfig, seed: int) -> Tensor:
    """(E, D) float32 from N(0, router_init_std^2), of the block's own stream."""
    generator = torch_generator(seed, f"upcycle.router.{block}")
    return config.router_init_std * torch.randn(config.experts, hidden, generator=generator)


def converted(
    dense: Mapping[str, Tensor], dense_config: Any, made: Any, config: UpcycleConfig, seed: int
) -> dict[str, Tensor]:
    """The state of the mixture, by the names of its live model.

    Args:
        dense: the donor's state; its tensors are shared where they are only carried over.
        made: the mixture's config (`targets.sparse_config`).
    """
    dense_config = base_config(dense_config)
    row, chosen = anatomy.of(made), config.block_indices(dense_config.num_hidden_layers)
    parts: dict[Place, Tensor] = {}
    state: dict[str, Tensor] = {}
    for name, tensor in dense.items():
        place = place_of(name, dense_config, chosen)
        if place is None:
            state[name] = tensor
        else:
            parts[place] = copies(tensor, place, config, seed)
    for block in chosen:
        gate, up, down = (parts[Place(block, linear)] for linear in LINEARS)
        home = f"{row.blocks}.{block}.{row.ffn}"
        state[f"{home}.{row.experts}.gate_up_proj"] = torch.cat([gate, up], dim=1)
        state[f"{home}.{row.experts}.down_proj"] = down.contiguous()
        state[f"{home}.{row.router}.weight"] = _like(router_weight(block, made.hidden_size, config, seed), down)
    like = next(iter(state.values()))
    return state | {name: _like(tensor, like) for name, tensor in fillers(made, dense.keys(), chosen).items()}


def fillers(made: Any, dense_names: Any, chosen: tuple[int, ...]) -> dict[str, Tensor]:
    """What the target has and the donor has not, all of it without effect: zero biases of queries, keys and values, and the empty shared
    expert with its gate. Float32."""
    if made.model_type != "qwen2_moe":
        return {}
    row, hidden, found = anatomy.of(made), made.hidden_size, {}
    sizes = anatomy.shape_of(made).attention_linears
    for block in range(made.num_hidden_layers):
        for path in list(sizes)[:-1]:
            name = f"{row.blocks}.{block}.{path}.bias"
            if name not in dense_names:
                found[name] = torch.zeros(sizes[path][1])
        if block in chosen:
            home = f"{row.blocks}.{block}.{row.ffn}"
            found[f"{home}.shared_expert_gate.weight"] = torch.zeros(1, hidden)
            for linear in LINEARS:
                shape = (hidden, 0) if linear == "down_proj" else (0, hidden)
                found[f"{home}.shared_expert.{linear}.weight"] = torch.zeros(shape)
    return found


def idle_names(made: Any) -> frozenset[str]:
    """Names of tensors that are there without effect and so never train: of an upcycled model what `fillers` has put in."""
    row, shape = anatomy.of(made), anatomy.shape_of(made)
    linears = anatomy.idle_biases(made, row, shape.attention_linears)
    names = [f"{row.blocks}.{block}.{path}.bias" for block in range(shape.layers) for path in linears]
    for block in shape.sparse.blocks if shape.sparse and shape.sparse.shared == 0 else ():
        home = f"{row.blocks}.{block}.{row.ffn}"
        names += [f"{home}.shared_expert_gate.weight", *(f"{home}.shared_expert.{linear}.weight" for linear in LINEARS)]
    return frozenset(names)


def idle_params(made: Any) -> int:
    """Parameters of `idle_names`."""
    shape = anatomy.shape_of(made)
    return shape.idle_biases + (shape.sparse.shared_params if shape.sparse and shape.sparse.shared == 0 else 0)


def _like(tensor: Tensor, other: Tensor) -> Tensor:
    if other.is_meta:
        return torch.empty(tensor.shape, dtype=other.dtype, device="meta")
    return tensor.to(other.device, other.dtype)
