"""In bfloat16 a pass over several tokens rounds otherwise than one over each: what is written must still be the full model's choice to
within a small margin."""

from __future__ import annotations

import pytest
import torch

import sparsmith as sm
from tests.unit.inference.models import deep, padded, prompts_of

MARGIN = 0.05
"""Logits; these models' lie within +-3, where bfloat16 steps by 0.008 to 0.016."""


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3"])
@torch.no_grad()
def test_every_token_is_the_full_models_choice_within_a_margin(family: str, device: str):
    model = deep(family, agree=0.1).to(device, torch.bfloat16)
    ids, mask = padded(4)
    settings = {"exit": 2, "draft_len": 4, "bonus": True, "stop_confidence": 0.0}
    options = {"max_new_tokens": 24, "eos_token_id": None, "pad_token_id": 0, "attention_mask": mask.to(device)}
    out = sm.generate(model, ids.to(device), self_speculative=settings, **options)
    start, tokens, flips = ids.shape[1], 0, 0
    for row, prompt in enumerate(prompts_of(ids, mask)):
        text = torch.cat([prompt[0].to(device), out[row, start:]])
        logits = model(input_ids=text[None]).logits[0, len(prompt[0]) - 1 : -1].float()
        best, chosen = logits.amax(dim=-1), logits.gather(-1, out[row, start:, None]).squeeze(-1)
        assert (best - chosen).max() <= MARGIN
        assert logits.abs().max() < 3
        tokens, flips = tokens + len(best), flips + int((chosen < best).sum())
    assert flips / tokens < 0.1
