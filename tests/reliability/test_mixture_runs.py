"""A run on an instruction mixture through the command line: shown, planned, tuned, killed, resumed to the same bits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from sparsmith.cli import main
from tests.kit import forks
from tests.kit.small_run import make_recipe
from tests.kit.tasks import mixture, write_tasks
from tests.kit.trials.kills import bits_of, count_writes, die_at_write


def recipe_of(folder: Path) -> Path:
    """The small run of the other trials, on a mixture in place of its sources."""
    path = make_recipe(folder, steps=8, save_every=3, eval_every=None)
    write_tasks(folder)
    made = yaml.safe_load(path.read_text(encoding="utf-8"))
    made["data"] = {key: made["data"][key] for key in ("template", "workers", "cache")}
    made["data"] |= {"mixture": mixture(fewshot_max=2), "max_length": 256}
    path.write_text(yaml.safe_dump(made), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return recipe_of(tmp_path_factory.mktemp("mixture"))


def test_it_is_shown_and_planned(recipe, capsys):
    assert main(["data", "show", str(recipe), "-n", "5", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert len(shown["rows"]) == 5 and {row["domain"] for row in shown["rows"]} <= {"maths", "general"}
    counts = {record["source"]: record for record in shown["counts"]}
    assert [round(counts[name]["share"], 4) for name in ("sums", "picks", "wishes")] == [0.25, 0.4286, 0.3214]
    assert all(sum(record["variants"].values()) == record["read"] for record in counts.values())
    assert main(["plan", str(recipe), "--json"]) == 0


def test_a_killed_run_resumes_to_the_uncut_bits(recipe):
    folder = recipe.parent
    uncut, calls = folder / "uncut", folder / "calls"
    assert forks.run(["tune", recipe, f"output={uncut}"], folder / "uncut.log", count_writes, calls) == 0
    wanted, writes = bits_of(uncut), int(calls.read_text())
    assert len(wanted["losses"]) == 8 and wanted["weights"]
    for number, when in enumerate((writes // 3, 2 * writes // 3)):
        run, log = folder / f"run{number}", folder / f"run{number}.log"
        command = ["tune", recipe, f"output={run}", f"data.cache={folder / f'cache{number}'}"]
        forks.run(command, log, die_at_write, when)
        assert not (run / "report.html").is_file()
        assert forks.run(command, log) == 0
        assert bits_of(run) == wanted
    told = json.loads((uncut / "data.json").read_text(encoding="utf-8"))
    assert told["domains"] == ["maths", "general"] and told["counts"]["train"]["picks"]["shots"] > 0
