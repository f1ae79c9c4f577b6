"""Sensitivity of a fitted model: the drawn defects that it finds, by kind, size and place."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.special import bdtr

from anomalib_sgfr.console import progress
from anomalib_sgfr.images.drawn_defects import (
    KINDS,
    DrawnDefect,
    choose_centre,
    distance_inside,
    draw_defect,
    sharpness,
)
from anomalib_sgfr.images.reading import read_image, why_unreadable
from anomalib_sgfr.post_processing.calibration import DEFAULT_RATE
from anomalib_sgfr.report.media import webp
from anomalib_sgfr.report.statistics import interval

__all__ = [
    "FEW",
    "TARGET",
    "DetectionCurve",
    "Example",
    "Inspected",
    "Place",
    "Sensitivity",
    "SettingResult",
    "SmallestSize",
    "better_settings",
    "default_sizes",
    "measure_sensitivity",
    "monotone",
    "recommend",
    "smallest_size",
]

TARGET = 0.9  # probability of detection
_DRAWS = 1000  # of the posterior of a curve
_LEVELS = (0.025, 0.975)
_SIZES, _SMALLEST, _LARGEST = 7, 1 / 100, 1 / 5  # of a side
_MIN_SIZE = 2.0  # pixels
_SAME_COST = 1.25  # ratio of times per image
_ALLOWED = 0.05  # probability of as many alarms, from which on the rate explains them
_SIGNIFICANT = 2.326  # quantile of the normal distribution at 99%
_TRIES = 5  # places for a distortion
_NEAR = 1 / 32  # of a side: how far from the defect the peak may lie
_MAX_PIXELS = 2**22  # of the frames that are inspected at once
_PER_CELL, _MOST_CELLS = 20, 12  # drawn defects in a cell of the map on the mean; cells of a side
FEW = 5  # drawn defects in a cell: it is left empty
_SHOWN = (0.1, 0.4, 0.7, 1.0)  # quantiles of the sizes of examples
_CROP_SIDE, _IMAGE_SIDE = 112, 640  # pixels of the page's images


class Inspected(Protocol):
    """What :class:`~anomalib_sgfr.inspector.Inspection` tells of a frame."""

    @property
    def score(self) -> float:
        """Anomaly score."""

    @property
    def label(self) -> bool | None:
        """Whether the frame is anomalous."""

    @property
    def place(self) -> tuple[int, int] | None:
        """Row and column of the peak."""


class SmallestSize(NamedTuple):
    """Smallest size that is found with a probability of 90%.

    Attributes:
        size (float | None): Pixels; ``None`` if it is not reached. If the smallest size that was
            drawn is found, that.
        low (float): Lower bound of the interval of 95%, a drawn size; 0 if the smallest that was
            drawn may be found.
        high (float | None): Upper bound, a drawn size; ``None`` if the largest that was drawn may
            be missed.
        is_bound (bool): Whether the smallest size that was drawn is found, so that ``size`` is only
            an upper bound.
    """

    size: float | None
    low: float
    high: float | None
    is_bound: bool


class DetectionCurve(NamedTuple):
    """Detected defects of a kind and a contrast, by size.

    Attributes:
        kind (str): Kind of the defects.
        contrast (float): Their contrast.
        sizes (list[float]): Sizes in pixels, ascending.
        drawn (list[int]): Number of drawn defects of each size.
        found (list[int]): How many of their images were labelled anomalous.
        located (list[int]): In how many of these the peak of the score map lay on the defect.
    """

    kind: str
    contrast: float
    sizes: list[float]
    drawn: list[int]
    found: list[int]
    located: list[int]

    @property
    def fitted(self) -> NDArray[np.float64]:
        """Monotone probability of detection at each size."""
        drawn = np.array(self.drawn, float)
        return monotone(np.array(self.found) / np.maximum(drawn, 1.0), drawn)

    @property
    def smallest(self) -> SmallestSize:
        """Smallest size that is found with a probability of 90%."""
        return smallest_size(self.sizes, self.found, self.drawn)


class Place(NamedTuple):
    """Cell of the map of places.

    Attributes:
        top (float): Upper edge, as a share of the height.
        left (float): Left edge, as a share of the width.
        bottom (float): Lower edge.
        right (float): Right edge.
        drawn (int): Drawn defects whose centre lies in it.
        missed (int): How many of them were missed.
    """

    top: float
    left: float
    bottom: float
    right: float
    drawn: int
    missed: int


class Example(NamedTuple):
    """Drawn defect to show.

    Attributes:
        kind (str): Its kind.
        contrast (float): Its contrast.
        size (float): Its size in pixels.
        found (bool): Whether its image was labelled anomalous.
        image (bytes): Crop around it, WebP.
    """

    kind: str
    contrast: float
    size: float
    found: bool
    image: bytes


class Sensitivity(NamedTuple):
    """What a model finds of drawn defects.

    Attributes:
        curves (list[DetectionCurve]): Of each kind and contrast.
        places (list[Place]): Map of places, row by row.
        examples (list[Example]): Drawn defects to show.
        image_size (tuple[int, int]): Height and width of the images; of several sizes the median.
        same_size (bool): Whether all images have that size.
        images (int): Good images that defects were drawn into.
        alarms (list[str]): Good images that are above the threshold by themselves, left out.
        background (bytes): One of the images, WebP.
    """

    curves: list[DetectionCurve]
    places: list[Place]
    examples: list[Example]
    image_size: tuple[int, int]
    same_size: bool
    images: int
    alarms: list[str]
    background: bytes

    @property
    def drawn(self) -> int:
        """Number of drawn defects."""
        return sum(sum(curve.drawn) for curve in self.curves)

    @property
    def missed(self) -> int:
        """Number of missed defects."""
        return self.drawn - sum(sum(curve.found) for curve in self.curves)

    @property
    def worst_places(self) -> list[Place]:
        """Cells where significantly more is missed than on the mean, the worst first."""
        share = self.missed / max(self.drawn, 1)
        worse = [
            place
            for place in self.places
            if place.drawn >= FEW and interval(place.missed, place.drawn)[0] > share
        ]
        return sorted(worse, key=lambda place: -place.missed / place.drawn)


class SettingResult(NamedTuple):
    """What a model of other settings finds of the same drawn defects.

    Attributes:
        name (str): The setting, in words.
        arguments (dict[str, Any]): Arguments of the model that differ from the present ones.
        seconds (float): Time of the inspection of an image.
        drawn (int): Number of drawn defects.
        found (int): How many of them were found.
        images (int): Number of good images.
        alarms (int): How many of them are above the threshold without a defect.
    """

    name: str
    arguments: dict[str, Any]
    seconds: float
    drawn: int
    found: int
    images: int
    alarms: int

    @property
    def rate(self) -> float:
        """Share of the drawn defects that were found."""
        return self.found / max(self.drawn, 1)


class _Planned(NamedTuple):
    """Defect to draw."""

    number: int
    kind: str
    contrast: float
    size: float


class _Result(NamedTuple):
    """Drawn defect that was inspected."""

    planned: _Planned
    centre: tuple[float, float]
    found: bool
    located: bool


def monotone(rates: NDArray[np.float64], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Non-decreasing rates of least weighted squared error (isotonic regression).

    Args:
        rates (NDArray[np.float64]): Rates in order of the size, shape ``(..., N)``.
        weights (NDArray[np.float64]): Number of trials of each, shape ``(N,)``; rates without
            trials take the value of those below.

    Returns:
        NDArray[np.float64]: Shape of ``rates``: the largest over all starts of the smallest over
        all ends of the mean in between.
    """
    weights = np.maximum(weights, 1e-9)
    number = rates.shape[-1]
    zero = np.zeros((*rates.shape[:-1], 1))
    sums = np.concatenate((zero, np.cumsum(rates * weights, -1)), -1)
    total = np.concatenate(([0.0], np.cumsum(weights)))
    found = np.empty(rates.shape)
    for at in range(number):
        starts = np.arange(at + 1)[:, None]
        ends = np.arange(at + 1, number + 1)[None, :]
        means = (sums[..., ends] - sums[..., starts]) / (total[ends] - total[starts])
        found[..., at] = means.min(-1).max(-1)
    return found


