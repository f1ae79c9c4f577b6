"""Where patches lie: numbers of places, tiles and windows, on images that are not square."""

import numpy as np
import pytest
import torch

from anomalib_sgfr.core.patch_grid import (
    PatchIndex,
    cropped_to_image,
    grid_of,
    origins,
    patches_in_region,
    require_whole_tiles,
    stitched,
    tile_spans,
    to_patches,
)


def coordinates(batch: int, rows: int, columns: int) -> torch.Tensor:
    """Channels: image, row and column."""
    grid = torch.meshgrid(
        torch.arange(batch), torch.arange(rows), torch.arange(columns), indexing="ij"
    )
    return torch.stack(grid, 1).float()


def test_origins_say_where_the_patches_were() -> None:
    patches = to_patches(coordinates(3, 4, 7))
    found = origins(torch.tensor([0, 1, 2]), (4, 7))
    assert torch.equal(found[:, :3].float(), patches)
    assert found[:, 3:].unique(dim=0).tolist() == [[4, 7]]
    assert origins(torch.tensor([9, -1]), (1, 2)).tolist() == [
        [n, 0, c, 1, 2] for n in (9, -1) for c in (0, 1)
    ]
    assert origins(torch.empty(0, dtype=torch.int64), (4, 7)).shape == (0, 5)


def test_a_place_on_another_grid_is_where_its_corner_lies() -> None:
    assert PatchIndex(5, 30, (16, 32)).on((8, 16)) == PatchIndex(2, 15, (8, 16))
    assert PatchIndex(2, 15, (8, 16)).on((16, 32)) == PatchIndex(4, 30, (16, 32))
    for row in range(13):
        for column in range(20):
            there = PatchIndex(row, column, (13, 20)).on((7, 10))
            corner, window = (
                PatchIndex(row, column, (13, 20)).window((91, 140)),
                there.window((91, 140)),
            )
            assert window.top <= corner.top + 1e-9 < window.top + window.height
            assert window.left <= corner.left + 1e-9 < window.left + window.width


def test_a_window_is_around_the_middle_of_the_patch() -> None:
    assert PatchIndex(1, 3, (4, 8)).window((64, 256)) == (16.0, 96.0, 16.0, 32.0)
    window = PatchIndex(0, 7, (4, 8)).window((64, 256), across=3)
    assert window == (-16.0, 192.0, 48.0, 96.0)


@pytest.mark.parametrize(
    ("size", "stride", "grid"),
    [((64, 96), 8, (8, 12)), ((65, 7), 16, (5, 1)), ((1, 16), 16, (1, 1))],
)
def test_a_grid_covers_the_image(size: tuple[int, int], stride: int, grid: tuple[int, int]) -> None:
    assert grid_of(size, stride) == grid
    larger = coordinates(2, grid[0] + 3, grid[1] + 2)
    assert torch.equal(cropped_to_image(larger, size, stride), larger[:, :, : grid[0], : grid[1]])


@pytest.mark.parametrize(
    ("length", "tile", "step"), [(96, 96, 96), (96, 64, 64), (160, 64, 32), (304, 128, 48)]
)
@pytest.mark.parametrize("stride", [8, 16])
def test_tiles_keep_each_patch_once_and_far_from_their_edges(
    length: int, tile: int, step: int, stride: int
) -> None:
    found = tile_spans(length, tile, step, stride)
    kept = [slot.start + stride * patch for slot in found for patch in range(slot.first, slot.last)]
    assert kept == [*range(0, length, stride)]
    assert (found[0].start, found[-1].start + tile) == (0, length)
    for slot in found:
        assert all(slot.start % stride == 0 and 0 <= edge <= tile // stride for edge in slot[1:])
        for patch in range(slot.first, slot.last):
            begin, end = stride * patch, stride * (patch + 1)
            assert slot.start == 0 or begin + stride > (tile - step) // 2
            assert slot.start + tile == length or tile - end + stride > (tile - step) // 2


def test_what_tiles_keep_is_put_side_by_side() -> None:
    image = torch.randn(2, 3, 20, 38)
    rows, columns = tile_spans(160, 64, 48, 8), tile_spans(304, 128, 80, 8)
    tiles = [
        image[..., row.start // 8 : row.start // 8 + 8, column.start // 8 : column.start // 8 + 16]
        for row in rows
        for column in columns
    ]
    assert torch.equal(stitched(tiles, rows, columns), image)


@pytest.mark.parametrize(("size", "stride"), [((40, 24), 8), ((37, 70), 16), ((5, 5), 8)])
@pytest.mark.parametrize("whole", [True, False])
def test_a_patch_is_touched_if_one_of_its_pixels_is_inside(
    size: tuple[int, int], stride: int, whole: bool
) -> None:
    region = torch.rand(size) > 0.99
    region[-1, -1] = True
    grid = grid_of(size, stride) if whole else tuple(max(1, length // stride) for length in size)
    expected = np.zeros(grid, bool)
    for row, column in region.nonzero().tolist():
        expected[min(row // stride, grid[0] - 1), min(column // stride, grid[1] - 1)] = True
    np.testing.assert_array_equal(patches_in_region(region, grid, stride).numpy(), expected)


def test_tiles_that_cannot_be_right_are_refused_with_some_that_are() -> None:
    require_whole_tiles((64, 96), (32, 16), 16)
    with pytest.raises(
        ValueError,
        match=r"tile_size must be a multiple of 16, .* got \(100, 64\): \(96, 64\) would do",
    ):
        require_whole_tiles((100, 64), (64, 64), 16)
    with pytest.raises(
        ValueError, match=r"stride must be a multiple of 16, .* got \(64, 3\): \(64, 16\) would do"
    ):
        require_whole_tiles((64, 64), (64, 3), 16)
    with pytest.raises(
        ValueError, match=r"stride must not exceed its tile_size \(64, 64\), got \(80, 64\)"
    ):
        require_whole_tiles((64, 64), (80, 64), 16)
