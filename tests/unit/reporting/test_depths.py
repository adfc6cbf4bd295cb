"""The report of a depth-elastic run: the guard first, every depth, where tokens leave, speed against quality."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from dataclasses import replace

import pytest

from sparsmith.reporting import depth_plots, depths, write_report
from sparsmith.reporting import page as page_of
from sparsmith.reporting.depth_plots import Line, Point, ink_on
from sparsmith.reporting.folder import compared_as, read_runs
from sparsmith.reporting.palette import depth_colours
from sparsmith.reporting.plots import svg
from tests.kit.runfolder import NASTY, make_run
from tests.kit.softfolder import DEPTHS, FULL, make_soft_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_soft_run(tmp_path_factory.mktemp("soft") / "soft")


@pytest.fixture(scope="module")
def page(run, tmp_path_factory):
    return write_report([run], tmp_path_factory.mktemp("out") / "report.html").read_text(encoding="utf-8")


def heads(page):
    return re.findall(r'<h2 id="[^"]*">(.*?)</h2>', page)


def words(html):
    return " ".join(re.sub("<[^>]*>", " ", html).split())


def test_the_guard_is_the_first_table(page):
    assert heads(page)[:5] == [
        "What the full depth pays",
        "Before and after",
        "Every depth",
        "Where tokens leave",
        "Speed",
    ]
    first = words(page.split("<table")[1].split("</table>")[0])
    for said in (
        "base, as it came",
        "control: the same rows",
        "this run",
        "+0.0080",
        "✓ within the limit",
        "at most 0.02 nats",
    ):
        assert said in first
    assert "612 480" in first
    assert page.index('class="wide guard"') < page.index('class="wide compare"')
    assert page.count('href="#guard"') == 1 and 'id="guard"' in page


def test_a_frozen_trunk_is_held_against_the_base(run):
    (found,) = read_runs([run])
    assert depths.guard(found)["against"] == "control"
    frozen = depths.guard(replace(found, guard={**found.guard, "control": None}))
    assert frozen["against"] == "base" and [row["key"] for row in frozen["rows"]] == ["base", "tuned"]


def test_what_belongs_to_routers_is_not_on_the_page(page):
    assert "Router health" not in page and "Expert load" not in page
    assert "Not measured in this run." not in page
    assert "<h1>stories-3m, crafted with SoFT</h1>" in page


def test_figures_are_well_formed_and_say_in_words_what_they_show(page):
    figures = re.findall(r"<svg .*?</svg>", page, flags=re.DOTALL)
    assert all(ET.fromstring(one.replace("xlink:href", "href")).get("aria-label") for one in figures)
    for title in ("Loss of every depth while tuning", "Held-out figures by depth", "Tokens by the depth they left at"):
        assert f"<b>{title}.</b>" in page
    assert "Speed against quality" in page
    assert "soft/loss_at" not in page and "soft: loss at" not in page  # one figure for all depths


def test_every_depth_in_numbers(run, page):
    table = depths.table(read_runs([run])[0])
    assert [row[0] for row in table["rows"]] == [str(n) for n in DEPTHS]
    assert table["rows"][-1][table["heads"].index("Agreement with the full depth")] == "–"
    losses = [float(row[1].split()[0]) for row in table["rows"]]
    assert losses == sorted(losses, reverse=True) and f"{losses[0]:.3f}" in page


def test_tokens_carry_their_depth_without_colour(run, page):
    tokens = json.loads((run / "exits.json").read_text())["prompts"][0]["tokens"]
    shown = re.findall(r'<p class="tokens">(.*?)</p>', page, flags=re.DOTALL)
    assert len(shown) == 3
    told = re.findall(r'title="left after (\d+) blocks">(?:<sub>(\d+)</sub>)?', shown[0])
    assert [int(depth) for depth, _ in told] == [depth for _, depth in tokens]
    changes = [depth for place, (_, depth) in enumerate(tokens) if place == 0 or tokens[place - 1][1] != depth]
    assert [int(number) for _, number in told if number] == changes
    assert NASTY not in page and "&lt;scr</span>" in shown[2]


def test_several_runs_stand_side_by_side_and_one_that_lost_too_much_is_red(run, tmp_path):
    other = make_soft_run(tmp_path / "longer", seed=1, lift=1.1, gap=0.05, benched=False)
    sparse = make_run(tmp_path / "pesc")
    bench = json.loads((run / "bench.json").read_text())
    speed = [row for row in bench["speed"] if row["depth"] == FULL]
    (sparse / "bench.json").write_text(json.dumps({**bench, "speed": speed, "ways": []}))
    page = write_report([run, other, sparse], tmp_path / "out.html").read_text(encoding="utf-8")
    assert "Router health" in page and page.count('class="wide guard"') == 2
    assert page.count('tr class="exceeded"') == page.count('tr class="kept"') == 1
    assert "✗ over the limit" in page and "+0.0500" in page
    assert page.count("Ways of writing") == 1 and page.count("Speed on ") == 2
    chart = depths.measured(read_runs([run, other]))
    assert "longer" in chart.svg and "control" not in chart.caption
    kinds = {point.kind for point in depths._speed_points(json.loads((sparse / "bench.json").read_text()))}
    assert kinds == {"base", "depth"}


def test_a_run_without_bench_or_control_has_the_rest(run):
    (found,) = read_runs([run])
    bare = page_of.view([replace(found, guard=None, bench=None, exits=None, control_depths=None)])
    shown = [title for _, title in bare["contents"]]
    assert shown[:3] == ["Before and after", "Every depth", "How it learned"]
    assert bare["by_depth"] and not bare["routed"]


@pytest.mark.parametrize(
    ("entry", "role"),
    [
        ({"method": "soft", "arm": "soft", "control": "train"}, ""),
        ({"method": "soft", "arm": "sft"}, "sft"),
        ({"method": "pesc", "control": "none"}, ""),
        ({"method": "pesc", "control": "dense_lora"}, "dense_lora"),
        ({"method": "other"}, ""),
    ],
)
def test_what_an_entry_is_in_a_comparison(entry, role):
    assert compared_as(entry) == role


def luminance(colour):
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_deeper_is_darker_and_text_on_it_reads(count):
    colours = list(depth_colours(range(2, 2 + count)).values())
    light = [luminance(colour) for colour in colours]
    assert light == sorted(light, reverse=True) and len(set(colours)) == count
    for colour in colours:
        one, other = sorted([luminance(colour), luminance(ink_on(colour))])
        assert (other + 0.05) / (one + 0.05) >= 4.5  # WCAG AA


def test_plots_of_one_depth_and_of_nothing_left(run):
    figure = depth_plots.shares({"a": {2: 0, 6: 4}, "b": {2: 0, 6: 0}}, depth_colours([2, 6]))
    assert "6 blocks" in svg(figure)
    one = {"a": [Point("depth", 1.0, 2.0, "6")]}
    assert "<svg" in svg(depth_plots.speed_and_quality({"x": one}, {"a": "#0072b2", "base": "#7b858f"}, ylabel="loss"))
    results = read_runs([run])[0].depths
    line = Line({int(n): depths._figure(result, "loss") for n, result in results.items()})
    panels = {f"panel {place}": {"a": line} for place in range(4)}
    assert len([a for a in depth_plots.over_depths(panels, {"a": "#0072b2"}).axes if a.get_visible()]) == 4
