"""Bad rows end with file:line, a reason and a mend; `skip` sets them aside and loses none."""

from __future__ import annotations

import gzip
import json
import random

import pytest

from sparsmith.data import read_rows
from sparsmith.data.columns import Columns
from sparsmith.data.rows import MAX_ROW_BYTES
from sparsmith.errors import DataError, SparsmithError
from tests.kit.rowfiles import rows_of, source, write_jsonl
from tests.kit.spoilt_rows import FILES, GOOD, JSONL, TABLES, TALKS, line, talk


def check(error: SparsmithError, where: str, words: str) -> None:
    assert str(error).startswith(where), str(error)
    assert any(each in error.found for each in words.split("|")), error.found
    assert "\n" not in str(error) and len(str(error)) < 700
    assert error.expected and error.mend


@pytest.mark.parametrize("kind", JSONL)
def test_a_bad_jsonl_row_is_named_or_set_aside(tmp_path, kind):
    bad, words = JSONL[kind]
    (tmp_path / "rows.jsonl").write_bytes(GOOD * 2 + bad + GOOD)
    with pytest.raises(DataError) as caught:
        read_rows(source("rows.jsonl"), "stop", tmp_path)
    check(caught.value, "rows.jsonl:3", words)
    found = read_rows(source("rows.jsonl"), "skip", tmp_path)
    assert (found.read, len(found.rows), len(found.rejects)) == (4, 3, 1)
    assert found.rejects[0].as_dict()["line"] == 3 and json.dumps(found.rejects[0].as_dict())


@pytest.mark.parametrize("kind", TALKS)
def test_a_bad_conversation_is_named(tmp_path, kind):
    bad, words = TALKS[kind]
    (tmp_path / "rows.jsonl").write_bytes(talk(("user", "a"), ("assistant", "b")) + bad)
    with pytest.raises(DataError) as caught:
        read_rows(source("rows.jsonl"), "stop", tmp_path)
    check(caught.value, "rows.jsonl:2", words)


@pytest.mark.parametrize("kind", TABLES)
def test_a_bad_table_row_is_named(tmp_path, kind):
    ending, data, number, words = TABLES[kind]
    (tmp_path / f"rows.{ending}").write_bytes(data)
    with pytest.raises(DataError) as caught:
        read_rows(source(f"rows.{ending}"), "stop", tmp_path)
    check(caught.value, f"rows.{ending}:{number}", words)
    found = read_rows(source(f"rows.{ending}"), "skip", tmp_path)
    assert found.read == len(found.rows) + len(found.rejects) and len(found.rejects) == 1


@pytest.mark.parametrize("kind", FILES)
def test_a_bad_file_is_named(tmp_path, kind):
    name, data, words = FILES[kind]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError) as caught:
        read_rows(source(name), "stop", tmp_path)
    check(caught.value, name, words)


def test_the_line_of_a_fault_in_a_json_list(tmp_path):
    (tmp_path / "r.json").write_text('[\n {"prompt": "a",\n  "completion": "b"},\n\n {"prompt": "c"}\n]')
    with pytest.raises(DataError) as caught:
        read_rows(source("r.json"), "stop", tmp_path)
    assert caught.value.where == "r.json:5:completion"


def test_a_missing_file_names_the_nearest(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", rows_of(1))
    with pytest.raises(DataError, match=r"Did you mean `train\.jsonl`"):
        read_rows(source("trian.jsonl"), "stop", tmp_path)
    with pytest.raises(DataError, match="no folder"):
        read_rows(source("nowhere/train.jsonl"), "stop", tmp_path)


def test_a_column_that_is_not_there_names_the_nearest(tmp_path):
    write_jsonl(tmp_path / "r.jsonl", [{"question": "a", "answer": "b"}])
    with pytest.raises(DataError, match=r"r\.jsonl:1:qestion.*Did you mean `question`"):
        read_rows(source("r.jsonl", columns={"prompt": "qestion", "completion": "answer"}), "stop", tmp_path)
    with pytest.raises(DataError, match="Did you mean `completion`"):
        Columns({"completoin": "answer"}, "rows")


def test_the_longest_row_is_read_and_one_byte_more_is_not(tmp_path):
    shell = len(line(prompt="a", completion="")) - 1
    for extra in (0, 1):
        (tmp_path / "r.jsonl").write_bytes(line(prompt="a", completion="b" * (MAX_ROW_BYTES - shell + extra)) + GOOD)
        assert len(read_rows(source("r.jsonl"), "skip", tmp_path).rejects) == extra


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "tsv", "jsonl.gz", "parquet"])
def test_mutated_files_never_end_in_a_traceback(tmp_path, ending):
    draw = random.Random(ending)
    rows = b"".join(line(prompt=f"q {i}", completion=f"a {i} \u00e9") for i in range(6))
    whole = {
        "jsonl": rows,
        "json": b"[" + b",\n".join(rows.splitlines()) + b"]",
        "csv": b"prompt,completion\n" + b'"q, 1","a ""1"""\nq,a\n' * 3,
        "tsv": b"prompt\tcompletion\n" + b"q\ta\n" * 5,
        "jsonl.gz": gzip.compress(rows),
        "parquet": _parquet(),
    }[ending]
    for _ in range(80):
        data = bytearray(whole)
        for _ in range(draw.randint(1, 3)):
            place = draw.randrange(len(data))
            match draw.randrange(4):
                case 0:
                    data[place] = draw.randrange(256)
                case 1:
                    del data[place : place + draw.randint(1, 9)]
                case 2:
                    data[place:place] = draw.choice(
                        [b"\xff", b"\n", b'"', b"{", b"\x00", b"\xef\xbb\xbf", b",", b"\\u"]
                    )
                case _:
                    del data[max(1, place) :]
        (tmp_path / f"r.{ending}").write_bytes(bytes(data))
        for mode in ("stop", "skip"):
            try:
                found = read_rows(source(f"r.{ending}"), mode, tmp_path)  # type: ignore[arg-type]
            except DataError as error:
                assert error.where.startswith(f"r.{ending}") and "\n" not in str(error)
            else:
                assert found.read == len(found.rows) + len(found.rejects)


def _parquet() -> bytes:
    import io

    import pyarrow
    import pyarrow.parquet

    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows_of(5)), out)
    return out.getvalue()
