"""Named streams: equal where the names are, apart where they are not, the same on every machine."""

from __future__ import annotations

import numpy
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsmith.seeds import numpy_generator, stream_seed, torch_generator


@given(st.integers(0, 2**64), st.text(max_size=20), st.lists(st.integers(0, 99), max_size=3))
def test_a_seed_is_63_bits_and_repeats(seed, name, indices):
    value = stream_seed(seed, name, *indices)
    assert 0 <= value < 2**63
    assert value == stream_seed(seed, name, *indices)


def test_streams_are_apart():
    seeds = {stream_seed(s, name, i) for s in range(5) for name in ("data", "gates", "depth") for i in range(20)}
    assert len(seeds) == 5 * 3 * 20


def test_a_stream_never_changes_between_releases():
    assert stream_seed(42, "data") == 7187661421020507658


def test_generators_start_at_the_stream():
    assert torch.equal(
        torch.rand(5, generator=torch_generator(1, "a", 2)), torch.rand(5, generator=torch_generator(1, "a", 2))
    )
    first, second = numpy_generator(1, "a").random(4), numpy_generator(1, "b").random(4)
    assert not numpy.array_equal(first, second)


def test_the_global_state_is_not_touched():
    state = torch.random.get_rng_state()
    torch_generator(3, "x")
    assert torch.equal(state, torch.random.get_rng_state())
