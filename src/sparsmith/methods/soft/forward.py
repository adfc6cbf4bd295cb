"""One forward of the trunk that yields the hidden state at every exit, normed and reduced to the labelled positions.

Hooks live for one forward. The states are taken raw inside the blocks (which may be checkpointed) and normed when the trunk reaches its
final norm: inside the decoder's own forward, where a sharded norm is gathered.

Shapes: B rows, S tokens, D hidden, P labelled positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sparsmith import anatomy
from sparsmith.anatomy import views
from sparsmith.methods.base import Batch
from sparsmith.methods.soft.parts import exits_of

Select = Callable[[Tensor], Tensor]


def labelled(batch: Batch) -> tuple[Select, Tensor]:
    """(hidden (B, S, D) -> (P, D) of the positions that predict a label, the labels (P,))."""
    targets = batch.labels[:, 1:]
    keep = targets.ne(-100)
    return lambda hidden: hidden[:, :-1][keep], targets[keep]


def inputs_of(batch: Batch) -> dict[str, Tensor]:
    given = {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "attention_mask": batch.attention_mask}
    return {name: value for name, value in given.items() if value is not None}


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def called_once(module: nn.Module, act: Callable[..., Any], *inputs: Tensor) -> Any:
    """`act(*inputs)` as one call of `module`: its hooks see one forward, for which its weights, where they are sharded, are gathered and
    stay until the backward. Inside, use what `module.forward` was before."""
    known = module.__dict__.get("forward")
    module.forward = act
    try:
        return module(*inputs)
    finally:
        del module.forward
        if known is not None:
            module.forward = known


def trunk_states(
    model: nn.Module, batch: Batch, depths: Sequence[int], select: Select, kept: Sequence[int] | None = None
) -> dict[int, Tensor]:
    """Depth -> (P, D), after the final norm.

    Args:
        depths: ascending; blocks above the last are not run.
        kept: blocks that are run (layer dropout); default all. A state at depth n is that after the last block that is run below it.
    """
    blocks = list(anatomy.blocks(model))
    last = depths[-1]
    run = [index for index in (kept if kept is not None else range(len(blocks))) if index < last]
    if len(run) == len(blocks):
        decoder: Any = anatomy.backbone(model)
    else:
        decoder = views.backbone_of(model, [blocks[i] for i in run], run, embeds=True, normed=True)
    norm: Any = anatomy.walk(anatomy.base_of(model), anatomy.anatomy_of(model).norm)
    source = {n: max(index for index in run if index < n) for n in depths[:-1]}
    raw: dict[int, Tensor] = {}
    states: dict[int, Tensor] = {}

    def take(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            raw[index] = _first(output)

        return hook

    def at_norm(module: Any, args: Any, output: Any) -> None:
        for n, index in source.items():
            states[n] = module.forward(select(raw[index]))

    with ExitStack() as stack:
        for index in sorted(set(source.values())):
            stack.callback(blocks[index].register_forward_hook(take(index)).remove)
        stack.callback(norm.register_forward_hook(at_norm).remove)
        output = decoder(**inputs_of(batch), use_cache=False).last_hidden_state
    states[last] = select(output)
    return {n: states[n] for n in depths}


def tail_states(
    model: nn.Module, batch: Batch, depths: Sequence[int], select: Select, full: bool
) -> tuple[dict[int, Tensor], Tensor | None]:
    """Exits with a block of their own on a frozen trunk.

    Every exit block is called as the trunk's next block is: with the same hidden state, mask and rotary positions. The trunk runs as it
    will when the model writes, without dropout.

    Returns:
        depth -> (P, D) after block and norm, with gradients into the block alone; and the full depth's (P, D), where asked for.
    """
    blocks, owned = anatomy.blocks(model), exits_of(model)
    norm: nn.Module = anatomy.walk(anatomy.base_of(model), anatomy.anatomy_of(model).norm)
    calls: dict[int, tuple[Any, Any]] = {}

    def take(depth: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            calls[depth] = (args, kwargs)

        return hook

    if full:
        decoder: Any = anatomy.backbone(model)
    else:  # the block after the deepest exit is called, and nothing beyond
        run = range(depths[-1] + 1)
        decoder = views.backbone_of(model, [blocks[i] for i in run], run, embeds=True)
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(_at_rest(decoder))
        for n in depths:
            stack.callback(blocks[n].register_forward_pre_hook(take(n), with_kwargs=True).remove)
        output = decoder(**inputs_of(batch), use_cache=False).last_hidden_state
    raw = []
    for n in depths:
        args, kwargs = calls[n]
        hidden = _first(owned[n]["block"](*_as_float(args), **_as_float(kwargs)))
        raw.append(select(hidden).to(output.dtype))
    own = norm.forward
    normed = called_once(norm, lambda *hidden: tuple(own(one) for one in hidden), *raw)
    return dict(zip(depths, normed)), select(output) if full else None


@contextmanager
def _at_rest(module: nn.Module) -> Iterator[None]:
    """Every part in evaluation mode, and afterwards as it was."""
    training = [part for part in module.modules() if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True


def _as_float(value: Any) -> Any:
    """Floating tensors in float32, through tuples, lists and dicts: a block of float32 masters on a bfloat16 trunk."""
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, (tuple, list)):
        return type(value)(_as_float(one) for one in value)
    if isinstance(value, dict):
        return {name: _as_float(one) for name, one in value.items()}
    return value
