"""Rows and files that are bad, each with the words by which the refusal must tell it; and files that are odd and good."""

from __future__ import annotations

import gzip
import json

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


TABLES: dict[str, tuple[str, bytes, int, str]] = {
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


PAIRS = [
    ("a b", "c\r\nd"),
    (" lead", "trail "),
    ("\u2028 sep", "nel \x85 end"),
    ("e\u0301", "\u00e9 \U0001f600"),
    ("tab\t", "nul \x00"),
]
"""(prompt, completion) texts that a careless reader changes: line ends, spaces, separators, unnormalised letters."""
_LINES = [line(prompt=prompt, completion=completion) for prompt, completion in PAIRS]
_RAW = [json.dumps({"prompt": p, "completion": c}, ensure_ascii=False).encode() + b"\n" for p, c in PAIRS]
_CELLS = b"prompt,completion\r\n" + b"".join(
    b'"%s","%s"\r\n' % (prompt.encode(), completion.encode()) for prompt, completion in PAIRS
)
ODD: dict[str, tuple[str, bytes]] = {
    "mark at the head": ("r.jsonl", b"\xef\xbb\xbf" + b"".join(_LINES)),
    "CRLF": ("r.jsonl", b"".join(_LINES).replace(b"\n", b"\r\n")),
    "CRLF and a mark": ("r.jsonl", b"\xef\xbb\xbf" + b"".join(_LINES).replace(b"\n", b"\r\n")),
    "no last line end": ("r.jsonl", b"".join(_LINES).removesuffix(b"\n")),
    "blank lines at the end": ("r.jsonl", b"".join(_LINES) + b"\n \r\n\n"),
    "spaces around": ("r.jsonl", b"".join(b" \t" + each[:-1] + b"  \n" for each in _LINES)),
    "letters as they are": ("r.jsonl", b"".join(_RAW)),
    "other columns": ("r.jsonl", b"".join(each.replace(b"{", b'{"id": null, "n": [1, {}], ', 1) for each in _LINES)),
    "packed": ("r.jsonl.gz", gzip.compress(b"".join(_LINES))),
    "packed under a plain name": ("r.jsonl", gzip.compress(b"".join(_LINES))),
    "packed in two parts": ("r.jsonl.gz", gzip.compress(b"".join(_LINES[:2])) + gzip.compress(b"".join(_LINES[2:]))),
    "a list": ("r.json", b"[" + b",".join(_LINES) + b"]"),
    "a list with a mark and CRLF": ("r.json", b"\xef\xbb\xbf[\r\n" + b",\r\n".join(_LINES) + b"]\r\n"),
    "a list in an object": ("r.json", b'{"version": 1, "data": [' + b",".join(_LINES) + b"]}"),
    "lines under json": ("r.json", b"".join(_LINES)),
    "quoted cells": ("r.csv", _CELLS),
    "quoted cells with a mark": ("r.csv", b"\xef\xbb\xbf" + _CELLS),
}  # fmt: skip
