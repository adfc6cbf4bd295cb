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
from tests.unit.data.make import rows_of, source, write_jsonl

GOOD = b'{"prompt": "a", "completion": "b"}\n'


def line(**row: object) -> bytes:
    return json.dumps(row).encode() + b"\n"


def talk(*turns: tuple[str, object]) -> bytes:
    return line(messages=[{"role": role, "content": content} for role, content in turns])


JSONL = {
    "missing key": (line(prompt="a"), "no column `completion`"),
    "null": (line(prompt="a", completion=None), "null as completion"),
    "number": (line(prompt="a", completion=3), "the number 3 as completion"),
    "boolean": (line(prompt=True, completion="b"), "the boolean true as prompt"),
    "list": (line(prompt=["a"], completion="b"), "a list of 1 as prompt"),
    "object": (line(prompt={"a": 1}, completion="b"), "an object as prompt"),
    "bad utf-8": (b'{"prompt": "\xff", "completion": "b"}\n', "0xff at byte 13"),
    "two objects": (b'{"prompt": "a", "completion": "b"} {"prompt": "c", "completion": "d"}\n', "two objects on one line"),
    "text after": (b'{"prompt": "a", "completion": "b"} x\n', "text after the object"),
    "bom inside": (b"\xef\xbb\xbf" + GOOD, "byte order mark"),
    "10 MB line": (line(prompt="a", completion="b" * (10 * 2**20)), "10.0 MiB"),
    "empty answer": (line(prompt="a", completion=""), "an empty completion"),
    "space answer": (line(prompt="a", completion=" \n"), "an empty completion"),
    "empty prompt": (line(prompt="", completion="b"), "an empty prompt"),
    "broken json": (b'{"prompt": "a", \n', "broken JSON"),
    "not json": (b"hello\n", "broken JSON"),
    "a list": (b'["a", "b"]\n', "a list of 2"),
    "a string": (b'"a"\n', "the text 'a'"),
    "NaN": (b'{"prompt": "a", "completion": "b", "score": NaN}\n', "the number NaN"),
    "duplicate keys": (b'{"prompt": "a", "prompt": "c", "completion": "b"}\n', "the key `prompt` twice"),
    "blank line": (b"  \n", "a blank line"),
    "surrogate": (b'{"prompt": "\\ud800", "completion": "b"}\n', "surrogate"),
    "deep": (b"[" * 100_000 + b"\n", "broken JSON|nested too deep"),
    "long number": (b'{"prompt": "a", "completion": "b", "n": ' + b"1" * 5000 + b"}\n", "too many digits"),
    "nul": (b"\x00\x00\x00\n", "broken JSON"),
}  # fmt: skip

TALKS = {
    "unknown role": (talk(("user", "a"), ("robot", "b")), "the role 'robot'"),
    "role of another type": (talk(("user", "a"), (3, "b")), "the role the number 3"),  # type: ignore[arg-type]
    "empty answer": (talk(("user", "a"), ("assistant", "")), "an empty answer"),
    "null content": (talk(("user", "a"), ("assistant", None)), "null as answer"),
    "no answer": (talk(("user", "a")), "without an answer"),
    "two users": (talk(("user", "a"), ("user", "b"), ("assistant", "c")), "user as message 1"),
    "late system": (talk(("user", "a"), ("system", "b"), ("assistant", "c")), "system as message 1"),
    "assistant first": (talk(("assistant", "a"), ("user", "b")), "assistant as message 0"),
    "no messages": (line(messages=[]), "no message"),
    "no list": (line(messages="hello"), "the text 'hello'"),
    "no object": (line(messages=["hello"]), "the text 'hello'"),
    "no content": (line(messages=[{"role": "user"}]), "no `content`"),
}


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


