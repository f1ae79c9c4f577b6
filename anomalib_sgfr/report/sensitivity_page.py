"""Page and figures of the sensitivity of a model to drawn defects."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from anomalib_sgfr.images.drawn_defects import KINDS
from anomalib_sgfr.report.media import curve_path
from anomalib_sgfr.report.page import render_template
from anomalib_sgfr.report.sensitivity import (
    FEW,
    TARGET,
    DetectionCurve,
    Place,
    Sensitivity,
    SettingResult,
    recommend,
)
from anomalib_sgfr.report.statistics import interval
from anomalib_sgfr.report.wording import Share

__all__ = ["SensitivityFacts", "render_sensitivity", "sensitivity_as_json"]

_NOT_REAL = (
    "Drawn defects are not real ones: they say which sizes and places are hard for this model, not"
    " how many of your defects it will find. Test on real defects wherever you have some."
)
_WORST = 12  # places in the table
_OPACITY = 0.8  # of the cell where most is missed


class SensitivityFacts(NamedTuple):
    """What a page and its figures tell beside the counts.

    Attributes:
        made (str): Time, to the minute.
        checkpoint (str): Path of the checkpoint.
        sha256 (str): Of the checkpoint.
        versions (dict[str, str]): Versions of Python and packages.
        threshold (float): Current threshold of normalised scores.
        basis (str): What the threshold is calibrated on, in words.
        false_alarm_rate (float): That it is calibrated for.
        seed (int): Seed of the drawings.
        has_region (bool): Whether defects were drawn in a region of interest alone.
        mm_per_pixel (float | None): Millimetres of a pixel of the images, if known.
        notes (list[str]): Sentences to read before relying on the figures.
        settings (list[SettingResult]): Compared settings, the present ones first; empty if none
            were compared.
    """

    made: str
    checkpoint: str
    sha256: str
    versions: dict[str, str]
    threshold: float
    basis: str
    false_alarm_rate: float
    seed: int
    has_region: bool
    mm_per_pixel: float | None
    notes: list[str]
    settings: list[SettingResult] = []  # noqa: RUF012  # never changed


def _caveats_of(sensitivity: Sensitivity, facts: SensitivityFacts) -> list[str]:
    """Sentences to read before relying on the figures."""
    alarms, images = len(sensitivity.alarms), sensitivity.images
    said = [_NOT_REAL]
    said.append(
        "A defect counts as found if its image is above the current threshold. All were drawn into"
        f" {images} image{'s' if images != 1 else ''}: the intervals do not tell how other images"
        " would differ."
    )
    if alarms:
        said.append(
            f"{alarms} of {alarms + images} good images are above the threshold without a defect"
            " and are left out."
        )
    if not facts.has_region:
        said.append(
            "Defects were drawn anywhere in the images, beside the part too if they show more than"
            " the part: name a mask of the part by --roi."
        )
    if not sensitivity.same_size:
        said.append(
            "The images differ in size: places are shares of height and width, in pixels of the"
            " median size."
        )
    return said + list(facts.notes)


def sensitivity_as_json(sensitivity: Sensitivity, facts: SensitivityFacts) -> dict[str, Any]:
    """Figures for programs.

    Args:
        sensitivity (Sensitivity): The counts.
        facts (SensitivityFacts): What is known beside.

    Returns:
        dict[str, Any]: ``curves`` has a row for each kind and contrast, with ``smallest_size`` and
        the counts of each size; ``places`` the map, in pixels. Intervals are of 95%.
    """
    height, width = sensitivity.image_size
    scale = facts.mm_per_pixel
    curves = []
    for curve in sensitivity.curves:
        smallest, fitted = curve.smallest, curve.fitted
        bounds = {"size": smallest.size, "low": smallest.low, "high": smallest.high}
        its: dict[str, Any] = {
            "status": "not reached"
            if smallest.size is None
            else ("at most" if smallest.is_bound else "reached"),
            "pixels": bounds,
        }
        if scale is not None:
            its["mm"] = {
                name: None if value is None else value * scale for name, value in bounds.items()
            }
        curves.append(
            {
                "kind": curve.kind,
                "contrast": curve.contrast,
                "smallest_size": its,
                "sizes": [
                    {
                        "pixels": size,
                        **({} if scale is None else {"mm": size * scale}),
                        "drawn": drawn,
                        "found": found,
                        "located": located,
                        "rate": found / drawn if drawn else None,
                        "interval": list(interval(found, drawn)),
                        "monotone_rate": float(fit) if drawn else None,
                    }
                    for size, drawn, found, located, fit in zip(
                        curve.sizes, curve.drawn, curve.found, curve.located, fitted, strict=True
                    )
                ],
            }
        )
    return {
        "made": facts.made,
        "checkpoint": facts.checkpoint,
        "sha256": facts.sha256,
        "versions": facts.versions,
        "threshold": facts.threshold,
        "basis": facts.basis,
        "seed": facts.seed,
        "probability": TARGET,
        "mm_per_pixel": scale,
        "image_size": [height, width],
        "same_size": sensitivity.same_size,
        "region": facts.has_region,
        "images": sensitivity.images,
        "alarms": sensitivity.alarms,
        "drawn": sensitivity.drawn,
        "missed": sensitivity.missed,
        "notes": _caveats_of(sensitivity, facts),
        "curves": curves,
        **(
            {
                "settings": [row._asdict() for row in facts.settings],
                "recommended": recommend(facts.settings, facts.false_alarm_rate),
            }
            if facts.settings
            else {}
        ),
        "places": [
            {
                "top": round(place.top * height),
                "left": round(place.left * width),
                "bottom": round(place.bottom * height),
                "right": round(place.right * width),
                "drawn": place.drawn,
                "missed": place.missed,
                "interval": list(interval(place.missed, place.drawn)),
            }
            for place in sensitivity.places
        ],
    }


def render_sensitivity(sensitivity: Sensitivity, facts: SensitivityFacts) -> str:
    """Render the page, in one file that needs neither a network nor scripts.

    Args:
        sensitivity (Sensitivity): The counts.
        facts (SensitivityFacts): What is known beside.

    Returns:
        str: HTML.
    """
    return render_template(
        "sensitivity.html.j2",
        lstrip_blocks=True,
        facts=facts,
        sensitivity=sensitivity,
        about=KINDS,
        caveats=_caveats_of(sensitivity, facts),
        lead=_lead(sensitivity, facts),
        contrasts=sorted({curve.contrast for curve in sensitivity.curves}),
        recommended=recommend(facts.settings, facts.false_alarm_rate) if facts.settings else "",
        kinds=[_kind_row(sensitivity, kind, facts) for kind in _kinds(sensitivity)],
        size_text=lambda pixels: _size_text(pixels, facts.mm_per_pixel),
        cells=[_cell(place, sensitivity) for place in sensitivity.places],
        map_range=[f"{100.0 * share:.0f}%" for share in _range(sensitivity)],
        worst=[_cell(place, sensitivity) for place in sensitivity.worst_places[:_WORST]],
    )


def _kinds(sensitivity: Sensitivity) -> list[str]:
    return list(dict.fromkeys(curve.kind for curve in sensitivity.curves))


def _size_text(pixels: float, mm_per_pixel: float | None) -> str:
    text = f"{pixels:.3g} px"
    return text if mm_per_pixel is None else f"{text} ({pixels * mm_per_pixel:.3g} mm)"


def _smallest_text(curve: DetectionCurve, mm_per_pixel: float | None) -> tuple[str, str]:
    """Smallest size and its interval, as texts."""
    found = curve.smallest
    if not any(curve.drawn):
        return "not drawn", "the images have no texture that it could be seen in"
    low, high = (
        _size_text(bound, mm_per_pixel) if bound else "" for bound in (found.low, found.high)
    )
    between = f"{low} to {high}" if low and high else f"{low} or more" if low else ""
    between = between or (f"at most {high}" if high else "any size")
    if found.size is None:
        return "not reached", f"95%: {between}"
    size = _size_text(found.size, mm_per_pixel)
    return f"{'≤ ' if found.is_bound else ''}{size}", f"95%: {between}"


def _lead(sensitivity: Sensitivity, facts: SensitivityFacts) -> str:
    """Sentence on what is found at the largest contrast, and what is not."""
    contrast = max(curve.contrast for curve in sensitivity.curves)
    own = [curve for curve in sensitivity.curves if curve.contrast == contrast and any(curve.drawn)]
    reached = [
        f"{curve.kind} {_smallest_text(curve, facts.mm_per_pixel)[0]}"
        for curve in own
        if curve.smallest.size is not None
    ]
    missed = [curve.kind for curve in own if curve.smallest.size is None]
    said = []
    if reached:
        said.append(
            f"Found with a probability of 90% at a contrast of {contrast:g}, from this size on:"
            f" {', '.join(reached)}."
        )
    if missed:
        said.append(
            f"At no size that was drawn, up to"
            f" {_size_text(own[0].sizes[-1], facts.mm_per_pixel)}: {', '.join(missed)}."
        )
    return " ".join(said) or "No defect could be drawn."


def _kind_row(sensitivity: Sensitivity, kind: str, facts: SensitivityFacts) -> dict[str, Any]:
    """What the page shows of a kind."""
    curves = [curve for curve in sensitivity.curves if curve.kind == kind]
    return {
        "name": kind,
        "curves": [
            {
                "contrast": curve.contrast,
                "smallest": _smallest_text(curve, facts.mm_per_pixel),
                **_paths(curve),
                "rows": [
                    (
                        _size_text(size, facts.mm_per_pixel),
                        drawn,
                        found,
                        located,
                        Share.of(found, drawn).cell if drawn else "none",
                    )
                    for size, drawn, found, located in zip(
                        curve.sizes, curve.drawn, curve.found, curve.located, strict=True
                    )
                ],
            }
            for curve in curves
        ],
        "ticks": _ticks(curves[0].sizes, facts.mm_per_pixel),
        "examples": [example for example in sensitivity.examples if example.kind == kind],
    }


def _share_of_axis(sizes: Sequence[float], size: float) -> float:
    """Position of a size on a logarithmic axis, from 0 to 1."""
    low, high = np.log(sizes[0]), np.log(sizes[-1])
    return float((np.log(size) - low) / (high - low)) if high > low else 0.5


def _ticks(sizes: Sequence[float], mm_per_pixel: float | None) -> list[tuple[float, str]]:
    shown = [sizes[round(share * (len(sizes) - 1))] for share in (0.0, 1 / 3, 2 / 3, 1.0)]
    unit = 1.0 if mm_per_pixel is None else mm_per_pixel
    name = "px" if mm_per_pixel is None else "mm"
    return [
        (_share_of_axis(sizes, size), f"{size * unit:.3g} {name}") for size in dict.fromkeys(shown)
    ]


def _paths(curve: DetectionCurve) -> dict[str, str]:
    """SVG paths of a curve in a view box of 1000 by 100: line, band of intervals, and points."""
    use = [at for at, drawn in enumerate(curve.drawn) if drawn]
    if not use:
        return {"line": "", "band": "", "points": ""}
    x = [_share_of_axis(curve.sizes, curve.sizes[at]) for at in use]
    rates = [curve.found[at] / curve.drawn[at] for at in use]
    low, high = zip(*(interval(curve.found[at], curve.drawn[at]) for at in use), strict=True)
    return {
        "line": curve_path(x, curve.fitted[use].tolist()),
        "band": curve_path([*x, *x[::-1]], [*low, *high[::-1]]) + "z",
        "points": "".join(f"{curve_path([a], [b])}h0" for a, b in zip(x, rates, strict=True)),
    }


def _range(sensitivity: Sensitivity) -> tuple[float, float]:
    """Least and largest share of missed defects in a cell of the map that has enough of them."""
    shares = [place.missed / place.drawn for place in sensitivity.places if place.drawn >= FEW]
    return min(shares, default=0.0), max(shares, default=0.0)


def _cell(place: Place, sensitivity: Sensitivity) -> dict[str, Any]:
    """Cell of the map in pixels of the images, with its share of missed defects."""
    least, most = _range(sensitivity)
    height, width = sensitivity.image_size
    top, bottom = round(place.top * height), round(place.bottom * height)
    left, right = round(place.left * width), round(place.right * width)
    few = place.drawn < FEW
    share = place.missed / place.drawn if place.drawn else 0.0
    low, high = interval(place.missed, place.drawn)
    return {
        "x": left,
        "y": top,
        "width": right - left,
        "height": bottom - top,
        "few": few,
        "opacity": f"{_OPACITY * (share - least) / max(most - least, 1e-9):.3f}",
        "rows": f"{top} to {bottom - 1}",
        "columns": f"{left} to {right - 1}",
        "text": f"{place.missed} of {place.drawn} missed"
        + ("" if few else f", {100 * share:.0f}% ({100 * low:.0f} to {100 * high:.0f})"),
    }
