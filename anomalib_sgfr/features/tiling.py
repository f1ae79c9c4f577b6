"""Tiling: tile lengths that are validated and stored, and embedding of images tile by tile."""

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

_TILED_PIXELS = 4 * 256 * 256  # of tiles that are embedded together


class Tiling(NamedTuple):
    """Tile lengths in pixels of the model's input, height first.

    Attributes:
        tile (tuple[int, int]): Height and width of a tile.
        step (tuple[int, int]): Distance from one tile to the next.
    """

    tile: tuple[int, int]
    step: tuple[int, int]

    @classmethod
    def parse(
        cls, tile: int | Sequence[int], step: int | Sequence[int] | None, stride: int
    ) -> "Tiling":
        """Tiling from a user's arguments.

        Args:
            tile (int | Sequence[int]): One length, or two.
            step (int | Sequence[int] | None): The same; ``None`` for that of the tile.
            stride (int): Of the coarsest scale.

        Returns:
            Tiling: The lengths.

        Raises:
            ValueError: If a length is not a positive integer or does not fit the stride.
        """
        tiling = cls(_pair("tile_size", tile), _pair("tile_stride", tile if step is None else step))
        require_whole_tiles(*tiling, stride)
        return tiling

    @classmethod
    def from_tiler(cls, tiler: Tiler | None) -> "Tiling | None":
        """Tiling of anomalib's tiler, ``None`` for none."""
        if tiler is None:
            return None
        return cls((tiler.tile_size_h, tiler.tile_size_w), (tiler.stride_h, tiler.stride_w))

    @classmethod
    def from_state(cls, state: dict[str, list[int]] | None) -> "Tiling | None":
        """Tiling from what :meth:`state` returned, ``None`` for none."""
        if state is None:
            return None
        return cls(_pair("tile", state["tile"]), _pair("step", state["step"]))

    def state(self) -> dict[str, list[int]]:
        """Plain data for a checkpoint."""
        return {"tile": list(self.tile), "step": list(self.step)}

    def tiler(self) -> Tiler:
        """Anomalib's tiler of these lengths."""
        return Tiler(self.tile, self.step)

    def __str__(self) -> str:
        """Text for messages."""
        (tile_height, tile_width), (down, right) = self
        return f"tiles of {tile_height} x {tile_width} every {down} x {right} pixels"


def _pair(name: str, lengths: Any) -> tuple[int, int]:  # noqa: ANN401
    pair = (lengths, lengths) if isinstance(lengths, int) else tuple(lengths)
    if len(pair) != 2 or not all(isinstance(length, int) and length > 0 for length in pair):  # noqa: PLR2004
        msg = f"{name} must be one or two whole numbers of pixels, at least 1, got {lengths!r}."
        raise ValueError(msg)
    return pair[0], pair[1]


def embed_tiles(embedder: PatchEmbedder, images: Tensor, tiler: Tiler) -> list[Tensor]:
    """Embed images tile by tile, and stitch the embeddings of each scale.

    Only the lengths of the tiler are used: anomalib's tiles end in a band of zeros if they do not
    fill the image, and its ``untile`` crops to pixels, not to patches.

    Args:
        embedder (PatchEmbedder): Embeds the tiles.
        images (Tensor): Normalised images, shape ``(B, 3, H, W)``.
        tiler (Tiler): anomalib's.

    Returns:
        list[Tensor]: Patch embeddings of each scale, the finest first, shape ``(B, d, h, w)``.

    Raises:
        ValueError: If the tile lengths do not fit the strides, or the size of the images is unknown
            while exporting.
    """
    strides = embedder.scale_strides
    tile_size, step = (tiler.tile_size_h, tiler.tile_size_w), (tiler.stride_h, tiler.stride_w)
    require_whole_tiles(tile_size, step, strides[-1])
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
    # whole patches of the coarsest scale, so that all tiles have one size
    padded = [number * strides[-1] for number in grid_of(size, strides[-1])]
    tile = [min(pair) for pair in zip(tile_size, padded, strict=True)]
    if tile == padded:  # a single tile
        return embedder(images)
    images = functional.pad(
        images, (0, padded[1] - size[1], 0, padded[0] - size[0]), mode="replicate"
    )
    spans = [
        [tile_spans(*lengths, stride) for lengths in zip(padded, tile, step, strict=True)]
        for stride in strides
    ]
    rows, columns = spans[0]
    corners = [(row.start, column.start) for row in rows for column in columns]
    tiles = [images[..., top : top + tile[0], left : left + tile[1]] for top, left in corners]
    groups = [_embed_group(embedder, group) for group in _groups(tiles)]
    parts = [[part for group in groups for part in group[scale]] for scale in range(len(strides))]
    return [
        cropped_to_image(stitched(part, rows, columns), size, stride)
        for part, (rows, columns), stride in zip(parts, spans, strides, strict=True)
    ]


def _embed_group(embedder: PatchEmbedder, tiles: Sequence[Tensor]) -> list[Sequence[Tensor]]:
    """Embeddings of each scale, of each tile ``(B, 3, H, W)``."""
    embeddings = embedder(torch.stack(list(tiles)).flatten(0, 1))
    return [part.unflatten(0, (len(tiles), -1)).unbind(0) for part in embeddings]


def _groups(tiles: Sequence[Tensor]) -> Iterator[Sequence[Tensor]]:
    """Tiles that are embedded together: a few, to bound the memory; all of them in an export."""
    number = len(tiles)
    if not torch.compiler.is_exporting():
        batch, _, height, width = tiles[0].shape
        number = max(1, _TILED_PIXELS // (batch * height * width))
    for first in range(0, len(tiles), number):
        yield tiles[first : first + number]
