"""Frame geometry: where the pixels of a model's input lie in the frame, with NumPy alone.

A pre-processor resizes, crops and pads. Each is a scale and a shift along each axis, and so is the
whole sequence.
"""

import math
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "AxisTransform",
    "FrameTransform",
    "aspect_bounds",
    "aspect_sizes",
    "frame_transform",
    "shortest_side",
    "size_of_aspect",
]

Step = Sequence[Any]  # name and numbers: plain data, which an exported file can keep

_BOUND = 2**14  # the longer side of an aspect ratio in integers, at most
_AREA_TOLERANCE = 0.1  # of the number of pixels of a size that keeps an aspect ratio
_MIN_SIDE = 64  # pixels: an image must be larger than the Gaussian that smooths its map reaches


class AxisTransform(NamedTuple):
    """Transform along one axis: pixel ``i`` has its centre at ``offset + (i + 0.5) * scale``.

    Attributes:
        offset (float): Start of the input in the frame; may lie outside of it.
        scale (float): Pixels of the frame per pixel of the input.
        length (int): Pixels of the input.
    """

    offset: float
    scale: float
    length: int

    def resized(self, length: int) -> "AxisTransform":
        """Another number of pixels over the same part of the frame."""
        return AxisTransform(self.offset, self.scale * self.length / length, length)

    def cropped(self, length: int) -> "AxisTransform":
        """The centre, rounded as torchvision does; padded on both sides if the input is shorter."""
        if length <= self.length:
            before = round((self.length - length) / 2.0)
        else:
            before = -((length - self.length) // 2)
        return AxisTransform(self.offset + before * self.scale, self.scale, length)

    def padded(self, before: int, after: int) -> "AxisTransform":
        """Pixels added on both sides."""
        offset = self.offset - before * self.scale
        return AxisTransform(offset, self.scale, self.length + before + after)


class FrameTransform(NamedTuple):
    """Transform from a model's input, or a map of it, to the frame.

    Attributes:
        vertical (AxisTransform): Along the rows.
        horizontal (AxisTransform): Along the columns.
        frame_size (tuple[int, int]): Height and width of the frame.
    """

    vertical: AxisTransform
    horizontal: AxisTransform
    frame_size: tuple[int, int]

    @property
    def input_size(self) -> tuple[int, int]:
        """Height and width of the model's input."""
        return self.vertical.length, self.horizontal.length

    @property
    def inspected_area(self) -> tuple[int, int, int, int]:
        """Part of the frame that the input covers: top, left, bottom, right, in whole pixels."""
        (top, bottom), (left, right) = (
            (
                max(0, math.ceil(axis.offset - 0.5)),
                min(length, math.ceil(axis.offset + axis.scale * axis.length - 0.5)),
            )
            for axis, length in zip(self[:2], self.frame_size, strict=True)
        )
        return top, left, bottom, right

    def frame_pixel(self, pixel: Sequence[int], shape: Sequence[int]) -> tuple[int, int]:
        """Pixel of the frame under the centre of a pixel of a map.

        Args:
            pixel (Sequence[int]): Row and column in the map.
            shape (Sequence[int]): Height and width of the map, which covers the whole input.

        Returns:
            tuple[int, int]: Row and column in the frame; the nearest if it lies outside.
        """
        axes = [axis.resized(length) for axis, length in zip(self[:2], shape, strict=True)]
        row, column = (
            min(max(math.floor(axis.offset + (at + 0.5) * axis.scale), 0), length - 1)
            for axis, at, length in zip(axes, map(int, pixel), self.frame_size, strict=True)
        )
        return row, column

    def resample(self, values: NDArray[Any]) -> NDArray[np.float32]:
        """Resample a map to the frame by bilinear interpolation.

        Args:
            values (NDArray): The map, shape ``(h, w)``, which covers the whole input.

        Returns:
            NDArray[np.float32]: Shape of the frame; zero outside of the inspected area.
        """
        top, left, bottom, right = self.inspected_area
        vertical, horizontal = (
            axis.resized(length) for axis, length in zip(self[:2], values.shape, strict=True)
        )
        rows = _interpolate(np.asarray(values, np.float32), vertical, top, bottom)
        area = _interpolate(np.ascontiguousarray(rows.T), horizontal, left, right).T
        if area.shape == self.frame_size:
            return np.ascontiguousarray(area)
        frame = np.zeros(self.frame_size, np.float32)
        frame[top:bottom, left:right] = area
        return frame


def _interpolate(
    values: NDArray[np.float32], axis: AxisTransform, start: int, stop: int
) -> NDArray[np.float32]:
    """Rows at the centres of the frame's pixels from ``start`` to ``stop``."""
    at = (np.arange(start, stop) + 0.5 - axis.offset) / axis.scale - 0.5
    at = at.clip(0.0, axis.length - 1.0)
    before = at.astype(np.int64)
    after = np.minimum(before + 1, axis.length - 1)
    weight = (at - before).astype(np.float32)[:, None]
    found: NDArray[np.float32] = values[before] * (1.0 - weight) + values[after] * weight
    return found


def shortest_side(step: int) -> int:
    """Shortest side of :func:`aspect_sizes`, in pixels.

    Args:
        step (int): As there.

    Returns:
        int: A multiple of ``step``, of at least two.
    """
    return max(2, -(-_MIN_SIDE // step)) * step


@lru_cache(maxsize=32)
def aspect_sizes(side: int, step: int) -> tuple[tuple[int, int], ...]:
    """Sizes of about ``side * side`` pixels, of different aspect ratios.

    Args:
        side (int): Sides in pixels of the square one.
        step (int): Sides of all others are multiples of it.

    Returns:
        tuple[tuple[int, int], ...]: Heights and widths, the widest first. Numbers of pixels differ
        from the square's by at most 10%.
    """
    area = side * side
    by_ratio = {1.0: (side, side)}
    least, most = shortest_side(step), int((1.0 + _AREA_TOLERANCE) * area)
    for height in range(least, most // least + 1, step):
        for width in range(least, most // height + 1, step):
            error = abs(height * width / area - 1.0)
            known = by_ratio.get(height / width)
            if error <= _AREA_TOLERANCE and height != width:
                better = known is None or error < abs(known[0] * known[1] / area - 1.0)
                by_ratio |= {height / width: (height, width)} if better else {}
    return tuple(size for _, size in sorted(by_ratio.items()))


@lru_cache(maxsize=32)
def aspect_bounds(side: int, step: int) -> NDArray[np.int64]:
    """Aspect ratios half-way, on a scale of logarithms, between neighbours of :func:`aspect_sizes`.

    They are integers: a runtime that computes in bfloat16 would round the lengths that are compared
    with them, and choose another size. Products with them fit 32 bits up to 131,071 pixels a side.

    Args:
        side (int): As there.
        step (int): As there.

    Returns:
        NDArray[np.int64]: Height and width of each, shape ``(n - 1, 2)`` for ``n`` sizes.
    """
    ratios = [height / width for height, width in aspect_sizes(side, step)]
    bounds = [math.sqrt(wider * taller) for wider, taller in pairwise(ratios)]
    least = [Fraction(min(bound, 1.0 / bound)).limit_denominator(_BOUND) for bound in bounds]
    sides = [
        sorted(part.as_integer_ratio(), reverse=r > 1)
        for part, r in zip(least, bounds, strict=True)
    ]
    return np.array(sides, np.int64).reshape(-1, 2)


@lru_cache(maxsize=4096)
def size_of_aspect(height: int, width: int, side: int, step: int) -> tuple[int, int]:
    """Size of about ``side * side`` pixels that is nearest to an image's aspect ratio.

    A size that it returns is its own: resizing twice is the same as once.

    Args:
        height (int): Of the image.
        width (int): Of the image.
        side (int): See :func:`aspect_sizes`, so for ``step``.
        step (int): Divides the sides.

    Returns:
        tuple[int, int]: Height and width.
    """
    heights, widths = aspect_bounds(side, step).T
    passed = height * widths > width * heights
    return aspect_sizes(side, step)[int(passed.sum())]


def frame_transform(steps: Sequence[Step], frame_size: Sequence[int]) -> FrameTransform:
    """Follow the transforms of a pre-processor.

    Args:
        steps (Sequence[Step]): In their order: ``("resize", height, width)``; ``("aspect", side,
            step)``, see :func:`size_of_aspect`; ``("shorter", length, longest)``, which keeps the
            aspect ratio, ``longest`` may be ``None``; ``("crop", height, width)``, of the centre;
            ``("pad", left, top, right, bottom)``.
        frame_size (Sequence[int]): Height and width of the frame.

    Returns:
        FrameTransform: From the pre-processor's output to the frame.

    Raises:
        ValueError: If a step is unknown.
    """
    rows, columns = (int(length) for length in frame_size)
    vertical, horizontal = AxisTransform(0.0, 1.0, rows), AxisTransform(0.0, 1.0, columns)
    for name, *numbers in steps:
        if name == "resize":
            vertical, horizontal = vertical.resized(numbers[0]), horizontal.resized(numbers[1])
        elif name == "aspect":
            height, width = size_of_aspect(vertical.length, horizontal.length, *numbers)
            vertical, horizontal = vertical.resized(height), horizontal.resized(width)
        elif name == "shorter":
            height, width = _aspect_kept(vertical.length, horizontal.length, *numbers)
            vertical, horizontal = vertical.resized(height), horizontal.resized(width)
        elif name == "crop":
            vertical, horizontal = vertical.cropped(numbers[0]), horizontal.cropped(numbers[1])
        elif name == "pad":
            left, top, right, bottom = numbers
            vertical, horizontal = vertical.padded(top, bottom), horizontal.padded(left, right)
        else:
            known = "resize, aspect, shorter, crop or pad"
            msg = f"a pre-processor's step must be {known}, got '{name}'."
            raise ValueError(msg)
    return FrameTransform(vertical, horizontal, (rows, columns))


def _aspect_kept(
    height: int, width: int, shorter: int, longest: int | None = None
) -> tuple[int, int]:
    """Size with a shorter side of the given length, as torchvision rounds it."""
    short, long = min(height, width), max(height, width)
    new_short, new_long = shorter, int(shorter * long / short)
    if longest is not None and new_long > longest:
        new_short, new_long = int(longest * new_short / new_long), longest
    return (new_short, new_long) if height <= width else (new_long, new_short)
