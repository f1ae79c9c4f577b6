"""How a model's map lies over the frame that it was made of: needs NumPy alone.

A pre-processor resizes, crops and pads; each is a scale and a shift along each axis, and so are all
of them together.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["AxisTransform", "FrameTransform", "frame_transform", "resample_to_frame"]

Step = Sequence[Any]  # what is done, and its numbers: plain data, that an exported file can keep


class AxisTransform(NamedTuple):
    """Along one axis: pixel ``i`` of the map is centred at ``offset + (i + 0.5) * step`` pixels of
    the frame.

    Attributes:
        offset (float): Where the map begins; may lie outside of the frame.
        step (float): Pixels of the frame to a pixel of the map.
        length (int): Pixels of the map.
    """

    offset: float
    step: float
    length: int

    def resized(self, length: int) -> "AxisTransform":
        """As many pixels as given, over the same part of the frame."""
        return AxisTransform(self.offset, self.step * self.length / length, length)

    def cropped(self, length: int) -> "AxisTransform":
        """The middle, rounded as torchvision does; more pixels than there are are added on both
        sides.
        """
        before = (
            round((self.length - length) / 2.0)
            if length <= self.length
            else -((length - self.length) // 2)
        )
        return AxisTransform(self.offset + before * self.step, self.step, length)

    def padded(self, before: int, after: int) -> "AxisTransform":
        """With pixels added on both sides."""
        return AxisTransform(
            self.offset - before * self.step, self.step, self.length + before + after
        )


class FrameTransform(NamedTuple):
    """Both axes, the vertical one first."""

    vertical: AxisTransform
    horizontal: AxisTransform

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the map."""
        return self.vertical.length, self.horizontal.length

    def inspected_area(self, size: Sequence[int]) -> tuple[int, int, int, int]:
        """Part of a frame that the map covers: top, left, bottom, right, in whole pixels.

        Args:
            size (Sequence[int]): Height and width of the frame.
        """
        (top, bottom), (left, right) = (
            (
                max(0, math.ceil(axis.offset - 0.5)),
                min(length, math.ceil(axis.offset + axis.step * axis.length - 0.5)),
            )
            for axis, length in zip(self, size, strict=True)
        )
        return top, left, bottom, right

    def pixel(
        self, place: Sequence[int], shape: Sequence[int], size: Sequence[int]
    ) -> tuple[int, int]:
        """Pixel of the frame under the centre of one of a map's.

        Args:
            place (Sequence[int]): Row and column in the map.
            shape (Sequence[int]): Height and width of the map.
            size (Sequence[int]): Height and width of the frame.
        """
        axes = [axis.resized(length) for axis, length in zip(self, shape, strict=True)]
        row, column = (
            min(max(math.floor(axis.offset + (at + 0.5) * axis.step), 0), length - 1)
            for axis, at, length in zip(axes, map(int, place), size, strict=True)
        )
        return row, column


def frame_transform(steps: Sequence[Step], size: Sequence[int]) -> FrameTransform:
    """Follow a frame through what a pre-processor does to it.

    Args:
        steps (Sequence[Step]): One after the other: ``("resize", height, width)``; ``("shorter",
            length, longest)``, which keeps the aspect, ``longest`` may be ``None``; ``("crop",
            height, width)``, of the middle; ``("pad", left, top, right, bottom)``.
        size (Sequence[int]): Height and width of the frame.

    Returns:
        FrameTransform: How what comes out lies over the frame.

    Raises:
        ValueError: If a step is unknown.
    """
    vertical, horizontal = (AxisTransform(0.0, 1.0, int(length)) for length in size)
    for name, *numbers in steps:
        if name == "resize":
            vertical, horizontal = vertical.resized(numbers[0]), horizontal.resized(numbers[1])
        elif name == "shorter":
            height, width = _kept_aspect(vertical.length, horizontal.length, *numbers)
            vertical, horizontal = vertical.resized(height), horizontal.resized(width)
        elif name == "crop":
            vertical, horizontal = vertical.cropped(numbers[0]), horizontal.cropped(numbers[1])
        elif name == "pad":
            left, top, right, bottom = numbers
            vertical, horizontal = vertical.padded(top, bottom), horizontal.padded(left, right)
        else:
            msg = f"a pre-processor's step must be resize, shorter, crop or pad, got '{name}'."
            raise ValueError(msg)
    return FrameTransform(vertical, horizontal)


def _kept_aspect(
    height: int, width: int, shorter: int, longest: int | None = None
) -> tuple[int, int]:
    """Size with the shorter side of a given length, as torchvision rounds it."""
    short, long = min(height, width), max(height, width)
    new_short, new_long = shorter, int(shorter * long / short)
    if longest is not None and new_long > longest:
        new_short, new_long = int(longest * new_short / new_long), longest
    return (new_short, new_long) if height <= width else (new_long, new_short)


def resample_to_frame(
    values: NDArray[Any], placement: FrameTransform, size: Sequence[int]
) -> NDArray[np.float32]:
    """Lay a map over its frame, pixel for pixel: bilinear interpolation.

    Args:
        values (NDArray): The map, shape ``(h, w)``; of another size than the placement has, it
            covers the same part.
        placement (FrameTransform): How it lies.
        size (Sequence[int]): Height and width ``(H, W)`` of the frame.

    Returns:
        NDArray[np.float32]: Shape ``(H, W)``; zero where the map does not reach.
    """
    top, left, bottom, right = placement.inspected_area(size)
    vertical, horizontal = (
        axis.resized(n) for axis, n in zip(placement, values.shape, strict=True)
    )
    rows = _between(np.asarray(values, np.float32), vertical, top, bottom)
    part = _between(np.ascontiguousarray(rows.T), horizontal, left, right).T
    if part.shape == tuple(size):
        return np.ascontiguousarray(part)
    over = np.zeros(tuple(size), np.float32)
    over[top:bottom, left:right] = part
    return over


def _between(
    values: NDArray[np.float32], axis: AxisTransform, start: int, stop: int
) -> NDArray[np.float32]:
    """Rows at the centres of some of the frame's pixels."""
    place = (np.arange(start, stop) + 0.5 - axis.offset) / axis.step - 0.5
    place = place.clip(0.0, axis.length - 1.0)
    before = place.astype(np.int64)
    after = np.minimum(before + 1, axis.length - 1)
    share = (place - before).astype(np.float32)[:, None]
    found: NDArray[np.float32] = values[before] * (1.0 - share) + values[after] * share
    return found
