"""The guard of the full model: its three rows, its verdict, and a run that is cut before it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import sparsmith.reporting
from sparsmith.app import tuning
from sparsmith.app.guarding import guard_of, sheet
from sparsmith.app.recipes import load_recipe
from sparsmith.cli import main
from sparsmith.errors import CheckpointMismatch, GuardFailed, MethodError, UsageError
from sparsmith.runs import RunFolder
from tests.kit.elastic import EXITS, STEPS, elastic_recipe


@pytest.fixture(autouse=True)
def no_page(monkeypatch):
    """The page costs more than the run; what it may read has to be there when it is written."""

    def write(runs, out):
        for run in map(RunFolder, runs):
            asked = guard_of(load_recipe(run.recipe, check_paths=False))
            assert run.finished and run.guard.is_file() == (asked is not None)
        Path(out).write_text("page")

    monkeypatch.setattr(sparsmith.reporting, "write_report", write)


@pytest.fixture
def trained(monkeypatch):
    """Folders of the runs whose training was begun, in order."""
    found, train = [], tuning._Session.train

    def counted(self, checkpoint):
        found.append(self.run.root.name)
        train(self, checkpoint)

    monkeypatch.setattr(tuning._Session, "train", counted)
    return found


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A recipe, and its control as a finished run of its own (under `control`)."""
    folder = tmp_path_factory.mktemp("guard")
    recipe = elastic_recipe(folder, arm="sft")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparsmith.reporting, "write_report", lambda runs, out: Path(out).write_text("page"))
        assert main(["tune", str(recipe), f"output={folder / 'control'}"]) == 0
    elastic_recipe(folder)
    return folder


def run_of(home, name, *overrides):
    return [str(home / "recipe.yaml"), f"output={home / name}", *overrides]


def given(home, name, *overrides):
    return run_of(home, name, f"methods.0.control={home / 'control'}", *overrides)