TABLES = {
    "ragged row": ("csv", b"prompt,completion\na,b\na,b,c\n", 3, "3 cells"),
    "short row": ("csv", b"prompt,completion\na,b\na\n", 3, "1 cells"),
    "open quote": ("csv", b'prompt,completion\na,b\n"a,b\nc,d\n', 3, "never closed"),
    "after quote": ("csv", b'prompt,completion\na,b\n"a"x,b\n', 3, "after a closing quote"),
    "blank line": ("csv", b"prompt,completion\na,b\n\nc,d\n", 3, "a blank line"),
    "empty cell": ("csv", b"prompt,completion\na,b\na,\n", 3, "an empty completion"),
    "bad utf-8": ("csv", b"prompt,completion\na,b\na,\xff\n", 3, "0xff"),
    "tsv ragged": ("tsv", b"prompt\tcompletion\na\tb\na\n", 3, "1 cells"),
    "after a record of three lines": ("csv", b'prompt,completion\n"a\n\nb",b\na\n', 5, "1 cells"),
}


@pytest.mark.parametrize("kind", TABLES)
def test_a_bad_table_row_is_named(tmp_path, kind):
    ending, data, number, words = TABLES[kind]
    (tmp_path / f"rows.{ending}").write_bytes(data)
    with pytest.raises(DataError) as caught:
        read_rows(source(f"rows.{ending}"), "stop", tmp_path)
    check(caught.value, f"rows.{ending}:{number}", words)
    found = read_rows(source(f"rows.{ending}"), "skip", tmp_path)
    assert found.read == len(found.rows) + len(found.rejects) and len(found.rejects) == 1


FILES = {
    "truncated gzip": ("r.jsonl.gz", gzip.compress(GOOD * 2000)[:-20], "ends too early"),
    "damaged gzip": ("r.jsonl.gz", b"\x1f\x8b" + b"x" * 40, "damaged gzip"),
    "not gzip": ("r.jsonl.gz", GOOD, "not gzip"),
    "utf-16": ("r.jsonl", GOOD.decode().encode("utf-16"), "UTF-16"),
    "empty": ("r.jsonl", b"", "no usable row"),
    "unknown ending": ("r.txt", b"hello", "a file ending in `.txt`"),
    "csv without rows": ("r.csv", b"prompt,completion\n", "no usable row"),
    "csv with a name twice": ("r.csv", b"prompt,prompt\na,b\n", "the column name `prompt` twice"),
    "csv with an empty name": ("r.csv", b"prompt,,x\na,b,c\n", "an empty name for column 2"),
    "broken json": ("r.json", b'[{"prompt": "a", "completion": "b"},\n{"prompt": }]', "broken JSON"),
    "json cut short": ("r.json", b'[{"prompt": "a", "completion": "b"}', "the end of the file"),
    "json without rows": ("r.json", b'{"a": 1}', "meaning is not certain"),
    "json of two lists": ("r.json", b'{"a": [{"b": 1}],\n "c": [{"d": 1}]}', "`a`, `c`"),
    "json with a tail": ("r.json", b'[{"prompt": "a", "completion": "b"}]\n[]', "text after the end"),
    "wrapped json with a tail": (
        "r.json",
        b'{"data": [{"prompt": "a",\n"completion": "b"}]}\n{}',
        "text after the end",
    ),
    "wrapped json cut short": ("r.json", b'{"data": [{"prompt": "a",\n"completion": "b"}]', "the end of the file"),
    "json number": ("r.json", b"3", "no JSON list"),
    "json bad utf-8": ("r.json", b'[\n{"prompt": "\xff"}]', "0xff"),
    "no parquet": ("r.parquet", b"PAR1 nothing", "cannot be read"),
    "json list in jsonl": ("r.jsonl", b'[\n{"prompt": "a"}\n]', "the head of a JSON list"),
    "unclear columns": ("r.jsonl", b'{"foo": "a", "bar": "b"}\n', "meaning is not certain"),
    "text beside code": ("r.jsonl", b'{"text": "a", "code": "b"}\n', "meaning is not certain"),
}


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
