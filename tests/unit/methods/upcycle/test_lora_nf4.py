"""A mixture over an NF4 base: attention in 4 bits, experts as they are, and only where that was asked for (spec F13, test 10)."""

from __future__ import annotations

import copy

import pytest
import torch

import sparsmith as sm
from sparsmith.anatomy.four_bit import quantised_linears
from sparsmith.crafting import settle as settling
from sparsmith.crafting.base_model import load_base
from sparsmith.crafting.settle import settle_report
from sparsmith.errors import MethodError, RefusedDonor
from sparsmith.methods.upcycle.layers import sparse_blocks
from sparsmith.recipe.schema import ModelSettings
from sparsmith.training.objective import Objective
from tests.kit.depths import deep_model, labelled_batch
from tests.kit.pico import pico_model
from tests.unit.methods.upcycle.test_lora import as_trained, logits, mixture

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # bitsandbytes on a CPU
SETTINGS = {"donor": "sparse", "tune": "lora", "lora": {"r": 4, "alpha": 4, "dropout": 0.0}}
# linears in 4 bits: four of every attention, three of a dense FFN and of a shared expert
BASES = {"mixtral": 16, "qwen2_moe, every second": 16 + 2 * 3, "a shared expert": 12 + 3 + 2 * 3}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    pytest.importorskip("bitsandbytes")
    folder = tmp_path_factory.mktemp("mixtures")
    mixtral = sm.settle(sm.craft(deep_model(), sm.UpcycleConfig(experts=4)))
    second = sm.settle(sm.craft(deep_model("qwen2"), sm.UpcycleConfig(experts=4, layers="every-2")))
    for name, model in zip(BASES, (mixtral, second, mixture()), strict=True):
        sm.save(model, folder / name, full=True) if name != "a shared expert" else model.save_pretrained(folder / name)
    return folder


def opened(folder, dtype="bfloat16"):
    return load_base(ModelSettings(path=str(folder), quant="nf4", dtype=dtype))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", BASES)
def test_attention_is_packed_and_experts_are_not(folders, name, dtype, tmp_path):
    base, config = opened(folders / name, dtype), sm.UpcycleConfig(**SETTINGS, allow_16bit_experts=True)
    assert len(quantised_linears(base)) == BASES[name] and torch.isfinite(logits(base)).all()
    plan, crafted = sm.plan(base.config, config, dtype=dtype, quant="nf4"), sm.craft(base, config)
    resident = sum(t.numel() * t.element_size() for t in crafted.parameters())
    assert plan.memory.weights == pytest.approx(resident, rel=0.01)
    held = sum(p.numel() for _, ffn in sparse_blocks(base) for p in ffn.experts.parameters())
    assert any(f"{2 * held:,} bytes of them in 16 bits" in note for note in plan.notes)
    for _, ffn in sparse_blocks(crafted):
        assert ffn.gate.weight.dtype == torch.float32 == next(p for n, p in ffn.named_parameters() if "lora" in n).dtype
        experts = ffn.experts.get_base_layer()
        assert experts.gate_up_proj.dtype == experts.down_proj.dtype == getattr(torch, dtype)
    Objective(crafted.train())(**labelled_batch())["loss"].backward()
    trained = [p for p in crafted.parameters() if p.requires_grad]
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in trained)
    assert sum(p.numel() for p in trained) == plan.trained_params
    crafted.zero_grad()

    as_trained(crafted)
    sm.save(crafted, tmp_path / "delta")
    assert torch.equal(logits(sm.load(tmp_path / "delta")), logits(crafted))
    reference = copy.deepcopy(crafted)
    settling.dequantise(reference, getattr(torch, dtype))
    unmerged, merged = logits(reference), sm.settle(crafted)
    assert settle_report(merged).dequantised == BASES[name] and not quantised_linears(merged)
    assert (logits(merged).float() - unmerged.float()).abs().max() <= (1e-4 if dtype == "float32" else 0.03)
    if name == "mixtral" and dtype == "bfloat16":
        sm.export(merged, tmp_path / "exported")  # opened in a clean process, and compared


def test_nf4_is_refused_unless_it_is_allowed(folders):
    with pytest.raises(MethodError, match="allow_16bit_experts"):
        sm.craft(opened(folders / "mixtral"), sm.UpcycleConfig(**SETTINGS))


def test_a_dense_donor_in_nf4_is_refused(tmp_path):
    pico_model().save_pretrained(tmp_path / "base")
    for settings in ({}, {"tune": "lora"}):
        with pytest.raises(RefusedDonor, match="a quantised donor"):
            sm.craft(opened(tmp_path / "base"), sm.UpcycleConfig(**settings))


def test_full_tuning_over_nf4_is_refused(folders):
    with pytest.raises(MethodError, match="plain weights"):
        sm.craft(opened(folders / "mixtral"), sm.UpcycleConfig(donor="sparse"))
