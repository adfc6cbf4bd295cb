"""Every way out of a command: one line, the right exit code, JSON where asked for, no traceback unless asked for."""

from __future__ import annotations

import inspect
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparsmith import app, errors
from sparsmith.cli import main
from tests.kit.recipes import GOOD, write

KINDS = {
    errors.SparsmithError: 1,
    errors.UsageError: 2,
    errors.RecipeError: 3,
    errors.DataError: 4,
    errors.UnsupportedAnatomy: 5,
    errors.UnknownAnatomy: 5,
    errors.CrossLayerStateError: 5,
    errors.RefusedDonor: 5,
    errors.MethodError: 6,
    errors.TiedHeadError: 6,
    errors.TargetUnreachable: 6,
    errors.LayoutMismatch: 6,
    errors.ScheduleTooShort: 6,
    errors.NonCausalRouter: 6,
    errors.CheckpointError: 7,
    errors.CheckpointMismatch: 7,
    errors.ProofError: 8,
    errors.GuardFailed: 8,
    errors.ExportMismatch: 8,
    errors.EmptyRole: 8,
    errors.RoleDidNotMove: 8,
    errors.EnvironmentFault: 9,
    errors.Interrupted: 143,
}


@pytest.fixture
def plan(monkeypatch):
    """Let `sparsmith plan` raise or return what a test wants."""

    def become(outcome):
        def stand_in(recipe, overrides):
            if isinstance(outcome, BaseException):
                raise outcome
            return outcome

        monkeypatch.setitem(app.__dict__, "plan", stand_in)

    return become


