"""Data of a report's images for the script of its page, as JSON in the page."""

import json
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

import matplotlib as mpl
import numpy as np
from markupsafe import Markup

from anomalib_sgfr.report.contents import ImageExplanation, ImageMedia, ReportContents
from anomalib_sgfr.report.media import ScoreAxis, data_uri, map_uri
from anomalib_sgfr.report.wording import printable

__all__ = ["LARGEST_SHOWN", "map_range", "script_data"]

LARGEST_SHOWN = 1e30  # score; the axis is not scaled to larger ones


def map_range(contents: ReportContents) -> tuple[float, float]:
    """Lowest and highest value of the colour scale, which all anomaly maps share."""
    if contents.normalised:
        return 0.0, 1.0
    media = [image.media for image in contents.images if image.media is not None]
    largest = [float(np.max(part.anomaly_map)) for part in media]
    return 0.0, max([value for value in largest if np.isfinite(value)], default=1.0) or 1.0


def script_data(
    contents: ReportContents,
    axis: ScoreAxis,
    start: float,
    names: tuple[Sequence[str], Sequence[str]],
    files: Sequence[str],
    command: tuple[str, str],
) -> Markup:
    """Data for the script of a page.

    Args:
        contents (ReportContents): The report.
        axis (ScoreAxis): Axis of scores.
        start (float): Threshold to begin with.
        names (tuple[Sequence[str], Sequence[str]]): Kind and group of each image.
        files (Sequence[str]): Printable name of each image.
        command (tuple[str, str]): Parts of the command before and after the threshold.

    Returns:
        Markup: JSON that cannot end the script element.
    """
    images, normalised = contents.images, contents.normalised
    kinds, groups = (sorted(set(part)) for part in names)
    kind_index, group_index = (
        {name: index for index, name in enumerate(part)} for part in (kinds, groups)
    )
    low, high = map_range(contents)
    media: list[dict[str, Any]] = []
    media_index: list[int] = []
    for image in images:
        media_index.append(-1 if image.media is None else len(media))
        if image.media is not None:
            media.append(_media(image.media, low, high))
    labelled = any(image.result.truth is not None for image in images)
    palette = (255 * mpl.colormaps["inferno"](np.arange(256))[:, :3]).round().astype(np.uint8)
    data = {
        "start": start,
        "low": axis.low,
        "high": axis.high,
        "least": 0.0001 if normalised else 0.0,  # limits of the command
        "most": 0.9999 if normalised else LARGEST_SHOWN,
        "normalised": normalised,
        "path": files,
        "score": [_shortest(image.result.score) for image in images],
        "truth": [image.result.truth for image in images],
        "kind": [kind_index[name] for name in names[0]],
        "group": [group_index[name] for name in names[1]],
        "peak": [image.peak and [round(part, 4) for part in image.peak] for image in images],
        "pixel": [_pixel(image.result.row, image.result.column) for image in images],
        "known": [int(image.trained_on) + 2 * int(image.chose_threshold) for image in images],
        "mediaIndex": media_index,
        "media": media,
        "kinds": kinds,
        "groups": groups if contents.group is not None else [],
        "explanations": {
            index: _explanation(explanation) for index, explanation in contents.explanations.items()
        },
        "command": command,
        "sort": "mistakes" if labelled and contents.threshold is not None else "high",
        "palette": bytes(palette).hex(),
    }
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)  # ASCII only
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return Markup(text)  # noqa: S704  # no HTML is left


def _pixel(row: int | None, column: int | None) -> list[int] | None:
    return None if row is None or column is None else [row, column]


def _shortest(score: float) -> float:
    """Float of 32 bits in the fewest digits that identify it."""
    return float(str(np.float32(score)))


def _media(media: ImageMedia, low: float, high: float) -> dict[str, Any]:
    return {
        "image": data_uri(media.image),
        "map": map_uri(media.anomaly_map, low, high),
        "outline": media.outline,
        "maskOutline": media.mask_outline,
        "aspect": round(media.aspect, 4),
    }


def _explanation(explanation: ImageExplanation) -> dict[str, Any]:
    rows = [
        {
            "number": row.number,
            "box": [round(part, 4) for part in row.box],
            "pixels": row.pixels,
            "residual": f"{row.residual:.3g}",
            "nominal": f"{row.nominal:.3g}",
            "crop": data_uri(row.crop),
            "atoms": [
                [
                    data_uri(atom.image) if atom.image else "",
                    f"{atom.coefficient:+.2f}",
                    printable(PurePath(atom.path).name),
                ]
                for atom in row.atoms
            ],
        }
        for row in explanation.rows
    ]
    return {"rows": rows, "whyNot": printable(explanation.why_not)}
