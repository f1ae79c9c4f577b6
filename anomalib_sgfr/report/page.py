"""HTML page of a report, in one file that needs no network."""

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
from anomalib_sgfr.report.contents import ReportContents, counts_of, tables_of
from anomalib_sgfr.report.media import (
    ScoreAxis,
    bar_path,
    curve_path,
    data_uri,
    histogram,
    ticks,
)
from anomalib_sgfr.report.model_facts import ModelFacts
from anomalib_sgfr.report.script_data import LARGEST_SHOWN, map_range, script_data
from anomalib_sgfr.report.statistics import Counts, Curve, GroupRow, roc
from anomalib_sgfr.report.wording import (
    Share,
    caveats,
    duration_text,
    images_shown,
    memory_text,
    printable,
    product_name,
    relative_names,
    summary,
    summary_of_all,
)
from anomalib_sgfr.run_paths import atomic_write

__all__ = ["render", "write_page"]

_TEMPLATES = Path(__file__).parent / "templates"
_FOLDERS = 8  # in a command, at most
_SECTIONS = ("Summary", "Threshold", "Images", "Model", "Tables", "Curves")


def render(contents: ReportContents) -> str:
    """Render the page of a report.

    Args:
        contents (ReportContents): The report.

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
        **_context(contents),
        style=Markup(style),  # noqa: S704  # this package's own
        script=Markup(script),  # noqa: S704
        script_hash=f"sha256-{script_hash}",
    )
    # escape what did not go through `printable`
    return page.encode("utf-8", "backslashreplace").decode("utf-8")


def write_page(page: str, file: Path) -> None:
    """Write a page, whole or not at all; its folder is made."""
    with atomic_write(file) as part:
        part.write_text(page, encoding="utf-8")


def _context(contents: ReportContents) -> dict[str, Any]:
    """Values of the template's variables."""
    images = contents.images
    results = [image.result for image in images]
    kinds, groups = [printable(image.kind) for image in images], [""] * len(images)
    if contents.group is not None:
        groups = [printable(group_label(row.image, contents.group)) for row in results]
    axis = _axis([row.score for row in results], contents)
    start = axis.high if contents.threshold is None else contents.threshold
    new = [image for image in images if image.is_new]
    counts, all_counts = counts_of(new, start), counts_of(images, start)
    left_out = len(images) - len(new)
    good, bad, unknown = (
        [row.score for row in results if row.truth == truth] for truth in (0, 1, None)
    )
    labels = (("Good", good, ""), ("Defective", bad, "bad"), ("Unlabelled", unknown, ""))
    histograms = [
        {"bars": histogram([(name, scores)], axis)[0], "tone": tone}
        for name, scores, tone in labels
        if scores
    ]
    folder, names = relative_names([row.image for row in results])
    low, high = map_range(contents)
    command = _command(contents)
    roc_curve = roc(good, bad)
    with_media = sum(image.media is not None for image in images)
    title = f"{len(images)} images inspected" if len(images) != 1 else "1 image inspected"
    return {
        "title": f"{product_name(folder) if len(images) != 1 else ''}{title}",
        "made": contents.made,
        "versions": contents.model.versions,
        "folder": folder,
        "sections": [(name, name.lower()) for name in _SECTIONS],
        "summary": summary(counts, contents.threshold, left_out, len(contents.unreadable)),
        "summary_of_all": (
            "" if contents.threshold is None else summary_of_all(all_counts, left_out)
        ),
        "left_out": left_out,
        "warning": printable(contents.warning or ""),
        "unreadable": [(printable(path), printable(why)) for path, why in contents.unreadable],
        "cards": _cards(contents, counts),
        "caveats": [printable(line) for line in caveats(contents, counts, with_media)],
        "number": len(images),
        "normalised": contents.normalised,
        "histograms": histograms,
        "axis": axis,
        "position": f"{100 * min(max((start - axis.low) / (axis.high - axis.low), 0.0), 1.0):.3f}",
        "current": contents.threshold,
        "start": start,
        "start_text": f"{start:.9g}",
        "counts": _count_lines("count", counts),
        "all_counts": _count_lines("all", all_counts) if left_out else [],
        "command": f"{command[0]}{start:.9g}{command[1]}",
        "images_shown": images_shown(with_media, len(images)),
        "any_mask": any(image.media and image.media.mask_outline for image in images),
        "any_unlabelled": bool(unknown),
        "map_low": f"{low:.3g}",
        "map_high": f"{high:.3g}",
        "several_kinds": len(set(kinds)) > 1,
        "group": contents.group,
        "tables": _tables(contents, start),
        "roc": None if roc_curve is None else _curve(roc_curve, 1.0),
        "overlap": None
        if contents.region_overlap is None
        else _curve(contents.region_overlap, 0.3),
        "region_note": contents.region_note,
        "data": script_data(contents, axis, start, (kinds, groups), names, command),
        **_model(contents.model, normalised=contents.normalised),
    }


