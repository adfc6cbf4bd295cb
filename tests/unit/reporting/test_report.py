from __future__ import annotations

import json
import re
import shutil
import xml.etree.ElementTree as ET

import pytest

from sparsmith.errors import CheckpointError, SparsmithError
from sparsmith.reporting import write_report
from sparsmith.reporting.folder import read_runs
from tests.kit.runfolder import NASTY, make_run


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    return [make_run(root / "dense-lora", control=True, seed=1, lift=0.8), make_run(root / "pesc")]


@pytest.fixture(scope="module")
def page(runs, tmp_path_factory):
    return write_report(runs, tmp_path_factory.mktemp("out") / "deep" / "report.html").read_text(encoding="utf-8")


@pytest.fixture
def copy(runs, tmp_path):
    return shutil.copytree(runs[1], tmp_path / "run")


def test_the_page_needs_nothing_from_outside(page):
    assert not re.search(r"https?://|//[a-z]+\.|<script|<link|<iframe|@import|url\((?!#)", page)
    assert all(
        target.startswith(("#", "data:image/png;base64,")) for target in re.findall(r'(?:href|src)="([^"]*)"', page)
    )


def test_every_part_is_there(page):
    heads = re.findall(r'<h2 id="[^"]*">(.*?)</h2>', page)
    assert heads == [
        "Before and after",
        "How it learned",
        "Router health",
        "Expert load",
        "Samples",
        "Proof",
        "Plan",
        "Data",
        "Recipe, versions and machine",
    ]
    assert page.count("<svg ") == page.count("</svg>") == 3 + 4 + 2 + 2
    assert page.count('class="badge yes"') == 4
    assert "Not measured in this run." not in page
    for words in (
        "4.92\u00a0M",
        "mean of domains",
        "9f2c7e4b1a0d6835",
        "learning_rate: 0.003",
        "torch",
        "as the reference",
    ):
        assert words in page


def test_the_control_stands_beside_the_run_that_the_report_is_about(page):
    assert "<h1>stories-3m, crafted with PESC</h1>" in page
    assert "dense LoRA, a control of PESC" in page
    heads = re.findall(r"<th>(.*?)</th>", page.split('class="wide compare"')[1].split("</thead>")[0])
    assert [re.sub("<.*?>", "", head) for head in heads] == [
        "rows", "base", "dense-lora", "pesc", "pesc \u2212 base", "pesc \u2212 dense-lora",
    ]  # fmt: skip
    assert 'class="best">2.576' in page and "\u22120.460" in page


def test_text_of_rows_is_escaped(page):
    assert "<script>alert" not in page and "<img" not in page
    assert "&lt;script&gt;alert(" in page
    assert NASTY not in page


def test_figures_are_well_formed_and_labelled(page):
    for figure in re.findall(r"<svg .*?</svg>", page, flags=re.DOTALL):
        element = ET.fromstring(figure.replace("xlink:href", "href"))
        assert element.get("role") == "img" and element.get("aria-label")
        width, viewed = float(element.get("width")), [float(x) for x in element.get("viewBox").split()]
        assert width == pytest.approx(viewed[2] * 4 / 3, abs=1)


def test_the_same_runs_give_the_same_bytes(runs, page, tmp_path):
    assert write_report(runs, tmp_path / "again.html").read_text(encoding="utf-8") == page


def test_absent_parts_are_said(copy, tmp_path):
    for name in ("plan.json", "data.json", "tables.json", "eval.json", "samples.json", "proof.json"):
        (copy / name).unlink()
    text = write_report([copy], tmp_path / "out.html").read_text(encoding="utf-8")
    assert text.count("Not measured in this run.") == 3
    assert text.count("No proof was recorded") == 2
    assert "No plan was recorded" in text and "No counts were recorded" in text
    assert "How it learned" in text and "<svg" in text


def test_a_run_without_steps_or_experts(copy, tmp_path):
    (copy / "metrics.jsonl").write_text("", encoding="utf-8")
    (copy / "tables.json").write_text('{"other": {"gates": [1, 2]}}', encoding="utf-8")
    text = write_report([copy], tmp_path / "out.html").read_text(encoding="utf-8")
    assert text.count("Not measured in this run.") == 2


@pytest.mark.parametrize("name", ["recipe.yaml", "run.json", "metrics.jsonl"])
def test_a_missing_file_of_a_finished_run_is_named(copy, tmp_path, name):
    (copy / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        write_report([copy], tmp_path / "out.html")
    assert not (tmp_path / "out.html").exists()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("run.json", "{"),
        ("run.json", "[]"),
        ("plan.json", "3"),
        ("eval.json", "[1]"),
        ("recipe.yaml", "a: [1"),
        ("recipe.yaml", "just words"),
        ("metrics.jsonl", '{"step": 1, "loss": 2}\n{"step"'),
        ("metrics.jsonl", "[]"),
    ],
)
def test_a_damaged_file_is_named(copy, tmp_path, name, text):
    (copy / name).write_text(text, encoding="utf-8")
    with pytest.raises(SparsmithError, match=name):
        write_report([copy], tmp_path / "out.html")


def test_no_runs_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="no run"):
        write_report([], tmp_path / "out.html")


def test_runs_of_one_name_are_told_apart(runs, tmp_path):
    twins = [shutil.copytree(runs[1], tmp_path / seed / "pesc") for seed in ("a", "b")]
    assert [run.name for run in read_runs(twins)] == ["a/pesc", "b/pesc"]
    assert len({run.name for run in read_runs([twins[0], twins[0]])}) == 2


def test_a_step_written_twice_counts_once(copy):
    lines = (copy / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    again = json.loads(lines[-1]) | {"loss": 1.25}
    (copy / "metrics.jsonl").write_text("\n".join([*lines, json.dumps(again)]) + "\n", encoding="utf-8")
    (run,) = read_runs([copy])
    assert len(run.steps) == 30 and run.steps[-1]["loss"] == 1.25


def test_rows_that_differ_are_not_paired(runs, tmp_path):
    other = shutil.copytree(runs[0], tmp_path / "other")
    evaluation = json.loads((other / "eval.json").read_text(encoding="utf-8"))
    evaluation["tuned"]["fingerprints"] = dict.fromkeys(evaluation["tuned"]["fingerprints"], "elsewhere")
    (other / "eval.json").write_text(json.dumps(evaluation), encoding="utf-8")
    text = write_report([runs[1], other], tmp_path / "out.html").read_text(encoding="utf-8")
    assert "\u22120.460" not in text and '<td class="absent">' in text
