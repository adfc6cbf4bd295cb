"""Every fault of a recipe at once, each with file, line, key, what was found and how to mend it."""

from __future__ import annotations

import json

import pytest

from sparsmith.errors import RecipeError, RecipeErrors
from sparsmith.methods import registry
from sparsmith.recipe import load_recipe, load_text
from tests.kit.recipes import GOOD, SPOILT, write

METHODS = registry.config_classes()


def faults(text: str, *overrides: str, folder=None) -> list[RecipeError]:
    with pytest.raises(RecipeErrors) as caught:
        load_text(text, "r.yaml", overrides, METHODS, folder, check_paths=folder is not None)
    return caught.value.faults


def line_of(text: str, part: str) -> int:
    return text[: text.index(part)].count("\n") + 1


@pytest.mark.parametrize(("old", "new", "key", "words"), SPOILT, ids=[f"{k} {w}" for _, _, k, w in SPOILT])
def test_each_fault_is_named(old, new, key, words):
    assert GOOD.count(old) >= 1
    text = GOOD.replace(old, new, 1)
    named = [fault for fault in faults(text) if fault.where.split(": ")[-1] == key]
    assert named, [str(fault) for fault in faults(text)]
    assert words in str(named[0])
    file, line, _ = named[0].where.split(":", 2)
    assert file == "r.yaml"
    assert 1 <= int(line) <= text.count("\n")
    assert "\n" not in str(named[0])


def test_the_line_is_the_key_s_own():
    text = GOOD.replace("micro_batch_size: 4", "micro_batch_size: nine")
    assert faults(text)[0].where == f"r.yaml:{line_of(text, 'micro_batch_size')}: train.micro_batch_size"


def test_all_faults_at_once():
    text = (
        GOOD.replace("steps: 10", "stpes: 10")
        .replace("name: facts", "name: shell")
        .replace("method: pesc", "method: x")
    )
    text = text.replace("heldout: 0.1, part: train", "heldout: 0.3, part: train").replace(
        "max_length: 64", "max_length: x"
    )
    keys = {fault.where.split(": ")[-1] for fault in faults(text, "train.sed=3", "data.train.7.rate=1", "nothing")}
    assert keys >= {
        "train.stpes",
        "data.eval.1.name",
        "methods.0.method",
        "data.eval.0.heldout",
        "data.max_length",
        "train.sed",
        "data.train.7",
    }


def test_one_fault_is_told_once():
    assert len(faults(GOOD.replace("num_experts: 4", "num_experts: x"))) == 1
    assert len(faults(GOOD.replace("targets: [q_proj, v_proj]", "targets: [q_proj, 3]"))) == 1


@pytest.mark.parametrize(
    ("override", "key", "words"),
    [
        ("train.stesp=3", "train.stesp", "`steps`"),
        ("trian.steps=3", "trian", "`train`"),
        ("methods.0.topk=1", "methods.0.topk", "`top_k`"),
        ("methods.1.top_k=1", "methods.1", "from 0 to 0"),
        ("methods.x.top_k=1", "methods.x", "index"),
        ("train.0=1", "train.0", "name"),
        ("train.steps.more=1", "train.steps", "single value"),
        ("train.steps", "command line `train.steps`", "key=value"),
        ("=3", "command line `=3`", "key=value"),
        ("train..steps=3", "command line `train..steps=3`", "key=value"),
        ("train.steps=[1", "command line `train.steps=[1`", "expected"),
        ("train.steps=!!int x", "command line `train.steps=!!int x`", "plain value"),
        ("train.steps=", "train.steps", "neither"),
        ("train.steps=#3", "train.steps", "comment"),
        ("output=a #b", "output", "comment"),
        ("train.steps=-1", "train.steps", "greater than 0"),
    ],
)
def test_faults_of_overrides(override, key, words):
    found = faults(GOOD, override)
    assert any(
        fault.where.endswith(key) and "command line" in fault.where and words in str(fault) for fault in found
    ), [str(fault) for fault in found]