def smallest_size(
    sizes: Sequence[float], found: Sequence[int], drawn: Sequence[int], seed: int = 0
) -> SmallestSize:
    """Smallest size that is found with a probability of 90%.

    The rates are made monotone, and the size is interpolated between two drawn ones by its
    logarithm. For its interval the same is done of rates drawn from their posterior distributions
    by Jeffreys' prior: of these, 95% reach 90% between two drawn sizes that lie within it. Nothing
    is assumed of the probability between drawn sizes but that it grows.

    Args:
        sizes (Sequence[float]): Sizes in pixels, ascending.
        found (Sequence[int]): Detected defects of each size.
        drawn (Sequence[int]): Defects of each size.
        seed (int): Of the draws.

    Returns:
        SmallestSize: The size.
    """
    use = np.array(drawn) > 0
    if not use.any():
        return SmallestSize(None, 0.0, None, is_bound=False)
    tested, hits, trials = (np.array(values, float)[use] for values in (sizes, found, drawn))
    rates = monotone(hits / trials, trials)
    size, at = None, _reached(rates[None])[0]
    if at == 0:
        size = float(tested[0])
    elif at < len(tested):
        share = (TARGET - rates[at - 1]) / (rates[at] - rates[at - 1])
        logs = np.log(tested[at - 1 : at + 1])
        size = float(np.exp(logs[0] + share * (logs[1] - logs[0])))
    rng = np.random.default_rng(seed)
    draws = rng.beta(hits + 0.5, trials - hits + 0.5, (_DRAWS, len(tested)))
    reached = np.sort(_reached(monotone(draws, trials)))
    first, last = (int(reached[round(level * (_DRAWS - 1))]) for level in _LEVELS)
    low = 0.0 if min(first, at) == 0 else float(tested[min(first, at) - 1])
    high = None if max(last, at) == len(tested) else float(tested[max(last, at)])
    return SmallestSize(size, low, high, is_bound=at == 0)


