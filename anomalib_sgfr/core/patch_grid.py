"""Where patches lie: the one geometry that embeddings, tiles, maps, origins and crops share.

A scale of stride ``s`` divides an image of ``H x W`` pixels into a grid of ``ceil(H / s) x ceil(W /
s)`` patches, which are numbered by rows. A place is a row and a column of a grid; it means nothing
without that grid, so the two travel together.
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
    "unknown_origins",
]

# numbers that say where a patch was seen: image, row, column, and the rows and columns of its grid
ORIGIN = 5


class Window(NamedTuple):
    """A part of an image, in pixels; its corner may lie outside."""

    top: float
    left: float
    height: float
    width: float


class PatchIndex(NamedTuple):
    """A patch of an image.

    Attributes:
        row (int): From the top.
        column (int): From the left.
        grid (tuple[int, int]): Rows and columns that the image has.
    """

    row: int
    column: int
    grid: tuple[int, int]

    def on(self, grid: tuple[int, int]) -> "PatchIndex":
        """The patch of another grid over the same image that this one's corner lies in."""
        return PatchIndex(
            self.row * grid[0] // self.grid[0], self.column * grid[1] // self.grid[1], grid
        )

    def window(self, size: Sequence[int], across: float = 1.0) -> Window:
        """The patch and its surroundings.

        Args:
            size (Sequence[int]): Height and width of the image.
            across (float): Patches to show, along each axis; the patch is in the middle.
        """
        height, width = (length / number for length, number in zip(size, self.grid, strict=True))
        top, left = (self.row + 0.5 - across / 2) * height, (self.column + 0.5 - across / 2) * width
        return Window(top, left, across * height, across * width)


def grid_of(size: Sequence[int], stride: int) -> tuple[int, int]:
    """Rows and columns of an image's patches.

    Args:
        size (Sequence[int]): Height and width of the image.
        stride (int): Pixels from one patch to the next.
    """
    rows, columns = (math.ceil(length / stride) for length in size)
    return rows, columns


def to_patches(embedding: Tensor) -> Tensor:
    """Patches ``(B * h * w, d)``, ``float32``, of embedding maps ``(B, d, h, w)``: image by image,
    row by row.
    """
    return embedding.flatten(2).transpose(1, 2).flatten(0, 1).float()


def origins(images: Tensor, grid: Sequence[int]) -> Tensor:
    """Where the patches were seen that :func:`to_patches` lists.

    Args:
        images (Tensor): Number of each image, shape ``(B,)``, ``int64``.
        grid (Sequence[int]): Rows and columns of the images' patches.

    Returns:
        Tensor: Number of the image, row, column, and the grid's rows and columns; shape ``(B * h *
            w, 5)``, ``int32``.
    """
    numbers, *places = (
        images.int(),
        *(torch.arange(n, dtype=torch.int32, device=images.device) for n in grid),
    )
    found = torch.cartesian_prod(numbers, *places)
    return torch.cat((found, found.new_tensor(list(grid)).expand(len(found), -1)), 1)


def unknown_origins(number: int, device: torch.device | None = None) -> Tensor:
    """Origins of patches of which it is not known where they were seen.

    Args:
        number (int): Of patches.
        device (torch.device | None): Where to.

    Returns:
        Tensor: Shape ``(number, 5)``, ``int32``, all -1.
    """
    return torch.full((number, ORIGIN), -1, dtype=torch.int32, device=device)


def require_whole_tiles(tile: Sequence[int], step: Sequence[int], stride: int) -> None:
    """Refuse tiles whose patches would not lie where those of the whole image lie.

    Args:
        tile (Sequence[int]): Height and width of a tile.
        step (Sequence[int]): From one tile to the next.
        stride (int): Of the coarsest scale.

    Raises:
        ValueError: If a length is no multiple of the stride; the message names lengths that are. If
            there are gaps.
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
    """A tile along one axis.

    Attributes:
        start (int): Its first pixel.
        first (int): The first of its patches that is kept.
        last (int): The one after the last that is kept.
    """

    start: int
    first: int
    last: int


def tile_spans(length: int, tile: int, step: int, stride: int) -> list[TileSpan]:
    """Tiles that cover a length, the last of which ends with it; where two overlap, each keeps the
    half on its side.

    So no patch is closer to the edge of its tile than half an overlap, but at the edge of the
    image.

    Args:
        length (int): Pixels to cover; like the next two, a multiple of ``stride``.
        tile (int): Length of a tile, at most ``length``.
        step (int): From one tile to the next.
        stride (int): Of the patches to keep.

    Returns:
        list[TileSpan]: In order; what they keep lies side by side, without a gap.
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
    """Put together what tiles keep.

    Args:
        tiles (Sequence[Tensor]): Row by row, each of shape ``(B, d, h, w)``.
        rows (Sequence[TileSpan]): Of the tiles, from the top.
        columns (Sequence[TileSpan]): From the left.

    Returns:
        Tensor: Shape ``(B, d, H, W)``.
    """
    parts = iter(tiles)
    return torch.cat(
        [
            torch.cat(
                [
                    next(parts)[..., row.first : row.last, column.first : column.last]
                    for column in columns
                ],
                -1,
            )
            for row in rows
        ],
        -2,
    )


def cropped_to_image(embedding: Tensor, size: Sequence[int], stride: int) -> Tensor:
    """Leave out patches of what was added at the bottom and the right to fill a last one of the
    coarsest scale.

    Args:
        embedding (Tensor): Of the larger image, shape ``(B, d, h, w)``.
        size (Sequence[int]): Height and width of the image.
        stride (int): Of the scale.
    """
    rows, columns = grid_of(size, stride)
    return embedding[..., :rows, :columns]


def patches_in_region(region: Tensor, grid: Sequence[int], stride: int) -> Tensor:
    """Patches that have at least one pixel in a region.

    Args:
        region (Tensor): One where a pixel lies inside, zero elsewhere; shape ``(H, W)``.
        grid (Sequence[int]): Rows and columns of the image's patches.
        stride (int): Pixels from one patch to the next.

    Returns:
        Tensor: Mask of shape ``grid``, ``bool``.
    """
    found = region.float()
    for axis, number in enumerate(grid):
        # pixels that a backbone leaves over at the end belong to its last patch
        patch_of = (torch.arange(region.shape[axis], device=region.device) // stride).clamp_max(
            number - 1
        )
        belongs = (patch_of == torch.arange(number, device=region.device)[:, None]).float()
        found = belongs @ found if axis == 0 else found @ belongs.T
    return found > 0
