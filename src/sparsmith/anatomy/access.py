"""Reaching and replacing the parts of a live model, by its anatomy row. Works on a base and on a crafted wrapper (its `.base`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sparsmith.anatomy.rows import Anatomy, known_names, of
from sparsmith.errors import UnsupportedAnatomy

if TYPE_CHECKING:
    from torch import Tensor, nn


def _config(model: nn.Module) -> Any:
    config = getattr(model, "config", None)
    if config is None:
        raise UnsupportedAnatomy(
            type(model).__name__, "no attribute `config`", "a transformers model", "Pass a PreTrainedModel."
        )
    return config


def anatomy_of(model: nn.Module) -> Anatomy:
    """The row of a live model."""
    return of(_config(model))


def base_of(model: nn.Module) -> nn.Module:
    """The dense-shaped model inside a crafted wrapper; any other model itself."""
    return model.base if getattr(_config(model), "base_config", None) is not None else model  # type: ignore[return-value]


def walk(root: nn.Module, path: str) -> Any:
    """`root.a.b.c` for "a.b.c"; a missing step is an `UnsupportedAnatomy` that names the class and the attribute."""
    node: Any = root
    for step in path.split("."):
        if not hasattr(node, step):
            raise UnsupportedAnatomy(
                f"{type(root).__name__} at `{path}`",
                f"{type(node).__name__} without attribute `{step}`",
                f"`{path}`",
                "Register a row that fits this class with sparsmith.anatomy.register.",
            )
        node = getattr(node, step)
    return node


def blocks(model: nn.Module) -> nn.ModuleList:
    """The blocks, in order."""
    return walk(base_of(model), anatomy_of(model).blocks)


def _name_in(block: nn.Module, row: Anatomy | None, field: str) -> str:
    """The name under which a block holds a part: the row's, or without a row the first known one that the block has."""
    names = tuple(filter(None, (getattr(row, field),) if row else known_names(field)))
    if not names:
        raise UnsupportedAnatomy(
            type(block).__name__,
            f"no module that is the {field} alone",
            f"a block whose {field} is one module",
            "Reach its linears by the paths in `ModelShape.ffn_linears`, or take a family with such a module.",
        )
    return next((name for name in names if hasattr(block, name)), names[0])


def ffn_of(block: nn.Module, row: Anatomy | None = None) -> nn.Module:
    """The FFN of a block (the crafted one where the model is crafted)."""
    return walk(block, _name_in(block, row, "ffn"))


def attention_of(block: nn.Module, row: Anatomy | None = None) -> nn.Module:
    """The attention module of a block."""
    return walk(block, _name_in(block, row, "attention"))


def set_ffn(block: nn.Module, module: nn.Module, row: Anatomy | None = None) -> None:
    """Put `module` in the place of a block's FFN."""
    ffn_of(block, row)
    setattr(block, _name_in(block, row, "ffn"), module)


def ffns(model: nn.Module) -> list[tuple[int, str, nn.Module]]:
    """(number of the block, path from the base, FFN) of every block. Of an encoder-decoder the encoder's blocks are counted first."""
    row, base = anatomy_of(model), base_of(model)
    stacks = [(row.encoder_blocks, row.encoder_ffn)] if row.encoder_blocks else []
    found: list[tuple[int, str, nn.Module]] = []
    for home, ffn in (*stacks, (row.blocks, row.ffn)):
        for place, block in enumerate(walk(base, home)):
            found.append((len(found), f"{home}.{place}.{ffn}", walk(block, ffn)))
    return found


def backbone(model: nn.Module) -> nn.Module:
    """The model without its head: embeddings, blocks, final norm. Its output's `last_hidden_state` is what the head reads. Of an
    encoder-decoder the decoder."""
    return walk(base_of(model), anatomy_of(model).blocks.split(".")[0])


def head(model: nn.Module) -> nn.Module:
    """The language-model head."""
    return walk(base_of(model), anatomy_of(model).head)


def softcap(model: nn.Module) -> float | None:
    """Where the family bends logits (Gemma 2): cap * tanh(logits / cap)."""
    return getattr(base_of(model).config, "final_logit_softcapping", None)


def logits_of(model: nn.Module, hidden: Tensor) -> Tensor:
    """Logits of the backbone's output, as the model itself computes them (softcap and scale included)."""
    config: Any = base_of(model).config
    if anatomy_of(model).scaled_head and getattr(config, "scale_decoder_outputs", config.tie_word_embeddings):
        hidden = hidden * config.hidden_size**-0.5
    logits, cap = head(model)(hidden), softcap(model)
    return logits if cap is None else (logits / cap).tanh() * cap


def probe(model: nn.Module) -> Anatomy:
    """Check that every part is where the row says and that each FFN that is one module maps one (.., d) tensor to one. Returns the row."""
    import torch

    row, base = anatomy_of(model), base_of(model)
    hidden = int(_config(base).hidden_size)
    for path in filter(None, (row.norm, row.embeddings, row.positions)):
        walk(base, path)
    for index, block in enumerate(blocks(model)):
        walk(block, row.attention)
        if not row.ffn:
            for path in row.linears:
                walk(block, path)
            continue
        ffn = ffn_of(block, row)
        inside = (row.experts, row.router) if row.experts and hasattr(ffn, row.experts) else row.ffn_linears
        for name in inside:
            walk(getattr(ffn, "ffn", ffn), name)
        weight = next((p for p in ffn.parameters() if p.is_floating_point()), None)
        dtype = torch.float32 if weight is None else weight.dtype
        device = next(ffn.parameters()).device
        with torch.no_grad():
            out = ffn(torch.zeros(1, 2, hidden, dtype=dtype, device=device))
        if not isinstance(out, torch.Tensor) or out.shape != (1, 2, hidden):
            shown = tuple(out.shape) if isinstance(out, torch.Tensor) else type(out).__name__
            raise UnsupportedAnatomy(
                f"{type(ffn).__name__} of block {index}",
                f"an output {shown}",
                f"one tensor (1, 2, {hidden}) for an input (1, 2, {hidden})",
                "sparsmith can only work on FFNs that map one hidden state to one.",
            )
    return row
