"""The flags that choose how much of the model runs: what they mean, and every way out that is none."""

from __future__ import annotations

import pytest

from sparsmith.cli import main
from sparsmith.cli.modes import one_mode
from sparsmith.errors import UsageError


def mode(depth=None, budget=None, exit_threshold=None, self_speculative=None, **more):
    return one_mode(depth, budget, exit_threshold, self_speculative, **more)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ({}, {}),
        ({"depth": 3}, {"depth": 3}),
        ({"budget": "0.6"}, {"budget": 0.6}),
        ({"budget": " 12.5ms"}, {"budget": "12.5ms"}),
        ({"budget": "12 ms", "profile": "p.json"}, {"budget": "12 ms", "profile": "p.json"}),
        ({"exit_threshold": "0.9"}, {"exit_threshold": 0.9}),
        ({"exit_threshold": "2"}, {"exit_threshold": 2.0}),
        ({"exit_threshold": "2:0.9,4:0.8"}, {"exit_threshold": {2: 0.9, 4: 0.8}}),
        ({"exit_threshold": "calibrated", "visit": "2,3"}, {"exit_threshold": "calibrated", "visit": [2, 3]}),
        ({"self_speculative": "2"}, {"self_speculative": {"exit": 2}}),
        ({"self_speculative": "2:6"}, {"self_speculative": {"exit": 2, "draft_len": 6}}),
    ],
)
def test_what_the_flags_mean(given, meant):
    assert mode(**given) == meant


def test_a_file_of_thresholds(tmp_path):
    file = tmp_path / "soft_thresholds.json"
    file.write_text("{}")
    assert mode(exit_threshold=str(file)) == {"exit_threshold": str(file)}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"depth": 2, "budget": "0.5"}, "--depth and --budget"),
        ({"exit_threshold": "0.9", "self_speculative": "2"}, "--exit-threshold and --self-speculative"),
        ({"budget": "0"}, "--budget"),
        ({"budget": "1.5"}, "--budget"),
        ({"budget": "nan"}, "--budget"),
        ({"budget": "12s"}, "12ms"),
        ({"exit_threshold": "0"}, "--exit-threshold"),
        ({"exit_threshold": "-1"}, "--exit-threshold"),
        ({"exit_threshold": "inf"}, "--exit-threshold"),
        ({"exit_threshold": "2:0.9,3:0"}, "--exit-threshold"),
        ({"exit_threshold": "2:0.9.9"}, "--exit-threshold"),
        ({"exit_threshold": "no/such\0file"}, "--calibrate"),
        ({"self_speculative": "two"}, "2:4"),
        ({"self_speculative": "2:4:1"}, "2:4"),
        ({"visit": "2", "depth": 2}, "--exit-threshold"),
        ({"exit_threshold": "0.9", "visit": "2;3"}, "--visit"),
        ({"budget": "0.5", "profile": "p.json"}, "milliseconds"),
        ({"profile": "p.json"}, "milliseconds"),
    ],
)
def test_what_cannot_be_meant(given, words):
    with pytest.raises(UsageError, match=words):
        mode(**given)


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (["--depth", "2", "--exit-threshold", "0.9"], 2, "--depth and --exit-threshold"),
        (["--depth", "2"], 6, "method: soft"),
        (["--budget", "12ms"], 9, "sparsmith bench"),
        (["--budget", "0.1"], 2, "depth 6"),
        (["--exit-threshold", "calibrated"], 2, "--calibrate"),
        (["--exit-threshold", "0.9", "--visit", "2"], 6, "visit"),
        (["--self-speculative", "6"], 6, "full depth"),
    ],
)
def test_a_model_of_one_depth(flags, code, words, capsys):
    """Each is one line with a mend; the model is the dense one that the package brings along."""
    assert main(["generate", "embedded", "-p", "2 + 3 =", "--max-new-tokens", "2", *flags]) == code
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and words in err


def test_what_it_took_without_a_mode(capsys):
    assert main(["generate", "embedded", "-p", "2 + 3 =", "--max-new-tokens", "2", "--stats"]) == 0
    assert "tokens/s\ndepth: all 6 blocks" in capsys.readouterr().out
