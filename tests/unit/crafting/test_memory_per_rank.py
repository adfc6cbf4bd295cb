"""Memory per rank against a naive count over the built model's tensors."""

from __future__ import annotations

import json

import pytest
import torch

import sparsmith as sm
from sparsmith import anatomy
from sparsmith.methods.base import LoraSettings
from tests.kit.pico import pico_config, pico_model

CONFIG = sm.PescConfig(num_experts=4, top_k=2, adapter_dim=8, lora=LoraSettings(r=4, dropout=0.0))


def planned(**options):
    return sm.plan(pico_config("llama"), CONFIG, max_length=32, micro_batch=16, batch_size=64, **options)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_gradients_and_state_equal_a_naive_count(dtype):
    model = sm.craft(pico_model("llama", dtype=getattr(torch, dtype)), CONFIG)
    held = sum(p.nbytes for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    block = sum(p.nbytes for p in anatomy.blocks(model)[0].parameters())
    head = anatomy.head(model).weight.nbytes
    final_norm = sum(p.nbytes for name, p in model.named_parameters() if name.endswith("model.norm.weight"))
    rows = planned(dtype=dtype).per_rank
    for count in (1, 8, 64):
        ddp, fsdp = rows["ddp"][count], rows["fsdp2"][count]
        assert ddp.weights == held and ddp.optimizer == 8 * trained
        assert ddp.gradients == 4 * trained * (1 if count == 1 else 2)
        if count == 1:
            assert fsdp == ddp
            continue
        # the plan spreads the final norm, which is no block's, over the blocks
        assert fsdp.weights == pytest.approx(held / count + 2 * block + head, abs=2 * final_norm)
        assert fsdp.gradients == pytest.approx(4 * trained / count + 4 * trained / 2, abs=1)
        assert fsdp.optimizer == pytest.approx(8 * trained / count, abs=1)


def test_qlora_is_ddp_over_an_nf4_base():
    whole, quantised = planned(dtype="bfloat16").per_rank["qlora"], planned(dtype="bfloat16", quant="nf4").per_rank
    assert whole == quantised["qlora"] == quantised["ddp"]
    shape = anatomy.shape_of(pico_config("llama"))
    linear = shape.layers * sum(i * o for i, o in shape.linears.values())
    saved = planned(dtype="bfloat16").per_rank["ddp"][8].weights - whole[8].weights
    assert saved == pytest.approx(linear * (2 - 4.127 / 8), rel=1e-3)
    # accelerate leaves 4-bit tensors whole on each rank
    assert quantised["fsdp2"][64].weights > linear * 4.12 / 8


def test_activations_are_those_of_a_ranks_own_rows():
    rows = planned().per_rank["ddp"]
    # 64 rows a step: 16 per forward on one GPU, 8 on each of 8, 1 on each of 64
    assert rows[1].activations == planned().memory.activations["expected"]
    assert rows[8].activations == rows[1].activations / 2
    assert rows[64].activations == rows[1].activations / 16
    assert rows[8].total == rows[8].weights + rows[8].gradients + rows[8].optimizer + rows[8].activations


def test_the_plan_tells_it_as_data_and_as_a_table():
    plan = planned()
    data = json.loads(json.dumps(plan.as_dict()))["memory_per_rank"]
    assert data["fsdp2"]["64"]["total"] == plan.per_rank["fsdp2"][64].total
    assert [list(data[layout]) for layout in ("ddp", "fsdp2", "qlora")] == [["1", "8", "64"]] * 3
    assert "QLoRA" in str(plan) and "64 GPUs" in str(plan)


def test_what_cannot_be_sharded_has_no_such_row():
    plan = sm.plan(pico_config(), sm.FineGatesConfig(target=0.8))
    assert set(plan.per_rank) == {"ddp", "qlora"} and any("not for FSDP2: `finegates`" in note for note in plan.notes)
    assert "fsdp2" in sm.plan(pico_config(), sm.PescConfig(num_experts=4, adapter_dim=16)).per_rank
