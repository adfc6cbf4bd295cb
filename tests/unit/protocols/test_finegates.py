"""The FineGates protocol: rivals that differ in the choice alone, sizes that are counted, a comparison that goes on where it was cut."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import sparsmith.reporting
from sparsmith.app import protocol, tuning
from sparsmith.app.recipes import load_recipe
from sparsmith.cli import main
from sparsmith.errors import MethodError, UsageError
from sparsmith.methods.finegates.config import FineGatesConfig
from sparsmith.protocols.finegates import ARMS, DENSE, RIVALS, Choices, config_of, rival_of
from tests.kit.elastic import elastic_recipe

METHOD = {
    "method": "finegates",
    "gates": {"lr": 0.4},
    "schedule": {"hold": 0.2, "warmup": 0.2, "settle_at": 0.6},
    "lora": {"r": 4, "alpha": 8.0, "dropout": 0.0},
}


def slim_recipe(folder: Path) -> Path:
    import yaml

    path = elastic_recipe(folder, train={"steps": 10})
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    recipe["methods"] = [METHOD]
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def cut_and_gone_on(tmp_path_factory):
    """(folder, comparison, names of the trainings): cut in the third cell, run to its end, called once more."""
    folder = tmp_path_factory.mktemp("protocol")
    recipe = slim_recipe(folder)
    trained, train = [], tuning._Session.train

    def counted(self, checkpoint):
        trained.append(self.run.root.name)
        if trained.count("random-0.7-seed3") == 1 and self.run.root.name == "random-0.7-seed3":
            raise KeyboardInterrupt
        train(self, checkpoint)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning._Session, "train", counted)
        patch.setattr(sparsmith.reporting, "write_report", lambda runs, out: Path(out).write_text("page"))
        asked = ["protocol", "finegates", str(recipe), "--seeds", "3", "--targets", "0.7"]
        asked += ["--arms", "finegates,random,lora", "--arm", "soft_start=settle.survivors=keep"]
        assert main(asked) == 130
        assert main(asked) == 0
        options = {"arms": ["finegates", "random", "lora"], "named": ["soft_start=settle.survivors=keep"]}
        result = protocol("finegates", recipe, seeds=[3], targets=[0.7], **options)
    return folder, result, trained


def test_finished_cells_are_not_run_again(cut_and_gone_on):
    _, result, trained = cut_and_gone_on
    cells = ["lora-seed3", "finegates-0.7-seed3", "soft_start-0.7-seed3", "random-0.7-seed3"]
    assert [cell.cell.run.name for cell in result.cells] == cells
    assert trained == [*cells, cells[-1]]


def test_every_figure_is_that_of_a_run(cut_and_gone_on):
    folder, result, _ = cut_and_gone_on
    written = json.loads((folder / "run" / "comparison.json").read_text())
    rows = {row["arm"]: row for row in written["table"]}
    losses = {}
    for cell in result.cells:
        evaluation = json.loads((cell.cell.run / "eval.json").read_text())
        losses[cell.arm] = evaluation["tuned"]["overall"]["loss"]["value"]
        assert rows[cell.arm]["losses"] == [losses[cell.arm]]
        assert rows[cell.arm]["tokens"] == rows["lora"]["tokens"], "all arms see as many tokens"
    assert rows["lora"]["remains"] == 1 and rows["finegates"]["remains"] <= 0.7
    assert rows["random"]["remains"] == rows["finegates"]["remains"]
    gap = next(g for g in written["gaps"] if (g["arm"], g["rival"], g["metric"]) == ("finegates", "random", "loss"))
    assert gap["difference"]["value"] == pytest.approx(losses["finegates"] - losses["random"], abs=1e-9)
    assert gap["by_seed"] == [pytest.approx(losses["finegates"] - losses["random"])]
    text = (folder / "run" / "comparison.md").read_text()
    assert text == result.markdown() and "| random |" in text and "Size and cost" in text
    assert (folder / "run" / "comparison.svg").read_text().lstrip().startswith("<?xml")


def test_rivals_differ_in_the_choice_alone():
    config = FineGatesConfig(target=0.6, gates={"band": 0.4, "attention": "none"}, settle={"unit": 32}, lora={"r": 8})
    for name in RIVALS:
        rival = rival_of(config, name)
        assert rival.baseline == name and rival.target == 0.6 and rival.lora == config.lora
        assert (
            rival.settle.unit == 32 and rival.gates.attention == "none" and rival.schedule.hold == config.schedule.hold
        )
    dense = rival_of(config, DENSE)
    assert not dense.cuts and dense.lora == config.lora


def test_what_cannot_be_compared_is_refused(tmp_path):
    recipe = load_recipe(slim_recipe(tmp_path))
    alone = recipe.model_copy(update={"methods": (FineGatesConfig(baseline="random"),)})
    with pytest.raises(MethodError, match="rivals itself"):
        config_of(alone)
    with pytest.raises(MethodError, match="finegates alone"):
        config_of(recipe.model_copy(update={"methods": (*recipe.methods, *recipe.methods)}))
    with pytest.raises(MethodError, match="LoRA"):
        rival_of(FineGatesConfig(), DENSE)
    for wrong in (Choices(arms=("nonsense",)), Choices(seeds=()), Choices(targets=(1.5,)), Choices(targets=())):
        with pytest.raises(UsageError):
            wrong.check()
    assert set(RIVALS) < set(ARMS)
