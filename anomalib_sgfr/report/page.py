"""HTML page of a report, in one file that needs no network."""

import base64
import hashlib
import json
import os
import shlex
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Any

import matplotlib as mpl
import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from anomalib_sgfr.post_processing.calibration import group_label
from anomalib_sgfr.report.contents import (
    ImageExplanation,
    ReportContents,
    counts_of,
    scores_of,
    tables_of,
)
from anomalib_sgfr.report.media import (
    ScoreAxis,
    bar_path,
    curve_path,
    data_uri,
    evidence_chart,
    histogram,
    map_uri,
    ticks,
)
from anomalib_sgfr.report.model_facts import ModelFacts
from anomalib_sgfr.report.statistics import Counts, roc
from anomalib_sgfr.report.wording import (
    Share,
    caveats,
    change_commands,
    duration_text,
    images_shown,
    layer_summary,
    memory_text,
    printable,
    product_name,
    relative_names,
    stream_summary,
    summary,
    summary_of_all,
)
from anomalib_sgfr.run_paths import atomic_write

__all__ = ["render", "render_template", "write_page"]

_TEMPLATES = Path(__file__).parent / "templates"
_FOLDERS = 8  # in a command, at most
_LARGEST_SHOWN = 1e30  # score; the axis is not scaled to larger ones


def render(contents: ReportContents) -> str:
    """Render the page of a report.

    Args:
        contents (ReportContents): The report.

    Returns:
        str: HTML.
    """
    script = (_TEMPLATES / "page.js").read_text(encoding="utf-8")
    script_hash = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    return render_template(
        "page.html.j2",
        contents=contents,
        model=contents.model,
        **_context(contents),
        change_commands=change_commands,
        curve_path=curve_path,
        evidence_chart=evidence_chart,
        layer_summary=layer_summary,
        stream_summary=stream_summary,
        ticks=ticks,
        script=Markup(script),  # noqa: S704  # this package's own
        script_hash=f"sha256-{script_hash}",
    )


def render_template(name: str, *, lstrip_blocks: bool = False, **values: Any) -> str:  # noqa: ANN401
    """Render a template of this package, with the style that all pages have.

    Args:
        name (str): File of the template.
        lstrip_blocks (bool): Whether to leave out what stands before a block on its line.
        **values (Any): Variables of the template.

    Returns:
        str: HTML that can be encoded.
    """
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=lstrip_blocks,
    )
    environment.filters.update(
        bar_path=bar_path, data_uri=data_uri, file_name=_file_name, printable=printable
    )
    style = Markup((_TEMPLATES / "page.css").read_text(encoding="utf-8"))  # noqa: S704  # our own
    page = environment.get_template(name).render(style=style, share_of=Share.of, **values)
    # escape what did not go through `printable`
    return page.encode("utf-8", "backslashreplace").decode("utf-8")


def write_page(page: str, file: Path) -> None:
    """Write a page, whole or not at all; its folder is made."""
    with atomic_write(file) as part:
        part.write_text(page, encoding="utf-8")


def _context(contents: ReportContents) -> dict[str, Any]:
    """Values of the template's variables that the contents do not hold as they are."""
    images = contents.images
    results = [image.result for image in images]
    axis = _axis([row.score for row in results], contents)
    start = axis.high if contents.threshold is None else contents.threshold
    new = [image for image in images if image.is_new]
    counts, all_counts = counts_of(new, start), counts_of(images, start)
    left_out = len(images) - len(new)
    good, bad, unknown = (scores_of(images, truth) for truth in (0, 1, None))
    labels = (("Good", good, ""), ("Defective", bad, "bad"), ("Unlabelled", unknown, ""))
    folder, names = relative_names([row.image for row in results])
    map_range = _map_range(contents)
    command = _command(contents)
    with_media = sum(image.media is not None for image in images)
    title = f"{len(images)} images inspected" if len(images) != 1 else "1 image inspected"
    return {
        "title": f"{product_name(folder) if len(images) != 1 else ''}{title}",
        "folder": folder,
        "summary": summary(counts, contents.threshold, left_out, len(contents.unreadable)),
        "summary_of_all": (
            "" if contents.threshold is None else summary_of_all(all_counts, left_out)
        ),
        "left_out": left_out,
        "cards": _cards(contents, counts),
        "caveats": caveats(contents, counts, with_media),
        "histograms": [
            (tone, histogram(name, scores, axis)) for name, scores, tone in labels if scores
        ],
        "axis": axis,
        "position": f"{100 * min(max((start - axis.low) / (axis.high - axis.low), 0.0), 1.0):.3f}",
        "start": start,
        "start_text": f"{start:.9g}",
        "counts": _count_lines("count", counts),
        "all_counts": _count_lines("all", all_counts) if left_out else [],
        "command": f"{command[0]}{start:.9g}{command[1]}",
        "images_shown": images_shown(with_media, len(images)),
        "any_mask": any(image.media and image.media.mask_outline for image in images),
        "any_unlabelled": bool(unknown),
        "map_range": map_range,
        "several_kinds": len({printable(image.kind) for image in images}) > 1,
        "tables": tables_of(contents, start),
        "roc": roc(good, bad),
        "data": _script_data(contents, axis, start, map_range, names, command),
        "facts": _facts(contents.model),
    }


