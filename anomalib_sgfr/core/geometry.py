"""Where patches lie: the one geometry that embeddings, tiles, maps, origins and crops share.

A scale of stride ``s`` divides an image of ``H x W`` pixels into a grid of ``ceil(H / s) x ceil(W / s)`` patches, which
are numbered by rows. A place is a row and a column of a grid; it means nothing without that grid, so the two travel
together.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

__all__ = [
    "ORIGIN",
    "Place",
    "Window",
    "cropped_to_image",
    "grid_of",
    "origins",
    "require_whole_tiles",
    "stitched",
    "to_patches",
    "unknown_origins",
]

ORIGIN = 5  # numbers that say where a patch was seen: image, row, column, and the rows and columns of its grid


class Window(NamedTuple):
    """A part of an image, in pixels; its corner may lie outside."""

    top: float
    left: float
    height: float
    width: float


class Place(NamedTuple):
    """A patch of an image.

    Attributes:
        row (int): From the top.
        column (int): From the left.
        grid (tuple[int, int]): Rows and columns that the image has.
    """

    row: int
    column: int
    grid: tuple[int, int]

    def on(self, grid: tuple[int, int]) -> "Place":
        """The patch of another grid over the same image that this one's corner lies in."""
        return Place(self.row * grid[0] // self.grid[0], self.column * grid[1] // self.grid[1], grid)

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
    """Patches ``(B * h * w, d)``, ``float32``, of embedding maps ``(B, d, h, w)``: image by image, row by row."""
    return embedding.flatten(2).transpose(1, 2).flatten(0, 1).float()


def origins(images: Tensor, grid: Sequence[int]) -> Tensor:
    """Where the patches were seen that :func:`to_patches` lists.

    Args:
        images (Tensor): Number of each image, shape ``(B,)``, ``int64``.
        grid (Sequence[int]): Rows and columns of the images' patches.

    Returns:
        Tensor: Number of the image, row, column, and the grid's rows and columns; shape ``(B * h * w, 5)``, ``int32``.
    """
    numbers, *places = (images.int(), *(torch.arange(n, dtype=torch.int32, device=images.device) for n in grid))
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
        ValueError: If a length is no multiple of the stride; the message names lengths that are.
    """
    for name, lengths in (("tile_size", tile), ("stride", step)):
        if any(length % stride for length in lengths):
            near = [max(stride, round(length / stride) * stride) for length in lengths]
            msg = (
                f"the tiler's {name} must be a multiple of {stride}, the stride of the coarsest layer, "
                f"got {tuple(lengths)}: {tuple(near)} would do."
            )
            raise ValueError(msg)


def stitched(tiles: Tensor, batch: int, across: Sequence[int], step: Sequence[int]) -> Tensor:
    """Put tiles together, row by row; where they overlap, their mean.

    Args:
        tiles (Tensor): Of one image after the other, shape ``(batch * rows * columns, d, h, w)``.
        batch (int): Number of images.
        across (Sequence[int]): Rows and columns of tiles in an image.
        step (Sequence[int]): From one tile to the next, in the unit of ``h`` and ``w``.

    Returns:
        Tensor: Shape ``(batch, d, h + (rows - 1) * step, w + (columns - 1) * step)``.
    """
    width, size = tiles.shape[1], tiles.shape[2:]
    if tuple(step) == tuple(size):
        rows = tiles.reshape(batch, *across, width, *size).permute(0, 3, 1, 4, 2, 5)
        return rows.reshape(batch, width, across[0] * size[0], across[1] * size[1])
    whole = (size[0] + (across[0] - 1) * step[0], size[1] + (across[1] - 1) * step[1])
    columns = tiles.reshape(batch, across[0] * across[1], -1).transpose(1, 2)
    total = functional.fold(columns, whole, size, stride=tuple(step))
    one = torch.ones_like(columns[:1, : size[0] * size[1]])
    return total / functional.fold(one, whole, size, stride=tuple(step))


def cropped_to_image(embedding: Tensor, size: Sequence[int], stride: int) -> Tensor:
    """Leave out patches of what was added at the bottom and the right to fill a last tile.

    Args:
        embedding (Tensor): Of the larger image, shape ``(B, d, h, w)``.
        size (Sequence[int]): Height and width of the image.
        stride (int): Of the scale.
    """
    rows, columns = grid_of(size, stride)
    return embedding[..., :rows, :columns]
