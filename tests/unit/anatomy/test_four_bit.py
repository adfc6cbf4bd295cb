"""4-bit linears stay what was read, whatever kernels the CPU has."""

from __future__ import annotations

import pytest
import torch

import sparsmith as sm
from sparsmith.anatomy.four_bit import hold_as_read, quantised_linears
from sparsmith.crafting.base_model import load_base
from sparsmith.errors import MethodError
from sparsmith.recipe.schema import ModelSettings
from tests.kit.checkpoints import save_base
from tests.kit.pico import pico_ids

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # bitsandbytes on a CPU


def opened(folder):
    pytest.importorskip("bitsandbytes")
    return load_base(ModelSettings(path=str(folder), quant="nf4"))


def test_a_forward_changes_no_weight(tmp_path):
    """Also where the CPU has AVX512-BF16, by which the library would lay the weights out anew."""
    model = opened(save_base(tmp_path / "base"))
    for _, linear in quantised_linears(model):
        assert not linear.support_avx512bf16_for_cpu
    before = [linear.weight.data.clone() for _, linear in quantised_linears(model)]
    assert len(before) == 14
    with torch.no_grad():
        first, second = (model.eval()(pico_ids()).logits for _ in range(2))
    assert torch.equal(first, second) and torch.isfinite(first).all()
    held = [linear.weight.data for _, linear in quantised_linears(model)]
    assert all(torch.equal(now, then) for now, then in zip(held, before, strict=True))
    trained = model.train()(pico_ids()).logits
    assert torch.equal(trained, first), "what is trained is what is measured"


def test_weights_that_were_laid_out_anew_are_refused(tmp_path):
    model = opened(save_base(tmp_path / "base"))
    name, linear = quantised_linears(model)[0]
    linear.weight.quant_state.packing_format_for_cpu = True  # what such a forward leaves
    with pytest.raises(MethodError, match=f"{name}.*laid out anew"):
        hold_as_read(model)
    with pytest.raises(MethodError, match="before its first forward"):
        sm.craft(model, sm.PescConfig(num_experts=2, top_k=1, adapter_dim=8))
