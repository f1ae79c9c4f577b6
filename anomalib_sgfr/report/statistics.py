"""Numbers of a report: counts at a threshold and how sure they are, curves and the areas under
them.

Whether image files are ones that a checkpoint knows: by whatever path, as copies, or in a folder
that was moved.

The per-region overlap of a run, by anomalib's own metric, while memory suffices.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from anomalib.metrics.aupro import _AUPRO
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score, roc_curve
from torch import Tensor

from anomalib_sgfr.post_processing.calibration import real_path

__all__ = [
    "Counts",
    "Curve",
    "Line",
    "RegionOverlap",
    "area_under",
    "interval",
    "known_among",
    "lines",
    "roc",
    "thinned",
]


_Z = 1.959963984540054  # of 95%, both sides
_POINTS = 400  # of a curve, to draw


class Counts(NamedTuple):
    """What a threshold makes of images.

    Attributes:
        good (int): Images known to be good.
        alarms (int): Of those, above the threshold.
        bad (int): Images known to be defective.
        missed (int): Of those, not above it.
        unknown (int): Images of which the truth is not known.
        called (int): Of those, above it.
    """

    good: int
    alarms: int
    bad: int
    missed: int
    unknown: int
    called: int

    @classmethod
    def at(
        cls, threshold: float, scores: Sequence[float], truths: Sequence[int | None]
    ) -> "Counts":
        """Count.

        Args:
            threshold (float): Larger scores are anomalous.
            scores (Sequence[float]): Of images.
            truths (Sequence[int | None]): 1 for a defect, 0 for a good image, ``None`` for one that
                is not known.
        """
        above = np.asarray(scores, float) > threshold
        truth = np.array([-1 if value is None else value for value in truths], int)
        good, bad, unknown = truth == 0, truth == 1, truth == -1
        found = (good, good & above, bad, bad & ~above, unknown, unknown & above)
        return cls(*(int(chosen.sum()) for chosen in found))


class Curve(NamedTuple):
    """A curve to draw.

    Attributes:
        x (list[float]): From the left.
        y (list[float]): Of each.
        area (float): Under it, of all that there could be.
    """

    x: list[float]
    y: list[float]
    area: float


class Line(NamedTuple):
    """A line of a table by kind or by group.

    Attributes:
        name (str): Of the kind or group.
        counts (Counts): Of its new images, at the threshold in force.
        auroc (float | None): Of all its images; ``None`` without good and defective ones.
        left_out (int): Its images that are not new.
    """

    name: str
    counts: Counts
    auroc: float | None
    left_out: int = 0


def interval(hits: int, number: int) -> tuple[float, float]:
    """Interval of 95% for a share (Wilson 1927).

    Args:
        hits (int): How many.
        number (int): Of how many.

    Returns:
        tuple[float, float]: From and to; all from 0 to 1 of none.
    """
    if not number:
        return 0.0, 1.0
    share, spread = hits / number, _Z * _Z / number
    middle = (share + spread / 2) / (1 + spread)
    half = (_Z / (1 + spread)) * float(
        np.sqrt(share * (1 - share) / number + spread / (4 * number))
    )
    return (0.0 if hits == 0 else middle - half), (1.0 if hits == number else middle + half)


def area_under(good: Sequence[float], bad: Sequence[float]) -> float | None:
    """Area under the ROC curve; ``None`` without images of both."""
    if not (len(good) and len(bad)):
        return None
    return float(roc_auc_score([0] * len(good) + [1] * len(bad), [*good, *bad]))


def roc(good: Sequence[float], bad: Sequence[float]) -> Curve | None:
    """False alarms against defects found; ``None`` without images of both."""
    area = area_under(good, bad)
    if area is None:
        return None
    alarms, found, _ = roc_curve([0] * len(good) + [1] * len(bad), [*good, *bad])
    return thinned(alarms, found, area)


def thinned(x: NDArray[np.floating], y: NDArray[np.floating], area: float) -> Curve:
    """A curve of so many points as can be seen: its ends, and those evenly spread along it."""
    walked = np.concatenate(
        ([0.0], np.cumsum(np.abs(np.diff(x)) / (np.ptp(x) or 1.0) + np.abs(np.diff(y))))
    )
    if len(x) > _POINTS:
        places = np.searchsorted(walked, np.linspace(0.0, walked[-1], _POINTS)).clip(0, len(x) - 1)
        chosen = np.unique(np.concatenate(([0], places, [len(x) - 1])))
        x, y = x[chosen], y[chosen]
    return Curve(np.round(x, 5).tolist(), np.round(y, 5).tolist(), area)


def lines(
    names: Sequence[str],
    scores: Sequence[float],
    truths: Sequence[int | None],
    threshold: float,
    *,
    against_all_good: bool,
    new: Sequence[bool],
) -> list[Line]:
    """A table by kind or by group.

    Args:
        names (Sequence[str]): Of the kind or group of each image.
        scores (Sequence[float]): Of each.
        truths (Sequence[int | None]): Of each.
        threshold (float): Larger scores are anomalous.
        against_all_good (bool): Whether defects are told from the good images of all names, as
            those of a kind are, and not from those of their own.
        new (Sequence[bool]): Whether each image is counted: not one that chose the threshold or was
            trained on.

    Returns:
        list[Line]: By name.
    """
    every_good = [score for score, truth in zip(scores, truths, strict=True) if truth == 0]
    found = []
    for name in sorted(set(names)):
        own = [row[1:] for row in zip(names, scores, truths, new, strict=True) if row[0] == name]
        counted = [(score, truth) for score, truth, is_new in own if is_new]
        good = every_good if against_all_good else [score for score, truth, _ in own if truth == 0]
        counts = Counts.at(
            threshold, [score for score, _ in counted], [truth for _, truth in counted]
        )
        area = area_under(good, [score for score, truth, _ in own if truth == 1])
        found.append(Line(name, counts, area, len(own) - len(counted)))
    return found


_NAMES = 2  # of folders that have to agree where a folder was moved


def known_among(files: Sequence[str], known: Iterable[str]) -> tuple[list[bool], int]:
    """Tell which images are known ones.

    An image is known if its path leads to a known file, through links too; if it has the content of
    one; or if the known file is gone, its folder is found again where the image lies, and the name
    is the same. A gone folder is found again in a folder of the same name, and of the same name of
    the folder above, that holds all images known of it: so ``bottle/test/good`` is not taken for a
    ``bottle/train/good`` that was moved.

    Args:
        files (Sequence[str]): Images; empty where the file is not known.
        known (Iterable[str]): Images that a checkpoint names.

    Returns:
        tuple[list[bool], int]: One for each of ``files``; and how many of them are known by their
            names alone.
    """
    real = [real_path(path) for path in files]
    paths = {real_path(path) for path in known if path}
    there = {path for path in paths if Path(path).is_file()}
    moved = _moved(paths - there, {str(Path(path).parent) for path in real if path})
    copies = _copies([path for path in real if path and path not in there], there)
    found = [path in there or path in copies for path in real]
    by_name = [path in moved and not its for path, its in zip(real, found, strict=True)]
    return [one or other for one, other in zip(found, by_name, strict=True)], sum(by_name)


def _copies(files: Iterable[str], known: Iterable[str]) -> set[str]:
    """Files with the content of a known one; only files of equal size are read."""
    by_size = defaultdict(list)
    for path in known:
        by_size[_size(path)].append(path)
    digests: dict[int, set[bytes]] = {}
    found = set()
    for path in files:
        size = _size(path)
        if size not in by_size or size < 0:
            continue
        if size not in digests:
            digests[size] = {_digest(other) for other in by_size[size]}
        if _digest(path) in digests[size]:
            found.add(path)
    return found


def _size(path: str) -> int:
    """In bytes; -1 of what is no file."""
    try:
        return Path(path).stat().st_size
    except OSError:
        return -1


def _digest(path: str) -> bytes:
    try:
        with Path(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError:  # like no other
        return path.encode(errors="surrogateescape")


def _moved(gone: Iterable[str], folders: Iterable[str]) -> set[str]:
    """Where files that are gone lie now, if their folder lies in or beside one of the folders
    given.
    """
    names: dict[Path, set[str]] = defaultdict(set)
    for path in map(Path, gone):
        names[path.parent].add(path.name)
    around = sorted(
        {part for folder in folders for part in (Path(folder), *Path(folder).parents)}, reverse=True
    )
    found = set()
    for folder, its in names.items():
        parts = folder.parts[1:]
        longest_first = (
            base.joinpath(*parts[start:])
            for start in range(len(parts) - _NAMES + 1)
            for base in around
        )
        place = next((place for place in longest_first if place.is_dir()), None)
        if place is not None and all((place / name).is_file() for name in its):
            found |= {str(place / name) for name in its}
    return found


_PIXELS = 2**26  # kept: 256 MiB of maps, a thousand of 256 x 256


class RegionOverlap:
    """Gathers maps and masks, and gives the curve of how much of each defect is found at how many
    false pixels.
    """

    def __init__(self) -> None:
        self._maps: list[Tensor] = []
        self._masks: list[Tensor] = []
        self._pixels = 0
        self.left_out = 0

    def add(self, maps: Tensor | None, masks: Tensor | None) -> None:
        """Keep those of a batch, shape ``(B, 1, H, W)`` or ``(B, H, W)``, where there are masks."""
        if maps is None or masks is None:
            return
        scores, truth = (
            part.detach().reshape(len(part), *part.shape[-2:]).cpu() for part in (maps, masks)
        )
        if scores.shape != truth.shape or self._pixels + scores.numel() > _PIXELS:
            self.left_out += len(scores)
            return
        if self._maps and self._maps[0].shape[1:] != scores.shape[1:]:
            self.left_out += len(scores)
            return
        self._pixels += scores.numel()
        self._maps.append(scores.float())
        self._masks.append(truth > 0)

    def curve(self) -> tuple[Curve | None, str]:
        """The curve up to 30% false pixels and the area under it as a share; and what it leaves
        out, or why not.

        Returns:
            tuple[Curve | None, str]: ``None`` where no defect is marked.
        """
        if not any(bool(mask.any()) for mask in self._masks):
            return None, "No mask marks a defect, so there is no per-region overlap."
        metric = _AUPRO()
        metric.update(torch.cat(self._maps), torch.cat(self._masks).int())
        # what its own figure is drawn from
        false_pixels, overlap = metric._compute()  # noqa: SLF001
        area = float(metric.compute())
        note = (
            f"{self.left_out} images are left out of it: it takes those that fit in memory."
            if self.left_out
            else ""
        )
        return thinned(false_pixels.cpu().numpy(), overlap.cpu().numpy(), area), note
