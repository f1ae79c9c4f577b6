"""The page itself: a digest, drawn by templates, in one file that needs nothing else."""

import base64
import hashlib
import json
import os
import shlex
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from anomalib_sgfr.core.thresholds import supported_rate
from anomalib_sgfr.inspection.evidence import named
from anomalib_sgfr.report.charts import Axis, bars, histogram, path_of, ticks
from anomalib_sgfr.report.digest import Digest, Mimic, ModelFacts, Picture
from anomalib_sgfr.report.statistics import Counts, Curve, Line, interval, lines, roc
from anomalib_sgfr.report.thumbnails import data_uri, embedded_heat
from anomalib_sgfr.report.words import caveats, memory_of, seconds_of, verdict

__all__ = ["rendered", "shown", "write_page"]

_TEMPLATES = Path(__file__).parent / "templates"
_PLAIN = {"data", "images", "img", "test"}  # names of folders
_BEYOND = 1e30  # scores that no axis has room for


def rendered(digest: Digest) -> str:
    """The page of a digest.

    Args:
        digest (Digest): What it shows.

    Returns:
        str: HTML.
    """
    style, script = ((_TEMPLATES / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    script_hash = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    return environment.get_template("page.html.j2").render(
        **_context(digest),
        style=Markup(style),  # noqa: S704  # this package's own
        script=Markup(script),  # noqa: S704
        script_hash=f"sha256-{script_hash}",
    )


def write_page(page: str, file: Path) -> None:
    """Write a page, whole or not at all; its folder is made."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.name}.part")
    try:
        part.write_text(page, encoding="utf-8")
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)


def shown(path: str) -> str:
    """A path as it can be shown: bytes of no encoding and control characters by their numbers."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode("ascii") for sign in text)


class _Share(NamedTuple):
    """A share of images, in words."""

    number: int
    rate: str
    said: str
    cell: str

    @classmethod
    def of(cls, hits: int, number: int) -> "_Share":
        low, high = (f"{100 * part:.1f}%" for part in interval(hits, number))
        rate = f"{100 * hits / number:.1f}%" if number else "-"
        said = f"{hits} of {number}, 95% interval {low} to {high}"
        return cls(number, rate, said, f"{hits}, {rate} ({low} to {high})")


def _context(digest: Digest) -> dict[str, Any]:
    scored = [unit.scored for unit in digest.units]
    scores, truths = [row.score for row in scored], [row.truth for row in scored]
    kinds, groups = [unit.kind for unit in digest.units], [""] * len(scored)
    if digest.group is not None:
        groups = [shown(named(row.image, digest.group)) for row in scored]
    axis = _axis(scores, digest)
    start = axis.high if digest.threshold is None else digest.threshold
    counts = Counts.at(start, scores, truths)
    good, bad, unknown = ([s for s, t in zip(scores, truths, strict=True) if t == its] for its in (0, 1, None))
    named_rows = (("Good", good, ""), ("Defective", bad, "bad"), ("Truth not known", unknown, ""))
    rows = [(name, its, tone) for name, its, tone in named_rows if its]
    drawn = histogram([(name, its) for name, its, _ in rows], axis)
    folder, names = _names([row.image for row in scored])
    low, high = _heat_range(digest)
    command = _command(digest)
    found = roc(good, bad)
    pictured = sum(unit.picture is not None for unit in digest.units)
    sections = ["Verdict", "Threshold", "Pictures", "Model", "Tables", "Curves"]
    return {
        "title": f"{_product(folder)}{len(scored)} images inspected" if len(scored) != 1 else "1 image inspected",
        "made": digest.made,
        "versions": digest.model.versions,
        "folder": folder,
        "sections": [(name, name.lower()) for name in sections],
        "verdict": verdict(counts, digest.threshold),
        "cards": _cards(digest, counts),
        "caveats": [shown(line) for line in caveats(digest, counts, pictured)],
        "number": len(scored),
        "scaled": digest.scaled,
        "rows": [{"bars": part, "tone": tone} for part, (_, _, tone) in zip(drawn, rows, strict=True)],
        "axis_of": axis,
        "at": f"{100 * min(max((start - axis.low) / (axis.high - axis.low), 0.0), 1.0):.3f}",
        "in_force": digest.threshold,
        "start": start,
        "start_text": f"{start:.9g}",
        "counts": _count_lines(counts),
        "command": f"{command[0]}{start:.9g}{command[1]}",
        "pictured": _pictured(pictured, len(scored)),
        "any_truth": any(unit.picture and unit.picture.truth for unit in digest.units),
        "any_unknown": bool(unknown),
        "heat_low": f"{low:.3g}",
        "heat_high": f"{high:.3g}",
        "several_kinds": len(set(kinds)) > 1,
        "group": digest.group,
        "tables": _tables(digest, kinds, groups, start),
        "roc": None if found is None else _curve(found, 1.0),
        "regions": None if digest.regions is None else _curve(digest.regions, 0.3),
        "regions_note": digest.regions_note,
        "data": _json(_data(digest, axis, start, (kinds, groups), names, command)),
        **_of_model(digest.model, digest.scaled),
    }


def _product(folder: str) -> str:
    """Name of the first folder upwards that says more than that it holds images."""
    own = next((part for part in reversed(PurePath(folder).parts) if part.lower() not in _PLAIN), "")
    return f"{own}: " if own.strip("/\\") else ""


def _axis(scores: Sequence[float], digest: Digest) -> Axis:
    """From the lowest score to the highest, with room, and the threshold on it."""
    values = [score for score in scores if score < _BEYOND]
    values += [] if digest.threshold is None else [digest.threshold]
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    room = 0.03 * (high - low) or 0.05 * abs(high) or 0.5
    low, high = low - room, high + room
    if digest.scaled:
        low, high = max(low, 0.0), min(high, 1.0)
    return Axis.over(float(f"{low:.4g}"), float(f"{high:.4g}"))


def _heat_range(digest: Digest) -> tuple[float, float]:
    """One scale for all maps: that of reported maps, or up to the highest."""
    if digest.scaled:
        return 0.0, 1.0
    tops = [float(np.max(unit.picture.heat)) for unit in digest.units if unit.picture is not None]
    return 0.0, max([top for top in tops if np.isfinite(top)], default=1.0) or 1.0


def _names(paths: Sequence[str]) -> tuple[str, list[str]]:
    """The folder that all are in, and what is left of each path."""
    folders = {str(PurePath(path).parent) for path in paths if path}
    try:
        common = os.path.commonpath(folders) if folders else ""
    except ValueError:  # absolute and relative ones
        common = ""
    left = [str(PurePath(path).relative_to(common)) if common and path else path for path in paths]
    return shown(common), [shown(name) or f"image {number}" for number, name in enumerate(left, 1)]


def _command(digest: Digest) -> tuple[str, str]:
    checkpoint = shown(shlex.quote(digest.model.checkpoint)) if digest.model.checkpoint else "CKPT"
    return f"anomalib-sgfr threshold {checkpoint} --score ", ""


def _cards(digest: Digest, counts: Counts) -> list[dict[str, Any]]:
    cards = []
    if digest.threshold is not None:
        if counts.good:
            part = _Share.of(counts.alarms, counts.good)
            cards.append({"name": "False alarms", "value": part.rate, "said": part.said, "accent": True})
        if counts.bad:
            part = _Share.of(counts.missed, counts.bad)
            cards.append({"name": "Missed defects", "value": part.rate, "said": part.said, "accent": True})
        if counts.unknown:
            part = _Share.of(counts.called, counts.unknown)
            cards.append({"name": "Called anomalous, truth not known", "value": part.rate, "said": part.said})
    value = "none" if digest.threshold is None else f"{digest.threshold:.4g}"
    cards.append({"name": "Threshold in force", "value": value, "said": f"rests on {digest.basis}"})
    if digest.nominal_units:
        rate = 100 * supported_rate(digest.nominal_units)
        said = f"so many, none of them an alarm, would support a false-alarm rate of {rate:.2g}% at 95% confidence"
        cards.append({"name": "Independent good units it rests on", "value": str(digest.nominal_units), "said": said})
    return [{"accent": False, **card} for card in cards]


def _count_lines(counts: Counts) -> list[dict[str, Any]]:
    parts = (
        ("alarms", "false alarms", counts.alarms, counts.good),
        ("missed", "missed", counts.missed, counts.bad),
        ("called", "called anomalous, truth not known", counts.called, counts.unknown),
    )
    found = []
    for key, name, hits, number in parts:
        if number:
            share = _Share.of(hits, number)
            found.append({"id": f"count-{key}", "name": name, "percent": share.rate, "said": share.said})
    return found


def _pictured(pictured: int, number: int) -> str:
    if pictured == number:
        return f"All {number} images." if number != 1 else "The one image."
    return (
        f"{pictured} of {number} images are shown with pictures: mistakes, those nearest the threshold and the highest "
        f"scores; the pictures of {number - pictured} are left out, their scores are not."
    )


def _tables(digest: Digest, kinds: Sequence[str], groups: Sequence[str], threshold: float) -> list[dict[str, Any]]:
    scores = [unit.scored.score for unit in digest.units]
    truths = [unit.scored.truth for unit in digest.units]

    def table(title: str, head: str, key: str, names: Sequence[str], *, against_all_good: bool) -> dict[str, Any]:
        found = lines(names, scores, truths, threshold, against_all_good=against_all_good)
        return {"title": title, "head": head, "key": key, "lines": [_line(line) for line in found]}

    tables = [table("Kinds of defect", "Kind", "kind", kinds, against_all_good=True)]
    if digest.group is not None:
        tables.append(table(f"Groups, by {digest.group}", "Group", "group", groups, against_all_good=False))
    return tables


def _line(line: Line) -> dict[str, Any]:
    counts = line.counts
    return {
        "name": line.name or "not known",
        "counts": counts,
        "alarms": _Share.of(counts.alarms, counts.good),
        "missed": _Share.of(counts.missed, counts.bad),
        "called": _Share.of(counts.called, counts.unknown),
        "auroc": line.auroc,
    }


def _curve(curve: Curve, right: float) -> dict[str, Any]:
    return {"path": path_of(curve.x, curve.y, right), "area": curve.area, "ticks": ticks(0.0, right, 4)}


def _of_model(model: ModelFacts, scaled: bool) -> dict[str, Any]:
    fit = model.fit
    facts = [
        ("Backbone", model.backbone),
        ("Training images", str(fit.images) if fit else "not recorded"),
        ("Time of the fit", seconds_of(fit.seconds) if fit else "not recorded"),
        ("Most memory held", memory_of(fit) if fit else "not recorded"),
        ("Fitted with", _listed(fit.versions) if fit else "not recorded"),
        ("Report made with", _listed(model.versions)),
        ("Checkpoint", shown(model.checkpoint) or "not known"),
        ("SHA-256", model.sha256 or "not known"),
    ]
    return {
        "facts": facts,
        "checkpoint": shown(model.checkpoint),
        "sha256": model.sha256,
        "scales": [(scale, bars(scale.histogram)) for scale in model.scales],
        "certified": model.certified,
        "suspects": [
            {
                "path": shown(suspect.path),
                "name": shown(PurePath(suspect.path).name),
                "score": f"{suspect.score:.3f}" if scaled else f"{suspect.score:.4g}",
                "uri": data_uri(suspect.picture) if suspect.picture else "",
            }
            for suspect in model.suspects
        ],
        "looked_at": model.looked_at,
        "folders": [(shown(name), count) for name, count in fit.folders.items()] if fit else [],
        "images": model.images,
        "arguments": [(name, shown(value)) for name, value in model.arguments],
    }


def _listed(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _data(
    digest: Digest,
    axis: Axis,
    start: float,
    names: tuple[Sequence[str], Sequence[str]],
    files: Sequence[str],
    command: tuple[str, str],
) -> dict[str, Any]:
    """What the page's script works on."""
    kinds, groups = (sorted(set(part)) for part in names)
    low, high = _heat_range(digest)
    pictures, places = [], []
    for unit in digest.units:
        places.append(-1 if unit.picture is None else len(pictures))
        if unit.picture is not None:
            pictures.append(_picture(unit.picture, low, high))
    labelled = any(unit.scored.truth is not None for unit in digest.units)
    palette = (255 * mpl.colormaps["inferno"](np.arange(256))[:, :3]).round().astype(np.uint8)
    return {
        "start": start,
        "low": axis.low,
        "high": axis.high,
        "least": 0.0001 if digest.scaled else 0.0,  # what the command takes
        "most": 0.9999 if digest.scaled else _BEYOND,
        "scaled": digest.scaled,
        "path": files,
        "score": [_short(unit.scored.score) for unit in digest.units],
        "truth": [unit.scored.truth for unit in digest.units],
        "kind": [kinds.index(name) for name in names[0]],
        "group": [groups.index(name) for name in names[1]],
        "place": [unit.place and [round(part, 4) for part in unit.place] for unit in digest.units],
        "picture": places,
        "kinds": kinds,
        "groups": groups if digest.group is not None else [],
        "pictures": pictures,
        "mimics": {number: _mimic(mimic) for number, mimic in digest.mimics.items()},
        "command": command,
        "sort": "mistakes" if labelled and digest.threshold is not None else "high",
        "palette": bytes(palette).hex(),
    }


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
