"""Drawn defects: spots, scratches, dents and others of a given size, put into images of good parts.

Sizes are in pixels of the image, contrasts in shares of white: 0.1 is 25 levels of an image of 8
bits. A defect is drawn antialiased and blurred as the image is. It is added to the image, or moves
or replaces a part of it, so that texture and noise of the camera stay.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

__all__ = ["KINDS", "DrawnDefect", "choose_centre", "distance_inside", "draw_defect", "sharpness"]

KINDS = {
    "spot": "an irregular spot of another brightness or colour",
    "scratch": "a thin, slightly bent line that tapers off",
    "thread": "a winding line of even width",
    "dent": "shading as of a dent or bump: bright on one side, dark on the other",
    "piece": "a missing piece, or one pasted from elsewhere in the image",
    "distortion": "texture that is pushed aside",
}

_Image = NDArray[np.float32]
_Field = NDArray[np.float64]

_GREY = np.array([0.299, 0.587, 0.114])  # weights of the channels in the brightness
_COVERED = 0.3  # of the largest change of brightness: what counts as the defect
_REACH = 3.0  # standard deviations of the optical blur around a defect that are changed
_SOURCES = 8  # places tried for a pasted piece
_LINE = 20.0  # length of a line over its width
_FARTHEST = 0.3  # of the size, that texture is pushed: farther, and it would fold
_VISIBLE = 0.01  # root of the mean squared change of brightness that pushed texture must show
_STRONG, _SHARPEST = 0.98, 0.9  # quantiles: of gradients, and among these of their loss by a blur
_BLURS = (0.5, 3.0)  # least and largest optical blur
_MEASURED = 1.0  # standard deviation of the gradient, and of what blurs the image once more


class DrawnDefect(NamedTuple):
    """An image with a drawn defect.

    Attributes:
        image (NDArray[np.float32]): Shape ``(H, W, 3)``, between 0 and 1.
        mask (NDArray[np.bool_]): Pixels of the defect, shape ``(H, W)``.
        contrast (float): Root of the mean squared change of brightness within the mask.
    """

    image: _Image
    mask: NDArray[np.bool_]
    contrast: float


class _Canvas(NamedTuple):
    """Part of an image around the centre of a defect.

    Attributes:
        image (NDArray[np.float64]): Its pixels, shape ``(h, w, 3)``.
        rows (NDArray[np.float64]): Rows from the centre, shape ``(h, w)``.
        columns (NDArray[np.float64]): Columns from the centre.
        whole (NDArray[np.float32]): The whole image.
        top_left (tuple[int, int]): Where the part begins.
        size (float): Of the defect.
        contrast (float): Of the defect.
        blur (float): Standard deviation of the optical blur.
        rng (np.random.Generator): Chooses shapes.
    """

    image: _Field
    rows: _Field
    columns: _Field
    whole: _Image
    top_left: tuple[int, int]
    size: float
    contrast: float
    blur: float
    rng: np.random.Generator

    def turned(self, angle: float) -> tuple[_Field, _Field]:
        """Coordinates along and across a direction."""
        cos, sin = np.cos(angle), np.sin(angle)
        return self.columns * cos + self.rows * sin, self.rows * cos - self.columns * sin

    def blurred(self, coverage: _Field) -> _Field:
        """Coverage as the optics show it."""
        found: _Field = ndimage.gaussian_filter(coverage, self.blur)
        return found


def draw_defect(
    image: _Image,
    kind: str,
    size: float,
    contrast: float,
    centre: Sequence[float],
    rng: np.random.Generator,
    region: NDArray[np.bool_] | None = None,
    blur: float = 0.7,
) -> DrawnDefect | None:
    """Draw a defect into an image.

    Args:
        image (NDArray[np.float32]): Image of a good part, shape ``(H, W, 3)``, between 0 and 1.
        kind (str): One of ``KINDS``.
        size (float): Largest extent in pixels, before the blur. Lines are a twentieth as wide, at
            least one pixel.
        contrast (float): Change of brightness as a share of white, before the blur; of a piece the
            root of its mean square. A dent takes at most all light, so that its contrast is less in
            a dark place. Of a distortion the share of the size by which texture is pushed, at most
            0.3.
        centre (Sequence[float]): Row and column of the centre.
        rng (np.random.Generator): Chooses shape, direction and sign.
        region (NDArray[np.bool_] | None): Pixels that may change, shape ``(H, W)``; ``None`` for
            all.
        blur (float): Standard deviation of the optical blur in pixels, see :func:`sharpness`.

    Returns:
        DrawnDefect | None: ``None`` if a distortion could not be seen there, for lack of texture.

    Raises:
        ValueError: If the kind is unknown or the size is not positive.
    """
    if kind not in KINDS:
        msg = f"kind must be one of {', '.join(KINDS)}, got '{kind}'."
        raise ValueError(msg)
    if not size > 0.0:
        msg = f"size must be a positive number of pixels, got {size}."
        raise ValueError(msg)
    height, width = image.shape[:2]
    half = int(np.ceil(size / 2.0 + _REACH * blur)) + 1
    row, column = (round(float(at)) for at in centre)
    top, left = max(row - half, 0), max(column - half, 0)
    bottom, right = min(row + half + 1, height), min(column + half + 1, width)
    rows, columns = np.mgrid[top:bottom, left:right].astype(float)
    canvas = _Canvas(
        image[top:bottom, left:right].astype(float),
        rows - float(centre[0]),
        columns - float(centre[1]),
        image,
        (top, left),
        size,
        contrast,
        blur,
        rng,
    )
    changed = _DRAW[kind](canvas)
    if changed is None:
        return None
    if region is not None:
        changed = np.where(region[top:bottom, left:right, None], changed, canvas.image)
    changed = changed.clip(0.0, 1.0)
    difference = np.abs((changed - canvas.image) @ _GREY)
    # where only the colour changes, brightness does not tell
    difference = np.maximum(difference, np.abs(changed - canvas.image).mean(-1))
    own = difference > _COVERED * difference.max(initial=0.0)
    found, mask = image.copy(), np.zeros((height, width), np.bool_)
    touched = difference > 0.0
    found[top:bottom, left:right][touched] = changed[touched]
    mask[top:bottom, left:right] = own
    return DrawnDefect(
        found, mask, float(np.sqrt((difference[own] ** 2).mean())) if own.any() else 0.0
    )


def distance_inside(region: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Distance of each pixel of a region from what is not of it, the border of the image included.

    Args:
        region (NDArray[np.bool_]): Pixels that defects may cover, shape ``(H, W)``.

    Returns:
        NDArray[np.float64]: In pixels, shape ``(H, W)``; zero outside.
    """
    found: _Field = ndimage.distance_transform_edt(np.pad(region, 1))[1:-1, 1:-1]
    return found


