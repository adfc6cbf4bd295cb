"""Processes change the time alone."""

from __future__ import annotations

import pytest

from sparsmith.data import workers
from sparsmith.data.chat import ChatEncoder
from sparsmith.data.rows import RowFault
from tests.kit.rowfiles import MARKED, chat_tokenizer
from tests.unit.data.test_tokens import turns

PICKY = "{% if messages[0]['content'] == 'no' %}{{ raise_exception('refused') }}{% endif %}"


@pytest.fixture
def rows():
    return [turns(f"why {i}", f"so {i}") for i in range(7)] + [turns("no", "x")]


def same(one, other) -> bool:
    if isinstance(one, RowFault):
        return isinstance(other, RowFault) and one.as_dict() == other.as_dict()
    return one == other


def test_processes_give_what_this_one_gives(rows, monkeypatch):
    encoder = ChatEncoder(chat_tokenizer(PICKY + MARKED))
    expected = list(workers.encode_all(encoder, rows))
    assert sum(isinstance(row, RowFault) for row in expected) == 1
    monkeypatch.setattr(workers, "PARALLEL_FROM", 0)
    started = []
    start = workers._start
    monkeypatch.setattr(workers, "_start", lambda *job: started.append(start(*job)) or started[-1])
    found = list(workers.encode_all(encoder, rows, 2))
    assert [process.returncode for process in started] == [0, 0]
    assert len(found) == len(expected) and all(map(same, found, expected))


def test_the_shard_of_a_worker_that_fails_is_encoded_here(rows, monkeypatch):
    encoder = ChatEncoder(chat_tokenizer(MARKED))
    monkeypatch.setattr(workers, "PARALLEL_FROM", 0)
    monkeypatch.setattr(workers.sys, "executable", "/bin/false")
    found = list(workers.encode_all(encoder, rows, 3))
    assert all(map(same, found, encoder.encode(rows)))
