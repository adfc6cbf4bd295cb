"""The report's colours: one palette that colour-blind readers can tell apart, and two maps of even steps.

Lines and bars use the palette of Okabe and Ito (2008). The maps are straight lines in OKLab, a space in which equal distances look
equally far apart; `LOAD` runs from paper to blue, `DIFFERENCE` from vermilion over paper to blue with the same lightness on both sides.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.colors import ListedColormap

INK, MUTED, LINE, PAPER = "#1d2329", "#5d6773", "#d8dde3", "#ffffff"
BASE = "#7b858f"
SYSTEMS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Runs in their order; the base is `BASE`."""

_DEPTH = ("#e8a317", "#2f9e8f", "#123a78")
_LOAD = ("#f7f9fb", "#0a4a86")
_DIFFERENCE = ("#b3460b", "#f9f8f6", "#1b72b1")
_STEPS = 256
_TO_LMS = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
_TO_LAB = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
)


def colour_of(index: int) -> str:
    """The colour of run `index`."""
    return SYSTEMS[index % len(SYSTEMS)]


def depth_colours(depths: Sequence[int]) -> dict[int, str]:
    """Shallow to deep: from light to dark in even steps, so that their order shows without colour too."""
    from matplotlib.colors import to_hex

    steps = _colormap("depth", _DEPTH)
    ordered = sorted(depths)
    return {depth: to_hex(steps(place / max(1, len(ordered) - 1))) for place, depth in enumerate(ordered)}


@cache
def load_map() -> ListedColormap:
    """Little to much."""
    return _colormap("load", _LOAD)


@cache
def difference_map() -> ListedColormap:
    """Less, same, more."""
    return _colormap("difference", _DIFFERENCE)


def _colormap(name: str, anchors: tuple[str, ...]) -> ListedColormap:
    from matplotlib.colors import ListedColormap, to_rgb

    lab_A3 = np.array([_oklab(np.array(to_rgb(anchor))) for anchor in anchors])
    at_S = np.linspace(0, len(anchors) - 1, _STEPS)
    lab_S3 = np.stack([np.interp(at_S, range(len(anchors)), lab_A3[:, axis]) for axis in range(3)], axis=1)
    return ListedColormap([_rgb(lab) for lab in lab_S3], name=f"sparsmith-{name}")


def _oklab(rgb_3: np.ndarray) -> np.ndarray:
    linear_3 = np.where(rgb_3 <= 0.04045, rgb_3 / 12.92, ((rgb_3 + 0.055) / 1.055) ** 2.4)
    return _TO_LAB @ np.cbrt(_TO_LMS @ linear_3)


def _rgb(lab_3: np.ndarray) -> np.ndarray:
    linear_3 = np.linalg.solve(_TO_LMS, np.linalg.solve(_TO_LAB, lab_3) ** 3).clip(0, 1)
    return np.where(linear_3 <= 0.0031308, 12.92 * linear_3, 1.055 * linear_3 ** (1 / 2.4) - 0.055).clip(0, 1)