def _reached(rates: NDArray[np.float64]) -> NDArray[np.int64]:
    """First of each row of monotone rates that is 90% or more; their number where none is."""
    found: NDArray[np.int64] = (rates < TARGET - 1e-12).sum(1)
    return found


def better_settings(
    results: Sequence[SettingResult], rate: float = DEFAULT_RATE
) -> tuple[list[SettingResult], ...]:
    """Settings that are better than the present ones, those of the same cost first.

    A setting is better if it finds significantly more of the drawn defects (two proportions, at
    99%, as several are compared), and if either no more good images are alarms or so many are to
    be expected at the false-alarm rate (binomial, at 95%): each setting has its own threshold for
    that rate. It costs the same if it takes at most a quarter more time.

    Args:
        results (Sequence[SettingResult]): That of the present settings first.
        rate (float): False-alarm rate that the thresholds are calibrated for.

    Returns:
        tuple[list[SettingResult], ...]: Better ones of the same cost, and those that cost more;
        each the best first.
    """
    now = results[0]
    better = sorted(
        (
            result
            for result in results[1:]
            if _is_more(result, now)
            and (not _alarms_more(result, now) or _alarms_allowed(result, rate))
        ),
        key=lambda result: -result.rate,
    )
    limit = _SAME_COST * now.seconds
    same = [result for result in better if result.seconds <= limit]
    return same, [result for result in better if result.seconds > limit]