def _axis(scores: Sequence[float], contents: ReportContents) -> ScoreAxis:
    """Axis from the lowest to the highest score with a margin, which includes the threshold."""
    values = [score for score in scores if score < LARGEST_SHOWN]
    values += [] if contents.threshold is None else [contents.threshold]
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    margin = 0.03 * (high - low) or 0.05 * abs(high) or 0.5
    low, high = low - margin, high + margin
    if contents.normalised:
        low, high = max(low, 0.0), min(high, 1.0)
    return ScoreAxis.over(float(f"{low:.4g}"), float(f"{high:.4g}"))


def _command(contents: ReportContents) -> tuple[str, str]:
    """Command that sets a threshold, before and after its value.

    It names the folders of the images, so that the next report knows what chose the threshold.
    """
    path = contents.model.checkpoint
    checkpoint = printable(shlex.quote(path)) if path else "CKPT"
    files = [image.result.image for image in contents.images if image.result.image]
    folders = sorted({str(Path(file).absolute().parent) for file in files})
    folders = [folder for folder in folders if printable(folder) == folder]
    if len(folders) > _FOLDERS:
        folders = [os.path.commonpath(folders)]
    read_from = f" --read_from {shlex.join(folders)}" if folders else ""
    return f"anomalib-sgfr threshold {checkpoint} --score ", read_from


def _cards(contents: ReportContents, counts: Counts) -> list[dict[str, Any]]:
    """Numbers at the top of the page, each with a name and an explanation."""
    names = ("False alarms", "Missed defects", "Unlabelled images called anomalous")
    cards: list[tuple[str, str, str]] = []
    if contents.threshold is not None:
        for name, (hits, number) in zip(names, counts.rates, strict=True):
            if number:
                share = Share.of(hits, number)
                cards.append((name, share.rate, share.text))
    if contents.unreadable:
        text = "images that could not be read, in none of the counts"
        cards.append(("Not inspected", str(len(contents.unreadable)), text))
    value = "none" if contents.threshold is None else f"{contents.threshold:.4g}"
    cards.append(("Current threshold", value, f"from {printable(contents.basis)}"))
    if contents.independent_images:
        rate = 100 * supported_rate(contents.independent_images)
        text = (
            f"if none of them is an alarm, they support a false-alarm rate of {rate:.2g}% at 95%"
            " confidence"
        )
        name = "Independent good images for calibration"
        cards.append((name, str(contents.independent_images), text))
    return [
        {"name": name, "value": value, "text": text, "accent": name in names[:2]}
        for name, value, text in cards
    ]


def _count_lines(which: str, counts: Counts) -> list[dict[str, Any]]:
    names = {
        "alarms": "false alarms",
        "missed": "missed",
        "called": "unlabelled, called anomalous",
    }
    return [
        {"id": f"{which}-{key}", "name": name, "share": Share.of(hits, number)}
        for (key, name), (hits, number) in zip(names.items(), counts.rates, strict=True)
        if number
    ]


def _tables(contents: ReportContents, threshold: float) -> list[dict[str, Any]]:
    titles = {"kind": "Kinds of defect", "group": f"Groups, by {printable(contents.group or '')}"}
    return [
        {
            "title": titles[key],
            "head": key.capitalize(),
            "key": key,
            "rows": [_table_row(row) for row in table],
        }
        for key, table in tables_of(contents, threshold).items()
    ]


def _table_row(row: GroupRow) -> dict[str, Any]:
    alarms, missed, called = (Share.of(hits, number) for hits, number in row.counts.rates)
    return {
        "name": printable(row.name) or "unlabelled",
        "counts": row.counts,
        "left_out": row.left_out,
        "alarms": alarms,
        "missed": missed,
        "called": called,
        "auroc": row.auroc,
    }


def _curve(curve: Curve, right: float) -> dict[str, Any]:
    return {
        "path": curve_path(curve.x, curve.y, right),
        "area": curve.area,
        "ticks": ticks(0.0, right, 4),
    }


def _model(model: ModelFacts, *, normalised: bool) -> dict[str, Any]:
    fit = model.fit
    facts = [
        ("Backbone", printable(model.backbone)),
        ("Training images", str(fit.images) if fit else "not recorded"),
        ("Duration of the fit", duration_text(fit.seconds) if fit else "not recorded"),
        ("Peak memory of the fit", memory_text(fit) if fit else "not recorded"),
        ("Fitted with", _joined(fit.versions) if fit else "not recorded"),
        ("Report made with", _joined(model.versions)),
        ("Checkpoint", printable(model.checkpoint) or "not known"),
        ("SHA-256", model.sha256 or "not known"),
    ]
    return {
        "facts": facts,
        "checkpoint": printable(model.checkpoint),
        "sha256": model.sha256,
        "scales": [(scale, bar_path(scale.histogram)) for scale in model.scales],
        "certified": model.certified,
        "suspected": [
            {
                "path": printable(image.path),
                "name": printable(PurePath(image.path).name),
                "score": f"{image.score:.3f}" if normalised else f"{image.score:.4g}",
                "uri": data_uri(image.image) if image.image else "",
            }
            for image in model.suspected
        ],
        "inspected": model.inspected,
        "folders": [(printable(name), count) for name, count in fit.folders.items()] if fit else [],
        "images": model.images,
        "arguments": [(name, printable(value)) for name, value in model.arguments],
    }


def _joined(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())
