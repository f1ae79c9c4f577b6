"""The page itself: a digest, drawn by templates, in one file that needs nothing else."""

import base64
import hashlib
import os
import shlex
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from anomalib_sgfr.post_processing.calibration import group_label
from anomalib_sgfr.post_processing.thresholds import supported_rate
from anomalib_sgfr.report.contents import Digest, ModelFacts, counts_of, tables_of
from anomalib_sgfr.report.media import (
    BEYOND,
    Axis,
    bars,
    data_uri,
    heat_range,
    histogram,
    path_of,
    script_data,
    ticks,
)
from anomalib_sgfr.report.statistics import Counts, Curve, Line, roc
from anomalib_sgfr.report.wording import (
    Share,
    caveats,
    memory_of,
    names_of,
    of_all,
    pictured_of,
    product_of,
    seconds_of,
    shown,
    verdict,
)
from anomalib_sgfr.run_paths import atomic_write

__all__ = ["rendered", "write_page"]

_TEMPLATES = Path(__file__).parent / "templates"
_FOLDERS = 8  # named in a command, at most


def rendered(digest: Digest) -> str:
    """The page of a digest.

    Args:
        digest (Digest): What it shows.

    Returns:
        str: HTML.
    """
    style, script = (
        (_TEMPLATES / name).read_text(encoding="utf-8") for name in ("page.css", "page.js")
    )
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    script_hash = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    page = environment.get_template("page.html.j2").render(
        **_context(digest),
        style=Markup(style),  # noqa: S704  # this package's own
        script=Markup(script),  # noqa: S704
        script_hash=f"sha256-{script_hash}",
    )
    return page.encode("utf-8", "backslashreplace").decode(
        "utf-8"
    )  # whatever came without going through `shown`


def write_page(page: str, file: Path) -> None:
    """Write a page, whole or not at all; its folder is made."""
    with atomic_write(file) as part:
        part.write_text(page, encoding="utf-8")


def _context(digest: Digest) -> dict[str, Any]:
    scored = [unit.scored for unit in digest.units]
    scores, truths = [row.score for row in scored], [row.truth for row in scored]
    kinds, groups = [shown(unit.kind) for unit in digest.units], [""] * len(scored)
    if digest.group is not None:
        groups = [shown(group_label(row.image, digest.group)) for row in scored]
    axis = _axis(scores, digest)
    start = axis.high if digest.threshold is None else digest.threshold
    new = [unit for unit in digest.units if unit.is_new]
    counts, every, left_out = (
        counts_of(new, start),
        counts_of(digest.units, start),
        len(scored) - len(new),
    )
    good, bad, unknown = (
        [s for s, t in zip(scores, truths, strict=True) if t == its] for its in (0, 1, None)
    )
    named_rows = (("Good", good, ""), ("Defective", bad, "bad"), ("Truth not known", unknown, ""))
    rows = [(name, its, tone) for name, its, tone in named_rows if its]
    drawn = histogram([(name, its) for name, its, _ in rows], axis)
    folder, names = names_of([row.image for row in scored])
    low, high = heat_range(digest)
    command = _command(digest)
    found = roc(good, bad)
    pictured = sum(unit.picture is not None for unit in digest.units)
    sections = ["Verdict", "Threshold", "Pictures", "Model", "Tables", "Curves"]
    return {
        "title": (
            f"{product_of(folder)}{len(scored)} images inspected"
            if len(scored) != 1
            else "1 image inspected"
        ),
        "made": digest.made,
        "versions": digest.model.versions,
        "folder": folder,
        "sections": [(name, name.lower()) for name in sections],
        "verdict": verdict(counts, digest.threshold, left_out, len(digest.unreadable)),
        "of_all": "" if digest.threshold is None else of_all(every, left_out),
        "left_out": left_out,
        "warning": shown(digest.warning or ""),
        "unreadable": [(shown(path), shown(reason)) for path, reason in digest.unreadable],
        "cards": _cards(digest, counts),
        "caveats": [shown(line) for line in caveats(digest, counts, pictured)],
        "number": len(scored),
        "scaled": digest.scaled,
        "rows": [
            {"bars": part, "tone": tone} for part, (_, _, tone) in zip(drawn, rows, strict=True)
        ],
        "axis_of": axis,
        "at": f"{100 * min(max((start - axis.low) / (axis.high - axis.low), 0.0), 1.0):.3f}",
        "in_force": digest.threshold,
        "start": start,
        "start_text": f"{start:.9g}",
        "counts": _count_lines("count", counts),
        "all_counts": _count_lines("all", every) if left_out else [],
        "command": f"{command[0]}{start:.9g}{command[1]}",
        "pictured": pictured_of(pictured, len(scored)),
        "any_truth": any(unit.picture and unit.picture.truth for unit in digest.units),
        "any_unknown": bool(unknown),
        "heat_low": f"{low:.3g}",
        "heat_high": f"{high:.3g}",
        "several_kinds": len(set(kinds)) > 1,
        "group": digest.group,
        "tables": _tables(digest, start),
        "roc": None if found is None else _curve(found, 1.0),
        "regions": None if digest.regions is None else _curve(digest.regions, 0.3),
        "regions_note": digest.regions_note,
        "data": script_data(digest, axis, start, (kinds, groups), names, command),
        **_of_model(digest.model, digest.scaled),
    }


