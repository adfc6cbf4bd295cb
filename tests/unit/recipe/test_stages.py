"""Recipes of several stages: what a stage takes from the top level, and every fault at its place in the file."""

from __future__ import annotations

import pytest
import yaml

from sparsmith.errors import RecipeErrors
from sparsmith.methods import registry
from sparsmith.recipe import Recipe, StagedRecipe, dump, load_text, with_absolute_paths
from tests.kit.recipes import GOOD

METHODS = registry.config_classes()
STAGED = """\
model: {path: embedded, dtype: bfloat16}
data:
  train:
    - {name: sums, domain: maths, path: sums.jsonl, heldout: 0.1, part: train}
  eval:
    - {name: held, domain: maths, path: sums.jsonl, heldout: 0.1, part: heldout}
  max_length: 64
train: {batch_size: 8, learning_rate: 3e-3, eval_every: 5}
output: runs/test
stages:
  - name: slim
    methods:
      - {method: soft}
    train: {steps: 10}
  - methods:
      - {method: pesc, num_experts: 4, adapter_dim: 16}
    data:
      train:
        - {name: shell, domain: code, path: shell.jsonl}
    train: {steps: 20, learning_rate: 1e-3, seed: 7}
    proof: {moved_after: 3}
"""


def load(text: str = STAGED, *overrides: str) -> StagedRecipe:
    loaded = load_text(text, "r.yaml", overrides, METHODS, check_paths=False)
    assert isinstance(loaded, StagedRecipe)
    return loaded


def faults(text: str = STAGED, *overrides: str) -> list[str]:
    with pytest.raises(RecipeErrors) as caught:
        load_text(text, "r.yaml", overrides, METHODS, check_paths=False)
    return [str(fault) for fault in caught.value.faults]


def test_a_stage_takes_what_it_leaves_out_from_the_top():
    recipe = load()
    slim, experts = recipe.stages
    assert (slim.name, experts.name) == ("slim", "pesc")
    assert [stage.train.steps for stage in recipe.stages] == [10, 20]
    assert [stage.train.learning_rate for stage in recipe.stages] == [3e-3, 1e-3]
    assert [stage.train.batch_size for stage in recipe.stages] == [8, 8]
    assert [stage.train.seed for stage in recipe.stages] == [42, 7]
    assert [stage.data.train[0].name for stage in recipe.stages] == ["sums", "shell"]
    assert [stage.data.eval[0].name for stage in recipe.stages] == ["held", "held"]
    assert [stage.data.max_length for stage in recipe.stages] == [64, 64]
    assert [stage.proof.moved_after for stage in recipe.stages] == [None, 3]
    own = recipe.recipe(1, recipe.model_at("/settled"), "/there")
    assert type(own) is Recipe and own.methods[0].num_experts == 4
    assert (own.model.path, own.model.dtype, own.output) == ("/settled", "bfloat16", "/there")


def test_a_stage_alone_is_the_recipe_that_it_says():
    """Merged by hand, the first stage loads as the same settings."""
    text = STAGED[: STAGED.index("stages:")] + "methods: [{method: soft}]\n"
    alone = load_text(text, "alone.yaml", ["train.steps=10"], METHODS, check_paths=False)
    assert load().recipe(0) == alone


def test_what_is_written_down_loads_back_equal():
    recipe = load()
    text = dump(recipe)
    assert load(text) == recipe
    assert set(yaml.safe_load(text)) == {"model", "stages", "output"}


def test_overrides_reach_a_stage():
    recipe = load(
        STAGED, "stages.1.train.steps=50", "stages.0.proof.moved_after=4", "train.batch_size=4", "stages.0.name=first"
    )
    assert [stage.train.steps for stage in recipe.stages] == [10, 50]
    assert [stage.train.batch_size for stage in recipe.stages] == [4, 4]
    assert recipe.stages[0].proof.moved_after == 4
    assert recipe.stages[0].name == "first"


def test_a_stage_may_take_back_a_key_of_the_top():
    text = STAGED.replace("batch_size: 8,", "batch_size: 8, steps: 10,").replace("    train: {steps: 10}\n", "")
    recipe = load(text, "stages.1.train.steps=null", "stages.1.train.epochs=1.0")
    assert [(stage.train.steps, stage.train.epochs) for stage in recipe.stages] == [(10, None), (None, 1.0)]


def test_paths_of_every_stage_become_absolute(tmp_path):
    for name in ("sums", "shell"):
        (tmp_path / f"{name}.jsonl").touch()
    recipe = with_absolute_paths(load(), tmp_path)
    paths = [source.path for stage in recipe.stages for source in (*stage.data.train, *stage.data.eval)]
    assert paths == [str(tmp_path.resolve() / f"{name}.jsonl") for name in ("sums", "sums", "shell", "sums")]


