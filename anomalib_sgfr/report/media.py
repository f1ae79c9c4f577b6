"""Charts as paths in a box that may be stretched: the page puts the words around them.

Small pictures for a page: images, maps on one scale, and outlines.

What the script of a page works on, as JSON in the page.

The mimic view as the page shows it: small crops of the nominal patches that rebuilt an image's
worst places.
"""

import base64
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
import torch
from contourpy import contour_generator
from markupsafe import Markup
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from PIL import Image

from anomalib_sgfr.core.patch_grid import PatchIndex
from anomalib_sgfr.images.pre_processor import read_prepared
from anomalib_sgfr.report.contents import Crop, Digest, Mimic, MimicRow, Picture, Unit
from anomalib_sgfr.report.crops import CONTEXT, Gallery, crop, displayed
from anomalib_sgfr.report.explanation import Reconstruction, explain
from anomalib_sgfr.report.wording import shown
from anomalib_sgfr.torch_model import SgfrModel

__all__ = [
    "BEYOND",
    "BUDGET",
    "HEIGHT",
    "WIDTH",
    "Axis",
    "Bars",
    "aspect_of",
    "bars",
    "data_uri",
    "embedded_heat",
    "heat_range",
    "histogram",
    "mimic_of",
    "outline",
    "path_of",
    "script_data",
    "small_heat",
    "ticks",
    "training_picture",
    "webp",
]


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
    places = [
        float(place) for place in MaxNLocator(number).tick_values(low, high) if low <= place <= high
    ]
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
    """A map as a grey picture of 8 bits: black at ``low`` and below, white at ``high`` and above,
    for a browser.
    """
    share = (np.asarray(heat, np.float32) - low) / (high - low if high > low else 1.0)
    grey = np.round(255.0 * np.clip(share, 0.0, 1.0)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(grey).save(buffer, "PNG", optimize=True)
    return data_uri(buffer.getvalue(), "png")


def data_uri(content: bytes, kind: str = "webp") -> str:
    """A picture that stands in the page itself."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"


def outline(values: NDArray[np.floating], level: float) -> str:
    """Where values ``(H, W)`` exceed a level, as an SVG path in a square of 1,000; empty where they
    nowhere do.

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
    """Width over height of a picture whose file was stretched to ``height`` x ``width``; of these,
    if it is gone.
    """
    try:
        with Image.open(Path(path)) as opened:
            width, height = opened.size
    except (OSError, ValueError, SyntaxError):
        pass
    return min(max(width / max(height, 1), 0.2), 5.0)


BEYOND = 1e30  # scores that no axis has room for


def heat_range(digest: Digest) -> tuple[float, float]:
    """One scale for all maps: that of reported maps, or up to the highest."""
    if digest.scaled:
        return 0.0, 1.0
    tops = [float(np.max(unit.picture.heat)) for unit in digest.units if unit.picture is not None]
    return 0.0, max([top for top in tops if np.isfinite(top)], default=1.0) or 1.0


def script_data(
    digest: Digest,
    axis: Axis,
    start: float,
    names: tuple[Sequence[str], Sequence[str]],
    files: Sequence[str],
    command: tuple[str, str],
) -> Markup:
    """What the page's script works on.

    Args:
        digest (Digest): What the page shows.
        axis (Axis): Of scores.
        start (float): Threshold to begin with.
        names (tuple[Sequence[str], Sequence[str]]): Kind and group of each image.
        files (Sequence[str]): Names of the images, as they are shown.
        command (tuple[str, str]): Before and after the threshold.

    Returns:
        Markup: JSON that no HTML can hide in.
    """
    kinds, groups = (sorted(set(part)) for part in names)
    kind_of, group_of = (
        {name: number for number, name in enumerate(part)} for part in (kinds, groups)
    )
    low, high = heat_range(digest)
    pictures: list[dict[str, Any]] = []
    places: list[int] = []
    for unit in digest.units:
        places.append(-1 if unit.picture is None else len(pictures))
        if unit.picture is not None:
            pictures.append(_picture(unit.picture, low, high))
    labelled = any(unit.scored.truth is not None for unit in digest.units)
    palette = (255 * mpl.colormaps["inferno"](np.arange(256))[:, :3]).round().astype(np.uint8)
    data = {
        "start": start,
        "low": axis.low,
        "high": axis.high,
        "least": 0.0001 if digest.scaled else 0.0,  # what the command takes
        "most": 0.9999 if digest.scaled else BEYOND,
        "scaled": digest.scaled,
        "path": files,
        "score": [_short(unit.scored.score) for unit in digest.units],
        "truth": [unit.scored.truth for unit in digest.units],
        "kind": [kind_of[name] for name in names[0]],
        "group": [group_of[name] for name in names[1]],
        "place": [unit.place and [round(part, 4) for part in unit.place] for unit in digest.units],
        "pixel": [_pixel(unit) for unit in digest.units],
        "known": [int(unit.trained_on) + 2 * int(unit.chose) for unit in digest.units],
        "picture": places,
        "kinds": kinds,
        "groups": groups if digest.group is not None else [],
        "pictures": pictures,
        "mimics": {number: _mimic(mimic) for number, mimic in digest.mimics.items()},
        "command": command,
        "sort": "mistakes" if labelled and digest.threshold is not None else "high",
        "palette": bytes(palette).hex(),
    }
    return _json(data)


def _pixel(unit: Unit) -> list[int] | None:
    """Row and column of the file."""
    row, column = unit.scored.row, unit.scored.column
    return None if row is None or column is None else [row, column]


def _short(score: float) -> float:
    """Of 32 bits, in as few digits as tell it from all others."""
    return float(str(np.float32(score)))


def _picture(picture: Picture, low: float, high: float) -> dict[str, Any]:
    return {
        "image": data_uri(picture.image),
        "heat": embedded_heat(picture.heat, low, high),
        "outline": picture.outline,
        "truth": picture.truth,
        "aspect": round(picture.aspect, 4),
    }


def _mimic(mimic: Mimic) -> dict[str, Any]:
    rows = [
        {
            "number": row.number,
            "box": [round(part, 4) for part in row.box],
            "pixels": row.pixels,
            "residual": f"{row.residual:.3g}",
            "nominal": f"{row.nominal:.3g}",
            "here": data_uri(row.here),
            "crops": [
                [
                    data_uri(crop.picture) if crop.picture else "",
                    f"{crop.share:+.2f}",
                    shown(PurePath(crop.image).name),
                ]
                for crop in row.crops
            ],
        }
        for row in mimic.rows
    ]
    return {"rows": rows, "why_not": shown(mimic.why_not)}


def _json(data: Any) -> Markup:  # noqa: ANN401
    """JSON that no HTML can hide in, for a script element."""
    text = json.dumps(
        data, separators=(",", ":"), allow_nan=False
    )  # all of it ASCII, the line separators too
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return Markup(text)  # noqa: S704  # see above


_REGIONS, _CROPS, _SIDE = 2, 4, 56


def mimic_of(model: SgfrModel, pre_processor: Any, path: str, gallery: Gallery) -> Mimic:  # noqa: ANN401
    """Explain an image, read anew from its file.

    Args:
        model (SgfrModel): A fitted model.
        pre_processor (Any): Its pre-processor.
        path (str): The image.
        gallery (Gallery): Keeps training images that were read.

    Returns:
        Mimic: Or why there is none.
    """
    if not path or not Path(path).is_file():
        return Mimic([], "The image's file is gone, so it is not explained.")
    try:
        image = read_prepared(path, pre_processor, model.bit_depth).to(next(model.parameters()))
        found = explain(model, image, _REGIONS)
    except (OSError, ValueError, RuntimeError, SyntaxError) as error:
        return Mimic([], f"The image is not explained: {error}")
    shown = displayed(pre_processor, image)
    rows = []
    for number, region in enumerate(found.regions, 1):
        window = PatchIndex(region.row, region.column, found.grid).window(shown.shape[:2], CONTEXT)
        height, width = shown.shape[:2]
        box = (
            window.left / width,
            window.top / height,
            window.width / width,
            window.height / height,
        )
        rows += [_row(number, box, part, shown, gallery) for part in region.reconstructions]
    return Mimic(rows)


def _row(
    number: int,
    box: tuple[float, float, float, float],
    part: Reconstruction,
    shown: NDArray[np.float32],
    gallery: Gallery,
) -> MimicRow:
    crops = []
    for contribution in part.contributions[:_CROPS]:
        seen = gallery.crop(part.scale, contribution.atom)
        picture = None if seen is None else webp(np.asarray(seen, np.float32), _SIDE)
        crops.append(Crop(picture, contribution.coefficient, contribution.image or ""))
    return MimicRow(
        number=number,
        box=box,
        pixels=round(shown.shape[0] / part.grid[0]),
        residual=part.residual,
        nominal=part.nominal,
        here=webp(crop(shown, PatchIndex(part.row, part.column, part.grid)), _SIDE),
        crops=crops,
    )


def training_picture(
    path: str,
    pre_processor: Any,
    bit_depth: int,
    side: int = 160,
) -> bytes | None:
    """A training image as the model saw it, WebP; ``None`` if it is gone."""
    try:
        with torch.no_grad():
            return webp(
                displayed(pre_processor, read_prepared(path, pre_processor, bit_depth)), side
            )
    except (OSError, ValueError, SyntaxError):
        return None
