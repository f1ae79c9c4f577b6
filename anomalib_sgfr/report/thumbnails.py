"""Small pictures for a page: images, maps on one scale, and outlines."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from contourpy import contour_generator
from numpy.typing import NDArray
from PIL import Image

__all__ = ["BUDGET", "aspect_of", "data_uri", "embedded_heat", "outline", "small_heat", "webp"]

BUDGET = 3_500_000  # bytes of all images of a page, before base64 makes a third more of them
_MOST = 65504.0  # that 16 bits hold
_HEAT = 64  # pixels across a map
_DRAWN = 160  # across a map whose outline is drawn
_APART = 7.0  # of 1,000: points of an outline
_LONGEST = 2500  # signs of an outline: what is finer is drawn coarser
_QUALITIES = (80, 70, 55, 40)


def webp(pixels: NDArray[np.float32], side: int, room: int | None = None) -> bytes:
    """An image ``(H, W, 3)`` between 0 and 1 as WebP.

    Args:
        pixels (NDArray[np.float32]): The image.
        side (int): Most pixels along its longer side.
        room (int | None): Most bytes, if quality and size can give so little.
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
            if room is None or len(found) <= room:
                return found
        side //= 2
        if side < 32:  # noqa: PLR2004
            return found


def small_heat(values: NDArray[np.floating]) -> NDArray[np.float16]:
    """A map ``(H, W)``, small enough to keep for every image."""
    return _resized(values, _HEAT).clip(-_MOST, _MOST).astype(np.float16)


def _resized(values: NDArray[np.floating], most: int) -> NDArray[np.float32]:
    finite = np.nan_to_num(np.asarray(values, np.float32), posinf=_MOST, neginf=-_MOST)
    image = Image.fromarray(np.ascontiguousarray(finite))
    share = min(1.0, most / max(image.size))
    size = (max(1, round(image.width * share)), max(1, round(image.height * share)))
    return np.asarray(image.resize(size, Image.Resampling.BILINEAR), np.float32)


def embedded_heat(heat: NDArray[np.floating], low: float, high: float) -> str:
    """A map as a grey picture of 8 bits: black at ``low`` and below, white at ``high`` and above, for a browser."""
    share = (np.asarray(heat, np.float32) - low) / (high - low if high > low else 1.0)
    grey = np.round(255.0 * np.clip(share, 0.0, 1.0)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(grey).save(buffer, "PNG", optimize=True)
    return data_uri(buffer.getvalue(), "png")


def data_uri(content: bytes, kind: str = "webp") -> str:
    """A picture that stands in the page itself."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"


def outline(values: NDArray[np.floating], level: float) -> str:
    """Where values ``(H, W)`` exceed a level, as an SVG path in a square of 1,000; empty where they nowhere do.

    Lines are drawn half-way between pixels by contourpy, and closed along the border.
    """
    field = _resized(values, _DRAWN)
    if not bool((field > level).any()):
        return ""
    height, width = field.shape
    around = np.pad(field, 1, constant_values=level - 1e-3 * (float(field.max()) - level))
    found = [
        np.clip((np.asarray(line) - 0.5) / (width, height), 0.0, 1.0) * 1000.0
        for line in contour_generator(z=around).lines(level)
    ]
    apart = _APART
    while True:
        path = "".join(_closed(_spaced(places, apart)) for places in found)
        if len(path) <= _LONGEST:
            return path
        apart *= 1.5


def _closed(places: Sequence[NDArray[np.floating]]) -> str:
    """Path of a line; none of what is smaller than can be drawn."""
    if len(places) < 3:  # noqa: PLR2004
        return ""
    return "M" + "L".join(f"{x:.0f} {y:.0f}" for x, y in places) + "z"


def _spaced(places: NDArray[np.floating], apart: float) -> Sequence[NDArray[np.floating]]:
    kept = [places[0]]
    for place in places[1:]:
        if float(np.abs(place - kept[-1]).max()) >= apart:
            kept.append(place)
    return kept


def aspect_of(path: str, height: int, width: int) -> float:
    """Width over height of a picture whose file was stretched to ``height`` x ``width``; of these, if it is gone."""
    try:
        with Image.open(Path(path)) as opened:
            width, height = opened.size
    except (OSError, ValueError, SyntaxError):
        pass
    return min(max(width / max(height, 1), 0.2), 5.0)
