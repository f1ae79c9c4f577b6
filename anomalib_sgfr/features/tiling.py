"""Tiles that images are embedded in: lengths that are checked, stored and compared, and the
embedding itself.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from anomalib.data.utils.tiler import Tiler
from torch import Tensor
from torch.nn import functional

from anomalib_sgfr.core.patch_grid import (
    cropped_to_image,
    grid_of,
    require_whole_tiles,
    stitched,
    tile_spans,
)
from anomalib_sgfr.features.embedding import PatchEmbedder

__all__ = ["Tiling", "embed_tiles"]

_TILED_PIXELS = 4 * 256 * 256  # of tiles that are embedded at once


class Tiling(NamedTuple):
    """Height and width of a tile, and from one to the next, in pixels of the model's input.

    Attributes:
        tile (tuple[int, int]): Of a tile.
        step (tuple[int, int]): From one tile to the next.
    """

    tile: tuple[int, int]
    step: tuple[int, int]

    @classmethod
    def parse(
        cls, tile: int | Sequence[int], step: int | Sequence[int] | None, stride: int
    ) -> "Tiling":
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
    def from_tiler(cls, tiler: Tiler | None) -> "Tiling | None":
        """The lengths of a tiler."""
        if tiler is None:
            return None
        return cls((tiler.tile_size_h, tiler.tile_size_w), (tiler.stride_h, tiler.stride_w))

    @classmethod
    def from_state(cls, state: dict[str, list[int]] | None) -> "Tiling | None":
        """What :meth:`state` stored."""
        return (
            None
            if state is None
            else cls(_both("tile", state["tile"]), _both("step", state["step"]))
        )

    def state(self) -> dict[str, list[int]]:
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


def embed_tiles(embedder: PatchEmbedder, images: Tensor, tiler: Tiler) -> list[Tensor]:
    """Embed a few tiles at a time, and put each scale's embeddings where those of the whole image
    would lie.

    Of the tiler only the lengths are used: its own tiles end in a band of zeros where they do not
    fill the image, and its ``untile`` crops to pixels, which crops nothing of an embedding.

    Args:
        embedder (PatchEmbedder): Embeds the tiles.
        images (Tensor): Normalised images, shape ``(B, 3, H, W)``.
        tiler (Tiler): anomalib's.

    Returns:
        list[Tensor]: Patch embeddings of each scale, the finest first, shape ``(B, d, h, w)``.

    Raises:
        ValueError: If tiles of these lengths cannot be right, or the size of the images is unknown
            while exporting.
    """
    strides = embedder.scale_strides
    given, step = (tiler.tile_size_h, tiler.tile_size_w), (tiler.stride_h, tiler.stride_w)
    require_whole_tiles(given, step, strides[-1])
    if tiler.remove_border_count:
        msg = (
            "the tiler's remove_border_count must be 0: the border of the image would have no"
            f" embedding, got {tiler.remove_border_count}."
        )
        raise ValueError(msg)
    size = images.shape[-2:]
    if not all(isinstance(length, int) for length in size):
        msg = (
            "a tiled model is exported for one size of image: pass --input_size, or let its"
            " pre-processor resize."
        )
        raise ValueError(msg)
    covered = [number * strides[-1] for number in grid_of(size, strides[-1])]
    tile = [min(pair) for pair in zip(given, covered, strict=True)]
    if tile == covered:  # one tile
        return embedder(images)
    # up to whole patches of the coarsest scale, so that all tiles are alike
    images = functional.pad(
        images, (0, covered[1] - size[1], 0, covered[0] - size[0]), mode="replicate"
    )
    at = [
        [tile_spans(*lengths, stride) for lengths in zip(covered, tile, step, strict=True)]
        for stride in strides
    ]
    corners = [(row.start, column.start) for row in at[0][0] for column in at[0][1]]
    tiles = [images[..., top : top + tile[0], left : left + tile[1]] for top, left in corners]
    embedded = [_embed_alike(embedder, some) for some in _groups(tiles)]
    parts = [[part for group in embedded for part in group[scale]] for scale in range(len(strides))]
    return [
        cropped_to_image(stitched(part, rows, columns), size, stride)
        for part, (rows, columns), stride in zip(parts, at, strides, strict=True)
    ]


def _embed_alike(embedder: PatchEmbedder, tiles: Sequence[Tensor]) -> list[Sequence[Tensor]]:
    """Embeddings of some tiles ``(B, 3, H, W)``: of each scale, of each tile."""
    found = embedder(torch.stack(list(tiles)).flatten(0, 1))
    return [part.unflatten(0, (len(tiles), -1)).unbind(0) for part in found]


def _groups(tiles: Sequence[Tensor]) -> Iterator[Sequence[Tensor]]:
    """As many tiles at a time as bounded memory allows; all in an exported graph, which holds the
    backbone once.
    """
    number = len(tiles)
    if not torch.compiler.is_exporting():
        batch, _, height, width = tiles[0].shape
        number = max(1, _TILED_PIXELS // (batch * height * width))
    for first in range(0, len(tiles), number):
        yield tiles[first : first + number]
