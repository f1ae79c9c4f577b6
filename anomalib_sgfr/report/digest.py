"""What a report shows, before it is drawn: plain data, from one process or from many."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from anomalib_sgfr.fitting.fit_record import FitRecord
from anomalib_sgfr.inspection.score_table import Scored
from anomalib_sgfr.report.statistics import Curve

__all__ = ["Crop", "Digest", "Mimic", "MimicRow", "ModelFacts", "Picture", "ScaleFacts", "Suspect", "Unit"]


class Picture(NamedTuple):
    """An image as the page shows it.

    Attributes:
        image (bytes): What the model saw, WebP.
        heat (NDArray[np.float16]): Its anomaly map as it is reported, small, shape ``(h, w)``.
        outline (str): Where the map exceeds the threshold of pixels: an SVG path in a square of 1,000.
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
        scored (Scored): Its file, score, label, truth, and the pixel of the file that raised the score.
        kind (str): Of defect; ``"good"``, or empty where the truth is not known.
        place (tuple[float, float] | None): What raised the score, as shares of width and height of what the model saw.
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
        histogram (list[int]): Patches by the bound of their residual, in bins of equal width up to ``largest``.
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
        threshold (float | None): In force, of scores as they are reported; ``None`` if there is none.
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
