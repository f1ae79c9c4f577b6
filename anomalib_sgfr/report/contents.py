"""Contents of a report as plain data: images, explanations, tables, and the same as JSON."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from anomalib_sgfr.post_processing.calibration import group_label
from anomalib_sgfr.report.model_facts import ModelFacts
from anomalib_sgfr.report.score_table import ScoreRow
from anomalib_sgfr.report.statistics import Counts, Curve, auroc, interval

__all__ = [
    "AtomCrop",
    "ChangeExample",
    "ChangeMaps",
    "ExplanationRow",
    "GroupRow",
    "ImageExplanation",
    "ImageMedia",
    "ImageRow",
    "LayerChange",
    "ReportContents",
    "WatchedStream",
    "as_json",
    "counts_of",
    "most_important",
    "scores_of",
    "tables_of",
    "with_most_media",
]


class ImageMedia(NamedTuple):
    """Image and anomaly map as the page shows them.

    Attributes:
        image (bytes): Pre-processed image, WebP.
        anomaly_map (NDArray[np.float16]): Small normalised anomaly map, shape ``(h, w)``.
        outline (str): SVG path, in a square of 1,000, around what exceeds the pixel threshold.
        mask_outline (str): SVG path around the marked defect; empty without a mask.
        aspect (float): Width over height of the file.
    """

    image: bytes
    anomaly_map: NDArray[np.float16]
    outline: str = ""
    mask_outline: str = ""
    aspect: float = 1.0


class ImageRow(NamedTuple):
    """Image of the run.

    Attributes:
        result (ScoreRow): File, score, label, truth and peak.
        kind (str): Kind of defect; ``"good"``, or empty without a label.
        peak (tuple[float, float] | None): Peak as shares of width and height of the model's input.
        media (ImageMedia | None): Image and map; ``None`` if left out.
        trained_on (bool): Whether the model was trained on the image.
        chose_threshold (bool): Whether the threshold was chosen by the image.
    """

    result: ScoreRow
    kind: str = ""
    peak: tuple[float, float] | None = None
    media: ImageMedia | None = None
    trained_on: bool = False
    chose_threshold: bool = False

    @property
    def is_new(self) -> bool:
        """Whether neither the model nor the threshold depends on the image."""
        return not (self.trained_on or self.chose_threshold)


class AtomCrop(NamedTuple):
    """Nominal patch that a patch is reconstructed from.

    Attributes:
        image (bytes | None): Crop of the training image, WebP; ``None`` if it is gone.
        coefficient (float): Coefficient of the atom.
        path (str): Path of the training image; empty if unknown.
    """

    image: bytes | None
    coefficient: float
    path: str


class ExplanationRow(NamedTuple):
    """Reconstruction of a patch of one scale.

    Attributes:
        number (int): Number of the region, from 1, the worst.
        box (tuple[float, float, float, float]): Left, top, width and height of the region as shares
            of the image.
        pixels (int): Height of the patch.
        residual (str): Residual of the patch, and its weight in the score unless that is 1.
        nominal (float): Upper bound of the mean residual of the nominal patches that the atoms
            stand for.
        crop (bytes): Crop around the patch, WebP.
        atoms (list[AtomCrop]): Nominal patches of the reconstruction.
    """

    number: int
    box: tuple[float, float, float, float]
    pixels: int
    residual: str
    nominal: float
    crop: bytes
    atoms: list[AtomCrop]


class ImageExplanation(NamedTuple):
    """Explanation of an image.

    Attributes:
        rows (list[ExplanationRow]): Reconstructions in the worst regions.
        why_not (str): Why there are none.
    """

    rows: list[ExplanationRow]
    why_not: str = ""


class LayerChange(NamedTuple):
    """Residuals of a scale before and after a change of conditions.

    Attributes:
        layers (str): Layers of its features.
        stride (int): Pixels from one patch to the next.
        contributes_to (str): Anomaly map, image score or both.
        before (float): Mean residual of images before the change.
        after (float): Mean residual of images after it.
        deviations (float): The difference, in standard deviations of the images before.
    """

    layers: str
    stride: int
    contributes_to: str
    before: float
    after: float
    deviations: float


class ChangeMaps(NamedTuple):
    """Place of a change of conditions.

    Attributes:
        before (bytes): Mean image before the change, WebP.
        after (bytes): Mean image after it, WebP.
        change (bytes): Change of the mean raw anomaly map, red where it rose, WebP.
        most (float): Largest change in size, at the ends of the colour scale.
        mean (float): Mean change.
        peak (tuple[float, float]): Place of the largest, as shares of width and height.
    """

    before: bytes
    after: bytes
    change: bytes
    most: float
    mean: float
    peak: tuple[float, float]


class ChangeExample(NamedTuple):
    """Image that shows a change of conditions.

    Attributes:
        kind (str): What it is an example of.
        path (str): The file.
        number (int): Number in the stream, from 1.
        score (float): Score, as predictions hold it.
        image (bytes): Pre-processed image, WebP.
        anomaly_map (bytes): Anomaly map in colours, WebP.
    """

    kind: str
    path: str
    number: int
    score: float
    image: bytes
    anomaly_map: bytes


class WatchedStream(NamedTuple):
    """Stream that a monitor has watched, and what has changed in it.

    Attributes:
        name (str): Camera, product ...; empty where all images are one stream.
        images (int): Number of images.
        evidence (list[float]): Evidence against unchanged conditions after each image.
        limit (float): Evidence at which the alarm is raised.
        changed_at (int | None): Number of images at the alarm; ``None`` without one.
        start (int | None): Number of images before the change, as estimated.
        direction (str | None): Which way scores moved: ``"higher"`` or ``"lower"``.
        basis (str): Images that layers and maps compare, in words.
        layers (list[LayerChange]): Scales, the finest first.
        maps (ChangeMaps | None): Place of the change.
        examples (list[ChangeExample]): Example images.
        new_images (list[str]): Images of after the change that may be good, for a command.
        notes (list[str]): What is missing and why.
    """

    name: str
    images: int
    evidence: list[float]
    limit: float
    changed_at: int | None = None
    start: int | None = None
    direction: str | None = None
    basis: str = ""
    layers: list[LayerChange] = []  # noqa: RUF012  # never changed
    maps: ChangeMaps | None = None
    examples: list[ChangeExample] = []  # noqa: RUF012  # never changed
    new_images: list[str] = []  # noqa: RUF012  # never changed
    notes: list[str] = []  # noqa: RUF012  # never changed


class ReportContents(NamedTuple):
    """Contents of a report.

    Attributes:
        images (list[ImageRow]): All images of the run.
        threshold (float | None): Current threshold of normalised scores; ``None`` without one.
        normalised (bool): Whether scores and maps are normalised to between 0 and 1.
        basis (str): What the threshold is calibrated on, in words.
        independent_images (int): Number of independent good images among that.
        model (ModelFacts): Facts of the model.
        made (str): Time of the report, to the minute.
        explanations (dict[int, ImageExplanation]): Explanation by the index of the image.
        group (str | None): Regular expression for the group in a path.
        region_overlap (Curve | None): Per-region overlap, if there are masks.
        region_note (str): Why it is missing, or what it leaves out.
        warning (str | None): Warning that the threshold is calibrated on too few images.
        known_by_name (int): Images that the checkpoint knows by their names alone.
        unreadable (list[tuple[str, str]]): File and reason of each image that cannot be read.
        notes (list[str]): Further notes.
        streams (list[WatchedStream]): Watched streams, those that have changed first.
    """

    images: list[ImageRow]
    threshold: float | None
    normalised: bool
    basis: str
    independent_images: int
    model: ModelFacts
    made: str
    explanations: dict[int, ImageExplanation] = {}  # noqa: RUF012  # never changed
    group: str | None = None
    region_overlap: Curve | None = None
    region_note: str = ""
    warning: str | None = None
    known_by_name: int = 0
    unreadable: list[tuple[str, str]] = []  # noqa: RUF012  # never changed
    notes: list[str] = []  # noqa: RUF012  # never changed
    streams: list[WatchedStream] = []  # noqa: RUF012  # never changed


class GroupRow(NamedTuple):
    """Row of a table by kind of defect or by group.

    Attributes:
        name (str): Kind or group.
        counts (Counts): Counts of its new images.
        auroc (float | None): Image AUROC of all its images; ``None`` without good and defective
            ones.
        left_out (int): Images that are not new.
    """

    name: str
    counts: Counts
    auroc: float | None
    left_out: int


def most_important(images: Sequence[ImageRow], threshold: float | None, most: int) -> list[int]:
    """Indices of the images that matter most, the first first.

    Mistakes come first, those farthest from the threshold before the others. Half of what is left
    goes to the images nearest the threshold, half to the highest scores. An image that is chosen
    among all images is also chosen among any part of them, so that a stream can be reduced as it
    comes.

    Args:
        images (Sequence[ImageRow]): The images.
        threshold (float | None): Current threshold; without one, the highest scores are chosen.
        most (int): Most images to choose.

    Returns:
        list[int]: Indices into ``images``.
    """
    indices = range(len(images))
    scores = [image.result.score for image in images]
    highest = sorted(indices, key=lambda index: (-scores[index], index))
    if threshold is None:
        return highest[:most]
    nearest = sorted(indices, key=lambda index: (abs(scores[index] - threshold), index))
    mistakes = [
        index
        for index in reversed(nearest)
        if images[index].result.truth not in {None, int(scores[index] > threshold)}
    ]
    found = dict.fromkeys(mistakes[:most])
    half = len(found) + (most - len(found) + 1) // 2
    for ranking, most_so_far in ((nearest, half), (highest, most), (nearest, most)):
        for index in ranking:
            if len(found) >= most_so_far:
                break
            found.setdefault(index)
    return list(found)


def with_most_media(
    images: Sequence[ImageRow], threshold: float | None, most: int
) -> list[ImageRow]:
    """The images, with media only for the ``most`` most important of those that have media."""
    held = [index for index, image in enumerate(images) if image.media is not None]
    chosen = most_important([images[index] for index in held], threshold, most)
    kept = {held[index] for index in chosen}
    return [
        image if index in kept else image._replace(media=None) for index, image in enumerate(images)
    ]


def counts_of(images: Sequence[ImageRow], threshold: float) -> Counts:
    """Counts of images at a threshold."""
    results = [image.result for image in images]
    return Counts.at(threshold, [row.score for row in results], [row.truth for row in results])


def scores_of(images: Sequence[ImageRow], truth: int | None) -> list[float]:
    """Scores of the images that are labelled good (0), defective (1) or not at all."""
    return [image.result.score for image in images if image.result.truth == truth]


def tables_of(contents: ReportContents, threshold: float) -> dict[str, list[GroupRow]]:
    """Table by kind of defect, and by group if there is an expression for it.

    The AUROC of a kind compares its images with all good images, that of a group only images of
    the group.

    Args:
        contents (ReportContents): The report.
        threshold (float): Larger scores are anomalous.

    Returns:
        dict[str, list[GroupRow]]: Rows, sorted by name, under ``"kind"`` and ``"group"``.
    """
    images, group = contents.images, contents.group
    good = scores_of(images, 0)
    tables = {"kind": _table(images, [image.kind for image in images], threshold, good)}
    if group is not None:
        names = [group_label(image.result.image, group) for image in images]
        tables["group"] = _table(images, names, threshold)
    return tables


def _table(
    images: Sequence[ImageRow],
    names: Sequence[str],
    threshold: float,
    good: Sequence[float] | None = None,
) -> list[GroupRow]:
    """Rows by name; the AUROC compares with scores of good images, else with those of the row."""
    by_name = defaultdict(list)
    for name, image in zip(names, images, strict=True):
        by_name[name].append(image)
    rows = []
    for name, own in sorted(by_name.items()):
        new = [image for image in own if image.is_new]
        area = auroc(scores_of(own, 0) if good is None else good, scores_of(own, 1))
        rows.append(GroupRow(name, counts_of(new, threshold), area, len(own) - len(new)))
    return rows


def as_json(contents: ReportContents) -> dict[str, Any]:
    """Contents of a report as JSON.

    Args:
        contents (ReportContents): The report.

    Returns:
        dict[str, Any]: ``new`` counts the images that neither chose the threshold nor were trained
        on, ``all`` all images; rates come with intervals of 95%. ``images`` has the columns of the
        table of scores, ``kind``, ``group``, ``trained_on`` and ``chose_threshold``. ``streams``,
        of a watch, has the evidence and the change of each scale's mean residual.
    """
    images, threshold, group = contents.images, contents.threshold, contents.group
    new = [image for image in images if image.is_new]
    found: dict[str, Any] = {
        "made": contents.made,
        "checkpoint": contents.model.checkpoint or None,
        "sha256": contents.model.sha256 or None,
        "versions": contents.model.versions,
        "threshold": threshold,
        "basis": contents.basis,
        "warning": contents.warning,
        "independent_good_images": contents.independent_images,
        "trained_on": sum(image.trained_on for image in images),
        "chose_threshold": sum(image.chose_threshold for image in images),
        "new": None if threshold is None else _rates(counts_of(new, threshold)),
        "all": None if threshold is None else _rates(counts_of(images, threshold)),
        "image_auroc": auroc(scores_of(images, 0), scores_of(images, 1)),
        "aupro": None if contents.region_overlap is None else contents.region_overlap.area,
        "unreadable": [{"image": path, "reason": reason} for path, reason in contents.unreadable],
        "notes": [*contents.notes, *filter(None, [contents.region_note])],
        "images": [
            {
                **image.result._asdict(),
                "kind": image.kind,
                **({} if group is None else {"group": group_label(image.result.image, group)}),
                "trained_on": image.trained_on,
                "chose_threshold": image.chose_threshold,
            }
            for image in images
        ],
    }
    if contents.streams:
        found["streams"] = [
            {
                "stream": stream.name,
                "images": stream.images,
                "evidence": stream.evidence[-1] if stream.evidence else 1.0,
                "limit": stream.limit,
                "changed_at": stream.changed_at,
                "unchanged_before": stream.start,
                "direction": stream.direction,
                "layers": [layer._asdict() for layer in stream.layers],
            }
            for stream in contents.streams
        ]
    for by, table in tables_of(contents, threshold).items() if threshold is not None else ():
        found[f"by_{by}"] = {
            row.name: {**_rates(row.counts), "left_out": row.left_out, "auroc": row.auroc}
            for row in table
        }
    return found


def _rates(counts: Counts) -> dict[str, Any]:
    names = ("false_alarms", "missed", "called_anomalous")
    return {
        name: {
            "images": number,
            "count": hits,
            "rate": hits / number if number else None,
            "interval": list(interval(hits, number)),
        }
        for name, (hits, number) in zip(names, counts.rates, strict=True)
    }
