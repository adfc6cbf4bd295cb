"""Settings of SoFT: presets, and what they cost."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel
from pydantic import ValidationError
from safetensors.torch import load_file, safe_open, save_file
from transformers import AutoModelForCausalLM

import sparsmith as sm
from sparsmith import anatomy, durable
from sparsmith.crafting.slices import at_depth
from sparsmith.errors import MethodError
from sparsmith.methods.base import Batch
from sparsmith.methods.soft.config import PRESETS
from sparsmith.methods.soft.forward import labelled, tail_states
from sparsmith.recipe.schema import ModelSettings
from sparsmith.training import Objective
from tests.kit.checkpoints import DELTA, IDENTITY, edit_json, save_base
from tests.kit.pico import pico_config, pico_ids, pico_model

EXITS = (1, 3, 4)


def config(**settings):
    return sm.SoftConfig(exits=EXITS, **settings)


def test_a_preset_stands_for_its_settings_and_gives_way_to_those_beside_it():
    kept = config(preset="keep_full")
    assert kept.trunk == "frozen" and kept.kl is not None and kept.kl.weight == 0.5
    assert config(preset="keep_full", kl={"weight": 0.9}).kl.weight == 0.9
    assert sm.SoftConfig(**kept.model_dump()) == kept
    plain = config(preset="paper").model_dump()
    assert {**plain, "preset": None} == config().model_dump() and set(PRESETS) == {"paper", "keep_full"}


@pytest.mark.parametrize("wrong", ["papers", ["paper"], 3])
def test_no_such_preset(wrong):
    with pytest.raises(ValidationError):
        config(preset=wrong)


def test_no_gradient_passes_through_a_frozen_trunk():
    """Training FLOPs per token by hand: the trunk forward alone, what was added three times."""
    base = pico_config(num_hidden_layers=4)
    flops = sm.plan(base, config(trunk="frozen")).flops
    heads = 2 * 2 * base.vocab_size * base.hidden_size
    exits = 2 * sm.plan(base, config(trunk="frozen")).trained["exit_block"]
    assert flops.training == flops.base_forward + 3 * (heads + exits) and flops.forward == flops.base_forward
    whole = sm.plan(base, config()).flops
    assert whole.training == 3 * whole.base_forward + 3 * heads and whole.forward == whole.base_forward
    low_rank = sm.plan(base, config(tune="lora"))
    assert low_rank.flops.training == 2 * whole.base_forward + 3 * heads + 6 * low_rank.trained["lora"]


def test_a_change_of_attention_reaches_the_exits_own_blocks():
    model = sm.craft(pico_model(num_hidden_layers=4), config(trunk="frozen"), inplace=True, proof=False)
    model.set_attn_implementation("sdpa")
    kinds = {m.config._attn_implementation for m in model.modules() if getattr(m, "config", None) is not None}
    assert kinds == {"sdpa"}


def test_an_exit_of_weight_nothing_is_refused():
    """LayerSkip's weights give 0 to an exit behind the first block."""
    with pytest.raises(MethodError, match=r"`sum_l`, which gives exit 1 the weight 0"):
        sm.craft(pico_model(num_hidden_layers=4), config(weights="sum_l"))
    sm.craft(pico_model(num_hidden_layers=4), sm.SoftConfig(exits=(2, 4), weights="sum_l"), proof=False)


@pytest.mark.parametrize("settings", [{"weights": "linear"}, {"schedule": "sandwich"}, {"kl": {}}])
def test_settings_of_exits_are_refused_where_there_is_none(settings):
    with pytest.raises(MethodError, match=rf"soft.{next(iter(settings))}: .*full depth 4 as the only exit"):
        sm.craft(pico_model(num_hidden_layers=4), sm.SoftConfig(exits=(4,), **settings))


@pytest.mark.parametrize("settings", [{"trunk": "frozen", "kl": {}}, {"arm": "ict"}, {"tune": "lora", "head": "train"}])
def test_a_bfloat16_base_is_tuned_and_read_out(settings):
    """What trains is held in float32; read out, it is what settling makes of it."""
    model = sm.craft(pico_model(num_hidden_layers=4, dtype=torch.bfloat16), config(**settings), inplace=True)
    ids, objective = pico_ids(), Objective(model)
    labels = ids.clone()
    labels[:, :4] = -100
    objective(ids, labels)["loss"].backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(parameter.grad, alpha=-0.1)
    live = at_depth(model.eval(), 3)(ids).logits
    settled = at_depth(sm.settle(model), 3)(ids).logits
    assert live.dtype == torch.bfloat16
    assert torch.equal(live, settled) or settings.get("tune") == "lora"  # a merged LoRA is rounded with its weight
    assert (live - settled).abs().max() < 0.1


def test_a_delta_without_a_key_that_came_later_opens(tmp_path):
    """The key's default is what the older version did."""
    base = save_base(tmp_path / "base", num_hidden_layers=4)
    model = sm.craft(sm.load_base(ModelSettings(path=str(base))), config(), inplace=True, proof=False)
    folder = sm.save(model, tmp_path / "delta")
    edit_json(folder / IDENTITY, lambda data: data["configs"][0].pop("preset"))
    with safe_open(folder / DELTA, "pt") as file:
        header = json.loads(file.metadata()["sparsmith"])
    header["configs"][0].pop("preset")
    save_file(load_file(folder / DELTA), folder / DELTA, {"sparsmith": json.dumps(header, sort_keys=True)})
    durable.seal(folder)
    opened = sm.load(folder)
    assert all(torch.equal(a, b) for a, b in zip(opened.parameters(), model.parameters(), strict=True))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks transformers by an old name
@pytest.mark.parametrize("train_norm", [True, False])
def test_peft_opens_a_delta_only_where_it_would_see_all_of_it(tmp_path, train_norm):
    base = save_base(tmp_path / "base", num_hidden_layers=4)
    settings = config(tune="lora", lora={"r": 4, "dropout": 0.0}, train_norm=train_norm)
    model = sm.craft(sm.load_base(ModelSettings(path=str(base))), settings, inplace=True, proof=False)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    folder, wanted = sm.save(model, tmp_path / "delta"), model.eval()(pico_ids()).logits
    assert torch.equal(sm.load(folder)(pico_ids()).logits, wanted)
    if train_norm:
        with pytest.raises(ValueError, match="adapter_config"):
            PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
    else:
        opened = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
        assert (opened.eval()(pico_ids()).logits - wanted).abs().max() < 1e-5


def test_a_frozen_trunk_runs_without_its_dropout():
    model = sm.craft(
        pico_model("gpt2", n_layer=4, resid_pdrop=0.5, embd_pdrop=0.5), config(trunk="frozen"), inplace=True
    )
    batch = Batch(pico_ids(), pico_ids(), torch.ones_like(pico_ids(), dtype=torch.bool))
    select, _ = labelled(batch)
    flags = [module.training for module in model.train().modules()]
    _, full = tail_states(model, batch, [1, 3], select, True)
    assert [module.training for module in model.modules()] == flags and all(flags)
    assert torch.equal(full, select(anatomy.backbone(model.eval())(pico_ids()).last_hidden_state))
