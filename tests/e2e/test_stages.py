"""A recipe of two stages through the command line on a pico base: killed inside a stage and between them, edited, moved, exported."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

import sparsmith as sm
from sparsmith import app, durable
from sparsmith.cli import main
from sparsmith.crafting.base_model import load_base
from sparsmith.recipe.schema import ModelSettings
from sparsmith.runs import open_run
from tests.kit import forks
from tests.kit.staged_run import STEPS, staged_recipe
from tests.kit.trials.kills import bits_of

SOFT = {"method": "soft", "exits": [1, 2], "guard": {"max_loss_gap": 9.0}}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    return staged_recipe(tmp_path_factory.mktemp("staged"))


@pytest.fixture(scope="module")
def whole(recipe) -> Path:
    """The run that nothing has cut."""
    folder = recipe.parent / "run"
    assert run_forked(["tune", recipe], recipe.parent / "run.log") == 0
    return folder


def run_forked(arguments: list, log: Path, prepare=None, *given) -> int:
    """A run of two stages with a proof in between takes minutes where the processor is shared."""
    return forks.start(arguments, log, prepare, *given).wait(600)


def said(capsys, *arguments) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main([str(argument) for argument in arguments])
    return code, *capsys.readouterr()


def stages_of(run: Path) -> list[Path]:
    return [run / "stages" / "1-first", run / "stages" / "2-pesc"]


def all_bits(run: Path) -> list[dict]:
    settled = durable.file_digest(stages_of(run)[0] / "settled" / "model.safetensors").hex()
    return [*(bits_of(stage) for stage in stages_of(run)), {"settled": settled}]


def test_the_second_stage_starts_from_what_the_first_has_settled(whole):
    first, second = (json.loads((stage / "eval.json").read_text()) for stage in stages_of(whole))
    assert first["tuned"]["fingerprints"] == second["base"]["fingerprints"]
    for domain, figures in first["tuned"]["domains"].items():
        assert second["base"]["domains"][domain]["loss"]["value"] == pytest.approx(figures["loss"]["value"], abs=1e-4)
        assert figures["loss"]["value"] < first["base"]["domains"][domain]["loss"]["value"]
    steps = [json.loads((stage / "run.json").read_text())["steps"] for stage in stages_of(whole)]
    assert tuple(steps) == STEPS
    plan = json.loads((stages_of(whole)[1] / "plan.json").read_text())
    planned = app.plan(whole.parent / "recipe.yaml").stages[1].plan
    assert plan["parameters"] == planned.as_dict()["parameters"], "planned from configs alone, built as planned"


def test_the_settled_result_is_a_stock_checkpoint_with_its_proof(whole):
    settled = stages_of(whole)[0] / "settled"
    durable.verify_folder(settled)
    proof = json.loads((settled / "proof.json").read_text())
    assert proof["passed"] is True
    assert json.loads((stages_of(whole)[0] / "proof.json").read_text())["settled"] == proof
    dense = load_base(ModelSettings(path=str(settled)))
    assert type(dense).__name__ == "LlamaForCausalLM"


def test_the_page_of_the_whole(whole):
    page = (whole / "report.html").read_text(encoding="utf-8")
    table = page[page.index('id="before-and-after"') : page.index('id="stages"')]
    assert table.index("base</th>") < table.index("1-first</th>") < table.index("2-pesc</th>")
    results = [json.loads((stage / "eval.json").read_text()) for stage in stages_of(whole)]
    for result in (results[0]["base"], results[0]["tuned"], results[1]["tuned"]):
        for domain in ("sums", "words"):
            assert f"{result['domains'][domain]['loss']['value']:.3f}" in table
    for stage in stages_of(whole):
        assert f'href="stages/{stage.name}/report.html"' in page and (stage / "report.html").is_file()
    proofs = page[page.index('id="proof"') :]
    assert proofs.index("<h3>1-first</h3>") < proofs.index("settled") < proofs.index("<h3>2-pesc</h3>")


def die_at(folder: str, place: str) -> None:
    """In the child: end the process, unasked, right before a folder of that name is put in its place (or right after)."""
    put = durable._put_in_place

    def killed(temp: Path, target: Path) -> None:
        meant = target.as_posix().endswith(folder)
        if meant and place == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        put(temp, target)
        if meant:
            os.kill(os.getpid(), signal.SIGKILL)

    durable._put_in_place = killed


@pytest.mark.parametrize(
    ("folder", "place"),
    [
        ("1-first/settled", "before"),
        ("2-pesc/model", "after"),
        pytest.param("1-first/checkpoints/checkpoint-3", "after", marks=pytest.mark.long),
        pytest.param("1-first/settled", "after", marks=pytest.mark.long),
        pytest.param("2-pesc/checkpoints/checkpoint-6", "before", marks=pytest.mark.long),
    ],
)
def test_a_killed_run_goes_on_to_the_same_bits(recipe, whole, folder, place):
    run = recipe.parent / f"killed-{folder.replace('/', '-')}-{place}"
    log, command = run.with_suffix(".log"), ["tune", recipe, f"output={run}"]
    assert run_forked(command, log, die_at, folder, place) == -signal.SIGKILL
    done = [stage / "run.json" for stage in stages_of(run) if (stage / "run.json").is_file()]
    times = [file.stat().st_mtime_ns for file in done]
    assert len(done) == (0 if "checkpoint-3" in folder else 1)
    assert run_forked(command, log) == 0
    assert [file.stat().st_mtime_ns for file in done] == times, "a finished stage is not run again"
    assert all_bits(run) == all_bits(whole)
    assert "settled" in json.loads((stages_of(run)[0] / "proof.json").read_text())
    assert not [path for path in run.rglob(".*") if ".writing-" in path.name]


def test_an_edit_of_a_begun_stage_is_refused_and_of_a_later_one_is_not(recipe, capsys):
    run = recipe.parent / "edited"
    log, command = run.with_suffix(".log"), ["tune", recipe, f"output={run}"]
    assert run_forked(command, log, die_at, "1-first/settled", "after") == -signal.SIGKILL
    edits = ["stages.0.train.steps=5", "stages.0.methods.0.lora.r=8", "stages.0.train.keep=5"]
    code, _, err = said(capsys, *command, *edits)
    assert code == 3 and err.count("as the run began") == 2, err
    assert "stages.0.train.steps" in err and "stages.0.methods.0.lora.r" in err
    code, _, err = said(capsys, *command, "stages.0.name=other")
    assert code == 3 and "stages.0.name" in err
    assert run_forked([*command, "stages.1.train.steps=3", "stages.1.name=late"], log) == 0
    assert json.loads((run / "stages" / "2-late" / "run.json").read_text())["steps"] == 3
    assert open_run(run).root.name == "2-late"


def test_a_finished_run_and_foreign_folders_are_left_alone(recipe, whole, capsys):
    code, _, err = said(capsys, "tune", recipe)
    assert code == 2 and "a finished run" in err
    code, _, err = said(capsys, "tune", recipe, "stages.1.train.steps=9")
    assert code == 2 and "a finished run" in err
    other = recipe.parent / "foreign"
    other.mkdir()
    (other / "letter.txt").write_text("mine")
    code, _, err = said(capsys, "tune", recipe, f"output={other}")
    assert code == 2 and "other files" in err


def test_a_moved_run_answers_every_verb(whole, capsys, tmp_path):
    moved = tmp_path / "elsewhere"
    shutil.copytree(whole, moved)
    aside = whole.with_name("aside")
    whole.rename(aside)
    try:
        first = json.loads((stages_of(moved)[1] / "eval.json").read_text())["tuned"]["overall"]["loss"]["value"]
        code, out, err = said(capsys, "eval", moved, "--json")
        assert code == 0, err
        assert json.loads(out)["overall"]["loss"]["value"] == pytest.approx(first, abs=1e-6)
        code, out, _ = said(capsys, "generate", moved, "-p", "12+7=", "--max-new-tokens", "3", "--json")
        assert code == 0 and json.loads(out)["prompt"] == "12+7="
        code, out, _ = said(capsys, "verify", moved, "--json")
        kinds = {(Path(row["path"]).name, row["kind"]) for row in json.loads(out)["folders"]}
        assert code == 0 and {("settled", "full"), ("1-first", "run"), ("2-pesc", "run")} <= kinds
        code, _, err = said(capsys, "export", moved, tmp_path / "out")
        assert code == 0, err
        ids = torch.tensor([[5, 6, 7, 8]])
        with torch.no_grad():
            mine, theirs = sm.load(moved)(ids).logits, sm.load(tmp_path / "out")(ids).logits
        assert torch.allclose(mine, theirs, atol=1e-4)
        assert "export" in json.loads((stages_of(moved)[1] / "proof.json").read_text())
        assert ">export<" in (moved / "report.html").read_text(encoding="utf-8"), (
            "the page of the whole is written anew"
        )
        quick = [
            "--batch",
            "1",
            "--context",
            "8",
            "--new-tokens",
            "2",
            "--repeats",
            "1",
            "--prompts",
            "2",
            "--rows",
            "2",
        ]
        code, _, err = said(capsys, "bench", moved, *quick)
        assert code == 0 and (stages_of(moved)[1] / "bench.json").is_file(), err
        code, _, _ = said(capsys, "report", moved, "--out", tmp_path / "page.html")
        assert code == 0 and 'href="elsewhere/stages/1-first/report.html"' in (tmp_path / "page.html").read_text()
    finally:
        aside.rename(whole)


def test_a_stage_torn_out_of_its_run_says_what_it_misses(whole, capsys, tmp_path):
    shutil.copytree(stages_of(whole)[1], tmp_path / "2-pesc")
    code, _, err = said(capsys, "eval", tmp_path / "2-pesc")
    assert code == 7 and "settled" in err and "base" in err


def test_a_moved_cut_run_goes_on(recipe, whole, tmp_path):
    run, log = recipe.parent / "cut", recipe.parent / "cut.log"
    killed = run_forked(["tune", recipe, f"output={run}"], log, die_at, "2-pesc/checkpoints/checkpoint-3", "after")
    assert killed == -signal.SIGKILL
    run.rename(tmp_path / "gone-on")
    assert run_forked(["tune", recipe, f"output={tmp_path / 'gone-on'}"], log) == 0, log.read_text()
    assert all_bits(tmp_path / "gone-on") == all_bits(whole)


def test_a_damaged_result_between_stages_is_named(recipe, capsys):
    run, log = recipe.parent / "damaged", recipe.parent / "damaged.log"
    command = ["tune", recipe, f"output={run}"]
    assert run_forked(command, log, die_at, "1-first/settled", "after") == -signal.SIGKILL
    weights = stages_of(run)[0] / "settled" / "model.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    code, _, err = said(capsys, *command)
    assert code == 7 and str(weights) in err


def test_exits_then_experts_from_python(tmp_path, capsys):
    """A stage with a control beside it; rows of its own; `sparsmith.tune` on a loaded recipe."""
    path = staged_recipe(tmp_path, SOFT)
    overrides = ["stages.0.train.steps=2", "stages.1.train.steps=2", "stages.1.data.max_length=48"]
    rows = "stages.1.data.eval=[{name: more, domain: words, path: words.jsonl, heldout: 0.1, part: heldout, limit: 3}]"
    run = sm.tune(sm.load_recipe(path, [*overrides, rows]))
    assert (run / "stages" / "1-first" / "control" / "run.json").is_file()
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "1-first, rows of 2-pesc" in page and "Not every stage is measured on the same rows" in page
    assert sm.load(run).config.model_type == "sparsmith_pesc"


def test_cut_then_experts_on_the_freed_budget(tmp_path, capsys):
    """Attention gates leave an expectation in the plan; what was cut is what the second stage is planned and built on."""
    cut = {"method": "finegates", "target": 0.7, "baseline": "magnitude", "settle": {"unit": 4}}
    path = staged_recipe(tmp_path, cut)
    small = ["stages.0.train.steps=4", "stages.1.train.steps=2"]
    code, out, err = said(capsys, "plan", path, *small, "--json")
    assert code == 0, err
    first, second = json.loads(out)["stages"]
    assert any("an expectation" in note for note in second["notes"])
    code, _, err = said(capsys, "tune", path, *small)
    assert code == 0, err
    run = tmp_path / "run"
    plan = json.loads((stages_of(run)[1] / "plan.json").read_text())
    dense = load_base(ModelSettings(path=str(stages_of(run)[0] / "settled")))
    held = sum(p.numel() for p in dense.parameters())
    assert plan["parameters"]["base"] == held < first["parameters"]["base"]
    assert second["parameters"]["base"] == pytest.approx(held, rel=0.1)


def test_a_failed_guard_is_not_built_upon(tmp_path, capsys):
    path = staged_recipe(tmp_path, {**SOFT, "guard": {"max_loss_gap": 0.0}})
    for _ in range(2):
        code, _, err = said(capsys, "tune", path, "stages.0.train.steps=4", "stages.0.train.learning_rate=0.05")
        assert code == 8 and "guard.json" in err, err
    assert not (tmp_path / "run" / "stages" / "2-pesc").exists()


def test_data_show_tells_of_every_stage_and_a_protocol_refuses(recipe, capsys):
    code, out, _ = said(capsys, "data", "show", recipe, "-n", 1, "--json", "stages.1.data.max_length=32")
    told = json.loads(out)["stages"]
    assert code == 0 and [stage["name"] for stage in told] == ["1-first", "2-pesc"]
    assert all(len(stage["rows"]) == 1 for stage in told) and told[1]["rows"][0]["tokens"] <= 32
    assert said(capsys, "data", "show", recipe)[1].index("Stage 1-first") >= 0
    code, _, err = said(capsys, "protocol", "pesc", recipe)
    assert code == 2 and "a protocol compares one crafting" in err
    code, out, _ = said(capsys, "eval", recipe.parent / "base", "--recipe", recipe, "--json")
    assert code == 0 and json.loads(out)["overall"]["loss"]["n"] == 8


def test_too_little_disk_is_told_before_the_first_step(recipe, capsys, monkeypatch):
    monkeypatch.setattr(durable, "free_bytes", lambda path: 1000)
    code, _, err = said(capsys, "tune", recipe, f"output={recipe.parent / 'full'}")
    assert code == 9 and "1,000 bytes free" in err
    assert not (recipe.parent / "full" / "stages").exists()


def test_what_an_earlier_stage_trained_on_is_seen_too(whole, recipe):
    """The evaluation sets of the last stage against the rows of every stage."""
    import yaml

    other = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    other["stages"][1]["data"] = {"train": [other["data"]["train"][0]]}
    file = recipe.parent / "seen.yaml"
    file.write_text(yaml.safe_dump(other, sort_keys=False))
    found = app.data_overlap(file)
    assert found.seen() == ["sums_held", "words_held"] and found.trained.keys() == {"sums", "words"}
    apart = app.evaluate_apart(whole)
    assert set(apart.report.trained) == {"sums", "words"} and apart.report.clean() == []