def recommend(results: Sequence[SettingResult], rate: float = DEFAULT_RATE) -> str:
    """Sentences that recommend a setting, of :func:`better_settings`.

    Args:
        results (Sequence[SettingResult]): That of the present settings first.
        rate (float): False-alarm rate that the thresholds are calibrated for.

    Returns:
        str: The setting to take at the same cost, and the best of those that cost more.
    """
    now = results[0]
    same, costlier = better_settings(results, rate)
    said = []
    for own, cost in ((same, "At the same cost"), (costlier, "")):
        if own:
            best = own[0]
            start = cost or f"For {best.seconds / now.seconds:.1f} times the time per image"
            said.append(
                f"{start}, take {best.name}: it finds {100.0 * best.rate:.0f}% of the drawn"
                f" defects, {100.0 * now.rate:.0f}% are found now."
            )
            if _alarms_more(best, now):
                said.append(
                    f"Of {best.images} good images {best.alarms} would be above its threshold, of"
                    f" {now.images} now {now.alarms}: so few images cannot tell that from a"
                    f" false-alarm rate of {100.0 * rate:.2g}%."
                )
    if not same:
        said.insert(0, "At the same cost, keep the settings: no other finds significantly more.")
    if not costlier:
        said.append("None that costs more finds significantly more.")
    return " ".join(said)


def _alarms_more(one: SettingResult, other: SettingResult) -> bool:
    """Whether a larger share of the good images is above the threshold."""
    return one.alarms * other.images > other.alarms * one.images


def _alarms_allowed(result: SettingResult, rate: float) -> bool:
    """Whether so many alarms or more have a probability of at least 5% at a false-alarm rate."""
    return result.alarms == 0 or 1.0 - bdtr(result.alarms - 1, result.images, rate) >= _ALLOWED


def _is_more(one: SettingResult, other: SettingResult) -> bool:
    """Whether one finds significantly more: difference of two proportions."""
    pooled = (one.found + other.found) / max(one.drawn + other.drawn, 1)
    spread = pooled * (1.0 - pooled) * (1.0 / max(one.drawn, 1) + 1.0 / max(other.drawn, 1))
    return one.rate - other.rate > _SIGNIFICANT * float(np.sqrt(spread))


def default_sizes(image_size: Sequence[int]) -> list[float]:
    """Sizes of defects from a hundredth to a fifth of a side, at least 2 pixels.

    Args:
        image_size (Sequence[int]): Height and width of the images.

    Returns:
        list[float]: Seven sizes, each larger than the one before by the same factor.
    """
    side = float(np.sqrt(image_size[0] * image_size[1]))
    smallest = max(_SMALLEST * side, _MIN_SIZE)
    sizes = np.geomspace(smallest, max(_LARGEST * side, 2.0 * smallest), _SIZES)
    return [float(f"{size:.3g}") for size in sizes]


