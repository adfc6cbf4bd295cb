import pytest
import torch

from sparsmith import anatomy
from sparsmith.errors import UnsupportedAnatomy
from tests.kit.pico import FAMILIES, LAYERS, pico_ids, pico_model


@pytest.mark.parametrize("family", FAMILIES)
def test_backbone_and_head_are_the_model(family):
    model, ids = pico_model(family), pico_ids()
    assert anatomy.probe(model) is anatomy.of(model.config)
    assert len(anatomy.blocks(model)) == LAYERS
    with torch.no_grad():
        hidden = anatomy.backbone(model)(input_ids=ids).last_hidden_state
        assert torch.equal(anatomy.logits_of(model, hidden), model(input_ids=ids).logits)


def test_softcap_is_applied():
    model = pico_model("gemma2", final_logit_softcapping=0.5)
    with torch.no_grad():
        logits = anatomy.logits_of(model, torch.randn(3, 64) * 100)
    assert anatomy.softcap(model) == 0.5 and logits.abs().max() <= 0.5


def test_a_missing_part_is_named_with_class_and_attribute():
    model = pico_model()
    del anatomy.blocks(model)[1].mlp
    with pytest.raises(UnsupportedAnatomy, match=r"LlamaDecoderLayer without attribute `mlp`"):
        anatomy.probe(model)


def test_an_ffn_that_maps_one_to_two_is_refused():
    class Two(torch.nn.Module):
        def __init__(self, ffn):
            super().__init__()
            self.ffn = ffn

        def forward(self, x):
            return self.ffn(x), None

    model = pico_model()
    block = anatomy.blocks(model)[0]
    anatomy.set_ffn(block, Two(anatomy.ffn_of(block)))
    with pytest.raises(UnsupportedAnatomy, match=r"Two of block 0.*tuple.*one tensor \(1, 2, 64\)"):
        anatomy.probe(model)


def test_a_thing_without_a_config_is_refused():
    with pytest.raises(UnsupportedAnatomy, match=r"Linear.*config"):
        anatomy.blocks(torch.nn.Linear(2, 2))
