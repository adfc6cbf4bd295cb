"""Good recipes, overrides, paths, and the way back to YAML."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sparsmith.errors import RecipeErrors
from sparsmith.methods import registry
from sparsmith.recipe import dump, is_hub_id, load_recipe, load_text, resolve, with_absolute_paths
from sparsmith.recipe.schema import Recipe
from tests.kit.recipes import GOOD, write

METHODS = registry.config_classes()


def load(text: str, *overrides: str) -> Recipe:
    return load_text(text, "r.yaml", overrides, METHODS, check_paths=False)


def test_a_good_recipe(tmp_path):
    recipe = load_recipe(write(tmp_path), (), METHODS)
    assert type(recipe) is Recipe
    assert recipe.methods[0] == METHODS["pesc"](
        num_experts=4, top_k=2, adapter_dim=16, lora={"r": 8, "targets": ("q_proj", "v_proj")}
    )
    assert recipe.train.learning_rate == 3e-3
    assert recipe.data.eval[1].options == ("yes", "no")


def test_overrides_reach_every_depth():
    recipe = load(
        GOOD,
        "train.steps=50",
        "methods.0.num_experts=8",
        "methods.0.lora.targets=all-linear",
        "data.train.1.rate=0.5",
        "proof={enabled: false}",
        "model.revision=null",
        "train.report_to=[trackio]",
        "data.template='### Q {prompt}'",
    )
    assert recipe.train.steps == 50
    assert (recipe.methods[0].num_experts, recipe.methods[0].lora.targets) == (8, "all-linear")
    assert recipe.data.train[1].rate == 0.5
    assert not recipe.proof.enabled
    assert recipe.train.report_to == ("trackio",)
    assert recipe.data.template == "### Q {prompt}"


def test_an_override_makes_the_group_that_is_not_there():
    text = GOOD.replace("proof: {moved_after: 5}\n", "")
    assert load(text, "proof.moved_after=3").proof.moved_after == 3


def test_a_run_without_proof_reads_its_own_recipe():
    recipe = load(GOOD.replace("proof: {moved_after: 5}", "proof: {enabled: false}"))
    assert load(dump(recipe)) == recipe
    assert (recipe.proof.looks_after, load(GOOD).proof.looks_after) == (None, 5)
    assert load(GOOD.replace("proof: {moved_after: 5}\n", "")).proof.looks_after == 20


def test_the_last_override_wins():
    assert load(GOOD, "train.steps=1", "train.steps=2").train.steps == 2


def test_paths_are_relative_to_the_recipe(tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base/config.json").write_text("{}")
    file = write(tmp_path, GOOD.replace("path: embedded", "path: ./base"))
    recipe = with_absolute_paths(load_recipe(file, (), METHODS), tmp_path)
    assert recipe.model.path == str(tmp_path.resolve() / "base")
    assert recipe.data.train[0].path == str(tmp_path.resolve() / "sums.jsonl")
    assert recipe.output == "runs/test"


def test_embedded_and_hub_ids_stay(tmp_path):
    file = write(tmp_path, GOOD.replace("path: embedded", "path: someone/model, revision: main"))
    assert with_absolute_paths(load_recipe(file, (), METHODS), tmp_path).model.path == "someone/model"
    assert with_absolute_paths(load(GOOD), tmp_path).model.path == "embedded"


def test_what_is_a_hub_id(tmp_path):
    (tmp_path / "owner").mkdir()
    assert is_hub_id("nobody/some-model.v2", tmp_path)
    for path in ("owner/name", "./a/b", "a/b/c", "a", "/a/b", "nobody/rows.jsonl", "nobody/rows.csv.gz", "~/a", ""):
        assert not is_hub_id(path, tmp_path), path


def test_resolve_knows_the_home_folder(tmp_path):
    assert resolve("~/x", tmp_path) == Path.home() / "x"
    assert resolve("~nobody-of-that-name/x", tmp_path) == tmp_path / "~nobody-of-that-name/x"


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("train.clip=null", "train.epochs=1.5", "train.steps=null"),
        ("data.template=yes", "data.template=1e5 {prompt}"),
        ("data.train.0.where={id:range: [1, 5], kind: [a, 'null', '1e3', 'true']}",),
        ("methods.0.layers=[0, 2]", "methods.0.router=dense", "methods.0.top_k=4", "train.learning_rate=1e-9"),
        ("output='é ü: #x'", "train.optimizer='0o17'", "model.path='007'"),
    ],
)
def test_dump_loads_back_equal(overrides):
    recipe = load(GOOD, *overrides)
    assert load(dump(recipe)) == recipe


def test_dump_says_everything_that_has_a_value():
    text = dump(load(GOOD))
    assert "weight_decay: 0.0" in text and "router_trainable: true" in text
    assert "epochs" not in text


def test_yaml_as_of_version_1_2():
    recipe = load(GOOD.replace('metrics: [loss, rank], options: ["yes", "no"]', "metrics: [rank], options: [yes, no]"))
    assert recipe.data.eval[1].options == ("yes", "no")


def test_text_with_a_byte_order_mark(tmp_path):
    file = write(tmp_path)
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n"))
    assert load_recipe(file, (), METHODS).train.steps == 10


def test_aliases_are_fine_within_reason():
    text = GOOD.replace(
        "columns: {prompt: question, completion: answer}", "columns: &c {prompt: question, completion: answer}"
    )
    text = text.replace("part: train}", "part: train, columns: *c}")
    assert load(text).data.train[1].columns == {"prompt": "question", "completion": "answer"}


def test_a_repetition_without_end_is_refused():
    bomb = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"{new}: &{new} [{', '.join(['*' + old] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi")
    )
    for text in (bomb, "a: &a [*a]", "a: " + "[" * 60 + "]" * 60, "a: " + "[" * 5000):
        with pytest.raises(RecipeErrors):
            load(text)


def test_the_shipped_schema_is_the_generated_one():
    import runpy

    tool = runpy.run_path(str(Path(__file__).resolve().parents[3] / "tools/write_schema.py"))
    assert tool["SCHEMA"].read_text(encoding="utf-8") == tool["schema_text"](), "run `make schema`"
    assert tool["TABLE"].read_text(encoding="utf-8") == tool["table_text"](), "run `make schema`"
    schema = json.loads(tool["schema_text"]())
    assert schema["additionalProperties"] is False
    assert schema["$defs"]["PescConfig"]["properties"]["num_experts"]["minimum"] == 2
