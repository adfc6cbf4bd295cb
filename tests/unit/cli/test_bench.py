"""`sparsmith bench` on pico models, and `generate` with what it writes: files and figures, none of them timed."""

from __future__ import annotations

import json
import shutil

import pytest

from sparsmith.cli import main
from tests.kit.soft_run import EXITS, LAYERS, PESC, crafted_run

QUICK = ["--batch", "2", "--context", "12", "--new-tokens", "6", "--repeats", "1", "--prompts", "4", "--rows", "4"]


@pytest.fixture(scope="module")
def soft(tmp_path_factory):
    """A measured run; (its folder, what the command printed as JSON)."""
    run = crafted_run(tmp_path_factory.mktemp("soft"))
    return run, spoken("bench", run, *QUICK, "--calibrate", "0.5")


def spoken(*arguments):
    """The JSON of a command that ends well."""
    from contextlib import redirect_stdout
    from io import StringIO

    text = StringIO()
    with redirect_stdout(text):
        code = main([*map(str, arguments), "--json"])
    assert code == 0, text.getvalue()
    return json.loads(text.getvalue())


def refused(capsys, *arguments):
    code = main([*map(str, arguments)])
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("error: ")
    return code, err


def test_every_depth_stands_beside_the_base(soft):
    run, found = soft
    rows = found["speed"]
    assert [(row["system"], row["depth"]) for row in rows] == [("base", LAYERS), *(("tuned", n) for n in EXITS)]
    shares = [row["predicted_share"] for row in rows[1:]]
    assert shares == sorted(shares) and shares[-1] == 1.0 and rows[0]["predicted_share"] == 1.0
    sizes = [row["weights_bytes"] for row in rows]
    assert sizes[1] < sizes[2] < sizes[3] == sizes[0]
    assert all(set(row["ms_per_token"]) == {"1", "2"} and row["loss"] > 0 for row in rows)
    assert all(timing["low"] <= timing["value"] for row in rows for timing in row["ms_per_token"].values())
    assert rows[0]["loss"] == pytest.approx(rows[-1]["loss"], abs=1e-5)  # crafting alone leaves the full depth as it is
    assert json.loads((run / "bench.json").read_text()) == {key: found[key] for key in found}


def test_ways_of_writing(soft):
    _, found = soft
    ways = {way["name"]: way for way in found["ways"]}
    drafted, exits = ("1:2", "1:4", "2:2", "2:4"), ("calibrated for 0.5", "0.9", "0.7")
    assert list(ways) == [
        *("token by token", "depth 1", "depth 2"),
        *(f"drafts {name}" for name in drafted),
        *(f"exits {name}" for name in exits),
    ]
    drafts = [way for way in ways.values() if way["kind"] == "speculation"]
    assert all(way["same_text"] is True and 0 <= way["acceptance"] <= 1 and way["drafted"] > 0 for way in drafts)
    left = [way for way in ways.values() if way["kind"] == "exits"]
    assert all(sum(way["histogram"].values()) == way["tokens"] for way in left)
    assert all(1 <= way["mean_depth"] <= LAYERS and 0 <= way["agreement"] <= 1 for way in left)
    assert ways["token by token"]["loss"] == ways["drafts 2:4"]["loss"] == found["speed"][-1]["loss"]
    assert ways["depth 1"]["loss"] == found["speed"][1]["loss"] and ways["depth 1"]["same_text"] is None


def test_exits_hold_the_tokens_with_their_depths(soft):
    run, found = soft
    exits = json.loads((run / "exits.json").read_text())
    ways = {way["name"]: way for way in found["ways"]}
    assert exits["histograms"][exits["shown"]] == ways[exits["shown"]]["histogram"]
    assert len(exits["prompts"]) == 3 and exits["depths"] == EXITS
    assert {depth for prompt in exits["prompts"] for _, depth in prompt["tokens"]} <= set(EXITS)


