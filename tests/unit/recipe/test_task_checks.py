"""What a classifier's recipe must say, and what has no meaning for it; each fault with its line."""

from __future__ import annotations

import pytest

from sparsmith.errors import RecipeErrors
from sparsmith.methods import registry
from sparsmith.recipe.loader import dump, load_text
from tests.kit.classifying import HEAD

GOOD = """\
model: {path: embedded, task: seq_cls, num_labels: 2}
methods:
  - {method: head, lora: {r: 4}}
data:
  train:
    - {name: a, domain: d, path: a.jsonl, labels: [no, yes]}
    - {name: b, domain: d, path: a.jsonl, labels: [false, true]}
  eval:
    - {name: c, domain: d, path: a.jsonl}
train: {steps: 10, select: {every: 3}}
output: runs/x
"""


@pytest.fixture(autouse=True)
def registered():
    registry.register(HEAD)
    yield
    registry.unregister("head")


def load(text: str, name: str = "r.yaml"):
    tasks = lambda method: registry.get(method).tasks  # noqa: E731
    return load_text(text, name, method_configs=registry.config_classes(), check_paths=False, tasks_of=tasks)


def test_a_good_one_has_no_packing_and_comes_back():
    recipe = load(GOOD)
    assert recipe.data.packing is False
    assert [source.label_names for source in recipe.data.train] == [("no", "yes"), ("false", "true")]
    assert recipe.train.select.share == 0.1 and recipe.train.select.max_rows == 1000
    assert load(dump(recipe)) == recipe


@pytest.mark.parametrize(
    "old, new, where, words",
    [
        ("method: head, lora: {r: 4}", "method: pesc", "r.yaml:3: methods.0.method", "`pesc`, which does causal_lm"),
        (
            "num_labels: 2",
            "num_labels: 3",
            "r.yaml:6: data.train.0.labels",
            "3, as model.num_labels says (at r.yaml:1)",
        ),
        ("num_labels: 2", "num_labels: 1", "model.num_labels", "at least 2"),
        ("[no, yes]", "[yes, yes]", "r.yaml:6: data.train.0.labels", "`yes` twice"),
        ("  eval:", "  packing: true\n  eval:", "r.yaml:8: data.packing", "one class"),
        ("  eval:", "  loss_on: all\n  eval:", "r.yaml:8: data.loss_on", "no effect"),
        ("  eval:", "  template: chat\n  eval:", "r.yaml:8: data.template", "a text with {prompt}"),
        ("name: c,", "name: c, metrics: [loss, exact_match],", "r.yaml:9: data.eval.0.metrics.1", "loss, as the task"),
        ("every: 3", "every: 10", "r.yaml:10: train.select.every", "no choice"),
        ("every: 3", "share: 0.2", "r.yaml:10: train.select.every", "nothing"),
    ],
)
def test_faults_are_told_with_their_place(old, new, where, words):
    assert old in GOOD
    with pytest.raises(RecipeErrors) as caught:
        load(GOOD.replace(old, new))
    found = [str(fault) for fault in caught.value.faults]
    assert any(where in text and words in text for text in found), found


def test_keys_of_a_classifier_have_no_effect_on_a_language_model():
    text = GOOD.replace(", task: seq_cls, num_labels: 2", "").replace("{method: head, lora: {r: 4}}", "{method: pesc}")
    with pytest.raises(RecipeErrors) as caught:
        load(text)
    told = "\n".join(map(str, caught.value.faults))
    for key in ("data.train.0.labels", "data.train.1.labels", "train.select"):
        assert f"{key}: found `{key.rsplit('.', 1)[-1]}`, which has no effect here; expected task seq_cls" in told
