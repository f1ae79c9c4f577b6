"""A map lies over its frame where the pre-processor took its pixels from."""

import numpy as np
import pytest
import torch
from torch.nn import functional
from torchvision.transforms.v2 import CenterCrop, Compose, Pad, Resize

from anomalib_sgfr.images.frame_geometry import frame_transform, resample_to_frame

STEPS = {
    "resize": ([("resize", 64, 96)], Resize((64, 96), antialias=True)),
    "shorter": ([("shorter", 80, None)], Resize(80, antialias=True)),
    "longest": ([("shorter", 80, 100)], Resize(80, max_size=100, antialias=True)),
    "crop": (
        [("shorter", 80, None), ("crop", 64, 56)],
        Compose([Resize(80, antialias=True), CenterCrop((64, 56))]),
    ),
    "pad": (
        [("pad", 10, 20, 30, 5), ("resize", 64, 64)],
        Compose([Pad([10, 20, 30, 5]), Resize((64, 64))]),
    ),
    "crop outside": (
        [("crop", 300, 400), ("resize", 50, 60)],
        Compose([CenterCrop((300, 400)), Resize((50, 60))]),
    ),
}


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("size", [(120, 200), (201, 119), (77, 333)])
def test_every_pixel_comes_from_where_it_says(name: str, size: tuple[int, int]) -> None:
    """The frame's own coordinates, sent through the pre-processor, come out as the placement has
    them.
    """
    steps, transform = STEPS[name]
    rows, columns = np.mgrid[: size[0], : size[1]] + 0.5
    seen = transform(torch.tensor(np.stack((rows, columns)), dtype=torch.float32)).numpy()
    placement = frame_transform(steps, size)
    assert placement.size == seen.shape[1:]
    for axis, found in zip(placement, (seen[0], seen[1].T), strict=True):
        expected = axis.offset + (np.arange(axis.length) + 0.5) * axis.step
        middle = found[:, found.shape[1] // 2]
        inside = (expected > 2 * max(1, axis.step)) & (
            expected < (size[axis is placement[1]]) - 2 * max(1, axis.step)
        )
        np.testing.assert_allclose(
            middle[inside], expected[inside], atol=0.1
        )  # of sums of few weights
        assert inside.sum() >= 8


@pytest.mark.parametrize("size", [(64, 64), (120, 200), (31, 17)])
def test_over_a_whole_frame_it_is_bilinear_interpolation(size: tuple[int, int]) -> None:
    values = np.random.default_rng(0).random((64, 48)).astype(np.float32)
    over = resample_to_frame(values, frame_transform([("resize", 64, 48)], size), size)
    expected = functional.interpolate(
        torch.tensor(values)[None, None], size, mode="bilinear", align_corners=False
    )
    np.testing.assert_allclose(over, expected[0, 0].numpy(), atol=1e-5)


def test_what_the_map_does_not_reach_is_zero() -> None:
    placement = frame_transform([("shorter", 80, None), ("crop", 40, 40)], (160, 240))
    assert placement.inspected_area((160, 240)) == (40, 80, 120, 160)
    over = resample_to_frame(np.ones((40, 40)), placement, (160, 240))
    assert over.sum() == 80 * 80
    assert over[40:120, 80:160].min() == 1.0
    finer = resample_to_frame(
        np.ones((20, 10)), placement, (160, 240)
    )  # a coarser map covers the same part
    assert np.array_equal(finer, over)


def test_an_unknown_step_is_refused() -> None:
    with pytest.raises(ValueError, match="must be resize, shorter, crop or pad, got 'turn'"):
        frame_transform([("turn", 90)], (10, 10))


def test_a_pixel_of_a_map_lies_over_one_of_the_frame() -> None:
    whole = frame_transform([("resize", 64, 96)], (128, 192))
    assert whole.pixel((0, 0), (64, 96), (128, 192)) == (1, 1)
    assert whole.pixel((63, 95), (64, 96), (128, 192)) == (127, 191)
    assert whole.pixel((10, 20), (64, 96), (128, 192)) == (21, 41)
    assert whole.pixel((3, 3), (8, 12), (128, 192)) == (56, 56)  # a coarser map over the same
    middle = frame_transform([("crop", 64, 56)], (120, 200))
    assert middle.pixel((0, 0), (64, 56), (120, 200)) == (28, 72)
    outside = frame_transform(
        [("crop", 300, 400)], (100, 100)
    )  # beyond the frame: its nearest pixel
    assert outside.pixel((0, 399), (300, 400), (100, 100)) == (0, 99)
