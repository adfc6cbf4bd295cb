"""The one shape of an error."""

from __future__ import annotations

import inspect
import pickle

import pytest

from sparsmith import errors
from sparsmith.errors import RecipeError, RecipeErrors, SparsmithError, nearest

KINDS = [
    kind
    for _, kind in inspect.getmembers(errors, inspect.isclass)
    if issubclass(kind, SparsmithError) and kind is not RecipeErrors
]


@pytest.mark.parametrize("kind", KINDS)
def test_as_text_as_data_and_through_a_pickle(kind):
    error = kind("file:3:key", "this", "that", "Do so.")
    assert str(error) == "file:3:key: found this; expected that. Do so."
    assert error.as_dict() == {
        "kind": kind.__name__,
        "where": "file:3:key",
        "found": "this",
        "expected": "that",
        "mend": "Do so.",
    }
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind and again.as_dict() == error.as_dict()


def test_several_faults_of_a_recipe():
    faults = [RecipeError(f"r.yaml:{line}", "this", "that", "Do so.") for line in (1, 2)]
    error = pickle.loads(pickle.dumps(RecipeErrors(faults)))
    assert [fault["where"] for fault in error.as_dict()["faults"]] == ["r.yaml:1", "r.yaml:2"]
    assert str(error).count("\n") == 1
    assert error.exit_code == RecipeError.exit_code


def test_exit_codes_are_apart_from_the_shell_s():
    assert all(0 < kind.exit_code < 64 for kind in KINDS if kind is not errors.Interrupted)
    assert errors.Interrupted("tune", "SIGINT", "an end", "Go on.", signal=2).exit_code == 130, "as the shell says it"


def test_nearest():
    assert nearest("stpes", ["steps", "seed"]) == "Did you mean `steps`?"
    assert nearest("zzz", ["steps", "seed"]) == "Known: steps, seed."
