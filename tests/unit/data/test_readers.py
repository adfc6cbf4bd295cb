"""Every format and packing gives the same rows, byte for byte."""

from __future__ import annotations

import csv
import gzip
import io
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsmith.data import read_rows
from sparsmith.data.read_table import read_csv
from sparsmith.data.rows import Row
from sparsmith.errors import DataError
from tests.kit.rowfiles import rows_of, source, write_jsonl

ROWS = [
    {"prompt": 'a, "b"\nc', "completion": "é\u2028x  "},
    {"prompt": " lead", "completion": "tab\there"},
    {"prompt": "x", "completion": "\\n stays"},
]


def as_bytes(kind: str, rows: list[dict]) -> bytes:
    if kind == "jsonl":
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    if kind == "json":
        return json.dumps(rows, indent=2).encode()
    if kind == "wrapped":
        return json.dumps({"version": "1", "data": rows}).encode()
    if kind == "csv":
        out = io.StringIO(newline="")
        writer = csv.DictWriter(out, ["prompt", "completion"])
        writer.writeheader()
        writer.writerows(rows)
        return out.getvalue().encode()
    import pyarrow
    import pyarrow.parquet

    packed = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), packed)
    return packed.getvalue()


def texts(found) -> list[dict]:
    return [{"prompt": row.messages[0]["content"], "completion": row.messages[1]["content"]} for row in found.rows]


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("kind", ["jsonl", "json", "wrapped", "csv", "parquet"])
def test_every_format_gives_the_same_rows(tmp_path, kind, zipped):
    name = f"r.{ {'wrapped': 'json'}.get(kind, kind) }".replace(" ", "") + (".gz" if zipped else "")
    data = as_bytes(kind, ROWS)
    (tmp_path / name).write_bytes(gzip.compress(data) if zipped else data)
    assert texts(read_rows(source(name), "stop", tmp_path)) == ROWS


def test_mark_crlf_and_last_blank_lines_are_no_fault(tmp_path):
    lines = as_bytes("jsonl", ROWS).replace(b"\n", b"\r\n")
    (tmp_path / "r.jsonl").write_bytes(b"\xef\xbb\xbf" + lines + b"\r\n\n  \n")
    assert texts(read_rows(source("r.jsonl"), "stop", tmp_path)) == ROWS
    (tmp_path / "r.csv").write_bytes(b"\xef\xbb\xbfprompt,completion\r\na,b\r\n\r\n")
    assert texts(read_rows(source("r.csv"), "stop", tmp_path)) == [{"prompt": "a", "completion": "b"}]


def test_json_lines_in_a_json_file_are_read(tmp_path):
    (tmp_path / "r.json").write_bytes(as_bytes("jsonl", ROWS))
    assert texts(read_rows(source("r.json"), "stop", tmp_path)) == ROWS


def test_conversations_in_a_json_file_are_rows_and_not_the_file(tmp_path):
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    for count in (1, 3):
        write_jsonl(tmp_path / "r.json", [row] * count)
        assert len(read_rows(source("r.json"), "stop", tmp_path).rows) == count


def test_a_headless_tsv_is_named_by_position_and_unescaped(tmp_path):
    (tmp_path / "r.tsv").write_bytes(b'"Is it?"\\n- yes\tyes\tBecause.\nWhat, 5" wide?\tno\t\\alpha\n')
    found = read_rows(source("r.tsv", columns={"prompt": "0", "completion": "{2} So {1}."}), "stop", tmp_path)
    assert texts(found)[0] == {"prompt": '"Is it?"\n- yes', "completion": "Because. So yes."}
    assert texts(found)[1] == {"prompt": 'What, 5" wide?', "completion": "\\alpha So no."}
    with pytest.raises(DataError, match="`0`, `1`, `2`"):
        read_rows(source("r.tsv"), "stop", tmp_path)


def test_a_tsv_with_a_header_keeps_its_cells(tmp_path):
    (tmp_path / "r.tsv").write_bytes(b"prompt\tcompletion\na\\nb\tc\n")
    assert texts(read_rows(source("r.tsv"), "stop", tmp_path)) == [{"prompt": "a\\nb", "completion": "c"}]


