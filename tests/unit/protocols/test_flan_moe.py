"""The FLAN-MoE protocol: sides that differ by their settings alone, setups that stand on each other, figures that are those of the runs."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

import sparsmith.reporting
from sparsmith.app import protocol, tuning
from sparsmith.app.recipes import load_recipe
from sparsmith.bootstrap import RowScores, contrast, paired_differences
from sparsmith.cli import main
from sparsmith.data import load_data
from sparsmith.errors import MethodError, UsageError
from sparsmith.methods.upcycle.config import UpcycleConfig
from sparsmith.protocols.cells import over_seeds
from sparsmith.protocols.flan_moe import FlanMoeComparison, check
from sparsmith.protocols.flan_moe_cells import SetupCell, Work, tuned_as_it_is
from tests.kit import forks
from tests.kit.elastic import elastic_recipe
from tests.kit.evalsets import char_tokenizer

SEEDS = [3]


def moe_recipe(folder: Path, **section) -> Path:
    path = elastic_recipe(folder, train={"steps": 4})
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    recipe["methods"] = [{"method": "upcycle", "experts": 4, "moe": {"z_coef": 0.01}}]
    first, second = recipe["data"]["train"]
    held_out = recipe["data"]["eval"]
    own = {**held_out[0], "name": "own", "metrics": ["loss"]}
    recipe["data"]["eval"] = [{**held_out[1], "name": "others"}]
    recipe["protocol"] = {
        "task_steps": 2,
        "tasks": [{"name": "one", "train": {**first, "name": "one"}, "eval": own}],
        **section,
    }
    recipe["data"]["train"] = [first, second]
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def cut_and_gone_on(tmp_path_factory):
    """(folder, comparison, names of the trainings): cut in a cell, run to its end, called once more."""
    folder = tmp_path_factory.mktemp("protocol")
    recipe = moe_recipe(folder)
    trained, train = [], tuning._Session.train

    def counted(self, checkpoint):
        trained.append(self.run.root.name)
        if trained.count("moe-seed3-instruct") == 1 and self.run.root.name == "moe-seed3-instruct":
            raise KeyboardInterrupt
        train(self, checkpoint)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning._Session, "train", counted)
        patch.setattr(sparsmith.reporting, "write_report", lambda runs, out: Path(out).write_text("page"))
        assert main(["protocol", "flan-moe", str(recipe), "--seeds", "3"]) == 130
        assert main(["protocol", "flan-moe", str(recipe), "--seeds", "3"]) == 0
        result = protocol("flan-moe", recipe, seeds=SEEDS)
    return folder, result, trained


def test_cells_run_once_and_in_their_order(cut_and_gone_on):
    _, result, trained = cut_and_gone_on
    cells = [f"{side}-seed3-{kind}" for side in ("dense", "moe") for kind in ("direct-one", "instruct", "then-one")]
    assert [cell.cell.run.name for cell in result.cells] == cells
    cut = cells.index("moe-seed3-instruct")
    assert trained == [*cells[: cut + 1], *cells[cut:]]


@pytest.mark.long
def test_eighteen_cells_survive_a_kill(tmp_path):
    """Spec test 17: three setups, two sides, three seeds; what was finished before the kill is not run again."""
    recipe, run = moe_recipe(tmp_path), tmp_path / "run"
    words = ["protocol", "flan-moe", recipe, "--seeds", "0,1,2"]
    child = forks.start(words, tmp_path / "first.log")
    while len(list(run.glob("*/report.html"))) < 7 and child.process.exitcode is None:
        time.sleep(0.05)
    child.kill_after(0)
    finished = {path.parent.name: path.stat().st_mtime_ns for path in run.glob("*/report.html")}
    assert 7 <= len(finished) < 18
    assert forks.run(words, tmp_path / "second.log") == 0, (tmp_path / "second.log").read_text()
    ended = {path.parent.name: path.stat().st_mtime_ns for path in run.glob("*/report.html")}
    assert len(ended) == 18 and {name: ended[name] for name in finished} == finished
    written = json.loads((run / "comparison.json").read_text())
    assert written["seeds"] == [0, 1, 2] and len(written["runs"]) == 18 and (run / "comparison.svg").is_file()
    assert all(len(row["figures"]["gain: 3 over 1"]["by_seed"]) == 3 for row in written["gains"])


def test_setups_stand_on_each_other(cut_and_gone_on):
    folder, _, _ = cut_and_gone_on
    recipes = {path.name: load_recipe(path / "recipe.yaml") for path in (folder / "run").iterdir() if path.is_dir()}
    assert recipes["moe-seed3-then-one"].model.path == str(folder / "run" / "moe-seed3-instruct" / "settled")
    assert recipes["moe-seed3-direct-one"].model.path == str(folder / "base")
    assert recipes["moe-seed3-then-one"].methods[0].donor == "sparse"
    assert recipes["moe-seed3-then-one"].methods[0].moe.z_coef == 0.01, "settings of the method go with it"
    assert recipes["dense-seed3-then-one"].methods[0].control == "dense"
    assert recipes["moe-seed3-direct-one"].train.steps == 2 and recipes["moe-seed3-instruct"].train.steps == 4
    assert all(recipe.protocol is None for recipe in recipes.values())


def test_both_sides_see_the_same_rows(cut_and_gone_on):
    folder, _, _ = cut_and_gone_on
    for kind in ("direct-one", "instruct", "then-one"):
        facts = [json.loads((folder / "run" / f"{s}-seed3-{kind}" / "run.json").read_text()) for s in ("dense", "moe")]
        assert facts[0]["tokens_trained"] == facts[1]["tokens_trained"]
        rows = [recipe_rows(folder / "run" / f"{side}-seed3-{kind}") for side in ("dense", "moe")]
        assert rows[0] == rows[1] and len(rows[0]) > 2


def recipe_rows(run: Path) -> list[tuple[int, ...]]:
    """The tokens of the first rows that a run trains on, drawn anew from its own recipe."""
    recipe = load_recipe(run / "recipe.yaml")
    data = load_data(recipe.data, char_tokenizer(), seed=recipe.train.seed, rows_needed=8)
    return [tuple(data.train[index]["input_ids"].tolist()) for index in range(8)]


def test_every_figure_is_that_of_a_run(cut_and_gone_on):
    folder, result, _ = cut_and_gone_on
    written = json.loads((folder / "run" / "comparison.json").read_text())

    def loss(cell, name, part="tuned"):
        found = json.loads((folder / "run" / cell / "eval.json").read_text())
        return found[part]["sets"][name]["loss"]["value"]

    table = {(row["side"], row["setup"], row["set"]): row["metrics"]["loss"]["value"] for row in written["table"]}
    assert table["dense", 1, "own"] == loss("dense-seed3-direct-one", "own")
    assert table["moe", 3, "own"] == loss("moe-seed3-then-one", "own")
    assert table["moe", 2, "others"] == loss("moe-seed3-instruct", "others")
    assert table["moe", -1, "others"] == loss("moe-seed3-instruct", "others", "base")
    gains = {(row["sparse"], row["metric"]): row["figures"] for row in written["gains"]}
    by_hand = (table["moe", 3, "own"] - table["moe", 1, "own"]) - (table["dense", 3, "own"] - table["dense", 1, "own"])
    assert gains["moe", "loss"]["gain: 3 over 1"]["value"] == pytest.approx(by_hand, abs=1e-12)
    assert gains["moe", "loss"]["gain: 3 over 1"]["by_seed"]["3"] == pytest.approx(by_hand, abs=1e-12)
    more = (table["moe", 2, "others"] - table["moe", -1, "others"]) - (
        table["dense", 2, "others"] - table["dense", -1, "others"]
    )
    assert gains["moe", "loss"]["gain: 2 over the base"]["value"] == pytest.approx(more, abs=1e-12)
    assert loss("moe-seed3-then-one", "own", "base") == loss("moe-seed3-instruct", "own"), "3 starts where 2 ends"
    assert "Matched by tokens" in result.markdown()
    assert (folder / "run" / "comparison.svg").read_text().startswith("<?xml")
    assert written["cost"][1]["total"] > written["cost"][0]["total"]


def test_continued_pre_training_stands_before_everything(tmp_path, monkeypatch):
    text = tmp_path / "plain.jsonl"
    text.write_text("".join(json.dumps({"text": f"word {n} and {n + 1}"}) + "\n" for n in range(40)), encoding="utf-8")
    source = {"name": "plain", "domain": "plain", "path": str(text), "format": "text"}
    sides = {"dense": {"settings": {"control": "dense"}}, "moe": {"start": {"train": [source], "steps": 7}}}
    loaded = load_recipe(moe_recipe(tmp_path, sides=sides))
    made = []

    def cell(work, recipe, *place):
        made.append(recipe)
        return SimpleNamespace(cell=SimpleNamespace(run=Path(recipe.output)))

    monkeypatch.setattr(Work, "_cell", cell)
    work = Work(loaded, check(loaded, SEEDS), tmp_path, None, lambda recipe, run: run.root / "settled", None)
    work.run_side("moe", 3)
    start, *others = made
    assert start.data.loss_on == "all" and start.train.steps == 7 and start.methods[0].donor == "dense"
    assert [one.name for one in start.data.sources] == ["plain"]
    assert [Path(one.output).name.removeprefix("moe-seed3-") for one in others] == [
        "direct-one",
        "instruct",
        "then-one",
    ]
    assert {Path(one.model.path).parent.name for one in others[:2]} == {"moe-seed3-start"}
    assert all(one.methods[0].donor == "sparse" and one.data.loss_on == "response" for one in others)


def with_grid(folder: Path, **section) -> Path:
    """The recipe with a grid of two learning rates and rows to choose by."""
    path = moe_recipe(folder, task_learning_rates=[0.001, 0.01], **section)
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    task = recipe["protocol"]["tasks"][0]
    task["validation"] = {**task["eval"], "name": "chosen_by"}
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return path


@pytest.mark.parametrize(("losses", "kept"), [({0.001: 2.0, 0.01: 1.5}, 0.01), ({0.001: 1.0, 0.01: 1.0}, 0.001)])
def test_a_grid_keeps_the_rate_of_the_lowest_validation_loss(tmp_path, monkeypatch, losses, kept):
    loaded = load_recipe(with_grid(tmp_path))
    made = []

    def cell(work, recipe, side, setup, task, seed):
        made.append(recipe)
        figures = {one.name: {"loss": SimpleNamespace(value=99.0)} for one in recipe.data.eval}
        if "chosen_by" in figures:
            figures["chosen_by"]["loss"].value = losses[recipe.train.learning_rate]
        run = SimpleNamespace(run=Path(recipe.output), result=SimpleNamespace(sets=figures), seed=seed)
        return SetupCell(side, setup, task, run, {})

    monkeypatch.setattr(Work, "_cell", cell)
    work = Work(loaded, check(loaded, SEEDS), tmp_path, None, lambda recipe, run: run.root / "settled", None)
    found = work.run_side("moe", 3)
    assert [(one.setup, one.kept_rate) for one in found] == [(1, kept), (2, None), (3, kept)]
    assert [Path(one.output).name for one in made if "direct" in one.output] == [
        f"moe-seed3-direct-one-lr{rate:g}" for rate in (0.001, 0.01)
    ]
    instruct = next(one for one in made if one.output.endswith("instruct"))
    assert "chosen_by" not in [one.name for one in instruct.data.eval], "the rows of the choice are not reported"
    compared = FlanMoeComparison(work.settings, tuple(found), {"moe": 1}, ("others",))
    assert [(row["setup"], row["rates"]) for row in compared.kept_rates()] == [(1, {"3": kept}), (3, {"3": kept})]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"task_learning_rates": [0.01]}, "two or more"),
        ({"task_learning_rates": [0.01, 0.01]}, "each once"),
        ({"task_learning_rate": 0.1}, "one of the two"),
        ({"task_learning_rates": []}, "rows that nothing reads"),
        ({"setups": [2]}, "no effect"),
    ],
)
def test_a_grid_that_chooses_nothing(tmp_path, capsys, change, match):
    path = with_grid(tmp_path)
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    recipe["protocol"].update(change)
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    assert main(["plan", str(path)]) == 3
    assert match in capsys.readouterr().err


def test_a_grid_without_rows_to_choose_by(tmp_path, capsys):
    assert main(["plan", str(moe_recipe(tmp_path, task_learning_rates=[0.001, 0.01]))]) == 3
    assert "Add `validation`" in capsys.readouterr().err


def test_a_contrast_is_the_signed_sum_on_the_same_draws():
    rows = {name: {"s": {"loss": RowScores(values, (1.0,) * 4)}} for name, values in _ROWS.items()}
    parts = [(1, rows["b after"]), (-1, rows["b before"]), (-1, rows["a after"]), (1, rows["a before"])]
    found = contrast(parts, {"s": "d"}, seed=1).overall["loss"]
    by_hand = [
        b - a - (d - c) for b, a, d, c in zip(*(_ROWS[n] for n in ("b after", "b before", "a after", "a before")))
    ]
    assert found.value == pytest.approx(sum(by_hand) / 4)
    rows_of = {"s": {"loss": RowScores(tuple(by_hand), (1.0,) * 4)}}
    zero = {"s": {"loss": RowScores((0.0,) * 4, (1.0,) * 4)}}
    pair = paired_differences(zero, rows_of, {"s": "d"}, seed=1).overall["loss"]
    assert (found.low, found.high) == pytest.approx((pair.low, pair.high))


_ROWS = {
    "a before": (1.0, 2.0, 3.0, 4.0),
    "a after": (0.5, 2.5, 2.0, 1.0),
    "b before": (1.5, 0.5, 3.0, 2.0),
    "b after": (0.25, 0.5, 1.0, 5.0),
}


@pytest.mark.parametrize(
    ("values", "half"),
    [
        ((1.0,), None),
        ((1.0, 3.0), 12.706),
        ((1.0, 2.0, 3.0), 4.303 / 3**0.5),
        (tuple(range(40)), 2.0227 * 11.690452 / 40**0.5),
    ],
)
def test_an_interval_over_seeds_is_students(values, half):
    assert over_seeds(values) == (half if half is None else pytest.approx(half, rel=1e-3))


def test_an_interval_over_seeds_covers_the_truth_nineteen_times_of_twenty():
    draws = torch.randn(4000, 3, generator=torch.Generator().manual_seed(1)).tolist()
    held = sum(abs(sum(three) / 3) <= over_seeds(three) for three in draws) / len(draws)
    assert abs(held - 0.95) < 0.01  # three standard errors of a share of 4,000


def test_flops_match_by_fewer_steps_of_the_same_stream(tmp_path):
    recipe = load_recipe(moe_recipe(tmp_path, match="flops"))
    work = Work(recipe, check(recipe, [0]), tmp_path, None, None, None)
    share = work.flops("dense") / work.flops("moe")
    assert share < 1 and work._steps(1000, "moe") == round(1000 * share) and work._steps(1000, "dense") == 1000


def test_a_side_may_stand_on_the_embedded_base(tmp_path):
    recipe = load_recipe(moe_recipe(tmp_path), ("model.path=embedded",))
    work = Work(recipe, check(recipe, [0]), tmp_path, None, None, None)
    assert 0 < work.flops("dense") < work.flops("moe")


def test_what_is_tuned_further_keeps_its_routers():
    config = UpcycleConfig(
        experts=4, top_k=1, layers="every-2", moe={"router": "top1", "jitter": 0.01, "balance_coef": 0.5}
    )
    later = tuned_as_it_is(config)
    assert later.donor == "sparse" and later.moe == config.moe and later.experts == 8
    assert tuned_as_it_is(later) is later


@pytest.mark.parametrize(
    ("section", "kind", "match"),
    [
        (
            {"sides": {"dense": {"settings": {"control": "dense"}}, "moe": {"settings": {"expert": 3}}}},
            MethodError,
            "expert",
        ),
        ({"pairs": [["dense", "mo"]]}, None, "`moe`"),
        ({"tasks": []}, None, "tasks to tune on"),
        ({"setups": [2]}, None, "no effect"),
        ({"setups": []}, None, "some of 1, 2, 3"),
    ],
)
def test_a_section_that_cannot_be_run(tmp_path, section, kind, match, capsys):
    path = moe_recipe(tmp_path, **section)
    assert main(["protocol", "flan-moe", str(path), "--seeds", "0"]) == (6 if kind else 3)
    assert match in capsys.readouterr().err


def test_recipes_that_are_not_for_it(tmp_path):
    path = moe_recipe(tmp_path)
    recipe = load_recipe(path)
    with pytest.raises(UsageError, match="no seed"):
        check(recipe, [])
    with pytest.raises(UsageError, match="no section"):
        check(recipe.model_copy(update={"protocol": None}), [0])
    with pytest.raises(MethodError, match="upcycle alone"):
        check(load_recipe(elastic_recipe(tmp_path)).model_copy(update={"protocol": recipe.protocol}), [0])
    with pytest.raises(MethodError, match="dense twin under"):
        check(recipe.model_copy(update={"methods": (UpcycleConfig(control="dense"),)}), [0])


def test_what_would_fail_after_hours_is_refused_at_once(tmp_path, capsys):
    choosing = {"dense": {"settings": {"control": "dense"}}, "moe": {"settings": {"moe": {"router": "expert_choice"}}}}
    path = moe_recipe(tmp_path, sides=choosing)
    assert main(["protocol", "flan-moe", str(path), "--seeds", "0"]) == 6
    assert "experts that choose" in capsys.readouterr().err and not (tmp_path / "run").exists()
    path = moe_recipe(tmp_path)
    assert main(["protocol", "flan-moe", str(path), "train.steps=null", "train.epochs=1", "--seeds", "0"]) == 6
    assert "in which sides are matched" in capsys.readouterr().err


def test_a_chance_without_ranks_is_refused(tmp_path, capsys):
    path = moe_recipe(tmp_path)
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    recipe["protocol"]["tasks"][0]["chance"] = 50
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    assert main(["plan", str(path)]) == 3
    assert "rank among eval.metrics" in capsys.readouterr().err


def test_a_source_of_a_task_that_is_not_there(tmp_path, capsys):
    path = moe_recipe(tmp_path)
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    recipe["protocol"]["tasks"][0]["train"]["path"] = "nowhere.jsonl"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    assert main(["plan", str(path)]) == 0, "a plan reads no rows"
    assert main(["protocol", "flan-moe", str(path), "--seeds", "0"]) == 3
    assert "protocol.tasks.0.train.path" in capsys.readouterr().err
