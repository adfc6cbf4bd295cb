from __future__ import annotations

import numpy as np
import pytest

from sparsmith.bootstrap import Figure
from sparsmith.reporting import maps, palette, plots
from sparsmith.reporting.plots import Curve, svg

COLOURS = {"base": palette.BASE, **plots.colours_of(["a", "b"])}


def test_curves_hold_what_they_were_given():
    figure = plots.curves(
        {"maths": {"a": Curve([1, 2], [3.0, 2.0], ([2], [2.5]))}, "code": {"b": Curve([1], [4.0])}},
        ylabel="loss",
        colours=COLOURS,
    )
    lines = figure.axes[0].get_lines()
    assert list(lines[0].get_ydata()) == [3.0, 2.0] and list(lines[-1].get_ydata()) == [2.5]
    assert [axis.get_title(loc="left") for axis in figure.axes[:2]] == ["maths", "code"]
    assert "<svg" in svg(figure, 'a "label" <b>') and "&lt;b>" in svg(figure, 'a "label" <b>')


@pytest.mark.parametrize(("layers", "experts"), [(1, 2), (6, 8), (32, 8), (24, 64)])
def test_load_maps_of_every_size(layers, experts):
    load_GLE = np.random.default_rng(0).dirichlet(np.ones(experts), (4, layers))
    figure = maps.load_by_layer(load_GLE.mean(0), list(range(2, layers + 2)))
    assert figure.axes[0].get_ylim() == (layers, 0)
    assert figure.axes[0].get_yticklabels()[0].get_text() == "2"
    wide = maps.load_by_domain(load_GLE, ["a", "b", "c", "d"])
    for text in (svg(figure), svg(wide)):
        assert text.startswith("<svg") and text.endswith("</svg>\n")
    assert figure.get_figheight() < 9 and wide.get_figheight() < 17


def test_an_even_router_draws():
    svg(maps.load_by_layer(np.full((2, 4), 0.25)))
    svg(maps.load_by_domain(np.full((1, 2, 4), 0.25), ["one"]))


def test_intervals_with_gaps():
    rows = [
        ("maths", {"base": Figure(0.1, 0.05, 0.2, 9), "a": Figure(0.4, 0.3, 0.5, 9)}),
        ("code", {"a": Figure(0.2, 0.1, 0.3, 9)}),
    ]
    figure = plots.intervals(rows, xlabel="exact match, %", colours=COLOURS, percent=True)
    assert figure.axes[0].get_xlim()[0] == 0
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["maths", "code"]


def test_a_band_over_steps():
    figure = plots.band({"a": ([1, 2], [0.2, 0.5], [2.0, 1.5]), "b": ([1], [0.1], [3.0])}, COLOURS)
    assert figure.axes[0].get_ylim()[0] == 0


def lightness(colormap) -> np.ndarray:
    from matplotlib.colors import to_rgb

    return np.array([palette._oklab(np.array(to_rgb(colour)))[0] for colour in colormap.colors])


def test_maps_are_even_in_lightness():
    """Equal steps of the load are equal steps of lightness; both sides of a difference are alike dark."""
    steps = np.diff(lightness(palette.load_map()))
    assert (steps < 0).all() and steps.std() < 0.15 * abs(steps.mean())
    both = lightness(palette.difference_map())
    assert abs(both[0] - both[-1]) < 0.03 and both[128] > both[0] + 0.3
    assert np.abs(both[:128] - both[-128:][::-1]).max() < 0.04