def test_a_csv_may_have_positions_as_names(tmp_path):
    for head in (b"", b"0,1\n"):
        (tmp_path / "r.csv").write_bytes(head + b"a,b\n")
        found = read_rows(source("r.csv", columns={"prompt": "0", "completion": "1"}), "stop", tmp_path)
        assert texts(found) == [{"prompt": "a", "completion": "b"}]


def test_a_folder_is_read_in_the_order_of_names_and_split(tmp_path):
    write_jsonl(tmp_path / "b_train.jsonl.gz", rows_of(2, "b"))
    write_jsonl(tmp_path / "a_train.jsonl", rows_of(1, "a"))
    write_jsonl(tmp_path / "test.jsonl", rows_of(1, "t"))
    found = read_rows(source(tmp_path), "stop")
    assert [row.messages[0]["content"] for row in found.rows] == ["a 0?", "b 0?", "b 1?", "t 0?"]
    assert len(found.fingerprints) == 3 and all(len(mark) == 64 for mark in found.fingerprints.values())
    assert len(read_rows(source(tmp_path, split="train"), "stop").rows) == 3
    with pytest.raises(DataError, match="no file for the split `dev`"):
        read_rows(source(tmp_path, split="dev"), "stop")


def test_a_saved_data_set_is_read(tmp_path):
    import datasets

    datasets.disable_progress_bars()
    made = datasets.Dataset.from_list(rows_of(3))
    datasets.DatasetDict({"train": made, "test": made.select([0])}).save_to_disk(str(tmp_path / "saved"))
    assert len(read_rows(source("saved"), "stop", tmp_path).rows) == 3
    assert len(read_rows(source("saved", split="test"), "stop", tmp_path).rows) == 1
    with pytest.raises(DataError, match="no split `dev`"):
        read_rows(source("saved", split="dev"), "stop", tmp_path)


cells = st.text(st.sampled_from('ab",\n\r é'), max_size=6)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(cells, cells.map(lambda cell: cell + "z")), min_size=1, max_size=6))
def test_csv_reads_what_pythons_writer_writes(rows):
    out = io.StringIO(newline="")
    csv.writer(out, quoting=csv.QUOTE_ALL).writerows([("p", "c"), *rows])
    found = list(read_csv(out.getvalue().encode(), "r.csv"))
    assert [isinstance(row, Row) and (row.values["p"], row.values["c"]) for row in found] == rows


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=60))
def test_csv_ends_on_any_bytes(data):
    try:
        found = list(read_csv(data, "r.csv"))
    except DataError:
        return
    assert all(row.line >= 1 for row in found)


def test_where_and_limit(tmp_path):
    write_jsonl(
        tmp_path / "r.jsonl",
        [{**row, "level": i % 4, "kind": "ab"[i % 2], "ok": i > 5} for i, row in enumerate(rows_of(40))],
    )
    assert len(read_rows(source("r.jsonl", where={"kind": "a"}), "stop", tmp_path).rows) == 20
    assert len(read_rows(source("r.jsonl", where={"level": [1, 2], "kind": "b"}), "stop", tmp_path).rows) == 10
    found = read_rows(source("r.jsonl", where={"level:range": [1, 2]}, limit=7), "stop", tmp_path)
    assert (len(found.rows), found.filtered, found.limited, found.read) == (7, 20, 13, 40)
    assert [row.line for row in found.rows] == sorted(row.line for row in found.rows)
    assert len(read_rows(source("r.jsonl", where={"ok": True}), "stop", tmp_path).rows) == 34
    with pytest.raises(DataError, match="Did you mean `level`"):
        read_rows(source("r.jsonl", where={"levl": 1}), "stop", tmp_path)
    with pytest.raises(DataError, match="no usable row"):
        read_rows(source("r.jsonl", where={"kind": "c"}), "stop", tmp_path)
    with pytest.raises(DataError, match=r"\[low, high\]"):
        read_rows(source("r.jsonl", where={"level:range": 3}), "stop", tmp_path)


def test_limit_takes_the_same_rows_for_a_seed(tmp_path):
    write_jsonl(tmp_path / "r.jsonl", rows_of(50))
    lines = {
        seed: [row.line for row in read_rows(source("r.jsonl", limit=9), "stop", tmp_path, seed).rows]
        for seed in (1, 1, 2)
    }
    assert lines[1] == [row.line for row in read_rows(source("r.jsonl", limit=9), "stop", tmp_path, 1).rows]
    assert lines[1] != lines[2]
