"""Spoilt recipes by the hundred: each fault is named with file, line and key; nothing ever ends in a traceback."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparsmith.errors import RecipeErrors
from sparsmith.methods import registry
from sparsmith.recipe import load_text
from sparsmith.recipe.yaml_tree import dump_yaml, parse
from tests.kit.recipes import GOOD

METHODS = registry.config_classes()
QUIET = settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


@QUIET
@given(st.integers(0, len(GOOD) - 1), st.integers(0, 8), st.text(max_size=6))
def test_no_spoilt_text_is_a_traceback(start, length, new):
    spoilt = GOOD[:start] + new + GOOD[start + length :]
    try:
        load_text(spoilt, "mutant.yaml", (), METHODS, check_paths=False)
    except RecipeErrors as error:
        assert all(fault.where.startswith("mutant.yaml:") and fault.mend for fault in error.faults)


@QUIET
@given(st.lists(st.text(max_size=20) | st.from_regex(r"\A[a-z0-9.]{1,12}=.{0,8}\Z"), max_size=3))
def test_no_override_is_a_traceback(overrides):
    try:
        load_text(GOOD, "good.yaml", overrides, METHODS, check_paths=False)
    except RecipeErrors as error:
        assert all("\n" not in fault.where for fault in error.faults)


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)


@QUIET
@given(st.dictionaries(st.sampled_from(["model", "methods", "data", "train", "output", "proof"]), values))
def test_no_value_is_a_traceback(data):
    with pytest.raises(RecipeErrors):
        load_text(dump_yaml(data), "mutant.yaml", (), METHODS, check_paths=False)


@QUIET
@given(values)
def test_yaml_goes_there_and_back(value):
    text = dump_yaml({"key": value})
    try:
        tree = parse(text, "x")
    except RecipeErrors:
        return
    if not tree.faults:
        assert repr(tree.data) == repr({"key": value})
