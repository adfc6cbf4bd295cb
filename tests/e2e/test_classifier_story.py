"""A classifier from recipe to export, through the verbs; a choice of the best point that survives a stop."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from sparsmith import app
from sparsmith.errors import UsageError
from sparsmith.methods import registry
from tests.kit.classifying import HEAD, make_class_recipe

SELECT = {"every": 4, "share": 0.2}


@pytest.fixture(autouse=True)
def registered():
    registry.register(HEAD)
    yield
    registry.unregister("head")


def read(path: Path):
    return json.loads(path.read_text())


def test_tune_eval_export_and_what_is_refused(tmp_path):
    recipe = make_class_recipe(tmp_path, "roberta", steps=60, eval_every=30)
    run = app.tune(recipe)
    figures = read(run / "eval.json")
    assert figures["tuned"]["overall"]["accuracy"]["value"] > 0.9 > figures["base"]["overall"]["accuracy"]["value"]
    assert set(figures["tuned"]["domains"]) == {"words", "other"} and set(figures["tuned"]["sets"]["words_held"]) == {
        "loss",
        "accuracy",
    }
    sample = read(run / "samples.json")[0]
    assert sample["reference"] in ("no", "yes", "false", "true") and 0 <= float(sample["tuned_probability"]) <= 1
    assert "nats per text" in (run / "report.html").read_text() and "(probability " in (run / "report.html").read_text()
    again = app.evaluate(run)
    assert again.overall["accuracy"].value == figures["tuned"]["overall"]["accuracy"]["value"]
    with pytest.raises(UsageError, match="a classifier, which writes no text"):
        list(app.generate(run, "a"))
    with pytest.raises(UsageError, match="a classifier, which writes no text"):
        app.bench(run)
    report = app.export(run, tmp_path / "out")
    assert report.proof["passed"]
    measured = app.evaluate(tmp_path / "out", recipe)
    assert measured.overall["accuracy"].value == pytest.approx(again.overall["accuracy"].value, abs=0.03)
    assert app.verify(tmp_path / "out") and app.verify(run)


def test_the_best_point_is_kept_and_a_stop_changes_nothing(tmp_path, monkeypatch):
    from sparsmith.evaluating import classify

    def recipe(name: str) -> Path:
        return make_class_recipe(tmp_path / name, steps=12, learning_rate=3e-2, save_every=5, select=SELECT)

    uncut = app.tune(recipe("uncut"))
    real, calls = classify.pooled_scores, []

    def fails_once(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("the machine goes down")
        return real(*args, **kwargs)

    monkeypatch.setattr(classify, "pooled_scores", fails_once)
    with pytest.raises(RuntimeError, match="goes down"):
        app.tune(recipe("cut"))
    assert [point["step"] for point in read(tmp_path / "cut/run/selection/points.json")] == [4]
    cut = app.tune(tmp_path / "cut/recipe.yaml")
    points = read(uncut / "selection/points.json")
    assert [point["step"] for point in points] == [4, 8, 12] and read(cut / "selection/points.json") == points
    best = max(points, key=lambda point: (point["accuracy"], -point["loss"]))
    assert read(uncut / "run.json")["selected"] == read(cut / "run.json")["selected"] == best
    kept = [load_file(run / "model/sparsmith_delta.safetensors") for run in (uncut, cut)]
    chosen = load_file(uncut / f"selection/step-{best['step']}/sparsmith_delta.safetensors")
    for name, tensor in chosen.items():
        assert tensor.equal(kept[0][name]) and tensor.equal(kept[1][name])