@pytest.mark.parametrize(
    "text", ["", "# nothing", "3", "[a]", "a: b: c", "a: [", "\ta: 1", "a: 1\n--- \nb: 2", "a: \x07", "@", "*x", "{a"]
)
def test_files_that_are_no_recipe(text):
    for fault in faults(text):
        assert fault.where.startswith("r.yaml:")


def test_bytes_that_are_no_text(tmp_path):
    file = write(tmp_path)
    file.write_bytes(b"model: {}\n# \xff\n")
    with pytest.raises(RecipeErrors) as caught:
        load_recipe(file, (), METHODS)
    assert caught.value.where == f"{file}:2"


@pytest.mark.parametrize("path", ["nothing.yaml", ".", "a\0b"])
def test_no_file(tmp_path, path):
    with pytest.raises(RecipeErrors, match="no readable file"):
        load_recipe(f"{tmp_path}/{path}", (), METHODS)


@pytest.mark.parametrize(
    ("old", "new", "key", "words"),
    [
        ("path: sums.jsonl", "path: sum.jsonl", "data.train.0.path", "`sums.jsonl`"),
        ("path: sums.jsonl", "path: ./no/such/rows.jsonl", "data.train.0.path", "holds nothing named `no`"),
        ("path: sums.jsonl", "path: sums.jsonl\n      split: x", "data.train.0.split", "no effect"),
        ("path: embedded", "path: embeded", "model.path", "`embedded`"),
        ("path: embedded", "path: ./base", "model.path", "does not exist"),
        ("path: embedded", "path: .", "model.path", "config.json"),
        ("path: embedded", "path: embedded, revision: x", "model.revision", "no effect"),
        ("path: embedded", "path: " + "x" * 5000, "model.path", "does not exist"),
    ],
)
def test_paths_are_looked_at(tmp_path, old, new, key, words):
    write(tmp_path)
    found = faults(GOOD.replace(old, new, 1), folder=tmp_path)
    assert [fault.where.split(": ")[-1] for fault in found] == [key]
    assert words in str(found[0])


@pytest.mark.parametrize(
    "output", [".", "..", "/", "data/run", "data/rows", "data/rows/x.jsonl/y", "file", "x/../data"]
)
def test_output_must_not_meet_what_is_read(tmp_path, monkeypatch, output):
    (tmp_path / "data/rows").mkdir(parents=True)
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    write(tmp_path)
    text = GOOD.replace("sums.jsonl", "data").replace("runs/test", f"'{output}'")
    assert [fault.where.split(": ")[-1] for fault in faults(text, folder=tmp_path)] == ["output"]


def test_nothing_is_written_or_loaded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = write(tmp_path, GOOD.replace("steps: 10", "steps: x"))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(RecipeErrors):
        load_recipe(file, (), METHODS)
    assert sorted(tmp_path.rglob("*")) == before


def test_faults_as_data(tmp_path):
    with pytest.raises(RecipeErrors) as caught:
        load_text("x: 1", "r.yaml", (), METHODS)
    data = caught.value.as_dict()
    assert data["kind"] == "RecipeErrors"
    assert {"kind", "where", "found", "expected", "mend"} == set(data["faults"][0])


HOSTILE = [
    "..",
    ".",
    "../x",
    "a/../../x",
    "/etc/x",
    "a/b",
    "a\\b",
    "C:x",
    "~",
    "~/x",
    "-x",
    " a",
    "a ",
    "a\n",
    "",
    "é",
    "a\tb",
    "x" * 65,
]


@pytest.mark.parametrize("field", ["name", "domain"])
@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_is_no_path(name, field):
    good = "name: sums" if field == "name" else "domain: maths"
    text = GOOD.replace(good, f"{field}: {json.dumps(name)}", 1)
    assert [fault.where.split(": ")[-1] for fault in faults(text)] == [f"data.train.0.{field}"]