def _axis(scores: Sequence[float], contents: ReportContents) -> ScoreAxis:
    """Axis from the lowest to the highest score with a margin, which includes the threshold."""
    values = [score for score in scores if score < _LARGEST_SHOWN]
    values += [] if contents.threshold is None else [contents.threshold]
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    margin = 0.03 * (high - low) or 0.05 * abs(high) or 0.5
    low, high = low - margin, high + margin
    if contents.normalised:
        low, high = max(low, 0.0), min(high, 1.0)
    return ScoreAxis(float(f"{low:.4g}"), float(f"{high:.4g}"))


def _map_range(contents: ReportContents) -> tuple[float, float]:
    """Lowest and highest value of the colour scale, which all anomaly maps share."""
    if contents.normalised:
        return 0.0, 1.0
    media = [image.media for image in contents.images if image.media is not None]
    largest = [float(np.max(part.anomaly_map)) for part in media]
    return 0.0, max([value for value in largest if np.isfinite(value)], default=1.0) or 1.0


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


def _cards(contents: ReportContents, counts: Counts) -> list[tuple[str, str, str, bool]]:
    """Name, value and explanation of the numbers at the top, and whether they are emphasised."""
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
        name, text = "Independent good images for calibration", "images of one part count as one"
        cards.append((name, str(contents.independent_images), text))
    return [(*card, card[0] in names[:2]) for card in cards]


def _count_lines(which: str, counts: Counts) -> list[tuple[str, str, Share]]:
    """Identifier, name and share of the counts beside the threshold."""
    names = {"alarms": "false alarms", "missed": "missed", "called": "unlabelled, called anomalous"}
    return [
        (f"{which}-{key}", name, Share.of(hits, number))
        for (key, name), (hits, number) in zip(names.items(), counts.rates, strict=True)
        if number
    ]


def _facts(model: ModelFacts) -> list[tuple[str, str]]:
    """Names and values of the facts of a model."""
    fit, missing = model.fit, "not recorded"
    rejected = ", ".join(
        f"{number}. {_file_name(image.partition(' ')[2])} ({image[:10]})"
        for number, image in enumerate(model.rejected, 1)
    )
    return [
        ("Backbone", printable(model.backbone)),
        ("Training images", str(fit.images) if fit else missing),
        *([("Rejected defects", rejected)] if rejected else []),
        ("Duration of the fit", duration_text(fit.seconds) if fit else missing),
        ("Peak memory of the fit", memory_text(fit) if fit else missing),
        ("Fitted with", _joined(fit.versions) if fit else missing),
        ("Report made with", _joined(model.versions)),
        ("Checkpoint", printable(model.checkpoint) or "not known"),
        ("SHA-256", model.sha256 or "not known"),
    ]


def _joined(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _file_name(path: str) -> str:
    return printable(PurePath(path).name)


def _script_data(
    contents: ReportContents,
    axis: ScoreAxis,
    start: float,
    map_range: tuple[float, float],
    files: Sequence[str],
    command: tuple[str, str],
) -> Markup:
    """Data for the script of a page, as JSON that cannot end the script element.

    The script begins with the threshold ``start``, and puts others between the parts of
    ``command``. The names in ``files`` are printable.
    """
    images, normalised, group = contents.images, contents.normalised, contents.group
    results = [image.result for image in images]
    kinds, kind_of = _numbered([image.kind for image in images])
    groups, group_of = _numbered(
        ["" if group is None else group_label(row.image, group) for row in results]
    )
    shown = [image.media for image in images if image.media is not None]
    media_numbers = iter(range(len(shown)))
    labelled = any(row.truth is not None for row in results)
    palette = (255 * mpl.colormaps["inferno"](np.arange(256))[:, :3]).round().astype(np.uint8)
    data = {
        "start": start,
        "low": axis.low,
        "high": axis.high,
        "least": 0.0001 if normalised else 0.0,  # limits of the command
        "most": 0.9999 if normalised else _LARGEST_SHOWN,
        "normalised": normalised,
        "path": files,
        # a float of 32 bits in the fewest digits that identify it
        "score": [float(str(np.float32(row.score))) for row in results],
        "truth": [row.truth for row in results],
        "kind": kind_of,
        "group": group_of,
        "peak": [image.peak and [round(part, 4) for part in image.peak] for image in images],
        "pixel": [None if row.row is None else [row.row, row.column] for row in results],
        "known": [int(image.trained_on) + 2 * int(image.chose_threshold) for image in images],
        "mediaIndex": [-1 if image.media is None else next(media_numbers) for image in images],
        "media": [
            {
                "image": data_uri(media.image),
                "map": map_uri(media.anomaly_map, *map_range),
                "outline": media.outline,
                "maskOutline": media.mask_outline,
                "aspect": round(media.aspect, 4),
            }
            for media in shown
        ],
        "kinds": kinds,
        "groups": groups if group is not None else [],
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


def _numbered(names: Sequence[str]) -> tuple[list[str], list[int]]:
    """Distinct printable names in order, and the number of each name among them."""
    texts = [printable(name) for name in names]
    numbers = {text: number for number, text in enumerate(sorted(set(texts)))}
    return list(numbers), [numbers[text] for text in texts]


def _explanation(explanation: ImageExplanation) -> dict[str, Any]:
    rows = [
        {
            "number": row.number,
            "box": [round(part, 4) for part in row.box],
            "pixels": row.pixels,
            "residual": row.residual,
            "nominal": f"{row.nominal:.3g}",
            "crop": data_uri(row.crop),
            "atoms": [
                [
                    data_uri(atom.image) if atom.image else "",
                    f"{atom.coefficient:+.2f}",
                    _file_name(atom.path),
                ]
                for atom in row.atoms
            ],
        }
        for row in explanation.rows
    ]
    return {"rows": rows, "whyNot": printable(explanation.why_not)}
