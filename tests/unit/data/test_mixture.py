"""The stream: shares, passes and prefixes, for any mixture."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsmith.data.mixture import Part, epoch_rows, shares, stream
from sparsmith.errors import DataError

parts_of_any = st.lists(
    st.tuples(st.integers(1, 40), st.floats(0.1, 10), st.one_of(st.none(), st.integers(1, 50))), min_size=1, max_size=5
).map(lambda rows: [Part(f"s{i}", f"d{i % 2}", n, rate, cap) for i, (n, rate, cap) in enumerate(rows)])
mixings = st.sampled_from(["sizes", "rates", "balanced"])


@settings(max_examples=80, deadline=None)
@given(parts_of_any, mixings, st.integers(0, 5), st.integers(0, 200))
def test_shares_hold_in_every_prefix_and_no_row_comes_twice_in_a_pass(parts, mixing, seed, length):
    source, row = stream(parts, mixing, seed, length)
    assert len(source) == len(row) == length
    wanted = shares(parts, mixing)
    counts = np.cumsum(source[:, None] == np.arange(len(parts)), axis=0)
    places = np.arange(1, length + 1)[:, None]
    assert (np.abs(counts - places * wanted) <= 1 + len(parts) * wanted + 1e-6).all()
    for number, part in enumerate(parts):
        rows = row[source == number]
        for start in range(0, len(rows), part.rows):
            one_pass = rows[start : start + part.rows]
            assert len(set(one_pass.tolist())) == len(one_pass) and (one_pass < part.rows).all()


@settings(max_examples=50, deadline=None)
@given(parts_of_any, mixings, st.integers(0, 5), st.integers(0, 120), st.integers(0, 120))
def test_a_longer_stream_begins_with_the_shorter(parts, mixing, seed, short, more):
    one, two = stream(parts, mixing, seed, short), stream(parts, mixing, seed, short + more)
    assert all((a == b[:short]).all() for a, b in zip(one, two))


def test_an_epoch_holds_each_row_once():
    parts = [Part("a", "x", 70), Part("b", "x", 13), Part("c", "y", 1)]
    source, row = stream(parts, "sizes", 3, epoch_rows(parts))
    assert sorted(zip(source.tolist(), row.tolist())) == [
        (s, r) for s, part in enumerate(parts) for r in range(part.rows)
    ]


def test_weights():
    parts = [Part("a", "x", 100, 2.0, 50), Part("b", "x", 300), Part("c", "y", 10)]
    assert shares(parts, "sizes") == pytest.approx(np.array([100, 300, 10]) / 410)
    assert shares(parts, "rates") == pytest.approx([0.5, 0.25, 0.25])
    assert shares(parts, "balanced") == pytest.approx([0.125, 0.375, 0.5])
    assert epoch_rows(parts) == 50 + 300 + 10


@pytest.mark.parametrize(
    "part",
    [Part("a", "x", 5, 0.0), Part("a", "x", 0), Part("a", "x", 5, float("nan")), Part("a", "x", 5, float("inf"))],
)
def test_a_source_that_gives_nothing_is_refused(part):
    with pytest.raises(DataError, match="data source `a`"):
        stream([part, Part("b", "x", 5)], "sizes", 0, 4)
    with pytest.raises(DataError, match="sizes, rates or balanced"):
        shares([Part("b", "x", 5)], "equal")


def test_the_seed_changes_the_order_and_the_name_keeps_it():
    parts = [Part("a", "x", 50), Part("b", "y", 50)]
    assert (stream(parts, "sizes", 1, 80)[1] != stream(parts, "sizes", 2, 80)[1]).any()
    alone = stream([parts[0]], "sizes", 1, 40)[1]
    source, row = stream(parts, "sizes", 1, 80)
    mixed = row[source == 0]
    assert (mixed[: len(alone)][:30] == alone[:30]).all()
