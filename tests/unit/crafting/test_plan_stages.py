"""The plan of several stages: from configs alone, each on what the one before leaves; what cannot be followed is told by name."""

from __future__ import annotations

import json

import pytest

import sparsmith as sm
from sparsmith import anatomy
from sparsmith.cli import main
from sparsmith.crafting.apply import craft
from sparsmith.crafting.plan_stages import StagesPlan, plan_stages
from sparsmith.errors import MethodError
from sparsmith.methods import registry
from sparsmith.methods.base import LoraSettings
from sparsmith.methods.finegates.config import FineGatesConfig, GateSettings, SettleSettings
from tests.kit.fifth import SHIFT, ShiftConfig
from tests.kit.pico import pico_config, pico_model
from tests.kit.staged_run import STEPS, staged_recipe

LORA = LoraSettings(r=4)
DENSE = {
    "dense LoRA": sm.PescConfig(control="dense_lora", lora=LORA),
    "equal LoRA": sm.PescConfig(control="equal_lora", num_experts=4, adapter_dim=8, lora=LORA),
    "exits": sm.SoftConfig(exits=(1, 2)),
    "exits, LoRA": sm.SoftConfig(exits=(1, 2), tune="lora", lora=LORA),
    "exits, a head of its own": sm.SoftConfig(exits=(1, 2), tune="lora", lora=LORA, head="train", untie=True),
    "cut FFN": FineGatesConfig(target=0.7, gates=GateSettings(attention="none")),
    "cut by magnitude": FineGatesConfig(target=0.7, gates=GateSettings(attention="none"), baseline="magnitude"),
}


@pytest.mark.parametrize("name", DENSE)
def test_the_settled_config_is_that_of_the_settled_model(name):
    config = DENSE[name]
    changes = {"tie_word_embeddings": True} if getattr(config, "untie", False) else {}
    base = pico_config("llama", **changes)
    before = base.to_dict()
    found = registry.of(config).settled_config(config, base)
    settled = sm.settle(craft(pico_model("llama", **changes), config, inplace=True))
    assert anatomy.shape_of(found) == anatomy.shape_of(settled.config)
    assert base.to_dict() == before, "the base's config is left as it is"


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (sm.PescConfig(num_experts=4, adapter_dim=8), "experts"),
        (sm.PescConfig(control="single_adapter", adapter_dim=8), "experts"),
        (sm.SoftConfig(exits=(1, 2), trunk="frozen"), "frozen trunk"),
        (FineGatesConfig(settle=SettleSettings(scope="global")), "layers may differ"),
    ],
)
def test_what_leaves_no_dense_model_says_so(config, words):
    with pytest.raises(MethodError, match=words):
        registry.of(config).settled_config(config, pico_config("llama"))


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return staged_recipe(tmp_path_factory.mktemp("staged"))


def test_every_stage_and_the_total(recipe):
    loaded = sm.load_recipe(recipe)
    plan = sm.plan(loaded)
    assert isinstance(plan, StagesPlan)
    first, second = (stage.plan for stage in plan.stages)
    assert [stage.name for stage in plan.stages] == ["1-first", "2-pesc"]
    assert second.base_params == first.total_params and second.total_params > second.base_params
    assert [note for note in second.notes if "1-first" in note] == [], "nothing here is an expectation"
    told = plan.as_dict()
    assert told["total"]["disk"] == sum(stage.disk for stage in plan.stages)
    assert told["total"]["trained"] == first.trained_params + second.trained_params
    flops = [stage.plan.flops.training * steps * 4 * 64 for stage, steps in zip(plan.stages, STEPS)]
    assert told["total"]["training_flops"] == sum(flops)
    text = str(plan)
    assert text.index("Stage 1-first") < text.index("Stage 2-pesc") < text.index("Total")
    assert "the settled result of 1-first" in text


def test_plan_on_the_command_line(recipe, capsys):
    assert main(["plan", str(recipe), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [stage["name"] for stage in told["stages"]] == ["1-first", "2-pesc"]
    assert main(["plan", str(recipe), "stages.1.train.steps=50"]) == 0
    assert "Total" in capsys.readouterr().out


def test_experts_cannot_be_followed(recipe, capsys):
    swapped = "stages.0.methods.0={method: pesc, num_experts: 4, adapter_dim: 8}"
    assert main(["plan", str(recipe), swapped]) != 0
    said = capsys.readouterr().err
    assert "stages.0.methods: pesc" in said and "last stage" in said
    folder = recipe.parent / "refused"
    assert main(["tune", str(recipe), swapped, f"output={folder}"]) != 0
    assert not folder.exists(), "refused before anything is written"


class _Learned(type(SHIFT)):
    name = "learned"
    config_class = type("LearnedConfig", (ShiftConfig,), {"__annotations__": {"method": str}, "method": "learned"})

    def settled_config(self, config, base_config):
        return pico_config("llama", intermediate_size=base_config.intermediate_size // 2)

    def settled_note(self, config):
        return "widths are learned: half is expected"


def test_a_width_that_is_learned_is_an_expectation(recipe):
    loaded = sm.load_recipe(recipe)
    learned = registry.register(_Learned())
    try:
        first = loaded.stages[0].model_copy(update={"methods": (learned.config_class(),)})
        plan = plan_stages(loaded.model_copy(update={"stages": (first, loaded.stages[1])}))
    finally:
        registry.unregister("learned")
    assert [stage.exact for stage in plan.stages] == [False, True]
    assert plan.stages[1].plan.base_params < plan.stages[0].plan.base_params
    assert "after 1-first: widths are learned: half is expected" in plan.stages[1].plan.notes


def test_a_recipe_or_a_base_with_its_config():
    with pytest.raises(MethodError, match="without a method's config"):
        sm.plan(pico_config("llama"))
    assert sm.plan(pico_config("llama"), DENSE["exits"]).base_params > 0
