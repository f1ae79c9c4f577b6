"""Grids of patches: the geometry that embeddings, tiles, maps, origins and crops share.

A scale of stride ``s`` divides an image of ``H x W`` pixels into a grid of ``ceil(H / s) x ceil(W /
s)`` patches, numbered by rows. The row and column of a patch are kept together with its grid.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "ORIGIN",
    "PatchIndex",
    "TileSpan",
    "Window",
    "cropped_to_image",
    "grid_of",
    "origins",
    "patches_in_region",
    "require_whole_tiles",
    "stitched",
    "tile_spans",
    "to_patches",
]

ORIGIN = 5  # numbers of an origin: image, row, column, rows and columns of the grid


class Window(NamedTuple):
    """Rectangle of an image, in pixels; its corner may lie outside the image."""

    top: float
    left: float
    height: float
    width: float


class PatchIndex(NamedTuple):
    """Position of a patch in the grid of an image.

    Attributes:
        row (int): Row, from the top.
        column (int): Column, from the left.
        grid (tuple[int, int]): Rows and columns of the grid.
    """

    row: int
    column: int
    grid: tuple[int, int]

    def on(self, grid: tuple[int, int]) -> "PatchIndex":
        """Patch of another grid over the same image that holds this patch's upper left corner."""
        return PatchIndex(
            self.row * grid[0] // self.grid[0], self.column * grid[1] // self.grid[1], grid
        )

    def window(self, size: Sequence[int], across: float = 1.0) -> Window:
        """Rectangle around the patch.

        Args:
            size (Sequence[int]): Height and width of the image.
            across (float): Side of the rectangle in patches.
        """
        height, width = (length / number for length, number in zip(size, self.grid, strict=True))
        top, left = (self.row + 0.5 - across / 2) * height, (self.column + 0.5 - across / 2) * width
        return Window(top, left, across * height, across * width)


def grid_of(size: Sequence[int], stride: int) -> tuple[int, int]:
    """Rows and columns of an image's patch grid.

    Args:
        size (Sequence[int]): Height and width of the image.
        stride (int): Pixels from one patch to the next.
    """
    rows, columns = (math.ceil(length / stride) for length in size)
    return rows, columns


def to_patches(embedding: Tensor) -> Tensor:
    """Embeddings of patches, image by image and row by row.

    Args:
        embedding (Tensor): Embedding maps, shape ``(B, d, h, w)``.

    Returns:
        Tensor: Shape ``(B * h * w, d)``, ``float32``.
    """
    return embedding.flatten(2).transpose(1, 2).flatten(0, 1).float()


def origins(images: Tensor, grid: Sequence[int]) -> Tensor:
    """Origins of the patches that :func:`to_patches` lists.

    Args:
        images (Tensor): Number of each image, shape ``(B,)``, ``int64``.
        grid (Sequence[int]): Rows and columns of the patch grid.

    Returns:
        Tensor: Image, row, column, rows and columns of the grid; shape ``(B * h * w, 5)``,
        ``int32``.
    """
    numbers, *places = (
        images.int(),
        *(torch.arange(n, dtype=torch.int32, device=images.device) for n in grid),
    )
    found = torch.cartesian_prod(numbers, *places)
    return torch.cat((found, found.new_tensor(list(grid)).expand(len(found), -1)), 1)


def require_whole_tiles(tile: Sequence[int], step: Sequence[int], stride: int) -> None:
    """Refuse tiles whose patch grid would not match that of the whole image.

    Args:
        tile (Sequence[int]): Height and width of a tile.
        step (Sequence[int]): Pixels from one tile to the next, along each axis.
        stride (int): Stride of the coarsest scale.

    Raises:
        ValueError: If a length is no multiple of the stride, or there are gaps between tiles.
    """
    for name, lengths in (("tile_size", tile), ("stride", step)):
        if any(length < 1 or length % stride for length in lengths):
            near = [max(stride, round(length / stride) * stride) for length in lengths]
            msg = (
                f"the tiler's {name} must be a multiple of {stride}, the stride of the coarsest"
                f" layer, got {tuple(lengths)}: {tuple(near)} would do."
            )
            raise ValueError(msg)
    if any(far > length for length, far in zip(tile, step, strict=True)):
        msg = (
            f"the tiler's stride must not exceed its tile_size {tuple(tile)}, got {tuple(step)}:"
            " there would be gaps."
        )
        raise ValueError(msg)


class TileSpan(NamedTuple):
    """Extent of a tile along one axis.

    Attributes:
        start (int): First pixel.
        first (int): First patch that is kept, counted in the tile.
        last (int): Patch after the last that is kept.
    """

    start: int
    first: int
    last: int


def tile_spans(length: int, tile: int, step: int, stride: int) -> list[TileSpan]:
    """Tiles along one axis; where two overlap, each keeps the patches of the half on its side.

    Args:
        length (int): Length of the image in pixels; like the next two, a multiple of ``stride``.
        tile (int): Length of a tile, at most ``length``.
        step (int): Pixels from one tile to the next.
        stride (int): Stride of the patches.

    Returns:
        list[TileSpan]: Tiles in order, the last at the end of the image. The patches that they keep
        cover the image once.
    """
    starts = [*range(0, length - tile, step), length - tile]
    edges = [
        0,
        *((before + tile + after) // (2 * stride) for before, after in pairwise(starts)),
        length // stride,
    ]
    return [
        TileSpan(start, first - start // stride, last - start // stride)
        for start, (first, last) in zip(starts, pairwise(edges), strict=True)
    ]


def stitched(
    tiles: Sequence[Tensor], rows: Sequence[TileSpan], columns: Sequence[TileSpan]
) -> Tensor:
    """Join the patches that tiles keep.

    Args:
        tiles (Sequence[Tensor]): Embedding maps of the tiles, row by row, shape ``(B, d, h, w)``.
        rows (Sequence[TileSpan]): Extents of the rows of tiles.
        columns (Sequence[TileSpan]): Extents of the columns of tiles.

    Returns:
        Tensor: Shape ``(B, d, H, W)``.
    """
    parts = iter(tiles)

    def row_of_tiles(row: TileSpan) -> Tensor:
        kept = [next(parts)[..., row.first : row.last, each.first : each.last] for each in columns]
        return torch.cat(kept, -1)

    return torch.cat([row_of_tiles(row) for row in rows], -2)


def cropped_to_image(embedding: Tensor, size: Sequence[int], stride: int) -> Tensor:
    """Remove the patches of padding at the bottom and the right.

    Args:
        embedding (Tensor): Embedding map of the padded image, shape ``(B, d, h, w)``.
        size (Sequence[int]): Height and width of the image without padding.
        stride (int): Stride of the scale.
    """
    rows, columns = grid_of(size, stride)
    return embedding[..., :rows, :columns]


def patches_in_region(region: Tensor, grid: Sequence[int], stride: int) -> Tensor:
    """Mask of the patches that have at least one pixel in a region.

    Args:
        region (Tensor): One inside, zero outside; shape ``(H, W)``.
        grid (Sequence[int]): Rows and columns of the patch grid.
        stride (int): Stride of the scale.

    Returns:
        Tensor: Mask of shape ``grid``, ``bool``.
    """
    found = region.float()
    for axis, number in enumerate(grid):
        # pixels that a backbone leaves over at the end belong to the last patch
        pixels = torch.arange(region.shape[axis], device=region.device)
        patch_of = (pixels // stride).clamp_max(number - 1)
        belongs = (patch_of == torch.arange(number, device=region.device)[:, None]).float()
        found = belongs @ found if axis == 0 else found @ belongs.T
    return found > 0
