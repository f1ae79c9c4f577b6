"""Where patches lie: numbers of places, tiles and windows, on images that are not square."""

import numpy as np
import pytest
import torch

from anomalib_sgfr.core.geometry import (
    Place,
    cropped_to_image,
    grid_of,
    origins,
    require_whole_tiles,
    stitched,
    to_patches,
)


def coordinates(batch: int, rows: int, columns: int) -> torch.Tensor:
    """Channels: image, row and column."""
    grid = torch.meshgrid(torch.arange(batch), torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.stack(grid, 1).float()


def test_origins_say_where_the_patches_were() -> None:
    patches = to_patches(coordinates(3, 4, 7))
    found = origins(torch.tensor([0, 1, 2]), (4, 7))
    assert torch.equal(found[:, :3].float(), patches)
    assert found[:, 3:].unique(dim=0).tolist() == [[4, 7]]
    assert origins(torch.tensor([9, -1]), (1, 2)).tolist() == [[n, 0, c, 1, 2] for n in (9, -1) for c in (0, 1)]
    assert origins(torch.empty(0, dtype=torch.int64), (4, 7)).shape == (0, 5)


def test_a_place_on_another_grid_is_where_its_corner_lies() -> None:
    assert Place(5, 30, (16, 32)).on((8, 16)) == Place(2, 15, (8, 16))
    assert Place(2, 15, (8, 16)).on((16, 32)) == Place(4, 30, (16, 32))
    for row in range(13):
        for column in range(20):
            there = Place(row, column, (13, 20)).on((7, 10))
            corner, window = Place(row, column, (13, 20)).window((91, 140)), there.window((91, 140))
            assert window.top <= corner.top + 1e-9 < window.top + window.height
            assert window.left <= corner.left + 1e-9 < window.left + window.width


def test_a_window_is_around_the_middle_of_the_patch() -> None:
    assert Place(1, 3, (4, 8)).window((64, 256)) == (16.0, 96.0, 16.0, 32.0)
    window = Place(0, 7, (4, 8)).window((64, 256), across=3)
    assert window == (-16.0, 192.0, 48.0, 96.0)


@pytest.mark.parametrize(
    ("size", "stride", "grid"), [((64, 96), 8, (8, 12)), ((65, 7), 16, (5, 1)), ((1, 16), 16, (1, 1))]
)
def test_a_grid_covers_the_image(size: tuple[int, int], stride: int, grid: tuple[int, int]) -> None:
    assert grid_of(size, stride) == grid
    larger = coordinates(2, grid[0] + 3, grid[1] + 2)
    assert torch.equal(cropped_to_image(larger, size, stride), larger[:, :, : grid[0], : grid[1]])


@pytest.mark.parametrize(
    ("across", "size", "step"), [((3, 2), (4, 5), (4, 5)), ((3, 4), (4, 6), (2, 3)), ((2, 1), (5, 3), (3, 3))]
)
def test_stitched_tiles_are_the_mean_of_what_lies_there(
    across: tuple[int, int], size: tuple[int, int], step: tuple[int, int]
) -> None:
    tiles = torch.randn(2 * across[0] * across[1], 3, *size)
    height, width = ((n - 1) * by + length for n, by, length in zip(across, step, size, strict=True))
    total, seen = np.zeros((2, 3, height, width)), np.zeros((height, width))
    for number, tile in enumerate(tiles.numpy()):
        image, place = divmod(number, across[0] * across[1])
        top, left = (at * by for at, by in zip(divmod(place, across[1]), step, strict=True))
        total[image, :, top : top + size[0], left : left + size[1]] += tile
        seen[top : top + size[0], left : left + size[1]] += image == 0
    found = stitched(tiles, 2, across, step)
    np.testing.assert_allclose(found.numpy(), total / seen, rtol=1e-5, atol=1e-6)
    if step == size:
        np.testing.assert_array_equal(found.numpy(), total.astype(np.float32))


def test_tiles_that_cannot_be_right_are_refused_with_some_that_are() -> None:
    require_whole_tiles((64, 96), (32, 16), 16)
    with pytest.raises(
        ValueError, match=r"tile_size must be a multiple of 16, .* got \(100, 64\): \(96, 64\) would do"
    ):
        require_whole_tiles((100, 64), (64, 64), 16)
    with pytest.raises(ValueError, match=r"stride must be a multiple of 16, .* got \(64, 3\): \(64, 16\) would do"):
        require_whole_tiles((64, 64), (64, 3), 16)
