"""Images and charts of a report: WebP images, small anomaly maps, outlines, and SVG paths."""

import base64
import io
import math
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

import numpy as np
from contourpy import contour_generator
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from PIL import Image

from anomalib_sgfr.images.reading import upright_size
from anomalib_sgfr.report.statistics import subsampled

__all__ = [
    "BUDGET",
    "Bars",
    "EvidenceChart",
    "ScoreAxis",
    "aspect_ratio",
    "bar_path",
    "curve_path",
    "data_uri",
    "evidence_chart",
    "histogram",
    "map_uri",
    "outline",
    "small_map",
    "ticks",
    "webp",
]

_WIDTH, _HEIGHT = 1000, 100  # of a chart's view box, which the page stretches
_BINS = 60
BUDGET = 3_500_000  # bytes of all images of a page; base64 adds a third
_LARGEST = 65504.0  # of float16
_MAP_SIDE = 64  # pixels of a small map
_OUTLINE_SIDE = 160  # pixels of a map that an outline is drawn from
_SPACING = 7.0  # thousandths of the image between points of an outline
_LONGEST = 2500  # characters of an outline; a finer one is drawn coarser
_LONGEST_ASPECT = 10.0  # of one side to the other that is drawn; longer images are squeezed to it
_QUALITIES = (80, 70, 55, 40)


class ScoreAxis(NamedTuple):
    """Axis of a chart.

    Attributes:
        low (float): Value at the left end.
        high (float): Value at the right end.
    """

    low: float
    high: float

    @property
    def ticks(self) -> list[tuple[float, str]]:
        """Position of each tick, from 0 to 1, and its label."""
        return ticks(self.low, self.high)


class Bars(NamedTuple):
    """Histogram of one kind of images.

    Attributes:
        name (str): Name of the kind.
        number (int): Number of images.
        tallest (int): Images in the tallest bar, which fills the height.
        path (str): SVG path of the bars.
    """

    name: str
    number: int
    tallest: int
    path: str


class EvidenceChart(NamedTuple):
    """Chart of the evidence of a stream.

    Attributes:
        path (str): SVG path.
        limit (float): Height of the limit, as a share of the chart's.
        powers (list[tuple[float, str]]): Height and label of some powers of ten.
    """

    path: str
    limit: float
    powers: list[tuple[float, str]]


def ticks(low: float, high: float, number: int = 8) -> list[tuple[float, str]]:
    """Positions, from 0 to 1, and labels of about ``number`` ticks at round numbers."""
    if not (math.isfinite(low) and math.isfinite(high) and high > low):
        return []
    values = map(float, MaxNLocator(number).tick_values(low, high))
    return [((v - low) / (high - low), f"{v:.6g}") for v in values if low <= v <= high]


def bar_path(counts: Sequence[int]) -> str:
    """SVG path of bars side by side, the tallest as high as the view box."""
    tallest, step = max(counts, default=0) or 1, _WIDTH / max(len(counts), 1)
    parts = []
    for index, count in enumerate(counts):
        if count:
            top = _HEIGHT - max(
                round(_HEIGHT * count / tallest, 1), 2.0
            )  # small counts stay visible
            parts.append(f"M{index * step:.1f} {_HEIGHT}V{top:g}h{step * 0.9:.1f}V{_HEIGHT}z")
    return "".join(parts)


def histogram(name: str, scores: Sequence[float], axis: ScoreAxis) -> Bars:
    """Histogram of the scores of a kind of images; scores beyond the axis count at its ends."""
    values = np.clip(np.asarray(scores, float), axis.low, axis.high)
    counts = np.histogram(values, _BINS, (axis.low, axis.high))[0].tolist()
    return Bars(name, len(values), max(counts), bar_path(counts))


def curve_path(x: Sequence[float], y: Sequence[float], right: float = 1.0) -> str:
    """SVG path of a curve over abscissas from 0 to ``right`` and ordinates from 0 to 1."""
    points = [
        f"{_WIDTH * a / right:.1f} {_HEIGHT * (1 - b):.2f}" for a, b in zip(x, y, strict=True)
    ]
    return "M" + "L".join(points) if points else ""