def choose_centre(inside: _Field, size: float, rng: np.random.Generator) -> tuple[int, int]:
    """Choose where a defect fits, at random.

    Args:
        inside (NDArray[np.float64]): As :func:`distance_inside` gives it.
        size (float): Extent of the defect in pixels.
        rng (np.random.Generator): Chooses.

    Returns:
        tuple[int, int]: Row and column of a pixel that lies half of the extent inside; where the
        region is too narrow for that, at least half as far as the pixel that lies farthest inside.

    Raises:
        ValueError: If the region is empty.
    """
    farthest = float(inside.max(initial=0.0))
    if not farthest > 0.0:
        msg = "the region has no pixel to draw a defect in."
        raise ValueError(msg)
    allowed = np.flatnonzero(inside >= max(min(size, farthest) / 2.0, 1.0))
    row, column = np.divmod(int(rng.choice(allowed)), inside.shape[1])
    return int(row), int(column)


def sharpness(image: _Image) -> float:
    r"""Standard deviation of the blur of an image's sharpest edges, in pixels.

    The gradient at an edge of blur :math:`s` falls by a factor :math:`\sqrt{s^2 + t^2} / s` if the
    image is blurred once more, by :math:`t` (Zhuo & Sim, Pattern Recognition 2011).

    Args:
        image (NDArray[np.float32]): Shape ``(H, W, 3)``.

    Returns:
        float: Between 0.5 and 3; 0.5 for an image without edges.
    """
    grey = image.astype(float) @ _GREY
    before, after = (
        ndimage.gaussian_gradient_magnitude(grey, sigma)
        for sigma in (_MEASURED, _MEASURED * 2**0.5)
    )
    strong = (before >= np.quantile(before, _STRONG)) & (before > 0.0)
    if not strong.any():
        return _BLURS[0]
    # some strong edges are out of focus
    ratio = float(np.quantile(before[strong] / np.maximum(after[strong], 1e-12), _SHARPEST))
    squared = _MEASURED**2 * (1.0 / max(ratio**2 - 1.0, 1e-6) - 1.0)
    return float(np.clip(np.sqrt(max(squared, 0.0)), *_BLURS))


