"""Charts as paths in a box that may be stretched: the page puts the words around them."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.ticker import MaxNLocator

__all__ = ["HEIGHT", "WIDTH", "Axis", "Bars", "bars", "histogram", "path_of", "ticks"]

WIDTH, HEIGHT = 1000, 100  # of the box
_BINS = 60


class Axis(NamedTuple):
    """From where to where an axis goes.

    Attributes:
        low (float): Its left end.
        high (float): Its right end.
        ticks (list[tuple[float, str]]): Share of the way, and what stands there.
    """

    low: float
    high: float
    ticks: list[tuple[float, str]]

    @classmethod
    def over(cls, low: float, high: float, number: int = 8) -> "Axis":
        """With words at round numbers."""
        return cls(low, high, ticks(low, high, number))


class Bars(NamedTuple):
    """A row of a histogram.

    Attributes:
        name (str): What is counted.
        number (int): How many in all.
        tallest (int): The tallest bar, to which the row is scaled.
        path (str): Of the bars.
    """

    name: str
    number: int
    tallest: int
    path: str


def ticks(low: float, high: float, number: int = 8) -> list[tuple[float, str]]:
    """Round numbers between two: share of the way, and how they are written."""
    if not (math.isfinite(low) and math.isfinite(high) and high > low):
        return []
    places = [float(place) for place in MaxNLocator(number).tick_values(low, high) if low <= place <= high]
    return [((place - low) / (high - low), f"{place:.6g}") for place in places]


def bars(counts: Sequence[int]) -> str:
    """Path of bars side by side, the tallest as high as the box."""
    tallest, step = max(counts, default=0) or 1, WIDTH / max(len(counts), 1)
    parts = []
    for place, count in enumerate(counts):
        if count:  # what is there can be seen
            top = HEIGHT - max(round(HEIGHT * count / tallest, 1), 2.0)
            parts.append(f"M{place * step:.1f} {HEIGHT}V{top:g}h{step * 0.9:.1f}V{HEIGHT}z")
    return "".join(parts)


def histogram(rows: Sequence[tuple[str, Sequence[float]]], axis: Axis) -> list[Bars]:
    """Rows of scores over one axis.

    Args:
        rows (Sequence[tuple[str, Sequence[float]]]): Names and scores.
        axis (Axis): What lies beyond it is counted at its ends.
    """
    found = []
    for name, scores in rows:
        values = np.clip(np.asarray(scores, float), axis.low, axis.high)
        counts = np.histogram(values, _BINS, (axis.low, axis.high))[0].tolist()
        found.append(Bars(name, len(values), max(counts), bars(counts)))
    return found


def path_of(x: Sequence[float], y: Sequence[float], right: float = 1.0) -> str:
    """Path of a curve between zero and ``right``, and zero and one."""
    points = [f"{WIDTH * a / right:.1f} {HEIGHT * (1 - b):.2f}" for a, b in zip(x, y, strict=True)]
    return "M" + "L".join(points) if points else ""