def evidence_chart(evidence: Sequence[float], limit: float) -> EvidenceChart:
    """Chart of evidence on a logarithmic axis, which ends a hundred times above the limit.

    Args:
        evidence (Sequence[float]): Evidence after each image.
        limit (float): Evidence at which the alarm is raised.

    Returns:
        EvidenceChart: The chart.
    """
    values = np.log10(np.clip(np.asarray([1.0, *evidence]), 1e-300, None))
    low, high = min(float(values.min()), -1.0), math.log10(limit) + 2.0
    heights = ((values - low) / (high - low)).clip(0.0, 1.0)
    curve = subsampled(np.arange(len(values), dtype=float), heights, 0.0)
    powers = range(math.ceil(low), math.floor(high) + 1, max(1, round((high - low) / 6)))
    return EvidenceChart(
        path=curve_path(curve.x, curve.y, max(len(evidence), 1)),
        limit=(math.log10(limit) - low) / (high - low),
        powers=[((power - low) / (high - low), f"{10.0**power:g}") for power in powers],
    )


def webp(pixels: NDArray[np.float32], side: int, most_bytes: int | None = None) -> bytes:
    """Encode an image as WebP.

    Args:
        pixels (NDArray[np.float32]): Image of shape ``(H, W, 3)``, between 0 and 1.
        side (int): Most pixels along its longer side.
        most_bytes (int | None): Most bytes, as far as lower quality and size allow.

    Returns:
        bytes: The encoded image.
    """
    values = np.round(255.0 * np.nan_to_num(np.clip(pixels, 0.0, 1.0))).astype(np.uint8)
    image = Image.fromarray(values)
    found = b""
    while True:
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
        for quality in _QUALITIES:
            buffer = io.BytesIO()
            image.save(buffer, "WEBP", quality=quality, method=3)
            found = buffer.getvalue()
            if most_bytes is None or len(found) <= most_bytes:
                return found
        side //= 2
        if side < 32:  # noqa: PLR2004
            return found


def small_map(values: NDArray[np.floating]) -> NDArray[np.float16]:
    """Anomaly map ``(H, W)`` of at most 64 pixels a side, to keep for every image."""
    return _resized(values, _MAP_SIDE).clip(-_LARGEST, _LARGEST).astype(np.float16)


def _resized(values: NDArray[np.floating], side: int) -> NDArray[np.float32]:
    finite = np.nan_to_num(np.asarray(values, np.float32), posinf=_LARGEST, neginf=-_LARGEST)
    image = Image.fromarray(np.ascontiguousarray(finite))
    share = min(1.0, side / max(image.size))
    size = (max(1, round(image.width * share)), max(1, round(image.height * share)))
    return np.asarray(image.resize(size, Image.Resampling.BILINEAR), np.float32)


def map_uri(values: NDArray[np.floating], low: float, high: float) -> str:
    """Data URI of an anomaly map ``(h, w)`` as 8-bit grey, black at ``low``, white at ``high``."""
    share = (np.asarray(values, np.float32) - low) / (high - low if high > low else 1.0)
    grey = np.round(255.0 * np.clip(share, 0.0, 1.0)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(grey).save(buffer, "PNG", optimize=True)
    return data_uri(buffer.getvalue(), "png")


def data_uri(content: bytes, kind: str = "webp") -> str:
    """Data URI of an encoded image."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"


def outline(values: NDArray[np.floating], level: float) -> str:
    """SVG path around what exceeds a level, closed along the border of the image.

    Args:
        values (NDArray[np.floating]): Map of shape ``(H, W)``.
        level (float): The level.

    Returns:
        str: Path in a square of 1,000; empty if nothing exceeds the level.
    """
    field = _resized(values, _OUTLINE_SIDE)
    if not bool((field > level).any()):
        return ""
    height, width = field.shape
    padded = np.pad(field, 1, constant_values=level - 1e-3 * (float(field.max()) - level))
    lines = [
        np.clip((np.asarray(line) - 0.5) / (width, height), 0.0, 1.0) * 1000.0
        for line in contour_generator(z=padded).lines(level)
    ]
    spacing = _SPACING
    while True:
        path = "".join(_closed_path(line, spacing) for line in lines)
        if len(path) <= _LONGEST:
            return path
        spacing *= 1.5


def _closed_path(points: NDArray[np.floating], spacing: float) -> str:
    """Path through points that are ``spacing`` apart; empty below three of them."""
    kept = [points[0]]
    for point in points[1:]:
        if float(np.abs(point - kept[-1]).max()) >= spacing:
            kept.append(point)
    if len(kept) < 3:  # noqa: PLR2004
        return ""
    return "M" + "L".join(f"{x:.0f} {y:.0f}" for x, y in kept) + "z"


def aspect_ratio(path: str, height: int, width: int) -> float:
    """Width over height of an image as it is shown, or of the sides if it cannot be read."""
    with suppress(OSError, ValueError, SyntaxError):
        height, width = upright_size(path)
    return min(max(width / max(height, 1), 1.0 / _LONGEST_ASPECT), _LONGEST_ASPECT)
