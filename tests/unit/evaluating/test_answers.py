from __future__ import annotations

import pytest

from sparsmith.evaluating import extract


@pytest.mark.parametrize(
    ("text", "extractor", "answer"),
    [
        ("  a  b\n c ", "exact", "a b c"),
        ("", "exact", None),
        (" \n", "exact", None),
        ("cafe\u0301", "exact", "caf\u00e9"),
        ("\n\n first  line \nsecond", "first_line", "first line"),
        ("\n \n", "first_line", None),
        ("  Yes, it is.", "first_word", "yes"),
        ("'No'", "first_word", "no"),
        ("... !", "first_word", None),
        ("so 3 + 4 = 7.", "last_number", "7"),
        ("it costs $1,250.50 now", "last_number", "1250.5"),
        ("-3.0", "last_number", "-3"),
        ("5-3", "last_number", "3"),
        ("0", "last_number", "0"),
        ("-0", "last_number", "0"),
        (".5", "last_number", "0.5"),
        ("1e3 or 100", "last_number", "100"),
        ("version v2", "last_number", None),
        ("none here", "last_number", None),
        ("so\n#### 1,200\nmore", "after_marker", "1200"),
        ("#### 3\n#### forty  two", "after_marker", "forty two"),
        ("no marker 5", "after_marker", None),
        ("####", "after_marker", None),
        ("#### nan", "after_marker", "nan"),
    ],
)
def test_extract(text, extractor, answer):
    assert extract(text, extractor) == answer


def test_marker_of_ones_own():
    assert extract("so the answer is: Paris\nbecause", "after_marker", "answer is:") == "Paris"


def test_every_extractor_of_the_recipe_is_known():
    from typing import get_args

    from sparsmith.evaluating.answers import EXTRACTORS
    from sparsmith.recipe.schema import EvalSource

    assert set(get_args(EvalSource.model_fields["extractor"].annotation)) == set(EXTRACTORS)
