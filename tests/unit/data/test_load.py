"""From a recipe's data to batches: counts, order, resume, cache, rejects."""

from __future__ import annotations

import json
import pickle
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from sparsmith.data import cache, load_data
from sparsmith.errors import DataError, RecipeError
from sparsmith.recipe.schema import EvalSource
from tests.kit.rowfiles import chat_tokenizer, rows_of, settings, source, write_jsonl

TOKENIZER = chat_tokenizer(None)


@pytest.fixture
def two(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", rows_of(30, "a"))
    write_jsonl(tmp_path / "b.jsonl.gz", rows_of(12, "b"))
    return settings(
        tmp_path,
        [source("a.jsonl", name="a", domain="x"), source("b.jsonl.gz", name="b", domain="y")],
        (EvalSource(name="a", domain="z", path="a.jsonl", limit=5),),
        template="Q {prompt} A ",
    )


def loaded(made, folder, **more):
    return load_data(made, TOKENIZER, **{"seed": 1, "base_dir": folder, **more})


def test_everything_is_there(two, tmp_path):
    data = loaded(two, tmp_path, rows_needed=100)
    assert len(data.train) == 100 and data.domains == ["x", "y", "z"] and list(data.eval) == ["a"]
    item = data.train[0]
    assert item["input_ids"].shape == item["labels"].shape == item["domain"].shape == item["position_ids"].shape
    record = data.counts["train"]["a"]
    assert (record["read"], record["kept"], record["format"]) == (30, 30, "prompt_completion")
    assert record["share"] == pytest.approx(30 / 42)
    tokens = [data.train.sets[0].row(i) for i in range(30)]
    assert record["tokens"] == sum(len(ids) for ids, _ in tokens)
    assert record["trained_tokens"] == sum(int(trained.sum()) for _, trained in tokens)
    assert set(data.fingerprints) == {"a.jsonl", "b.jsonl.gz"}
    for index in range(100):
        item = data.train[index]
        assert item["sample_ids"] == data.train.sample_id(index)
        name, line = data.place(item["sample_ids"]).split(":")
        word = "a" if name == "a.jsonl" else "b"
        assert TOKENIZER.decode(item["input_ids"]).startswith(f"<s>Q {word} {int(line) - 1}? A answer {int(line) - 1}")
        assert item["domain"].unique().tolist() == ["ab".index(word)]


def test_an_epoch_is_the_default_length(two, tmp_path):
    data = loaded(two, tmp_path)
    assert sorted(data.train.sample_id(i) for i in range(len(data.train))) == list(range(42))
    assert len(loaded(two, tmp_path, epochs=1.5).train) == 63
    assert len(loaded(two, tmp_path, rows_needed=0).train) == 0


def test_same_seed_same_stream_packed_or_not(two, tmp_path):
    one = loaded(two, tmp_path, rows_needed=48)
    other = loaded(two.model_copy(update={"packing": False}), tmp_path, rows_needed=48)
    assert loaded(two, tmp_path, rows_needed=48, seed=2).train.row_of.tolist() != one.train.row_of.tolist()
    for start in range(0, 48, 8):
        batches = [data.collator()([data.train[i] for i in range(start, start + 8)]) for data in (one, other)]
        assert batches[0]["sample_ids"].tolist() == batches[1]["sample_ids"].tolist()
        counts = [int((batch["labels"] >= 0).sum()) for batch in batches]
        assert counts[0] == counts[1] and batches[0]["input_ids"].shape[0] < 8 == batches[1]["input_ids"].shape[0]


@examples(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.integers(0, 2), st.integers(0, 60))
def test_a_resume_sees_the_rows_that_were_left(resumed, batch, workers, cut):
    data = resumed
    whole = [data.train.sample_id(i) for i in range(len(data.train))]
    rest = torch.utils.data.Subset(data.train, range(cut, len(whole)))
    loader = torch.utils.data.DataLoader(rest, batch, collate_fn=data.collator())
    assert [i for one in loader for i in one["sample_ids"].tolist()] == whole[cut:]


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    write_jsonl(folder / "a.jsonl", rows_of(20))
    return loaded(settings(folder, [source("a.jsonl")]), folder, rows_needed=60)


def test_the_stream_travels_to_workers(resumed):
    twin = pickle.loads(pickle.dumps(resumed.train))
    assert all(torch.equal(twin[i]["labels"], resumed.train[i]["labels"]) for i in range(60))


def test_long_and_masked_rows_are_counted(tmp_path):
    rows = [{"prompt": "p" * n, "completion": "c" * 5} for n in (5, 20, 28, 200)]
    write_jsonl(tmp_path / "r.jsonl", rows)
    base = settings(tmp_path, [source("r.jsonl")], template="{prompt}:", max_length=24)
    names = ("kept", "over_long", "truncated", "all_masked")

    def counts(**more):
        record = loaded(base.model_copy(update=more), tmp_path).counts["train"]["rows"]
        assert record["read"] == record["kept"] + record["over_long"] + record["all_masked"]
        return tuple(record[name] for name in names)

    assert counts(over_long="drop") == (1, 3, 0, 0)
    assert counts(over_long="truncate") == (2, 0, 1, 2)
    assert counts(over_long="truncate", loss_on="all") == (4, 0, 3, 0)
    with pytest.raises(DataError, match=r"r\.jsonl:2: found a row of 28 tokens; expected at most 24"):
        counts(over_long="stop")
    item = loaded(base.model_copy(update={"over_long": "truncate"}), tmp_path).train
    assert max(len(item[i]["input_ids"]) for i in range(len(item))) == 24


def test_no_row_left_is_an_error(tmp_path):
    write_jsonl(tmp_path / "r.jsonl", [{"prompt": "p" * 90, "completion": "c"}])
    with pytest.raises(DataError, match="no row left"):
        loaded(settings(tmp_path, [source("r.jsonl")]), tmp_path)


def test_skip_writes_rejects(tmp_path):
    write_jsonl(tmp_path / "r.jsonl", [*rows_of(3), {"prompt": "x"}, ["é"], *rows_of(1)])
    base = settings(tmp_path, [source("r.jsonl", name="my.rows")])
    with pytest.raises(DataError, match=r"r\.jsonl:4:completion"):
        loaded(base, tmp_path)
    for _ in range(2):  # the second reading comes from the cache
        data = loaded(base.model_copy(update={"on_bad_row": "skip"}), tmp_path, rejects=tmp_path / "out" / "rejects")
        written = [
            json.loads(line) for line in (tmp_path / "out" / "rejects" / "my.rows.jsonl").read_text().splitlines()
        ]
        assert [(row["file"], row["line"]) for row in written] == [("r.jsonl", 4), ("r.jsonl", 5)]
        assert all(row["reason"] for row in written) and written[0]["raw"] == '{"prompt": "x"}'
        record = data.counts["train"]["my.rows"]
        assert record["kept"] + record["rejected"] == record["read"] == 6
    with pytest.raises(DataError, match=r"r\.jsonl:4:completion"):  # a cache written under skip does not hide a bad row
        loaded(base, tmp_path)


def test_a_source_of_its_own_mind(tmp_path):
    write_jsonl(tmp_path / "r.jsonl", [*rows_of(3), {"prompt": "x"}])
    base = settings(tmp_path, [source("r.jsonl", on_bad_row="skip")])
    assert len(loaded(base, tmp_path).rejects["rows"]) == 1


def test_the_cache_gives_the_same_and_is_verified(two, tmp_path, monkeypatch):
    first = loaded(two, tmp_path)
    files = sorted((tmp_path / "cache").iterdir())
    assert len(files) == 2 and all(file.suffix == ".npz" for file in files)
    monkeypatch.setattr("sparsmith.data.prepare._encode", lambda *_: pytest.fail("encoded again"))
    second = loaded(two, tmp_path)
    assert first.counts == second.counts and first.fingerprints == second.fingerprints
    assert all(torch.equal(first.train[i]["labels"], second.train[i]["labels"]) for i in range(42))
    monkeypatch.undo()
    for spoil in (lambda data: data[:-9], lambda data: data[:50] + bytes([data[50] ^ 1]) + data[51:], lambda data: b""):
        files[0].write_bytes(spoil(files[0].read_bytes()))
        again = loaded(two, tmp_path)
        assert all(torch.equal(first.train[i]["labels"], again.train[i]["labels"]) for i in range(42))


def test_the_cache_knows_what_changes_tokens(two, tmp_path):
    def entries() -> int:
        return len(list((tmp_path / "cache").iterdir()))

    loaded(two, tmp_path)
    loaded(two.model_copy(update={"max_length": 30, "packing": False}), tmp_path)
    assert entries() == 2
    loaded(two.model_copy(update={"template": "{prompt}"}), tmp_path)
    assert entries() == 4
    loaded(two.model_copy(update={"loss_on": "all"}), tmp_path)
    assert entries() == 6
    load_data(two, chat_tokenizer(), seed=1, base_dir=tmp_path)
    assert entries() == 8
    write_jsonl(tmp_path / "a.jsonl", rows_of(31, "a"))
    assert loaded(two, tmp_path).counts["train"]["a"]["read"] == 31


def test_the_cache_may_be_used_by_several_at_once(tmp_path):
    import numpy as np

    entry = ({"ids": np.arange(50_000)}, {"n": 1})
    faults = []

    def work():
        for _ in range(15):
            cache.write(tmp_path, "key", entry)
            found = cache.read(tmp_path, "key")
            if found is None or not (found[0]["ids"] == entry[0]["ids"]).all():
                faults.append(found)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults and [file.name for file in tmp_path.iterdir()] == ["key.npz"]


def test_a_cache_that_cannot_be_written_is_no_fault(two, tmp_path):
    (tmp_path / "file").write_text("")
    data = loaded(two.model_copy(update={"cache": str(tmp_path / "file" / "cache")}), tmp_path)
    assert len(data.train) == 42


def test_names_are_distinct(two, tmp_path):
    twins = two.model_copy(update={"train": (two.train[0], two.train[0])})
    with pytest.raises(RecipeError, match="the source name `a` twice"):
        loaded(twins, tmp_path)


def test_chat_rows_that_the_template_refuses_are_bad_rows(tmp_path):
    picky = chat_tokenizer(
        "{% if messages[0]['content'] == 'no' %}{{ raise_exception('refused') }}{% endif %}"
        + chat_tokenizer().chat_template
    )
    write_jsonl(tmp_path / "r.jsonl", [*rows_of(2), {"prompt": "no", "completion": "x"}])
    base = settings(tmp_path, [source("r.jsonl")])
    with pytest.raises(DataError, match=r"r\.jsonl:3:messages: found a row that the chat template refuses \(refused\)"):
        load_data(base, picky, seed=1, base_dir=tmp_path)
    data = load_data(base.model_copy(update={"on_bad_row": "skip"}), picky, seed=1, base_dir=tmp_path)
    assert data.counts["train"]["rows"]["rejected"] == 1 and data.counts["train"]["rows"]["kept"] == 2


def test_one_file_for_training_and_evaluation(tmp_path):
    write_jsonl(tmp_path / "r.jsonl", rows_of(60))
    base = settings(
        tmp_path,
        [source("r.jsonl", heldout=0.3, part="train")],
        (EvalSource(name="e", domain="d", path="r.jsonl", heldout=0.3, part="heldout"),),
    )
    data = loaded(base, tmp_path)
    train = {data.place(i) for i in range(len(data.train))}
    held = {row.place for row in data.eval["e"].rows}
    assert not train & held and len(train | held) == 60 and held
