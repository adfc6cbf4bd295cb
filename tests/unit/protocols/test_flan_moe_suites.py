"""Tasks of lm-evaluation-harness inside the FLAN-MoE protocol: asked once, before and after setup 2, with the figures of `eval --tasks`."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from sparsmith import app
from sparsmith.app import comparison
from sparsmith.app.recipes import load_recipe
from sparsmith.cli import main
from sparsmith.errors import MethodError
from sparsmith.protocols import flan_moe_suites as suites
from sparsmith.protocols.flan_moe import check
from tests.kit.taskfiles import colours, write_rows
from tests.unit.protocols.test_flan_moe import moe_recipe, with_grid

harness = pytest.mark.skipif(
    not any(d.metadata["Name"].replace("-", "_") == "lm_eval" for d in metadata.distributions()),
    reason="lm_eval is not installed: pip install 'sparsmith[eval]'",
)


def asking(folder, **section):
    """The recipe of setup 2 with one suite, named relative to its folder."""
    colours(folder)
    asked = {"tasks": ["colours.yaml"], "shots": 0, **section}
    return moe_recipe(folder, setups=[2], tasks=[], task_steps=None, suites=asked)


@harness
def test_suites_are_asked_before_and_after_setup_2(tmp_path, monkeypatch):
    path = asking(tmp_path)
    asked, ask = [], comparison._ask
    monkeypatch.setattr(comparison, "_ask", lambda target, one: asked.append(target) or ask(target, one))
    assert main(["protocol", "flan-moe", str(path), "--seeds", "3,4"]) == 0
    run = tmp_path / "run"
    tuned = [str(run / f"{side}-seed{seed}-instruct") for seed in (3, 4) for side in ("dense", "moe")]
    assert sorted(asked) == sorted([str(tmp_path / "base")] * 2 + tuned), "the base once for each side"
    written = json.loads((run / "comparison.json").read_text())["suites"]
    of = {(row["side"], row["setup"]): row for row in written["table"]}
    again = [
        app.evaluate_tasks(run / f"moe-seed{seed}-instruct", [str(tmp_path / "colours.yaml")], shots=0)
        for seed in (3, 4)
    ]
    share = sum(one.groups["colours"].share("acc").value for one in again) / 2
    assert of["moe", 2]["tasks"]["colours"]["acc"]["value"] == pytest.approx(share, abs=1e-12)
    assert of["moe", 2]["average"]["value"] == pytest.approx(100 * (share - 0.5) / 0.5, abs=1e-9)
    assert of["moe", -1]["tasks"] == of["dense", -1]["tasks"], "an upcycled model is its base at step 0"
    gains = {row["metric"]: row["figures"] for row in written["gains"]}
    values = {key: row["tasks"]["colours"]["acc"]["value"] for key, row in of.items()}
    by_hand = (values["moe", 2] - values["moe", -1]) - (values["dense", 2] - values["dense", -1])
    assert gains["acc"]["gain: 2 over the base"]["value"] == pytest.approx(by_hand, abs=1e-12)
    assert set(gains["acc"]["setup 2"]["by_seed"]) == {"3", "4"}
    assert "Tasks of lm-evaluation-harness" in (run / "comparison.md").read_text()

    asked.clear()
    assert main(["protocol", "flan-moe", str(path), "--seeds", "3,4"]) == 0
    assert not asked, "a finished comparison asks nothing anew"
    write_rows(tmp_path, "colours_test", [{"q": f"other {n}", "a": "red"} for n in range(6)])
    (run / "suites" / "moe-seed4-instruct.json").unlink()
    assert main(["protocol", "flan-moe", str(path), "--seeds", "3,4"]) == 6
    assert asked == [str(run / "moe-seed4-instruct")]


def test_figures_are_read_again_for_the_same_question_alone(tmp_path):
    asked = []

    def ask(target, one):
        asked.append((target, one.limit))
        return SimpleNamespace(to_json=lambda: {"n": len(asked)})

    settings = load_recipe(asking(tmp_path)).protocol.suites
    file = tmp_path / "suites" / "one.json"
    own, anew = {"held": {"loss": {"value": 1.25}}}, {"held": {"loss": {"value": 1.5}}}
    assert (
        suites.asked_once(file, "a", own, settings, ask) == {"n": 1} == suites.asked_once(file, "a", own, settings, ask)
    )
    assert suites.asked_once(file, "b", own, settings, ask) == {"n": 2}
    assert suites.asked_once(file, "b", own, settings.model_copy(update={"limit": 5}), ask) == {"n": 3}
    assert suites.asked_once(file, "b", anew, settings, ask) == {"n": 4}, (
        "a model that was tuned anew in the same folder"
    )
    assert asked == [("a", None), ("b", None), ("b", 5), ("b", None)]


def test_rows_that_changed_between_two_runs_are_named():
    def cell(seed, mark):
        figures = {"tasks": {"colours": {"fingerprint": mark}}}
        run = Path(f"out/moe-seed{seed}-instruct")
        return SimpleNamespace(seed=seed, cell=SimpleNamespace(run=run), suites={"base": figures, "tuned": figures})

    suites.require_same_rows([cell(0, "x"), cell(1, "x")])
    with pytest.raises(MethodError, match="`colours` that differ between moe-seed0-instruct and moe-seed1-instruct"):
        suites.require_same_rows([cell(0, "x"), cell(1, "y")])


def test_paths_of_suites_and_of_validation_rows_are_those_of_the_recipe(tmp_path):
    protocol = load_recipe(asking(tmp_path, data=".")).protocol
    assert protocol.suites.tasks == (str(tmp_path / "colours.yaml"),) and protocol.suites.data == str(tmp_path)
    assert load_recipe(asking(tmp_path, tasks=["boolq"])).protocol.suites.tasks == ("boolq",), "a name stays one"
    path = with_grid(tmp_path)
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    source = recipe["protocol"]["tasks"][0]["validation"]
    recipe["protocol"]["tasks"][0]["validation"] = {**source, "path": "rows.jsonl"}
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    (tmp_path / "rows.jsonl").write_text("{}\n", encoding="utf-8")
    assert load_recipe(path).protocol.tasks[0].validation.path == str(tmp_path / "rows.jsonl")


def test_suites_that_nothing_asks(tmp_path, capsys):
    colours(tmp_path)
    path = moe_recipe(tmp_path, setups=[1], suites={"tasks": ["colours.yaml"]})
    assert main(["plan", str(path)]) == 3
    assert "suites" in capsys.readouterr().err
    recipe = load_recipe(asking(tmp_path))
    switch = recipe.model_copy(update={"model": recipe.model.model_copy(update={"task": "seq2seq"})})
    with pytest.raises(MethodError, match="tasks for a seq2seq"):
        check(switch, [0])


def test_a_bad_suite_is_told_before_the_first_run(tmp_path, capsys):
    path = asking(tmp_path, tasks=["colour"])
    assert main(["protocol", "flan-moe", str(path), "--seeds", "0"]) == 2
    assert "`colour`" in capsys.readouterr().err and not (tmp_path / "run").exists()
