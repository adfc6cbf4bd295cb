"""The SoFT protocol: arms that are what they say, figures that are paired, and a comparison that goes on where it was cut."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import sparsmith.reporting
from sparsmith.anatomy import shape_of, views
from sparsmith.app import protocol, tuning
from sparsmith.app.comparison import Asked, _named
from sparsmith.app.recipes import load_recipe
from sparsmith.cli import main
from sparsmith.crafting.base_model import load_base
from sparsmith.crafting.checkpoint import load
from sparsmith.crafting.plan import plan_recipe
from sparsmith.errors import CheckpointMismatch, MethodError, RecipeErrors, UsageError
from sparsmith.evaluating import DepthResult
from sparsmith.methods.soft.method import SOFT
from sparsmith.protocols import soft_arms as arms
from sparsmith.protocols.judging import judge_both_orders
from sparsmith.runs import RunFolder
from tests.kit.elastic import EXITS, LAYERS, STEPS, elastic_recipe
from tests.kit.pico import HIDDEN, VOCAB


@pytest.fixture(scope="module")
def cut_and_gone_on(tmp_path_factory):
    """(folder, comparison, labels of the trainings): cut in the third cell, then run to its end, then called once more."""
    folder = tmp_path_factory.mktemp("protocol")
    recipe = elastic_recipe(folder)
    trained, train = [], tuning._Session.train

    def counted(self, checkpoint):
        trained.append(self.run.root.name)
        if trained.count("extracted-1-seed3") == 1 and self.run.root.name == "extracted-1-seed3":
            raise KeyboardInterrupt
        train(self, checkpoint)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning._Session, "train", counted)
        patch.setattr(sparsmith.reporting, "write_report", lambda runs, out: Path(out).write_text("page"))
        asked = ["protocol", "soft", str(recipe), "--seeds", "3", "--arm", "tail=trunk=frozen"]
        assert main(asked) == 130
        assert main(asked) == 0
        result = protocol("soft", recipe, seeds=[3], named=["tail=trunk=frozen"])
    return folder, result, trained


def test_finished_cells_are_not_run_again(cut_and_gone_on):
    _, result, trained = cut_and_gone_on
    cells = ["sft", "ict", "extracted-1", "extracted-2", "soft", "tail"]
    assert [cell.arm for cell in result.cells] == cells
    assert trained == [f"{name}-seed3" for name in (*cells[:3], *cells[2:])]


def test_every_arm_at_every_depth(cut_and_gone_on):
    folder, result, _ = cut_and_gone_on
    written = json.loads((folder / "run" / "comparison.json").read_text())
    places = {(row["arm"], row["depth"]) for row in written["matrix"]}
    every = {(arm, n) for arm in ("base", "sft", "ict", "extracted", "soft", "tail") for n in EXITS}
    assert places == every - {("extracted", LAYERS)}, "extracted at full depth is SFT itself"
    matrix = {(row["arm"], row["depth"]): row for row in written["matrix"]}
    assert matrix["ict", 4]["losses"] == matrix["sft", 4]["losses"] == matrix["tail", 4]["losses"]
    evaluation = json.loads((folder / "run" / "soft-seed3" / "eval.json").read_text())
    for depth in EXITS:
        assert matrix["soft", depth]["losses"] == [evaluation["depths"][str(depth)]["overall"]["loss"]["value"]]
    assert matrix["soft", 1]["agreement"] == evaluation["depths"]["1"]["overall"]["agreement"]["value"]
    assert evaluation["base"] == json.loads((folder / "run" / "sft-seed3" / "eval.json").read_text())["base"]
    base = DepthResult.from_json(json.loads((folder / "run" / "base.json").read_text())["depths"])
    assert base.full.overall["loss"].value == evaluation["base"]["overall"]["loss"]["value"]
    gap = next(row for row in written["diagonal"] if (row["arm"], row["rival"], row["depth"]) == ("soft", "sft", 2))
    expected = matrix["soft", 2]["loss"] - matrix["sft", 2]["loss"]
    assert gap["loss_difference"]["value"] == pytest.approx(expected, abs=1e-9)
    head = next(row for row in written["headline"] if (row["arm"], row["depth"]) == ("soft", 1))
    assert head["loss_difference"]["value"] == pytest.approx(
        matrix["soft", 1]["loss"] - matrix["sft", 4]["loss"], abs=1e-9
    )
    text = (folder / "run" / "comparison.md").read_text()
    assert text == result.markdown()
    assert "| ict* |" in text and "4 + 4 *" in text and "| soft |" in text
    assert (folder / "run" / "comparison.svg").read_text().lstrip().startswith("<?xml")


def test_verdicts_of_a_judge_stand_beside_the_losses(cut_and_gone_on):
    pairs = [("soft@1", "sft@4"), ("soft@2", "sft@2")]
    verdicts = [v for ours, theirs in pairs for v in judge_both_orders([("p", "aa", "b")] * 3, ours, theirs, longer)]
    result = replace(cut_and_gone_on[1], verdicts=tuple(verdicts))
    head = next(row for row in result.headline() if (row["arm"], row["depth"]) == ("soft", 1))
    assert head["judged"] == {"wins": 3, "losses": 0, "ties": 0, "score": 1.0}
    assert [row["depth"] for row in result.diagonal() if "judged" in row] == [2]
    assert result.markdown().count("3/0/0 (+1.000)") == 2


def longer(prompt, first, second):
    return "first" if len(first) > len(second) else "second"


def test_unequal_training_is_flagged(cut_and_gone_on):
    rows = {row["arm"]: row for row in cut_and_gone_on[1].training()}
    assert {arm for arm, row in rows.items() if not row["equal_training"]} == {"ict", "tail"}
    assert rows["extracted"]["models"] == 2 and rows["extracted"]["steps_shown"] == str(STEPS)
    assert rows["sft"]["flops_over_sft"] == 1 < rows["soft"]["flops_over_sft"]
    assert rows["soft"]["extra"] == rows["sft"]["extra"] == 0
    assert rows["ict"]["flops"] > rows["sft"]["flops"]


def test_the_control_of_soft_is_the_sft_arm(cut_and_gone_on):
    folder = cut_and_gone_on[0]
    for name, control in (("soft-seed3", str(folder / "run" / "sft-seed3")), ("tail-seed3", None)):
        run = RunFolder(folder / "run" / name)
        assert run.read(run.guard)["control"] == control
        assert not run.control.root.exists()
    assert not RunFolder(folder / "run" / "sft-seed3").guard.exists()


def test_ict_leaves_the_trunk_and_adds_its_heads(cut_and_gone_on):
    folder = cut_and_gone_on[0]
    sft, ict = (load(folder / "run" / f"{name}-seed3") for name in ("sft", "ict"))
    mine = dict(ict.named_parameters())
    for name, parameter in sft.named_parameters():
        assert torch.equal(mine[name], parameter), name
    added = {name: p.numel() for name, p in mine.items() if name not in dict(sft.named_parameters())}
    assert sum(added.values()) == (len(EXITS) - 1) * HIDDEN * VOCAB
    heads = [mine[name] for name in added]
    assert not any(torch.equal(head, sft.lm_head.weight) for head in heads), "the heads have trained"
    row = next(row for row in cut_and_gone_on[1].training() if row["arm"] == "ict")
    assert row["extra"] == row["trained"] == sum(added.values())


def test_a_frozen_trunk_is_that_of_sft(cut_and_gone_on):
    folder = cut_and_gone_on[0]
    sft, tail = (load(folder / "run" / f"{name}-seed3") for name in ("sft", "tail"))
    mine = dict(tail.named_parameters())
    assert all(torch.equal(mine[name], parameter) for name, parameter in sft.named_parameters())


def test_extracted_starts_from_the_pretrained_weights(cut_and_gone_on):
    folder = cut_and_gone_on[0]
    settings = load_recipe(folder / "recipe.yaml").model
    pretrained = load_base(settings)
    for depth in EXITS[:-1]:
        place = folder / "run" / "bases" / f"depth-{depth}"
        made = json.loads((place / arms.RECORD).read_text())
        cut = load_base(settings.model_copy(update={"path": str(place)}))
        assert shape_of(cut.config).layers == depth
        assert made["weights"] == arms.weights_digest(cut) == arms.weights_digest(views.first_blocks(pretrained, depth))
        assert made["depth"] == depth and made["parent"] == settings.path
        tuned = load_recipe(folder / "run" / f"extracted-{depth}-seed3" / "recipe.yaml")
        assert tuned.model.path == str(place) and tuned.methods[0].arm == "sft" and tuned.methods[0].exits == (depth,)
    with pytest.raises(CheckpointMismatch, match="depth-1"):
        arms.cut_base(settings.model_copy(update={"path": str(folder)}), 1, folder / "run" / "bases" / "depth-1")


def test_every_arm_sees_the_same_rows(cut_and_gone_on):
    folder = cut_and_gone_on[0]
    recipes = [load_recipe(path) for path in sorted((folder / "run").glob("*-seed3/recipe.yaml"))]
    assert len(recipes) == 6
    assert (
        len({one.train.model_dump_json() for one in recipes})
        == len({one.data.model_dump_json() for one in recipes})
        == 1
    )


def test_a_finished_cell_of_another_recipe_is_refused(cut_and_gone_on):
    folder = cut_and_gone_on[0]
    with pytest.raises(RecipeErrors, match=r"train\.learning_rate"):
        protocol("soft", folder / "recipe.yaml", ["train.learning_rate=0.001"], seeds=[3], arms=["soft"])


def test_equal_compute(tmp_path):
    recipe = load_recipe(elastic_recipe(tmp_path, train={"steps": 1000}))
    plots = arms.extracted_plots(recipe, tuple(EXITS), 0, tmp_path / "run", "compute")
    assert [plot.arm for plot in plots] == ["extracted-1", "extracted-2", "extracted-4"]
    assert len({plot.recipe.train.steps for plot in plots}) == 1
    spent = sum(plot.recipe.train.steps * plan_recipe(plot.recipe).flops.training for plot in plots)
    assert spent == pytest.approx(1000 * plan_recipe(recipe).flops.training, rel=2e-3)


def test_steps_and_epochs_are_scaled(tmp_path):
    train = load_recipe(elastic_recipe(tmp_path)).train
    assert arms.scaled(train, 0.5).steps == STEPS // 2 and arms.scaled(train, 1e-6).steps == 1
    assert arms.scaled(train.model_copy(update={"steps": None, "epochs": 2.0}), 0.25).epochs == 0.5


def test_the_sft_arm_keeps_how_the_recipe_tunes(tmp_path):
    recipe = load_recipe(
        elastic_recipe(tmp_path, tune="lora", train_norm=False, weights="linear", control=str(tmp_path))
    )
    sft = arms.sft_of(recipe.methods[0])
    assert (sft.arm, sft.tune, sft.train_norm, sft.exits) == ("sft", "lora", False, tuple(EXITS))
    assert SOFT.control(sft) is None


def test_named_arms(tmp_path):
    recipe = elastic_recipe(tmp_path)
    asked = Asked(recipe, ["train.seed=9"])
    name, one = _named(asked, "boost=weights=full_boost, boost=0.7,kl.weight=0.25,exits=[2,4],train.steps=8")
    config = one.methods[0]
    assert name == "boost" and config.weights == "full_boost" and config.boost == 0.7
    assert config.kl.weight == 0.25 and config.exits == (2, 4) and (one.train.steps, one.train.seed) == (8, 9)
    for text in ("boost", "=weights=linear", "boost="):
        with pytest.raises(UsageError):
            _named(asked, text)
    with pytest.raises(RecipeErrors, match="weighs"):
        _named(asked, "boost=weighs=linear")
    for taken in ("sft", "base", "a b"):
        with pytest.raises(UsageError, match="--arm"):
            protocol("soft", recipe, named=[f"{taken}=weights=linear"])


def test_refusals(tmp_path):
    recipe = elastic_recipe(tmp_path)
    for more, flag in (
        ({"arms": ["soft", "sfd"]}, "--arms"),
        ({"seeds": []}, "--seeds"),
        ({"ict_share": 0.0}, "--ict-share"),
        ({"extracted_steps": "same"}, "--extracted-steps"),
        ({"controls": ["random"]}, "--controls"),
    ):
        with pytest.raises(UsageError, match=flag):
            protocol("soft", recipe, **more)
    with pytest.raises(UsageError, match="--arms"):
        protocol("pesc", recipe, arms=["soft"])
    with pytest.raises(UsageError, match="soft"):
        protocol("sofd", recipe)
    with pytest.raises(MethodError, match=r"soft\.arm"):
        protocol("soft", recipe, ["methods.0.arm=sft"])
    with pytest.raises(MethodError, match="metric loss"):
        protocol("soft", elastic_recipe(tmp_path, eval_rows=False))
    assert not (tmp_path / "run").exists()
