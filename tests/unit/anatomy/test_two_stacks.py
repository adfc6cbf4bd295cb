"""The shape of an encoder-decoder, told from its config, against built models."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig

from sparsmith import anatomy
from sparsmith.errors import UnsupportedAnatomy
from tests.kit.switching import switch_model, t5_model

CHANGES = {
    "as it is": {},
    "untied": {"tie_word_embeddings": False},
    "a bias": {"router_bias": True},
    "none asked for, one built": {"num_sparse_encoder_layers": 0},
    "all of the decoder": {"num_layers": 4, "num_sparse_encoder_layers": 2, "num_sparse_decoder_layers": 4},
    "wide heads": {"d_kv": 20},
    "dense": {"kind": "t5"},
    "dense and gated": {"kind": "t5", "feed_forward_proj": "gated-gelu"},
}


def built(kind="switch", **changes):
    return (t5_model if kind == "t5" else switch_model)(**changes)


@pytest.mark.parametrize("name", CHANGES)
def test_parameters_blocks_and_flops_are_those_of_the_built_model(name):
    model = built(**CHANGES[name])
    shape = anatomy.shape_of(anatomy.for_task(model.config, anatomy.SEQ2SEQ))
    assert shape.total_params == sum(p.numel() for p in model.parameters())
    sparse = tuple(index for index, _, ffn in anatomy.ffns(model) if hasattr(ffn, "experts"))
    assert (shape.sparse.blocks if shape.sparse else ()) == sparse
    assert all(model.get_submodule(path) is ffn for _, path, ffn in anatomy.ffns(model))
    model.set_attn_implementation("eager")  # a fused kernel hides its products from the counter
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        read, written = torch.full((1, 7), 5), torch.full((1, 5), 5)
        model(input_ids=read, decoder_input_ids=written, use_cache=False)
    assert shape.row_flops(7, 5) == counter.get_total_flops()
    assert shape.forward_flops(6) == shape.row_flops(6, 6) // 12


@pytest.mark.parametrize("kind", ["switch", "t5"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_two_stacks_by_hand_are_the_model(tied, kind):
    model = built(kind, tie_word_embeddings=tied)
    ids, fed = torch.tensor([[5, 6, 7, 0], [8, 9, 0, 0]]), torch.tensor([[0, 4], [0, 5]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    with torch.no_grad():
        hidden = anatomy.decode(model, fed, anatomy.encode(model, ids, mask), mask)
        wanted = model(input_ids=ids, attention_mask=mask, decoder_input_ids=fed).logits
        assert torch.equal(anatomy.logits_of(model, hidden), wanted)


def test_the_task_is_told_by_class_and_config():
    model = switch_model()
    assert anatomy.task_of(model) == anatomy.SEQ2SEQ
    assert anatomy.task_of(anatomy.for_task(model.config, "seq2seq")) == anatomy.SEQ2SEQ
    pictures = AutoConfig.for_model("gemma3_text", architectures=["Gemma3ForConditionalGeneration"])
    assert anatomy.task_of(pictures) == anatomy.CAUSAL_LM, "the ending alone does not make two stacks"


def test_the_wrong_task_is_refused_with_the_right_one():
    with pytest.raises(UnsupportedAnatomy, match=r"Set model\.task to seq2seq"):
        anatomy.require_task(switch_model().config, anatomy.CAUSAL_LM)
    with pytest.raises(UnsupportedAnatomy, match=r"Set model\.task to causal_lm.*switch_transformers"):
        anatomy.require_task(AutoConfig.for_model("llama"), anatomy.SEQ2SEQ)