def measure_sensitivity(
    inspect: Callable[[list[Any]], Sequence[Inspected]],
    paths: Sequence[Path],
    region_of: Callable[[Path, tuple[int, int]], NDArray[np.bool_]] | None = None,
    *,
    bit_depth: int = 8,
    kinds: Sequence[str] = tuple(KINDS),
    contrasts: Sequence[float] = (0.1, 0.25),
    sizes: Sequence[float] | None = None,
    number: int = 30,
    seed: int = 0,
    damaged: dict[Path, str] | None = None,
) -> Sensitivity:
    """Draw defects into good images, and count those that a model finds.

    Args:
        inspect (Callable): Inspects frames of shape ``(H, W, 3)``, as
            :class:`~anomalib_sgfr.inspector.Inspector` does.
        paths (Sequence[Path]): Good images.
        region_of (Callable | None): From an image, and its height and width, to the pixels that a
            defect may cover; ``None`` for all.
        bit_depth (int): Bits of the camera.
        kinds (Sequence[str]): Kinds of defects.
        contrasts (Sequence[float]): Contrasts, shares of white.
        sizes (Sequence[float] | None): Sizes in pixels; ``None`` for :func:`default_sizes`.
        number (int): Drawn defects of each kind, contrast and size.
        seed (int): Chooses images, places and shapes.
        damaged (dict[Path, str] | None): Receives the reason for each image that cannot be read.

    Returns:
        Sensitivity: The counts.

    Raises:
        ValueError: If no image is left to draw into, or a size cannot be in one.

    Examples:
        >>> from anomalib_sgfr import Inspector, measure_sensitivity
        >>> good = sorted((image.parents[1] / "good").iterdir())
        >>> found = measure_sensitivity(Inspector.load(checkpoint), good, kinds=["spot"], number=1)
        >>> [curve.kind for curve in found.curves], found.missed <= found.drawn
        (['spot', 'spot'], True)
    """
    good, shapes, alarms = _good_images(inspect, paths, bit_depth, damaged)
    if not good:
        why = f"{len(alarms)} of {len(paths)} images are above the threshold without a defect"
        if len(alarms) < len(paths):
            why += f", {len(paths) - len(alarms)} cannot be read"
        msg = f"good: {why}, so there is none to draw a defect into"
        raise ValueError(msg)
    height, width = (int(np.median([shape[axis] for shape in shapes])) for axis in (0, 1))
    chosen = sorted(default_sizes((height, width)) if sizes is None else sizes)
    most = min(max(shape[:2]) for shape in shapes)
    if not 1.0 <= chosen[0] <= chosen[-1] <= most:
        wrong = chosen[0] if chosen[0] < 1.0 else chosen[-1]
        msg = f"sizes: they must be of 1 to {most} pixels, the side of an image, got {wrong:g}"
        raise ValueError(msg)
    rng = np.random.default_rng(seed)
    combinations = [
        (kind, contrast, size)
        for _ in range(number)
        for kind in kinds
        for contrast in contrasts
        for size in chosen
    ]
    planned: list[list[_Planned]] = [[] for _ in good]
    order: list[int] = []
    for index, combination in enumerate(combinations):
        order = order or rng.permutation(len(good)).tolist()
        planned[order.pop()].append(_Planned(index, *combination))
    results: list[_Result] = []
    examples: dict[tuple[str, float, float], Example] = {}
    shown = _shown_sizes(chosen)
    region_of = region_of or (lambda _, size: np.ones(size, bool))
    steps = _inspected(inspect, good, planned, region_of, bit_depth, seed)
    for result, defect in progress(steps, len(combinations), "Drawn defects"):
        results.append(result)
        key = (result.planned.kind, result.planned.contrast, result.planned.size)
        if result.planned.size in shown and key not in examples:
            examples[key] = Example(*key, result.found, _crop(defect, result))
    curves = [
        _curve(results, kind, contrast, chosen) for kind in kinds for contrast in sorted(contrasts)
    ]
    return Sensitivity(
        curves=curves,
        places=_places(results, height, width),
        examples=[examples[key] for key in sorted(examples)],
        image_size=(height, width),
        same_size=len(set(shapes)) == 1,
        images=len(good),
        alarms=alarms,
        background=webp(read_image(good[0], bit_depth), _IMAGE_SIDE),
    )


def _good_images(
    inspect: Callable[[list[Any]], Sequence[Inspected]],
    paths: Sequence[Path],
    bit_depth: int,
    damaged: dict[Path, str] | None,
) -> tuple[list[Path], list[tuple[int, int]], list[str]]:
    """Images that are not above the threshold, their heights and widths, and those that are."""
    good: list[Path] = []
    shapes: list[tuple[int, int]] = []
    alarms: list[str] = []
    for path in progress(paths, len(paths), "Good images"):
        try:
            image = read_image(path, bit_depth)
        except (OSError, SyntaxError, ValueError) as error:
            if damaged is None:
                raise
            damaged[path] = why_unreadable(path, error)
            continue
        if inspect([image])[0].label:
            alarms.append(str(path))
        else:
            good.append(path)
            shapes.append((image.shape[0], image.shape[1]))
    return good, shapes, alarms