def _tint(canvas: _Canvas, strength: float) -> _Field:
    """Change of the channels of a change of brightness by one; equal ones of a grey image."""
    if np.ptp(canvas.image, axis=-1).max(initial=0.0) < 1e-3:  # noqa: PLR2004
        return np.ones(3)
    tint = 1.0 + strength * canvas.rng.normal(size=3)
    return tint / max(abs(float(tint @ _GREY)), 0.5)


def _signed(canvas: _Canvas, coverage: _Field) -> float:
    """Contrast with a sign: at random, but not towards a limit that the image is near to."""
    weight = max(float(coverage.sum()), 1e-12)
    brightness = float((canvas.image @ _GREY * coverage).sum()) / weight
    sign = float(canvas.rng.choice([-1.0, 1.0]))
    possible = {-1.0: brightness, 1.0: 1.0 - brightness}  # largest change either way
    if possible[sign] < canvas.contrast and possible[-sign] > possible[sign]:
        sign = -sign
    return sign * canvas.contrast


def _added(canvas: _Canvas, coverage: _Field, tint: float) -> _Field:
    """Image with a change of brightness where it is covered."""
    shown = canvas.blurred(coverage)
    amount = _signed(canvas, shown)
    return canvas.image + amount * shown[..., None] * _tint(canvas, tint)


def _blob(canvas: _Canvas, roughness: float, flattest: float) -> _Field:
    """Coverage of an irregular disc whose largest diameter is the size."""
    rng = canvas.rng
    along, across = canvas.turned(rng.uniform(0.0, np.pi))
    across = across / rng.uniform(flattest, 1.0)
    orders = np.arange(2, 7)
    shares = roughness * rng.normal(size=len(orders)) / orders
    phases = rng.uniform(0.0, 2.0 * np.pi, len(orders))

    def radius(angle: _Field) -> _Field:
        waves = np.cos(angle[..., None] * orders + phases)
        return np.maximum(1.0 + waves @ shares, 0.2)

    angles = np.linspace(0.0, np.pi, 90, endpoint=False)
    diameter = float((radius(angles) + radius(angles + np.pi)).max())
    outline = radius(np.arctan2(across, along)) * canvas.size / diameter
    inside: _Field = (outline - np.hypot(along, across) + 0.5).clip(0.0, 1.0)
    return inside


def _line(canvas: _Canvas, bends: Sequence[tuple[float, float, float]], taper: float) -> _Field:
    """Coverage of a line as long as the size.

    Args:
        canvas (_Canvas): Where to draw.
        bends (Sequence[tuple[float, float, float]]): Waves that its middle follows: share of the
            length that each departs from a straight line, number of periods and phase.
        taper (float): Exponent of the loss of width towards the ends; ``0`` for none.

    Returns:
        NDArray[np.float64]: Between 0 and 1, shape of the canvas.
    """
    length = canvas.size
    along, across = canvas.turned(canvas.rng.uniform(0.0, np.pi))
    bend, slope = np.zeros_like(along), np.zeros_like(along)
    for share, periods, phase in bends:
        turn = 2.0 * np.pi * periods / length
        bend += share * length * np.sin(turn * along + phase)
        slope += share * length * turn * np.cos(turn * along + phase)
    distance = np.abs(across - bend) / np.hypot(1.0, slope)
    width = max(length / _LINE, 1.0) * (1.0 - (2.0 * along / length) ** 2).clip(0.0, 1.0) ** taper
    sides = (width / 2.0 + 0.5 - distance).clip(0.0, 1.0)
    ends = (length / 2.0 + 0.5 - np.abs(along)).clip(0.0, 1.0)
    covered: _Field = np.minimum(sides, width) * ends
    return covered


def _draw_spot(canvas: _Canvas) -> _Field:
    return _added(canvas, _blob(canvas, 0.15, 0.6), 0.15)


def _draw_scratch(canvas: _Canvas) -> _Field:
    rng = canvas.rng
    bends = [(rng.uniform(-0.1, 0.1), 0.5, 0.5 * np.pi)]
    covered = _line(canvas, bends, 0.5)
    # a tool does not press evenly
    uneven = ndimage.gaussian_filter(rng.normal(size=covered.shape), max(canvas.size / 12.0, 1.0))
    uneven = 0.8 + 0.2 * uneven / max(float(np.abs(uneven).max(initial=0.0)), 1e-12)
    return _added(canvas, covered * uneven, 0.05)


def _draw_thread(canvas: _Canvas) -> _Field:
    rng = canvas.rng
    waves = ((0.08, 0.8), (0.04, 1.9))
    bends = [
        (rng.uniform(0.5, 1.0) * share, periods * rng.uniform(0.8, 1.2), rng.uniform(0.0, 6.3))
        for share, periods in waves
    ]
    return _added(canvas, _line(canvas, bends, 0.0), 0.2)


