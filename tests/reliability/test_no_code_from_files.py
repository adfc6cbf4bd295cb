"""Promise 16: nothing that is read can run."""

from __future__ import annotations

import ast

import pytest

from tests.kit.trials import no_code


def test_the_source_holds_no_call_that_runs_a_file():
    tally = no_code.source_calls()
    assert tally.whole, tally.failures
    assert tally.tried > 100


@pytest.mark.parametrize(
    "text",
    [
        *["eval(x)", "exec(x)", "pickle.load(f)", "torch.load(f)", "torch.load(f, weights_only=False)", "yaml.load(f)"],
        *["f(trust_remote_code=True)", "os.system(x)", "run(x, shell=True)", "np.load(f, allow_pickle=True)"],
    ],
)
def test_the_check_itself_sees(text):
    assert no_code.calls_that_run(ast.parse(text))


def test_the_bomb_itself_runs(tmp_path):
    """Else every trial below would pass for nothing."""
    import pickle

    pickle.loads(pickle.dumps(no_code.Bomb(tmp_path / "ran")))
    assert (tmp_path / "ran").exists()


def test_a_pickle_in_any_slot_does_not_run(home, tmp_path):
    tally = no_code.bombs(home, tmp_path)
    tally.add(no_code.data_bombs(tmp_path))
    assert tally.whole, tally.failures


def test_code_beside_the_weights_does_not_run(home, tmp_path):
    tally = no_code.configs(home, tmp_path)
    assert tally.whole, tally.failures


def test_tags_of_a_recipe_do_not_run(tmp_path):
    tally = no_code.yaml_tags(tmp_path)
    assert tally.whole, tally.failures
