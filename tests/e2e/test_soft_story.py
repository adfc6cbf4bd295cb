"""A depth-elastic model through the command line, on a pico base: planned, tuned with its guard, measured, written with in every way,
cut, reported.
"""

from __future__ import annotations

import json

import pytest
import yaml

from sparsmith.cli import main
from tests.kit.soft_run import EXITS, LAYERS, soft_recipe

QUICK = ["--batch", "2", "--context", "12", "--new-tokens", "6", "--repeats", "1", "--prompts", "4", "--rows", "4"]
LENIENT = {"method": "soft", "exits": EXITS, "guard": {"max_loss_gap": 5.0}}


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """(recipe, finished run)."""
    root = tmp_path_factory.mktemp("soft")
    recipe = soft_recipe(root, LENIENT)
    assert main(["tune", str(recipe)]) == 0
    return recipe, root / "run"


def run(capsys, *arguments):
    capsys.readouterr()
    code = main([*map(str, arguments), "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_the_plan_names_the_price(story, capsys):
    recipe, _ = story
    code, plan = run(capsys, "plan", recipe)
    assert code == 0
    told = " ".join(plan["notes"])
    assert "exits 1, 2, 4 of 4" in told and "overhead of the heads" in told and "memory of the losses" in told


def test_the_run_holds_its_guard_and_every_depth(story):
    _, folder = story
    guard = json.loads((folder / "guard.json").read_text())
    assert [row["name"] for row in guard["rows"]] == ["base", "control", "tuned"] and guard["passed"] is True
    assert (folder / "control" / "recipe.yaml").is_file()
    depths = json.loads((folder / "eval.json").read_text())["depths"]
    assert list(depths) == [str(n) for n in EXITS]
    health = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["health"]
    assert {f"soft/loss_at_{n}" for n in EXITS} <= set(health)
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert page.index('id="guard"') < page.index('id="before-and-after"') < page.index('id="depths"')


def test_eval_again_gives_the_same_figures_at_every_depth(story, capsys):
    _, folder = story
    code, again = run(capsys, "eval", folder)
    assert code == 0
    first = json.loads((folder / "eval.json").read_text())["depths"]
    for depth, result in again["depths"].items():
        loss = first[depth]["overall"]["loss"]["value"]
        assert result["overall"]["loss"]["value"] == pytest.approx(loss, abs=1e-6)


def test_bench_then_text_in_every_way(story, capsys):
    _, folder = story
    code, found = run(capsys, "bench", folder, *QUICK, "--calibrate", "0.5")
    assert code == 0 and {row["depth"] for row in found["speed"]} == set(EXITS)
    ask = ("generate", folder, "-p", "12+7=", "--max-new-tokens", "6", "--stats")
    whole = run(capsys, *ask)[1]
    ways = (
        ["--depth", 2],
        ["--budget", 1.0],
        ["--budget", "100000ms"],
        ["--exit-threshold", "calibrated"],
        ["--exit-threshold", 0.2, "--visit", "1,2"],
        ["--self-speculative", "1:3"],
    )
    told = {" ".join(map(str, way)): run(capsys, *ask, *way) for way in ways}
    assert all(code == 0 and answer["stats"]["blocks"] == LAYERS for code, answer in told.values())
    assert told["--depth 2"][1]["stats"]["depth"] == 2
    for exact in ("--budget 1.0", "--budget 100000ms", "--self-speculative 1:3"):
        assert told[exact][1]["text"] == whole["text"]
    page = (folder / "report.html").read_text(encoding="utf-8")  # written anew by bench
    assert "Where tokens leave" in page and "Ways of writing" in page


def test_a_depth_is_cut_out_and_writes_the_same(story, capsys):
    _, folder = story
    code, exported = run(capsys, "export", folder, folder.parent / "cut", "--depth", 2, "--no-proof")
    assert code == 0, exported
    assert json.loads((folder.parent / "cut" / "config.json").read_text())["num_hidden_layers"] == 2
    ask = ("-p", "12+7=", "--max-new-tokens", "6", "--raw")
    slim = run(capsys, "generate", folder.parent / "cut", *ask)[1]["text"]
    assert slim == run(capsys, "generate", folder, *ask, "--depth", 2)[1]["text"]


def test_two_runs_side_by_side(story, capsys):
    _, folder = story
    page = folder.parent / "both.html"
    code, _ = run(capsys, "report", folder, folder / "control", "--out", page)
    text = page.read_text(encoding="utf-8")
    assert code == 0 and "SFT, a control of SoFT" in text and "crafted with SoFT" in text


def test_the_recipe_that_the_run_wrote_down_is_whole(story):
    recipe, folder = story
    asked = yaml.safe_load(recipe.read_text())["methods"][0]
    written = yaml.safe_load((folder / "recipe.yaml").read_text())["methods"][0]
    assert {key: written[key] for key in ("method", "exits")} == {key: asked[key] for key in ("method", "exits")}
