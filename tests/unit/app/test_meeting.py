"""`sparsmith data overlap` through the command line, and `sparsmith eval` of a run, which keeps clean and seen sets apart."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from sparsmith.app.meeting import overlap_of_run
from sparsmith.app.recipes import measured_recipe
from sparsmith.cli import main
from sparsmith.data.overlap_search import trained_by
from sparsmith.errors import CheckpointError
from sparsmith.runs import RunFolder
from tests.kit.small_run import make_recipe


def printed(capsys, *arguments) -> dict:
    code = main([*map(str, arguments), "--json"])
    out = capsys.readouterr().out
    assert code == 0, out
    return json.loads(out)


def change(path: Path, edit) -> Path:
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    edit(recipe)
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    """Two training sources; one evaluation set of each of their files, and one of rows that nobody trained on."""
    folder = tmp_path_factory.mktemp("meeting")
    path = make_recipe(folder, steps=4, save_every=None, eval_every=None)
    rows = [{"prompt": f"say {n * n} and {n}", "completion": str(n)} for n in range(5)]
    (folder / "fresh.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def edit(recipe):
        recipe["data"]["eval"].append({"name": "fresh", "domain": "sums", "path": "fresh.jsonl"})
        recipe["data"]["train"][0]["licence"] = "CC0-1.0"
        recipe["data"]["train"][0]["family"] = "our_sums"

    return change(path, edit)


@pytest.fixture(scope="module")
def run(recipe) -> Path:
    assert main(["tune", str(recipe)]) == 0
    return recipe.parent / "run"


def test_the_verb_tells_every_set(recipe, capsys):
    found = printed(capsys, "data", "overlap", recipe)
    assert {name: one["verdict"] for name, one in found["sets"].items()}["fresh"] == "clean"
    assert found["clean"] == ["fresh"] and found["seen"] == ["sums_held", "words_held"]
    assert set(found["sets"]["words_held"]["shared"]) == {"same file", "family words"}
    # its own tag takes the place of its name, so that the file alone is shared
    assert set(found["sets"]["sums_held"]["shared"]) == {"same file"}
    assert all(rows > 60 for rows in found["trained"].values())
    assert main(["data", "overlap", str(recipe)]) == 0
    text = capsys.readouterr().out
    assert "words_held" in text and "same file: words" in text and "training rows" in text


def test_a_preset_of_the_base_counts_too(recipe, capsys):
    boolq = "data.eval.2.name=boolq"
    assert printed(capsys, "data", "overlap", recipe, boolq)["sets"]["boolq"]["verdict"] == "clean"
    found = printed(capsys, "data", "overlap", recipe, boolq, "--preset", "flan2022")
    assert found["sets"]["boolq"]["verdict"] == "seen" and found["presets"] == ["flan2022"]


def test_faults_of_the_verb(recipe, tmp_path, capsys):
    assert main(["data", "overlap", str(recipe), "--preset", "flan"]) == 2
    assert "flan2022" in capsys.readouterr().err
    assert main(["data", "overlap", str(recipe), "data.eval=[]"]) == 2
    assert "data.eval" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert main(["data", "overlap", str(recipe), "--out", str(tmp_path / "file")]) == 2
    assert "--out" in capsys.readouterr().err


def test_the_evaluation_of_a_run_keeps_them_apart(recipe, run, capsys):
    found = printed(capsys, "eval", run)
    assert found["overlap"]["basis"].startswith("families and files alone")
    averages = found["overlap"]["averages"]
    assert averages["clean"]["sets"] == ["fresh"] and averages["seen"]["sets"] == ["sums_held", "words_held"]
    assert averages["clean"]["overall"]["loss"] == found["sets"]["fresh"]["loss"]
    both = [found["sets"][name]["loss"]["value"] for name in ("sums_held", "words_held")]
    assert averages["seen"]["overall"]["loss"]["value"] == pytest.approx(sum(both) / 2, rel=1e-12)
    assert found["overall"] == {} and found["domains"] == {}
    assert main(["eval", str(run)]) == 0
    text = capsys.readouterr().out
    assert "clean: fresh" in text and "seen: sums_held, words_held" in text and "mean of domains" not in text
    # a model that no recipe is known of is shown as ever
    assert "overlap" not in printed(capsys, "eval", recipe.parent / "base", "--recipe", recipe)


def test_the_stored_report_is_used_while_it_is_of_the_same_rows(recipe, run, capsys):
    stored = printed(capsys, "data", "overlap", recipe, "--out", run)
    file = run / "overlap.json"

    def basis(limit: int | None = None) -> str:
        own = measured_recipe(run / "recipe.yaml", [] if limit is None else [f"data.eval.2.limit={limit}"])
        return overlap_of_run(RunFolder(run), trained_by(own.data, own.train.seed), own).basis

    try:
        assert printed(capsys, "eval", run)["overlap"]["basis"] == stored["basis"] == basis()
        assert "of other sources and was not used" in basis(limit=3)
        file.write_text(json.dumps({**stored, "files": dict.fromkeys(stored["files"], "0" * 64)}))
        assert "of other bytes of" in basis()
        file.write_text("{}")
        with pytest.raises(CheckpointError, match=r"overlap\.json"):
            basis()
    finally:
        file.unlink()


def test_licence_and_family_stand_in_the_report_and_the_card(run, tmp_path, capsys):
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "CC0-1.0" in page and "our_sums" in page and "licence" in page
    assert main(["export", str(run), str(tmp_path / "out"), "--no-proof"]) == 0
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    line = next(line for line in card.splitlines() if line.startswith("| sums | train |"))
    assert line.split(" | ")[2:4] == [
        "sums",
        str(json.loads((run / "data.json").read_text())["counts"]["train"]["sums"]["kept"]),
    ]
    assert line.endswith("| our_sums | CC0-1.0 |")
    assert "| words_held | eval |" in card
