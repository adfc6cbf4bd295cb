"""Spoilt recipes by the hundred: each fault is named with file, line and key; nothing ever ends in a traceback."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparsmith.errors import RecipeErrors
from sparsmith.methods import registry
from sparsmith.recipe import load_text
from sparsmith.recipe.yaml_tree import dump_yaml, parse
from tests.unit.recipe.good import GOOD

METHODS = registry.config_classes()
WRONG_KIND = {
    str: [3, True, [], {}],
    int: ["x", 2.5, True, [1]],
    float: ["x", False, {}],
    bool: ["true", 1],
    list: [3, "x"],
    dict: [3, "x"],
}


def walk(value, path=()) -> Iterator[tuple]:
    yield path
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from walk(item, (*path, key))


def at(data, path):
    for part in path:
        data = data[part]
    return data


def mutate(rng: random.Random) -> tuple[str, str]:
    """(a spoilt recipe, the dotted key that must be named)."""
    data = parse(GOOD, "good").data
    paths = [path for path in walk(data) if path and "where" not in path]
    path = rng.choice(paths)
    parent, key, value = at(data, path[:-1]), path[-1], at(data, path)
    kinds = ["kind"]
    if isinstance(key, str) and "columns" not in path[:-1]:
        kinds += ["typo", "unknown"]
    if isinstance(value, int | float) and not isinstance(value, bool):
        kinds.append("range")
    match rng.choice(kinds):
        case "kind":
            choices = WRONG_KIND[type(value)]
            if path[-1] in ("options", "targets"):  # a text is as good as a list here
                choices = [3]
            parent[key] = rng.choice(choices)
        case "typo":
            key = key[:-1] + "qz"
            parent[key] = parent.pop(path[-1])
        case "unknown":
            key = "surplus"
            parent[key] = 1
        case "range":
            parent[key] = -7
    return dump_yaml(data), ".".join(map(str, (*path[:-1], key)))


@pytest.mark.parametrize("seed", range(300))
def test_every_mutant_is_named(seed):
    text, key = mutate(random.Random(seed))
    with pytest.raises(RecipeErrors) as caught:
        load_text(text, "mutant.yaml", (), METHODS, check_paths=False)
    named = [fault.where for fault in caught.value.faults]
    hits = [where for where in named if where.split(": ")[-1] == key]
    assert hits, (key, named)
    line = int(hits[0].split(":")[1])
    assert key.rsplit(".", 1)[-1] in text.splitlines()[line - 1] or key.rsplit(".", 1)[-1].isdigit()


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