def test_the_control_is_tuned_beside_the_run(tmp_path, trained, capsys):
    recipe = elastic_recipe(tmp_path)
    assert main(["tune", str(recipe), "methods.0.guard.max_loss_gap=10.0"]) == 0
    run = RunFolder(tmp_path / "run")
    assert trained == ["run", "control"]
    assert run.finished and run.control.finished
    control, own = load_recipe(run.control.recipe), load_recipe(run.recipe)
    assert control.methods[0].arm == "sft" and control.train == own.train and control.data == own.data
    found = run.read(run.guard)
    assert [row["name"] for row in found["rows"]] == ["base", "control", "tuned"]
    assert [row["tokens"] > 0 for row in found["rows"]] == [False, True, True]
    assert [row["steps"] for row in found["rows"]] == [0, STEPS, STEPS]
    losses = [row["loss"]["value"] for row in found["rows"]]
    tuned, base = (run.read(run.evaluation)[key]["overall"]["loss"]["value"] for key in ("tuned", "base"))
    assert (losses[0], losses[2]) == (base, tuned)
    assert losses[1] == run.read(run.control.evaluation)["tuned"]["overall"]["loss"]["value"]
    assert found["difference"]["value"] == pytest.approx(losses[2] - losses[1], abs=1e-9)
    assert found["difference"]["low"] <= found["difference"]["value"] <= found["difference"]["high"]
    assert found["passed"] and found["limit"] == 10.0 and found["control"] == "control"
    capsys.readouterr()
    assert main(["eval", str(run.root), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    depths = run.read(run.evaluation)["depths"]
    assert shown["overall"]["loss"]["value"] == tuned
    assert {n: one["rows"] for n, one in shown["depths"].items()} == {n: one["rows"] for n, one in depths.items()}
    assert list(map(int, depths)) == EXITS and depths["4"] == run.read(run.evaluation)["tuned"]


def test_a_regression_of_the_full_depth_fails_after_everything_is_saved(home, capsys, monkeypatch):
    train = tuning._Session.train

    def worse(self, checkpoint):
        train(self, checkpoint)
        with torch.no_grad():
            self.model.model.norm.weight.neg_()

    monkeypatch.setattr(tuning._Session, "train", worse)
    assert main(["tune", *given(home, "worse")]) == GuardFailed.exit_code == 8
    told = capsys.readouterr().err
    assert all(word in told for word in ("base", "control", "tuned", "FAILED", "guard.json"))
    run = RunFolder(home / "worse")
    assert run.finished and run.report.is_file() and (run.model / "sparsmith.json").is_file()
    found = run.read(run.guard)
    assert not found["passed"] and found["difference"]["value"] > found["limit"] == 0.02
    assert [row["name"] for row in found["rows"]] == ["base", "control", "tuned"]
    text = sheet(found).markdown()
    assert "FAILED" in text and text.count("| base |") == text.count("| control |") == text.count("| tuned |") == 1
    assert main(["tune", *given(home, "worse")]) == 2, "a finished run, whatever its guard said"


def test_a_cut_between_run_and_control_goes_on_there(home, monkeypatch, trained):
    overrides = run_of(home, "cut", "methods.0.guard.max_loss_gap=10.0")
    run = RunFolder(home / "cut")
    with monkeypatch.context() as patch:
        patch.setattr(tuning, "_guard", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert main(["tune", *overrides]) == 130
    assert run.tuned and not run.finished and not run.guard.is_file() and not run.report.is_file()
    finish = tuning._Session.finish
    with monkeypatch.context() as patch:  # and once more inside the control, after its training
        patch.setattr(
            tuning._Session,
            "finish",
            lambda self: finish(self) if self.guarded else (_ for _ in ()).throw(KeyboardInterrupt),
        )
        assert main(["tune", *overrides]) == 130
    assert not run.finished and run.tuned
    assert main(["tune", *overrides]) == 0
    assert trained == ["cut", "control", "control"], "the run itself is not trained again"
    assert run.finished and run.guard.is_file() and run.report.is_file()


def test_another_recipe_does_not_go_on_with_a_waiting_run(home, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(tuning, "_guard", lambda *_: None)
        assert main(["tune", *given(home, "waiting")]) == 0
    assert main(["tune", *given(home, "waiting", "train.learning_rate=0.001")]) == 7
    assert main(["tune", *given(home, "waiting", "methods.0.exits=[1,4]")]) == 3


def test_of_a_frozen_trunk_the_base_is_the_control(home, trained):
    assert main(["tune", *run_of(home, "frozen", "methods.0.trunk=frozen")]) == 0
    run = RunFolder(home / "frozen")
    found = run.read(run.guard)
    assert trained == ["frozen"] and not run.control.root.exists()
    assert found["control"] is None and found["passed"] and found["limit"] == 0.0
    assert found["difference"] == {**found["difference"], "value": 0.0, "low": 0.0, "high": 0.0}
    assert found["rows"][1]["loss"] == found["rows"][0]["loss"] == found["rows"][2]["loss"]


def test_no_setting_leaves_the_guard_out(home, tmp_path):
    for settings in ("methods.0.control=null", "methods.0.guard=null", "methods.0.guard.max_loss_gap=-1.0"):
        assert main(["tune", *run_of(home, "none", settings)]) == 3
    for more in ({}, {"trunk": "frozen"}):
        recipe = elastic_recipe(tmp_path, eval_rows=False, **more)
        with pytest.raises(MethodError, match="the guard has no rows"):
            tuning.tune(recipe)
    assert not (tmp_path / "run").exists()


def test_a_control_of_another_training_is_refused_at_the_start(home, trained, tmp_path):
    for change in ("train.learning_rate=0.001", "train.seed=7", "train.steps=5", "data.max_length=48"):
        with pytest.raises(CheckpointMismatch, match=change.partition("=")[0]):
            tuning.tune(home / "recipe.yaml", given(home, "other", change)[1:])
    with pytest.raises(CheckpointMismatch, match="trained parameters"):
        tuning.tune(home / "recipe.yaml", given(home, "lora", "methods.0.tune=lora")[1:])
    with pytest.raises(UsageError, match="no finished run"):
        tuning.tune(home / "recipe.yaml", run_of(home, "absent", f"methods.0.control={tmp_path}")[1:])
    assert trained == []


def test_a_run_of_the_method_itself_is_no_control(home, tmp_path):
    guard = guard_of(load_recipe(home / "recipe.yaml", [f"methods.0.control={home / 'control'}"]))
    guard.check_start()
    text = (home / "control" / "recipe.yaml").read_text().replace("arm: sft", "arm: soft")
    (tmp_path / "recipe.yaml").write_text(text)
    (tmp_path / "run.json").write_text(json.dumps({"finished": "now"}))
    guard = guard_of(load_recipe(home / "recipe.yaml", [f"methods.0.control={tmp_path}"]))
    with pytest.raises(CheckpointMismatch, match="not as a control"):
        guard.check_start()


def test_rows_that_have_changed_are_refused(home, monkeypatch, trained):
    rows = home / "words.jsonl"
    before = rows.read_text()
    rows.write_text(before.replace("reverse", "mirror"))
    try:
        with pytest.raises(CheckpointMismatch, match=r"words\.jsonl"):
            tuning.tune(home / "recipe.yaml", given(home, "rows")[1:])
    finally:
        rows.write_text(before)
    assert trained == []
