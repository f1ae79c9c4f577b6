"""What the script of a page works on, as JSON in the page."""

import json
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

import matplotlib as mpl
import numpy as np
from markupsafe import Markup

from anomalib_sgfr.report.charts import Axis
from anomalib_sgfr.report.digest import Digest, Mimic, Picture, Unit
from anomalib_sgfr.report.thumbnails import data_uri, embedded_heat
from anomalib_sgfr.report.words import shown

__all__ = ["BEYOND", "heat_range", "script_data"]

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
    kind_of, group_of = ({name: number for number, name in enumerate(part)} for part in (kinds, groups))
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
                [data_uri(crop.picture) if crop.picture else "", f"{crop.share:+.2f}", shown(PurePath(crop.image).name)]
                for crop in row.crops
            ],
        }
        for row in mimic.rows
    ]
    return {"rows": rows, "why_not": shown(mimic.why_not)}


def _json(data: Any) -> Markup:  # noqa: ANN401
    """JSON that no HTML can hide in, for a script element."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)  # all of it ASCII, the line separators too
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return Markup(text)  # noqa: S704  # see above