def test_the_profile_is_what_a_budget_in_time_reads(soft):
    run, found = soft
    full = found["speed"][-1]["ms_per_token"]["1"]["value"]
    told = spoken(
        "generate", run, "-p", "1+1=", "--budget", f"{2 * full + 1000:.3f}ms", "--stats", "--max-new-tokens", 3
    )
    assert told["stats"]["depth"] == LAYERS
    assert {row["batch"] for row in json.loads((run / "soft_profile.json").read_text())["profiles"]} == {1, 2}


@pytest.mark.parametrize(
    ("flags", "keys"),
    [
        (["--depth", "2"], {"depth"}),
        (["--budget", "0.6"], {"depth"}),
        (["--exit-threshold", "calibrated"], {"mean_depth", "histogram", "passes"}),
        (["--exit-threshold", "1:0.1,2:0.1"], {"mean_depth", "histogram", "passes"}),
        (["--exit-threshold", "0.1", "--visit", "2"], {"mean_depth", "histogram", "passes"}),
        (["--self-speculative", "2:3"], {"acceptance", "drafted", "full_passes"}),
    ],
)
def test_every_way_streams_what_it_gives_as_json(soft, flags, keys, capsys):
    run, _ = soft
    asked = ["generate", run, "-p", "12+7=", "--max-new-tokens", "6", "--stats", *flags]
    told = spoken(*asked)
    assert keys <= set(told["stats"]) and told["stats"]["tokens"] == 6 and told["stats"]["blocks"] == LAYERS
    assert main([*map(str, asked)]) == 0
    out = capsys.readouterr().out
    assert out.startswith(told["text"] + "\n\n6 tokens in ")


def test_drafts_write_what_the_full_model_writes(soft):
    run, _ = soft
    texts = [spoken("generate", run, "-p", "12+7=", *flags)["text"] for flags in ([], ["--self-speculative", "1"])]
    assert texts[0] == texts[1]


def test_thresholds_of_another_model_are_refused(soft, tmp_path, capsys):
    run, _ = soft
    other = shutil.copytree(run, tmp_path / "run")
    file = other / "soft_thresholds.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_hash": "0" * 64}))
    code, err = refused(capsys, "generate", other, "-p", "1", "--exit-threshold", "calibrated")
    assert code == 7 and "Calibrate" in err


def test_what_is_missing_is_named(soft, tmp_path, capsys):
    bare = tmp_path / "run"
    shutil.copytree(soft[0], bare, ignore=shutil.ignore_patterns("soft_*.json"))
    assert refused(capsys, "generate", bare, "-p", "1", "--exit-threshold", "calibrated")[0] == 2
    code, err = refused(capsys, "generate", bare, "-p", "1", "--budget", "5ms")
    assert code == 9 and "sparsmith bench" in err
    code, err = refused(capsys, "generate", bare, "-p", "1", "--depth", "3")
    assert code == 6 and "1, 2, 4" in err
    code, err = refused(capsys, "generate", bare, "-p", "1", "--budget", "0.001")
    assert code == 2 and "depth 1" in err


def test_a_sparse_run_is_measured_beside_its_base(tmp_path):
    run = crafted_run(tmp_path, PESC)
    found = spoken("bench", run, *QUICK)
    assert [row["system"] for row in found["speed"]] == ["base", "tuned"] and found["ways"] == []
    assert found["speed"][0]["loss"] == pytest.approx(found["speed"][1]["loss"], abs=1e-5)
    assert sorted(path.name for path in run.glob("*.json")) == ["bench.json"]


def test_a_model_alone_and_a_table(capsys):
    assert main(["bench", "embedded", *QUICK]) == 0
    out = capsys.readouterr().out
    assert "Speed of embedded" in out and "predicted" in out and "written" not in out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["embedded", "--calibrate", "0.98"], "--out"),
        (["embedded", "--calibrate", "0.98", "--out", "x"], "one depth"),
        (["embedded", "--calibrate", "1"], "between 0 and 1"),
        (["embedded", "--context", "100000"], "--context"),
        (["embedded", "train.seed=3"], "--recipe"),
    ],
)
def test_what_cannot_be_measured(flags, words, capsys):
    code, err = refused(capsys, "bench", *flags)
    assert code == 2 and words in err