def _inspected(
    inspect: Callable[[list[Any]], Sequence[Inspected]],
    paths: Sequence[Path],
    planned: Sequence[Sequence[_Planned]],
    region_of: Callable[[Path, tuple[int, int]], NDArray[np.bool_]],
    bit_depth: int,
    seed: int,
) -> Iterator[tuple[_Result, DrawnDefect]]:
    """Draw and inspect defects, image by image; a distortion that cannot be seen is left out."""
    for path, own in zip(paths, planned, strict=True):
        if not own:
            continue
        image = read_image(path, bit_depth)
        height, width = image.shape[:2]
        region = region_of(path, (height, width))
        inside, blur = distance_inside(region), sharpness(image)
        most = max(1, _MAX_PIXELS // (height * width))
        for first in range(0, len(own), most):
            batch: list[tuple[_Planned, tuple[int, int], DrawnDefect]] = []
            for item in own[first : first + most]:
                rng = np.random.default_rng([seed, item.number])
                for _ in range(_TRIES):
                    centre = choose_centre(inside, item.size, rng)
                    defect = draw_defect(
                        image, item.kind, item.size, item.contrast, centre, rng, region, blur
                    )
                    if defect is not None:
                        batch.append((item, centre, defect))
                        break
            found = inspect([defect.image for _, _, defect in batch]) if batch else []
            for (item, centre, defect), inspection in zip(batch, found, strict=True):
                share = ((centre[0] + 0.5) / height, (centre[1] + 0.5) / width)
                is_found = bool(inspection.label)
                is_near = is_found and _is_near(inspection.place, defect.mask)
                yield _Result(item, share, is_found, is_near), defect


def _is_near(peak: Sequence[int] | None, mask: NDArray[np.bool_]) -> bool:
    """Whether a peak lies on a defect or as near as the map can tell."""
    if peak is None or not mask.any():
        return False
    rows, columns = np.nonzero(mask)
    distance = float(np.hypot(rows - peak[0], columns - peak[1]).min())
    return distance <= _NEAR * float(np.sqrt(mask.size))


def _curve(
    results: Sequence[_Result], kind: str, contrast: float, sizes: Sequence[float]
) -> DetectionCurve:
    own = [
        [result for result in results if result.planned[1:] == (kind, contrast, size)]
        for size in sizes
    ]
    return DetectionCurve(
        kind,
        contrast,
        list(sizes),
        [len(part) for part in own],
        [sum(result.found for result in part) for part in own],
        [sum(result.located for result in part) for part in own],
    )


def _places(results: Sequence[_Result], height: int, width: int) -> list[Place]:
    """Map of cells that are about square and have enough defects each."""
    number = max(1, len(results) // _PER_CELL)
    side = max((height * width / number) ** 0.5, max(height, width) / _MOST_CELLS)
    rows, columns = (max(1, round(length / side)) for length in (height, width))
    drawn, missed = np.zeros((2, rows, columns), int)
    for result in results:
        cell = int(result.centre[0] * rows), int(result.centre[1] * columns)
        drawn[cell] += 1
        missed[cell] += not result.found
    return [
        Place(
            row / rows,
            column / columns,
            (row + 1) / rows,
            (column + 1) / columns,
            int(drawn[row, column]),
            int(missed[row, column]),
        )
        for row in range(rows)
        for column in range(columns)
    ]


def _shown_sizes(sizes: Sequence[float]) -> set[float]:
    return {sizes[round(share * (len(sizes) - 1))] for share in _SHOWN}


def _crop(defect: DrawnDefect, result: _Result) -> bytes:
    """Crop around a defect, WebP."""
    height, width = defect.mask.shape
    half = round(max(result.planned.size, float(np.sqrt(height * width)) / 10.0))
    half = min(half, height // 2, width // 2)
    row, column = (
        int(min(max(share * length, half), length - half))
        for share, length in zip(result.centre, (height, width), strict=True)
    )
    part = defect.image[row - half : row + half, column - half : column + half]
    return webp(np.ascontiguousarray(part), _CROP_SIDE)
