"""Rows as the model sees them."""

from __future__ import annotations

import io
import json

from rich.console import Console

from sparsmith.data import show
from tests.kit.rowfiles import chat_tokenizer, rows_of, settings, source, write_jsonl


def test_the_view_marks_what_is_trained(tmp_path):
    write_jsonl(tmp_path / "r.jsonl", [*rows_of(4), {"prompt": "[bold]x", "completion": None}])
    base = settings(tmp_path, [source("r.jsonl", on_bad_row="skip")], template="Q {prompt} A ")
    view = show(base, chat_tokenizer(None), 2, seed=0, base_dir=tmp_path)
    assert len(view.rows) == 2 and view.domains["d"]["kept"] == 4
    for row in view.rows:
        assert [trained for _, trained in row.pieces] == [False, True]
        assert "".join(text for text, _ in row.pieces).startswith("<s>Q row")
        assert row.pieces[1][0].startswith("answer") and row.pieces[1][0].endswith("</s>")
    text = view.as_text()
    assert "«answer" in text and "r.jsonl:5:completion" in text and "trained_tokens" in text
    assert json.loads(json.dumps(view.as_dict()))["counts"][0]["rejected"] == 1
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(view)
    printed = console.export_text()
    assert "answer" in printed and "rejected" in printed
