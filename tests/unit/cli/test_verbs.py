"""The verbs and their flags, frozen: a change here is a change of the command line, and belongs in the changelog."""

from __future__ import annotations

from typing import Any

import pytest
import typer

from sparsmith.cli import main
from sparsmith.cli.entry import app

COMMON = {"--json", "--debug"}
OVERRIDES = {"RECIPE", "KEY=VALUE"}
VERBS: dict[str, set[str]] = {
    "demo": {"--out"},
    "plan": OVERRIDES,
    "tune": OVERRIDES,
    "eval": {"RUN|MODEL", "KEY=VALUE", "--recipe", "--seed"}
    | {"--tasks", "--tasks-data", "--limit", "--shots", "--scorer"},
    "generate": {"RUN|MODEL", "--prompt", "-p", "--max-new-tokens", "--temperature", "--top-p", "--seed", "--raw"}
    | {"--depth", "--budget", "--exit-threshold", "--visit", "--self-speculative", "--profile", "--stats"},
    "export": {"RUN|RECIPE", "OUT", "KEY=VALUE", "--max-shard-size"}
    | {"--depth", "--all", "--dtype", "--fold-scale", "--proof", "--no-proof"}
    | {"--form", "--deci", "--measure"},
    "report": {"RUN...", "--out"},
    "verify": {"DIR"},
    "doctor": set(),
    "data show": OVERRIDES | {"--rows", "-n"},
    "data overlap": OVERRIDES | {"--preset", "--out"},
    "import camelidae": {"DIR", "OUT", "--adapter-dim", "--adapter-scale", "--top-k", "--rope-theta", "--base"},
    "bench": {"RUN|MODEL", "KEY=VALUE", "--recipe", "--out", "--batch", "--context", "--new-tokens", "--repeats"}
    | {"--prompts", "--rows", "--calibrate", "--seed"},
    "protocol": OVERRIDES
    | {
        "NAME",
        "--seeds",
        "--controls",
        "--arms",
        "--arm",
        "--ict-share",
        "--extracted-steps",
        "--verdicts",
        "--targets",
    },
}


def commands(command: Any, trail: str = "") -> dict[str, Any]:
    inner = getattr(command, "commands", None)
    if inner is None:
        return {trail: command}
    return {
        name: leaf for key, each in inner.items() for name, leaf in commands(each, f"{trail} {key}".strip()).items()
    }


LEAVES = commands(typer.main.get_command(app))


def test_the_set_of_verbs():
    assert set(LEAVES) == set(VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_the_set_of_flags(verb):
    names: set[str] = set()
    for parameter in LEAVES[verb].params:
        argument = parameter.param_type_name == "argument"
        names.update([parameter.metavar] if argument else [*parameter.opts, *parameter.secondary_opts])
    assert names == VERBS[verb] | COMMON


@pytest.mark.parametrize("verb", ["", "data", "import", *VERBS])
def test_help(verb, capsys):
    assert main([*verb.split(), "--help"]) == 0
    out = capsys.readouterr().out
    assert "Usage: sparsmith" in out
    assert all(flag in out for flag in VERBS.get(verb, set()) if flag.startswith("--"))


@pytest.mark.parametrize("verb", ["", "data", "import"])
def test_alone_a_group_prints_its_help(verb, capsys):
    assert main(verb.split()) == 0
    assert "Commands:" in capsys.readouterr().out


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == "0.1.0"
