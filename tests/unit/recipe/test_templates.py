"""Template files are data: what they may say, and what is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparsmith.errors import RecipeErrors
from sparsmith.recipe.templates import fault_of, load_templates, parse_templates, pieces_of, shipped_names


def test_every_shipped_set_is_read():
    names = shipped_names()
    assert {"choice", "maths-rationale", "nl-to-bash", "plain", "definition", "docstring-to-code"} <= set(names)
    for name in names:
        found = load_templates(name, Path())
        assert len(found.templates) >= 8 or name == "plain"
        assert len(set(found.templates)) == len(found.templates)
        assert len({one.fields for one in map(frozenset_fields, found.templates)}) == 1  # any row fits any of them


def frozenset_fields(template):
    class Fields:
        fields = frozenset(template.fields)

    return Fields


def test_pieces():
    assert pieces_of("a {b} {{c}} {d_e}") == (("a ", "b"), (" {c} ", "d_e"))
    assert pieces_of("{a}") == (("", "a"),)
    assert pieces_of("x}}") == (("x}", None),)


@pytest.mark.parametrize(
    "text",
    [
        "{a.__class__}", "{a[0]}", "{a!r}", "{a:>10}", "{}", "{0}", "{__class__}", "{a.b.c}", "{a b}", "{a-b}", "{_a}", "{a_}", "{a", "a}",
        "{{a}", "{a}}", "{a{b}}", "{é}", "{a\n}", "{" + "a" * 65 + "}", "no field", "{options_}", "{a}{options_}{options_}", "{a:{b}}",
        "{a!s:{0.__globals__}}", "{lambda: 1}", "{{}}",
    ],
)  # fmt: skip
def test_what_is_no_field_is_refused(text):
    assert fault_of(text, "input")
    raw = ("patterns:\n  - input: " + repr_yaml(text) + '\n    target: "{b}"\n').encode()
    with pytest.raises(RecipeErrors, match=r"own\.yaml:2: patterns\.0\.input"):
        parse_templates(raw, "own.yaml")


def repr_yaml(text: str) -> str:
    import json

    return json.dumps(text)


@pytest.mark.parametrize(
    ("raw", "told"),
    [
        (b"", "no settings"),
        (b"- a", "no settings"),
        (b"patterns: []", "at least 1"),
        (b"patterns: 3", "a list"),
        (b"patterns: [3]", r"patterns\.0"),
        (b"patterns: [{input: 3, target: '{a}'}]", r"patterns\.0\.input: found `3`; expected text"),
        (b"patterns: [{input: '{a}'}]", r"patterns\.0\.target: found nothing"),
        (b"patterns: [{input: '{a}', target: '{a}', code: x}]", "the unknown key `code`"),
        (b"patterns: [{input: '{a}', target: '{options_}'}]", "outside the input"),
        (b"patterns: [{input: '{a}', target: '{a}', lead: ' '}]", "no text"),
        (b"patterns: [{input: '{a}', target: '{a}', join: ''}]", "join"),
        (b"patterns: !!python/object/apply:os.system [ls]", "tag"),
        (b"patterns: &a [*a]", "nested or repeated|unreadable"),
        (b"patterns: [{input: '{a}', input: '{b}', target: '{a}'}]", "a second time"),
        (b"\xff\xfe", "UTF-8"),
        (b"{" * 5000, "own.yaml:1"),
        (b"x" * (2**20 + 1), "at most"),
        (b"patterns: [{input: '" + b"a" * 9000 + b"{a}', target: '{a}'}]", "at most 8000 characters"),
        (b"patterns: [" + b"{input: '{a}', target: '{a}'}, " * 201 + b"]", "at most 200"),
    ],
)
def test_a_hostile_file_is_refused_by_name(raw, told):
    with pytest.raises(RecipeErrors, match=told) as caught:
        parse_templates(raw, "own.yaml")
    assert all(fault.where.startswith("own.yaml:") for fault in caught.value.faults)


def test_json_is_read_too(tmp_path):
    (tmp_path / "own.json").write_text('{"patterns": [{"input": "{a}\\n", "target": "{b}"}]}')
    (template,) = load_templates("own.json", tmp_path).templates
    assert template.input == (("", "a"), ("\n", None)) and template.fields == ("a", "b")


@pytest.mark.parametrize(
    "name", ["chioce", "own.yaml", "no/such.json", "/", "\0.yaml", "~nobody-here/x.yaml", "a" * 5000 + ".yaml"]
)
def test_a_set_that_is_not_there(name, tmp_path):
    with pytest.raises(RecipeErrors) as caught:
        load_templates(name, tmp_path)
    assert caught.value.faults[0].where == name
    if name == "chioce":
        assert "Did you mean `choice`?" in str(caught.value)
    with pytest.raises(RecipeErrors):
        (tmp_path / "big.yaml").write_bytes(b"#" * (2**20 + 1))
        load_templates("big.yaml", tmp_path)