def _axis(scores: Sequence[float], digest: Digest) -> Axis:
    """From the lowest score to the highest, with room, and the threshold on it."""
    values = [score for score in scores if score < BEYOND]
    values += [] if digest.threshold is None else [digest.threshold]
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    room = 0.03 * (high - low) or 0.05 * abs(high) or 0.5
    low, high = low - room, high + room
    if digest.scaled:
        low, high = max(low, 0.0), min(high, 1.0)
    return Axis.over(float(f"{low:.4g}"), float(f"{high:.4g}"))


def _command(digest: Digest) -> tuple[str, str]:
    """Before and after the threshold; says which images it was read from, so that the next report
    can tell.
    """
    checkpoint = shown(shlex.quote(digest.model.checkpoint)) if digest.model.checkpoint else "CKPT"
    folders = sorted(
        {
            str(Path(unit.scored.image).absolute().parent)
            for unit in digest.units
            if unit.scored.image
        }
    )
    folders = [folder for folder in folders if shown(folder) == folder]
    if len(folders) > _FOLDERS:
        folders = [os.path.commonpath(folders)]
    read_from = f" --read_from {shlex.join(folders)}" if folders else ""
    return f"anomalib-sgfr threshold {checkpoint} --score ", read_from


def _cards(digest: Digest, counts: Counts) -> list[dict[str, Any]]:
    cards = []
    if digest.threshold is not None:
        if counts.good:
            part = Share.of(counts.alarms, counts.good)
            cards.append(
                {"name": "False alarms", "value": part.rate, "said": part.said, "accent": True}
            )
        if counts.bad:
            part = Share.of(counts.missed, counts.bad)
            cards.append(
                {"name": "Missed defects", "value": part.rate, "said": part.said, "accent": True}
            )
        if counts.unknown:
            part = Share.of(counts.called, counts.unknown)
            cards.append(
                {"name": "Called anomalous, truth not known", "value": part.rate, "said": part.said}
            )
    if digest.unreadable:
        said = "images that could not be read, in none of the counts"
        cards.append({"name": "Not inspected", "value": str(len(digest.unreadable)), "said": said})
    value = "none" if digest.threshold is None else f"{digest.threshold:.4g}"
    cards.append(
        {"name": "Threshold in force", "value": value, "said": f"from {shown(digest.basis)}"}
    )
    if digest.nominal_units:
        rate = 100 * supported_rate(digest.nominal_units)
        said = (
            f"so many, none of them an alarm, would support a false-alarm rate of {rate:.2g}% at"
            " 95% confidence"
        )
        cards.append(
            {
                "name": "Independent good images it is calibrated on",
                "value": str(digest.nominal_units),
                "said": said,
            }
        )
    return [{"accent": False, **card} for card in cards]


def _count_lines(which: str, counts: Counts) -> list[dict[str, Any]]:
    parts = (
        ("alarms", "false alarms", counts.alarms, counts.good),
        ("missed", "missed", counts.missed, counts.bad),
        ("called", "called anomalous, truth not known", counts.called, counts.unknown),
    )
    found = []
    for key, name, hits, number in parts:
        if number:
            share = Share.of(hits, number)
            found.append(
                {"id": f"{which}-{key}", "name": name, "percent": share.rate, "said": share.said}
            )
    return found


def _tables(digest: Digest, threshold: float) -> list[dict[str, Any]]:
    titles = {"kind": "Kinds of defect", "group": f"Groups, by {shown(digest.group or '')}"}
    return [
        {
            "title": titles[key],
            "head": key.capitalize(),
            "key": key,
            "lines": [_line(line) for line in table],
        }
        for key, table in tables_of(digest, threshold).items()
    ]


def _line(line: Line) -> dict[str, Any]:
    counts = line.counts
    return {
        "name": shown(line.name) or "not known",
        "counts": counts,
        "left_out": line.left_out,
        "alarms": Share.of(counts.alarms, counts.good),
        "missed": Share.of(counts.missed, counts.bad),
        "called": Share.of(counts.called, counts.unknown),
        "auroc": line.auroc,
    }


def _curve(curve: Curve, right: float) -> dict[str, Any]:
    return {
        "path": path_of(curve.x, curve.y, right),
        "area": curve.area,
        "ticks": ticks(0.0, right, 4),
    }


def _of_model(model: ModelFacts, scaled: bool) -> dict[str, Any]:
    fit = model.fit
    facts = [
        ("Backbone", shown(model.backbone)),
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
