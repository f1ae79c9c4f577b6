"""What a report shows, before it is drawn: plain data, from one process or from many.

Which images a page has room to show: mistakes, those nearest the threshold and the highest.

The figures of a page as plain data, for programs.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from anomalib_sgfr.post_processing.calibration import group_label
from anomalib_sgfr.report.fit_record import FitRecord
from anomalib_sgfr.report.score_table import Scored
from anomalib_sgfr.report.statistics import Counts, Curve, Line, area_under, interval, lines

__all__ = [
    "Crop",
    "Digest",
    "Mimic",
    "MimicRow",
    "ModelFacts",
    "Picture",
    "ScaleFacts",
    "Suspect",
    "Unit",
    "by_importance",
    "counts_of",
    "figures",
    "pruned",
    "tables_of",
]


class Picture(NamedTuple):
    """An image as the page shows it.

    Attributes:
        image (bytes): What the model saw, WebP.
        heat (NDArray[np.float16]): Its anomaly map as it is reported, small, shape ``(h, w)``.
        outline (str): Where the map exceeds the threshold of pixels: an SVG path in a square of
            1,000.
        truth (str): The same of the defect, where a mask marks it.
        aspect (float): Width over height, as the file has it.
    """

    image: bytes
    heat: NDArray[np.float16]
    outline: str = ""
    truth: str = ""
    aspect: float = 1.0


class Unit(NamedTuple):
    """An image of the run.

    Attributes:
        scored (Scored): Its file, score, label, truth, and the pixel of the file that raised the
            score.
        kind (str): Of defect; ``"good"``, or empty where the truth is not known.
        place (tuple[float, float] | None): What raised the score, as shares of width and height of
            what the model saw.
        picture (Picture | None): ``None`` where it is left out.
        trained_on (bool): Whether the model was trained on it.
        chose (bool): Whether it is one of the images that chose the threshold.
    """

    scored: Scored
    kind: str = ""
    place: tuple[float, float] | None = None
    picture: Picture | None = None
    trained_on: bool = False
    chose: bool = False

    @property
    def is_new(self) -> bool:
        """Whether its score says how the model does on images that it has not seen."""
        return not (self.trained_on or self.chose)


class Crop(NamedTuple):
    """A nominal patch that a patch was rebuilt from.

    Attributes:
        picture (bytes | None): Its surroundings, WebP; ``None`` if the training image is gone.
        share (float): Its coefficient.
        image (str): Path of the training image; empty if it is not known.
    """

    picture: bytes | None
    share: float
    image: str


class MimicRow(NamedTuple):
    """How a patch of one scale was rebuilt.

    Attributes:
        number (int): Of the place, from 1, the worst.
        box (tuple[float, float, float, float]): Left, top, width and height as shares of the image.
        pixels (int): Height of the patch.
        residual (float): What is left of it.
        nominal (float): What is left of nominal patches of its kind, on average at most.
        here (bytes): Its surroundings, WebP.
        crops (list[Crop]): What it was rebuilt from.
    """

    number: int
    box: tuple[float, float, float, float]
    pixels: int
    residual: float
    nominal: float
    here: bytes
    crops: list[Crop]


class Mimic(NamedTuple):
    """The mimic view of an image.

    Attributes:
        rows (list[MimicRow]): Of each scale of the worst places.
        why_not (str): Why there is none.
    """

    rows: list[MimicRow]
    why_not: str = ""


class ScaleFacts(NamedTuple):
    """A bank.

    Attributes:
        layers (str): Whose features it holds.
        stride (int): Pixels from one patch to the next.
        heard (str): By map, score or both.
        atoms (int): Patches it holds.
        width (int): Numbers of each.
        patches (int): Nominal patches that it stands for.
        mean (float): Their residuals average to no more.
        largest (float): None is larger.
        histogram (list[int]): Patches by the bound of their residual, in bins of equal width up to
            ``largest``.
    """

    layers: str
    stride: int
    heard: str
    atoms: int
    width: int
    patches: int
    mean: float
    largest: float
    histogram: list[int]


class Suspect(NamedTuple):
    """A training image that the atoms of the others rebuild badly.

    Attributes:
        path (str): The file.
        score (float): Without its own atoms, as scores are reported.
        picture (bytes | None): WebP; ``None`` if it is gone.
    """

    path: str
    score: float
    picture: bytes | None


class ModelFacts(NamedTuple):
    """What the model is.

    Attributes:
        backbone (str): Its name.
        scales (list[ScaleFacts]): The banks, the finest first.
        certified (float): No training image has a larger raw score.
        arguments (list[tuple[str, str]]): Of the model.
        fit (FitRecord | None): How the fit went, if the checkpoint says.
        images (int): Training images that atoms come from.
        suspects (list[Suspect]): The worst first.
        looked_at (int): Training images that suspects were looked for among.
        checkpoint (str): The file; empty if it is not known.
        sha256 (str): Of the file.
        versions (dict[str, str]): Of what made the report.
    """

    backbone: str
    scales: list[ScaleFacts]
    certified: float
    arguments: list[tuple[str, str]]
    fit: FitRecord | None
    images: int
    suspects: list[Suspect]
    looked_at: int
    checkpoint: str
    sha256: str
    versions: dict[str, str]


class Digest(NamedTuple):
    """All that a page shows.

    Attributes:
        units (list[Unit]): All images of the run.
        threshold (float | None): In force, of scores as they are reported; ``None`` if there is
            none.
        heat_threshold (float | None): Of pixels.
        scaled (bool): Whether scores and maps are reported between zero and one.
        basis (str): What the threshold is calibrated on, in words.
        nominal_units (int): Independent good images among that.
        model (ModelFacts): What the model is.
        made (str): When, to the minute.
        mimics (dict[int, Mimic]): By the number of the unit.
        group (str | None): Expression for the product, camera ... in a path.
        regions (Curve | None): Per-region overlap, if there are masks.
        regions_note (str): Why there is none, or what it leaves out.
        warning (str | None): That too few images support the threshold, in words.
        by_name (int): Images of ``units`` that are known to the checkpoint by their names alone.
        unreadable (list[tuple[str, str]]): Images that could not be read: file and reason.
        notes (list[str]): What else is to be known.
    """

    units: list[Unit]
    threshold: float | None
    heat_threshold: float | None
    scaled: bool
    basis: str
    nominal_units: int
    model: ModelFacts
    made: str
    mimics: dict[int, Mimic] = {}  # noqa: RUF012  # never changed
    group: str | None = None
    regions: Curve | None = None
    regions_note: str = ""
    warning: str | None = None
    by_name: int = 0
    unreadable: list[tuple[str, str]] = []  # noqa: RUF012  # never changed
    notes: list[str] = []  # noqa: RUF012  # never changed


def by_importance(units: Sequence[Unit], threshold: float | None, most: int) -> list[int]:
    """Places of the images that matter most, the first first.

    Mistakes come first, the farthest from the threshold before the others; what room is left goes
    half to the images nearest the threshold, and half to the highest scores. What is chosen among
    some of the images is chosen among all of them or was crowded out, so that a stream can be
    pruned as it comes.

    Args:
        units (Sequence[Unit]): Images.
        threshold (float | None): In force; without one, the highest scores count.
        most (int): How many at most.
    """
    every = range(len(units))
    scores = [unit.scored.score for unit in units]
    highest = sorted(every, key=lambda place: (-scores[place], place))
    if threshold is None:
        return highest[:most]
    nearest = sorted(every, key=lambda place: (abs(scores[place] - threshold), place))
    wrong = [
        place
        for place in reversed(nearest)
        if units[place].scored.truth is not None
        and units[place].scored.truth != int(scores[place] > threshold)
    ]
    found = dict.fromkeys(wrong[:most])
    half = len(found) + (most - len(found) + 1) // 2
    for ranking, room in ((nearest, half), (highest, most), (nearest, most)):
        for place in ranking:
            if len(found) >= room:
                break
            found.setdefault(place)
    return list(found)


def pruned(units: Sequence[Unit], threshold: float | None, most: int) -> list[Unit]:
    """The same images, without the pictures that there is no room for."""
    held = [place for place, unit in enumerate(units) if unit.picture is not None]
    kept = {
        held[place] for place in by_importance([units[place] for place in held], threshold, most)
    }
    return [
        unit if place in kept else unit._replace(picture=None) for place, unit in enumerate(units)
    ]


def counts_of(units: Sequence[Unit], threshold: float) -> Counts:
    """What a threshold makes of images."""
    return Counts.at(
        threshold, [unit.scored.score for unit in units], [unit.scored.truth for unit in units]
    )


def tables_of(digest: Digest, threshold: float) -> dict[str, list[Line]]:
    """Lines by kind, and by group if there is one.

    Args:
        digest (Digest): What the page shows.
        threshold (float): Larger scores are anomalous.
    """
    scored = [unit.scored for unit in digest.units]
    scores, truths = [row.score for row in scored], [row.truth for row in scored]
    new = [unit.is_new for unit in digest.units]
    kinds = [unit.kind for unit in digest.units]
    tables = {"kind": lines(kinds, scores, truths, threshold, against_all_good=True, new=new)}
    if digest.group is not None:
        groups = [group_label(row.image, digest.group) for row in scored]
        tables["group"] = lines(groups, scores, truths, threshold, against_all_good=False, new=new)
    return tables


def figures(digest: Digest) -> dict[str, Any]:
    """Figures of a page.

    Args:
        digest (Digest): What the page shows.

    Returns:
        dict[str, Any]: Can be written as JSON. ``new`` counts images that neither chose the
        threshold nor were trained on, ``all`` all; rates come with intervals of 95%. ``images`` has
        the columns of the table of scores, ``kind``, ``group``, ``trained_on`` and
        ``chose_threshold``.
    """
    new = [unit for unit in digest.units if unit.is_new]
    good, bad = (
        [unit.scored.score for unit in digest.units if unit.scored.truth == truth]
        for truth in (0, 1)
    )
    threshold = digest.threshold
    found: dict[str, Any] = {
        "made": digest.made,
        "checkpoint": digest.model.checkpoint or None,
        "sha256": digest.model.sha256 or None,
        "versions": digest.model.versions,
        "threshold": threshold,
        "basis": digest.basis,
        "warning": digest.warning,
        "independent_good_images": digest.nominal_units,
        "trained_on": sum(unit.trained_on for unit in digest.units),
        "chose_threshold": sum(unit.chose for unit in digest.units),
        "new": None if threshold is None else _rates(counts_of(new, threshold)),
        "all": None if threshold is None else _rates(counts_of(digest.units, threshold)),
        "image_auroc": area_under(good, bad),
        "aupro": None if digest.regions is None else digest.regions.area,
        "unreadable": [{"image": path, "reason": reason} for path, reason in digest.unreadable],
        "notes": [*digest.notes, *([digest.regions_note] if digest.regions_note else [])],
        "images": [_image(unit, digest.group) for unit in digest.units],
    }
    for name, table in tables_of(digest, threshold).items() if threshold is not None else ():
        found[f"by_{name}"] = {
            line.name: {**_rates(line.counts), "left_out": line.left_out, "auroc": line.auroc}
            for line in table
        }
    return found


def _rates(counts: Counts) -> dict[str, Any]:
    parts = (
        ("false_alarms", counts.alarms, counts.good),
        ("missed", counts.missed, counts.bad),
        ("called_anomalous", counts.called, counts.unknown),
    )
    return {
        name: {
            "images": number,
            "count": hits,
            "rate": hits / number if number else None,
            "interval": list(interval(hits, number)),
        }
        for name, hits, number in parts
    }


def _image(unit: Unit, group: str | None) -> dict[str, Any]:
    return {
        **unit.scored._asdict(),
        "kind": unit.kind,
        **({} if group is None else {"group": group_label(unit.scored.image, group)}),
        "trained_on": unit.trained_on,
        "chose_threshold": unit.chose,
    }