@pytest.mark.parametrize(("kind", "code"), KINDS.items())
def test_a_fault_is_one_line_and_its_exit_code(kind, code, plan, capsys):
    plan(kind("rows.jsonl:3", "a\nb", "text\tc", "Mend it."))
    assert main(["plan", "r.yaml"]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "error: rows.jsonl:3: found a b; expected text c. Mend it.\n"


def test_every_kind_of_fault_has_its_code_here():
    """The codes above are frozen: scripts of users stand on them."""
    kinds = {
        kind for kind in vars(errors).values() if inspect.isclass(kind) and issubclass(kind, errors.SparsmithError)
    }
    assert kinds - {errors.RecipeErrors} == KINDS.keys()
    assert all(kind.exit_code == code for kind, code in KINDS.items())


def test_exit_codes_are_written_down():
    """docs/exit-codes.md holds each kind under its code, and nothing else."""
    text = (Path(__file__).resolve().parents[3] / "docs/exit-codes.md").read_text(encoding="utf-8")
    table = [re.split(r"(?<!\\)\|", line)[1:3] for line in text.splitlines() if re.match(r"\| \d", line)]
    written = {(kind, int(code)) for code, kinds in table for kind in re.findall(r"`(\w+)`", kinds)}
    named = {("RecipeErrors" if kind is errors.RecipeError else kind.__name__, code) for kind, code in KINDS.items()}
    assert written == named | {("Interrupted", 130)}
    assert {int(code) for code, _ in table} == {0, *KINDS.values(), 70, 130, 141}


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stop_by_a_signal(number, code, plan, capsys):
    plan(errors.Interrupted("tune", "a signal", "a run to its end", "Nothing is lost.", number))
    assert main(["plan", "r.yaml", "--json"]) == code
    assert json.loads(capsys.readouterr().out)["exit_code"] == code


def test_a_fault_as_json(plan, capsys):
    plan(errors.DataError("rows.jsonl:3", "nothing", "text", "Mend it."))
    assert main(["plan", "r.yaml", "--json"]) == 4
    out, err = capsys.readouterr()
    document = json.loads(out)
    assert document["exit_code"] == 4
    assert document["error"] == {
        "kind": "DataError",
        "where": "rows.jsonl:3",
        "found": "nothing",
        "expected": "text",
        "mend": "Mend it.",
    }
    assert err.count("\n") == 1


def test_a_result_as_json_and_nothing_else_on_stdout(monkeypatch, capsys):
    def noisy(recipe, overrides):
        print("a library talks")
        return {"a": 1}

    monkeypatch.setitem(app.__dict__, "plan", noisy)
    assert main(["plan", "r.yaml", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == {"a": 1}
    assert "a library talks" in err


def test_a_path_and_an_object(plan, capsys):
    plan(Path("runs/x"))
    assert main(["plan", "r.yaml"]) == 0
    assert capsys.readouterr().out == "result: runs/x\n"
    plan("text")
    assert main(["plan", "r.yaml"]) == 0
    assert capsys.readouterr().out == "text\n"


class Result:
    """Data that knows its table, as an evaluation does."""

    def to_json(self):
        return {"value": 1}

    def table(self):
        return "a table"


def test_an_object_with_a_table(plan, capsys):
    plan(Result())
    assert main(["plan", "r.yaml"]) == 0
    assert capsys.readouterr().out == "a table\n"
    plan({"path": Path("x"), "inner": Result()})
    assert main(["plan", "r.yaml", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"path": "x", "inner": {"value": 1}}


def test_faults_of_a_recipe_are_a_line_each(tmp_path, capsys):
    file = write(tmp_path, GOOD.replace("steps: 10", "stesp: 10").replace("name: facts", "name: shell"))
    assert main(["plan", str(file), "train.sede=1"]) == 3
    err = capsys.readouterr().err.splitlines()
    assert all(line.startswith("error: ") for line in err)
    assert [line.split(": ")[2] for line in err] == ["data.eval.1.name", "train.stesp", "train.sede"]


@pytest.mark.parametrize("flag", [[], ["--json"]])
def test_a_fault_of_ours(plan, capsys, flag):
    plan(RuntimeError("boom\nbang"))
    assert main(["plan", "r.yaml", *flag]) == 70
    out, err = capsys.readouterr()
    assert err.startswith("internal error: RuntimeError: boom bang")
    assert "--debug" in err and err.count("\n") == 1
    assert not flag or json.loads(out)["exit_code"] == 70


def test_a_traceback_only_with_debug(plan, capsys):
    plan(RuntimeError("boom"))
    assert main(["--debug", "plan", "r.yaml"]) == 70
    assert "Traceback" in capsys.readouterr().err
    plan(errors.DataError("a", "b", "c", "d"))
    assert main(["plan", "r.yaml", "--debug"]) == 4
    assert "Traceback" in capsys.readouterr().err


def test_interrupted(plan, capsys):
    plan(KeyboardInterrupt())
    assert main(["plan", "r.yaml"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["plann"], "Did you mean 'plan'?"),
        (["plan"], "Missing argument"),
        (["plan", "--jsn", "r"], "--jsn"),
        (["generate", "embedded", "-p", "x", "--top-p", "2"], "--top-p"),
        (["generate", "embedded", "-p", "x", "--top-p", "0.5"], "--temperature"),
        (["generate", "embedded", "-p", "x", "--max-new-tokens", "many"], "--max-new-tokens"),
        (["eval", "embedded", "train.seed=3"], "--recipe"),
        (["eval", "embedded", "--limit", "5"], "--tasks"),
        (["eval", "embedded", "--tasks", "boolq", "--recipe", "r.yaml"], "--recipe"),
        (["eval", "embedded", "--tasks", "boolk"], "Did you mean `boolq`?"),
        (["eval", "embedded", "--tasks", "boolq", "--tasks-data", "no-such-folder"], "--tasks-data"),
        (["eval", "embedded", "--tasks", ","], "no task"),
        (["verify", "no-such-folder"], "no folder"),
        (["export", "no-such-folder", "out"], "RUN|RECIPE"),
        (["export", __file__, "out", "--depth", "2"], "--depth"),
        (["export", __file__, "out", "--form", "zeros"], "--form"),
        (["export", str(Path(__file__).parent), "out", "--max-shard-size", "5GB"], "--max-shard-size"),
        (["export", str(Path(__file__).parent), "out", "train.seed=3"], "train.seed=3"),
        (["report"], "Missing argument"),
        (["data", "shwo"], "shwo"),
        (["data", "overlap"], "Missing argument"),
        (["data", "overlap", "r.yaml", "--out", ""], "--out"),
    ],
)
def test_usage_faults(arguments, words, capsys):
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert err.startswith("error: ") and words in err


def test_usage_faults_as_json(capsys):
    assert main(["plann", "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["kind"] == "UsageError"


@pytest.fixture(scope="module")
def verified():
    """`verify` that reads nothing."""
    app.__dict__["verify"] = lambda folder: {}
    yield
    del app.__dict__["verify"]


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(
    st.lists(
        st.sampled_from(["plan", "data", "show", "verify", "--json", "--debug", "--out", "-n", "--", "0"])
        | st.text(max_size=8)
    )
)
def test_no_command_line_is_a_traceback(verified, arguments):
    assert main(["verify", *arguments]) in (0, 2)


def run(*command: str, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, **options)


def test_as_a_module():
    done = run(sys.executable, "-m", "sparsmith", "--version")
    assert (done.returncode, done.stdout.strip()) == (0, "0.1.0")


def test_a_closed_pipe_is_quiet():
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe:
        done = subprocess.run(
            [sys.executable, "-m", "sparsmith", "--help"],
            stdout=pipe,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            check=False,
        )
    assert (done.returncode, done.stderr) == (141, "")


def test_ascii_terminals(tmp_path):
    done = run(
        sys.executable,
        "-m",
        "sparsmith",
        "plan",
        str(tmp_path / "é.yaml"),
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    assert done.returncode == 3
    assert "no readable file" in done.stderr


def test_verbs_stay_functions_after_their_modules_were_loaded():
    import sparsmith
    from sparsmith import app

    for face, names in ((app, app.__all__), (sparsmith, sparsmith.__all__)):
        for name in names:
            first, again = getattr(face, name), getattr(face, name)
            assert first is again
            assert callable(first) or name == "__version__"
