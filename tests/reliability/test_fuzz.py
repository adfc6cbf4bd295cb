"""Promise 20 in short form: no input ends in a traceback."""

from __future__ import annotations

import random

from tests.kit.mutate import spoil_bytes, spoil_json
from tests.kit.trials import fuzz


def test_no_spoilt_input_ends_in_a_traceback(tmp_path):
    tally = fuzz.run(tmp_path, count=300)
    assert tally.whole, tally.failures
    assert tally.tried >= 300
    assert tally.figures["refused"] > tally.tried // 3  # or nothing was spoilt


def test_the_trial_itself_sees():
    def broken():
        raise KeyError("x")

    assert fuzz._end_of(broken) == ("broke", "KeyError: 'x'")
    assert fuzz._end_of(lambda: None) == ("passed", "")


def test_the_hand_spoils():
    rng = random.Random(0)
    data, value = b"abcdefgh" * 9, {"a": [1, {"b": 2}], "c": "d"}
    assert sum(spoil_bytes(rng, data) != data for _ in range(100)) > 60
    assert sum(spoil_json(rng, value) != value for _ in range(100)) > 90
    assert value == {"a": [1, {"b": 2}], "c": "d"}