@pytest.mark.parametrize(
    ("old", "new", "where", "words"),
    [
        ("output: runs/test", "output: runs/test\nmethods: [{method: soft}]", "r.yaml:10: methods", "beside `stages`"),
        ("      - {method: soft}\n", "      []\n", "r.yaml:12: stages.0.methods", "at least 1 entries"),
        ("    methods:\n      - {method: soft}\n", "", "stages.0.methods", "nothing"),
        ("{method: soft}", "{method: sotf}", "r.yaml:13: stages.0.methods.0.method", "`soft`"),
        ("num_experts: 4", "num_expert: 4", "stages.1.methods.0.num_expert", "`num_experts`"),
        ("steps: 20", "stpes: 20", "r.yaml:20: stages.1.train.stpes", "`steps`"),
        ("steps: 20", "steps: many", "r.yaml:20: stages.1.train.steps", "a whole number"),
        ("batch_size: 8", "batch_szie: 8", "r.yaml:8: train.batch_szie", "`batch_size`"),
        ("max_length: 64", "max_length: 4", "r.yaml:7: data.max_length", "at least 8"),
        ("  - name: slim", "  - nmae: slim", "r.yaml:11: stages.0.nmae", "`name`"),
        ("  - name: slim", "  - name: ../slim", "r.yaml:11: stages.0.name", "letters"),
        ("output: runs/test", "output: runs/test\nstage: 3", "r.yaml:10: stage", "`stages`"),
        ("    train: {steps: 10}", "    train: 10", "r.yaml:14: stages.0.train", "a group of settings"),
        ("steps: 10}", "steps: 10, epochs: 1.0}", "r.yaml:14: stages.0.train.epochs", "both steps and epochs"),
        (
            "proof: {moved_after: 3}",
            "proof: {enabled: false, moved_after: 3}",
            "stages.1.proof.moved_after",
            "no effect",
        ),
        ("heldout: 0.1, part: heldout", "heldout: 0.2, part: heldout", "r.yaml:6: data.eval.0.heldout", "one share"),
        ("path: shell.jsonl", "path: sums.jsonl", "r.yaml:19: stages.1.data.train.0.heldout", "one share"),
    ],
)
def test_faults_name_their_place(old, new, where, words):
    assert old in STAGED
    text = STAGED.replace(old, new, 1)
    found = faults(text)
    assert any(where in fault and words in fault for fault in found), found


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_stages_are_no_stages(count):
    text = STAGED[: STAGED.index("stages:")]
    text += "stages: [{methods: [{method: soft}], train: {steps: 1}}]\n" if count else "stages: []\n"
    found = faults(text)
    assert any("r.yaml:10: stages" in fault and "at least 2 entries" in fault for fault in found), found


@pytest.mark.parametrize("value", ["3", "null", "{a: 1}", "[3, 4]"])
def test_stages_that_are_no_list_of_groups(value):
    found = faults(STAGED[: STAGED.index("stages:")] + f"stages: {value}\n")
    assert any(": stages" in fault for fault in found), found


def test_all_faults_at_once_and_each_once():
    text = STAGED.replace("max_length: 64", "max_lenght: 64").replace("steps: 10}", "stpes: 10}")
    text = text.replace("adapter_dim: 16", "adapter_dim: 20").replace("embedded", "embeded")
    found = faults(text, "stages.1.train.clip=-1")
    places = [fault.split(": found")[0] for fault in found]
    assert len(set(places)) == len(places)
    for wanted in ("data.max_lenght", "stages.0.train.stpes", "stages.1.methods.0.adapter_dim", "stages.1.train.clip"):
        assert any(place.endswith(wanted) for place in places), places


def test_settings_of_the_top_that_every_stage_has_for_itself():
    found = faults(STAGED, "train.steps=5")
    assert len(found) == 1 and "train.steps" in found[0] and "every stage has its own" in found[0]
    text = STAGED.replace("train: {batch_size: 8, learning_rate: 3e-3, eval_every: 5}", "train: {steps: 3}")
    found = faults(text)
    assert len(found) == 1 and found[0].startswith("r.yaml:8: train: found `train`, which has no effect")


def test_a_recipe_of_one_stage_is_what_it_was():
    assert type(load_text(GOOD, "r.yaml", (), METHODS, check_paths=False)) is Recipe
    with pytest.raises(RecipeErrors) as caught:
        load_text("model: {path: embedded}\noutput: x\n", "r.yaml", (), METHODS, check_paths=False)
    assert {"methods", "data", "train"} <= {fault.where.rsplit(" ", 1)[-1] for fault in caught.value.faults}