def _draw_dent(canvas: _Canvas) -> _Field:
    along, across = canvas.turned(canvas.rng.uniform(0.0, 2.0 * np.pi))
    across = across / canvas.rng.uniform(0.6, 1.0)
    # slope of the height (1 - r^2)^2, whose largest is 1
    inside = (1.0 - (along**2 + across**2) / (canvas.size / 2.0) ** 2).clip(0.0)
    slope = along / (canvas.size / 2.0) * inside * 1.5 * 3.0**0.5
    shown = canvas.blurred(slope)
    # light falls on the dent as on the rest: at most all of it is lost
    weight = np.abs(shown)
    brightness = float((canvas.image @ _GREY * weight).sum()) / max(float(weight.sum()), 1e-12)
    strength = min(canvas.contrast / max(brightness, 1e-12), 1.0)
    return canvas.image * (1.0 + strength * shown[..., None])


def _draw_piece(canvas: _Canvas) -> _Field:
    inside = _blob(canvas, 0.3, 0.7)
    shown = canvas.blurred(inside)[..., None]
    source = _elsewhere(canvas)
    if canvas.rng.random() < 0.5:  # noqa: PLR2004  # a missing piece: its ground, with noise
        mean = (canvas.image * shown).sum((0, 1)) / max(float(shown.sum()), 1e-12)
        noise = source - ndimage.gaussian_filter(source, (1.0, 1.0, 0.0))
        source = mean + noise + _signed(canvas, shown[..., 0])
    difference = source - canvas.image
    squared = (difference @ _GREY) ** 2
    change = float(np.sqrt((inside * squared).sum() / max(float(inside.sum()), 1e-12)))
    if change < canvas.contrast:  # of another piece, which is brighter or darker
        missing = float(np.sqrt(canvas.contrast**2 - change**2))
        difference = difference + np.sign(_signed(canvas, shown[..., 0])) * missing
        change = canvas.contrast
    return canvas.image + min(canvas.contrast / max(change, 1e-12), 1.0) * shown * difference


def _elsewhere(canvas: _Canvas) -> _Field:
    """The part of the image, of the canvas's size and perhaps turned, that differs most from it."""
    height, width = canvas.image.shape[:2]
    rng, best, most = canvas.rng, canvas.image, -1.0
    for _ in range(_SOURCES):
        top, left = (
            int(rng.integers(whole - part + 1))
            for whole, part in zip(canvas.whole.shape, (height, width), strict=False)
        )
        found = canvas.whole[top : top + height, left : left + width].astype(float)
        found = found[:: int(rng.choice([-1, 1])), :: int(rng.choice([-1, 1]))]
        difference = float(np.abs(found - canvas.image).mean())
        if difference > most:
            best, most = found, difference
    return best


def _draw_distortion(canvas: _Canvas) -> _Field | None:
    """Push texture aside; ``None`` where there is none."""
    squared = (canvas.rows**2 + canvas.columns**2) / (canvas.size / 2.0) ** 2
    bump = (1.0 - squared).clip(0.0) ** 2
    distance = canvas.size * min(canvas.contrast, _FARTHEST) * bump
    angle = canvas.rng.uniform(0.0, 2.0 * np.pi)
    margin = int(np.ceil(distance.max(initial=0.0))) + 3  # what the interpolation reaches
    around = tuple(
        slice(max(start - margin, 0), start + length + margin)
        for start, length in zip(canvas.top_left, canvas.image.shape, strict=False)
    )
    part = canvas.whole[around].astype(float)
    rows, columns = np.indices(distance.shape)
    where = (
        rows + canvas.top_left[0] - around[0].start + distance * np.sin(angle),
        columns + canvas.top_left[1] - around[1].start + distance * np.cos(angle),
    )
    channels = [
        ndimage.map_coordinates(part[..., channel], where, order=3, mode="nearest")
        for channel in range(3)
    ]
    moved = np.where(distance[..., None] > 0.0, np.stack(channels, -1), canvas.image)
    change = ((moved - canvas.image) @ _GREY)[bump > _COVERED]
    is_seen = not change.size or np.sqrt((change**2).mean()) >= _VISIBLE
    return moved if is_seen or not canvas.contrast else None


_DRAW = {
    "spot": _draw_spot,
    "scratch": _draw_scratch,
    "thread": _draw_thread,
    "dent": _draw_dent,
    "piece": _draw_piece,
    "distortion": _draw_distortion,
}
