"""A head that is the embedding matrix, trained with it: the delta holds it once and opens again."""

from __future__ import annotations

import torch

import sparsmith as sm
from sparsmith.crafting.base_model import load_base
from sparsmith.recipe.schema import ModelSettings
from tests.kit.checkpoints import save_base
from tests.kit.pico import pico_ids


def test_a_trained_embedding_that_is_the_head_too(tmp_path):
    base = ModelSettings(path=str(save_base(tmp_path / "base", tie_word_embeddings=True)))
    model = sm.craft(load_base(base), sm.SoftConfig(exits=[1, 2]), inplace=True).eval()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
        wanted = model(pico_ids()).logits
    sm.save(model, tmp_path / "delta")
    again = sm.load(tmp_path / "delta").eval()
    with torch.no_grad():
        assert torch.equal(again(pico_ids()).logits, wanted)
