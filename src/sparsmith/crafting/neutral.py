"""Proof 1: crafting leaves the function unchanged, seen on a probe batch.

The probe is a fixed batch of token ids drawn from a named stream: two rows, the second shorter and padded, so that masks are used. A
classifier gives few numbers for a row, and has more rows. An encoder-decoder reads the probe, and is fed other ids of the same stream.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sparsmith import anatomy
from sparsmith.errors import ProofError
from sparsmith.seeds import torch_generator

PROBE_LENGTH = 24
PROBE_PADDING = 7
CLASSIFIER_ROWS = 8
TOLERANCE = 1e-6  # rounding of float32 (promise 10), where a method's algebra does not allow bitwise equality
_HALF = {torch.bfloat16: 6e-2, torch.float16: 1e-2}  # as merging into these types is held to


def probe_batch(model: Any, seed: int) -> dict[str, torch.Tensor] | None:
    """Token ids (2, 24) and their mask, on the model's device; None for a model without storage (meta device). Of a classifier (8, 24),
    every second row padded."""
    parameter = next(model.parameters())
    if parameter.device.type == "meta":
        return None
    vocab = model.get_input_embeddings().weight.shape[0]
    classifies = anatomy.task_of(model) == anatomy.SEQ_CLS
    rows = CLASSIFIER_ROWS if classifies else 2
    stream = torch_generator(seed, "proof.probe")
    ids = torch.randint(0, vocab, (rows, PROBE_LENGTH), generator=stream)
    mask = torch.ones_like(ids)
    mask[1::2, PROBE_LENGTH - PROBE_PADDING :] = 0
    padding = getattr(model.config, "pad_token_id", None)
    if classifies and padding is not None:  # where the class is read is told by the padding token
        ids = torch.where(ids == padding, (padding + 1) % vocab, ids).masked_fill(mask == 0, padding)
    batch = {"input_ids": ids, "attention_mask": mask}
    if anatomy.task_of(model) == anatomy.SEQ2SEQ:
        batch["decoder_input_ids"] = torch.randint(0, vocab, (rows, PROBE_LENGTH), generator=stream)
    return {name: tensor.to(parameter.device) for name, tensor in batch.items()}


@torch.no_grad()
def probe_logits(model: nn.Module, seed: int) -> torch.Tensor | None:
    """Logits (2, 24, V) of the probe in evaluation mode; of a classifier (8, classes)."""
    batch = probe_batch(model, seed)
    if batch is None:
        return None
    was_training = model.training
    model.eval()
    try:
        return model(**batch, use_cache=False).logits
    finally:
        model.train(was_training)


def compare_probe(
    model: nn.Module, before: torch.Tensor, seed: int, *, limit: float = TOLERANCE, shifts: str = ""
) -> dict[str, Any]:
    """The proof's figures; raises where the crafted model differs by more than rounding.

    Args:
        limit: of the largest logit. shifts: why the function changes on purpose; the difference is then told and not judged.

    Raises:
        ProofError: names the largest difference.
    """
    after = probe_logits(model, seed)
    assert after is not None
    difference = (after.float() - before.float()).abs().max().item()
    scale = before.float().abs().max().item()
    bitwise = torch.equal(after, before)
    if shifts:
        check = f"the logits move, as asked for by {shifts}"
        return {"check": check, "bitwise": bitwise, "value": difference, "limit": None, "passed": True}
    if limit > TOLERANCE:  # sums in another order: of half types they differ by units of a far larger last place
        limit = max(limit, _HALF.get(before.dtype, 0.0))
    if not bitwise and not difference <= limit * max(scale, 1.0):
        raise ProofError(
            "craft",
            f"logits that differ from the base by {difference:.3e}",
            f"the same function (at most {limit:g} of the largest logit)",
            "This is a fault of the method or of the model's family; please report it.",
        )
    return {
        "check": "craft leaves the logits unchanged",
        "bitwise": bitwise,
        "value": difference,
        "limit": 0.0 if bitwise else limit,
        "passed": True,
    }
