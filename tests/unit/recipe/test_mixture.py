"""`data.mixture` in a recipe: its faults by name, all at once; paths, stages, dump."""

from __future__ import annotations

import pytest
import yaml

from sparsmith.errors import RecipeErrors
from sparsmith.methods import registry
from sparsmith.recipe import dump, load_recipe, load_text, with_absolute_paths
from tests.kit.tasks import mixture, write_tasks

METHODS = registry.config_classes()


def recipe(**data) -> dict:
    return {
        "model": {"path": "embedded"},
        "methods": [{"method": "pesc", "num_experts": 4, "top_k": 2, "adapter_dim": 16}],
        "data": {"mixture": mixture(), "max_length": 64, **data},
        "train": {"steps": 10},
        "output": "runs/test",
    }


@pytest.fixture
def home(tmp_path):
    write_tasks(tmp_path)
    return tmp_path


def opened(home, made, *overrides):
    (home / "recipe.yaml").write_text(yaml.safe_dump(made))
    return load_recipe(home / "recipe.yaml", overrides, METHODS)


def test_a_mixture_is_read_dumped_and_moved(home):
    (home / "own.yaml").write_text('patterns: [{input: "{question}", target: "{answer}"}]')
    made = recipe(mixture=mixture(tasks={"sums": {"templates": "own.yaml"}}))
    loaded = opened(home, made)
    assert [task.name for task in loaded.data.sources] == ["sums", "picks", "wishes"]
    assert [task.domain for task in loaded.data.sources] == ["maths", "general", "general"]
    assert load_text(dump(loaded), "dumped", (), METHODS, home) == loaded
    moved = with_absolute_paths(loaded, home).data.sources[0]
    assert moved.path == str(home / "sums.jsonl") and moved.templates == str(home / "own.yaml")


TASK, SUB = "data.mixture.submixtures.0.tasks.0", "data.mixture.submixtures.0"


@pytest.mark.parametrize(
    ("override", "key", "told"),
    [
        (f"{TASK}.templates=maths-rationnale", f"{TASK}.templates", "Did you mean `maths-rationale`"),
        (f"{TASK}.templates=none.yaml", f"{TASK}.templates", "no readable file"),
        (f"{TASK}.templats=x", f"{TASK}.templats", "`templates`"),
        (f"{TASK}.path=suns.jsonl", f"{TASK}.path", "`sums.jsonl`"),
        (f"{TASK}.name=picks", "data.mixture.submixtures.1.tasks.0.name", "a second time"),
        (f"{TASK}.rate=2", f"{TASK}.rate", "unknown key"),
        (f"{TASK}.options=[a, b]", f"{TASK}.options", "no effect"),
        (f"{TASK}.option_style=letters", f"{TASK}.option_style", "no effect"),
        (f"{TASK}.fixed={{nothing: x}}", f"{TASK}.fixed.nothing", "no effect"),
        (f"{TASK}.fixed={{options_: x}}", f"{TASK}.fixed.options_", "a field of a template"),
        (f"{TASK}.columns={{a.b: x}}", f"{TASK}.columns.a.b", "letters, digits"),
        (f"{TASK}.format=text", f"{TASK}.format", "a question and an answer"),
        (f"{TASK}.labels=[a, b]", f"{TASK}.labels", "no effect"),
        (f"{TASK}.variants={{zs_opt: 0}}", f"{TASK}.variants.zs_opt", "sum to 0"),
        (f"{SUB}.tasks=[]", f"{SUB}.tasks", "at least 1"),
        (f"{SUB}.rate=0", f"{SUB}.rate", "`maths`"),
        (f"{SUB}.rate=null", f"{SUB}.rate", "no rate of `maths`"),
        (f"{SUB}.name=general", "data.mixture.submixtures.1.name", "a second time"),
        ("data.mixture.submixtures=[]", "data.mixture.submixtures", "at least 1"),
        ("data.mixture.preset=flan2022", "data.mixture.preset", "no effect"),
        ("data.mixture.preset=flan2023", "data.mixture.preset", "`flan2022"),
        ("data.mixture.fewshot_max=0", "data.mixture.fewshot_max", "greater than 0"),
        ("data.mixture.max_input=100", "data.mixture.max_input", "no effect"),
        ("data.mixing=rates", "data.mixing", "no effect"),
        ("data.loss_on=all", "data.loss_on", "response"),
        ("data.mixture=null", "data.train", "a `mixture`"),
        ("data.train=[{name: a, domain: b, path: sums.jsonl}]", "data.mixture", "one of the two"),
    ],
)
def test_a_fault_is_named(home, override, key, told):
    with pytest.raises(RecipeErrors) as caught:
        opened(home, recipe(), override)
    fits = [fault for fault in caught.value.faults if fault.where.endswith(f": {key}") or f"{key}`" in fault.where]
    assert fits and told in str(fits[0]), caught.value


def test_held_out_rows_are_drawn_by_one_prompt(home):
    columns = {"prompt": "{question} {rationale}"}
    made = recipe(
        mixture=mixture(tasks={"sums": {"heldout": 0.2, "part": "train", "columns": columns}}),
        eval=[
            {"name": "e", "domain": "d", "path": "sums.jsonl", "heldout": 0.2, "part": "heldout",
             "columns": {"prompt": "question", "completion": "answer"}}
        ],
    )  # fmt: skip
    with pytest.raises(RecipeErrors, match=r"Give both sources the same `columns\.prompt`"):
        opened(home, made)
    columns["prompt"] = "question"
    opened(home, made)
    del columns["prompt"]
    with pytest.raises(RecipeErrors, match="no `prompt`"):
        opened(home, made)


def test_a_faulty_template_file_is_told_with_the_recipe(home):
    (home / "own.yaml").write_text('patterns:\n  - {input: "{a.__class__}", target: "{b}"}\n')
    made = recipe(mixture=mixture(tasks={name: {"templates": "own.yaml"} for name in ("sums", "wishes")}))
    with pytest.raises(RecipeErrors) as caught:
        opened(home, made, "train.stps=3")
    told = [str(fault) for fault in caught.value.faults]
    assert (
        len([line for line in told if line.startswith("own.yaml:2: patterns.0.input: found the field `{a.__class__}`")])
        == 1
    )
    assert any("train.stps" in line for line in told)


def test_a_classifier_takes_no_mixture(home):
    with pytest.raises(RecipeErrors, match="answered in words"):
        opened(home, recipe(), "model.task=seq_cls", "model.num_labels=2")


def test_a_stage_may_have_rows_in_place_of_the_mixture(home):
    made = recipe()
    methods = made.pop("methods")
    rows = [{"name": "a", "domain": "b", "path": "sums.jsonl"}]
    prune = [{"method": "soft"}]
    made["stages"] = [{"methods": prune, "data": {"train": rows}}, {"methods": methods}]
    loaded = opened(home, made)
    assert loaded.stages[0].data.mixture is None and loaded.stages[1].data.train == ()
    made["stages"][1]["data"] = {"train": rows}
    with pytest.raises(RecipeErrors, match=r"data\.mixture: found .* no effect"):
        opened(home, made)
