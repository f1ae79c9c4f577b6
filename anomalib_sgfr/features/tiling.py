"""Tiles that images are embedded in: lengths that are checked, stored as plain data, and compared."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from anomalib.data.utils.tiler import Tiler

from anomalib_sgfr.core.geometry import require_whole_tiles

__all__ = ["Tiling"]


class Tiling(NamedTuple):
    """Height and width of a tile, and from one to the next, in pixels of the model's input.

    Attributes:
        tile (tuple[int, int]): Of a tile.
        step (tuple[int, int]): From one tile to the next.
    """

    tile: tuple[int, int]
    step: tuple[int, int]

    @classmethod
    def given(cls, tile: int | Sequence[int], step: int | Sequence[int] | None, stride: int) -> "Tiling":
        """What a user gave.

        Args:
            tile (int | Sequence[int]): One length, or two.
            step (int | Sequence[int] | None): The same; ``None`` for that of the tile.
            stride (int): Of the coarsest scale.

        Raises:
            ValueError: If tiles of these lengths cannot be right.
        """
        found = cls(_both("tile_size", tile), _both("tile_stride", tile if step is None else step))
        require_whole_tiles(*found, stride)
        return found

    @classmethod
    def of(cls, tiler: Tiler | None) -> "Tiling | None":
        """The lengths of a tiler."""
        if tiler is None:
            return None
        return cls((tiler.tile_size_h, tiler.tile_size_w), (tiler.stride_h, tiler.stride_w))

    @classmethod
    def stored(cls, plain: dict[str, list[int]] | None) -> "Tiling | None":
        """What :meth:`plain` stored."""
        return None if plain is None else cls(_both("tile", plain["tile"]), _both("step", plain["step"]))

    def plain(self) -> dict[str, list[int]]:
        """Plain data for a checkpoint."""
        return {"tile": list(self.tile), "step": list(self.step)}

    def tiler(self) -> Tiler:
        """The same as anomalib's object."""
        return Tiler(self.tile, self.step)

    def __str__(self) -> str:
        """For messages."""
        (tile_height, tile_width), (down, right) = self
        return f"tiles of {tile_height} x {tile_width} every {down} x {right} pixels"


def _both(name: str, lengths: Any) -> tuple[int, int]:  # noqa: ANN401
    both = (lengths, lengths) if isinstance(lengths, int) else tuple(lengths)
    if len(both) != 2 or not all(isinstance(length, int) and length > 0 for length in both):  # noqa: PLR2004
        msg = f"{name} must be one or two whole numbers of pixels, at least 1, got {lengths!r}."
        raise ValueError(msg)
    return both[0], both[1]
