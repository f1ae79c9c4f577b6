"""A map is resampled to where the pre-processor took its pixels from."""

import numpy as np
import pytest
import torch
from torch.nn import functional
from torchvision.transforms.v2 import CenterCrop, Compose, Pad, Resize

from anomalib_sgfr.images.frame_geometry import aspect_sizes, frame_transform, size_of_aspect

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
def test_pixels_come_from_where_the_transform_says(name: str, size: tuple[int, int]) -> None:
    """The frame's coordinates, pre-processed, are those that the transform gives."""
    steps, pre_process = STEPS[name]
    rows, columns = np.mgrid[: size[0], : size[1]] + 0.5
    seen = pre_process(torch.tensor(np.stack((rows, columns)), dtype=torch.float32)).numpy()
    transform = frame_transform(steps, size)
    assert transform.input_size == seen.shape[1:]
    for axis, length, found in zip(transform[:2], size, (seen[0], seen[1].T), strict=True):
        expected = axis.offset + (np.arange(axis.length) + 0.5) * axis.scale
        middle, border = found[:, found.shape[1] // 2], 2 * max(1, axis.scale)
        inside = (expected > border) & (expected < length - border)
        np.testing.assert_allclose(middle[inside], expected[inside], atol=0.1)  # few weights
        assert inside.sum() >= 8


@pytest.mark.parametrize("size", [(64, 64), (120, 200), (31, 17)])
def test_resampling_is_bilinear_interpolation(size: tuple[int, int]) -> None:
    values = np.random.default_rng(0).random((64, 48)).astype(np.float32)
    resampled = frame_transform([("resize", 64, 48)], size).resample(values)
    expected = functional.interpolate(
        torch.tensor(values)[None, None], size, mode="bilinear", align_corners=False
    )
    np.testing.assert_allclose(resampled, expected[0, 0].numpy(), atol=1e-5)


def test_a_map_is_zero_outside_of_the_inspected_area() -> None:
    transform = frame_transform([("shorter", 80, None), ("crop", 40, 40)], (160, 240))
    assert transform.inspected_area == (40, 80, 120, 160)
    resampled = transform.resample(np.ones((40, 40)))
    assert resampled.sum() == 80 * 80
    assert resampled[40:120, 80:160].min() == 1.0
    # a coarser map covers the same part
    assert np.array_equal(transform.resample(np.ones((20, 10))), resampled)


def test_an_unknown_step_is_refused() -> None:
    with pytest.raises(
        ValueError, match="must be resize, aspect, shorter, crop or pad, got 'turn'"
    ):
        frame_transform([("turn", 90)], (10, 10))


@pytest.mark.parametrize(
    ("steps", "frame_size", "shape", "pixel", "expected"),
    [
        (("resize", 64, 96), (128, 192), (64, 96), (0, 0), (1, 1)),
        (("resize", 64, 96), (128, 192), (64, 96), (63, 95), (127, 191)),
        (("resize", 64, 96), (128, 192), (64, 96), (10, 20), (21, 41)),
        (("resize", 64, 96), (128, 192), (8, 12), (3, 3), (56, 56)),  # a coarser map
        (("crop", 64, 56), (120, 200), (64, 56), (0, 0), (28, 72)),
        (("crop", 300, 400), (100, 100), (300, 400), (0, 399), (0, 99)),  # outside: the nearest
    ],
)
def test_the_pixel_of_the_frame_under_a_pixel_of_the_map(
    steps: tuple[object, ...],
    frame_size: tuple[int, int],
    shape: tuple[int, int],
    pixel: tuple[int, int],
    expected: tuple[int, int],
) -> None:
    assert frame_transform([steps], frame_size).frame_pixel(pixel, shape) == expected


@pytest.mark.parametrize("rule", [(256, 32), (320, 32), (392, 14), (64, 32), (250, 32)])
def test_sizes_of_any_aspect_ratio_have_about_as_many_pixels(rule: tuple[int, int]) -> None:
    side, step = rule
    sizes = aspect_sizes(*rule)
    assert (side, side) in sizes
    assert set(sizes) == {size[::-1] for size in sizes}
    for height, width in sizes:
        assert abs(height * width / side**2 - 1.0) <= 0.1
        assert height == width or (height % step == 0 and width % step == 0)
        assert size_of_aspect(height, width, *rule) == (height, width)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        ((300, 300), (256, 256)),
        ((1255, 500), (416, 160)),
        ((500, 1255), (160, 416)),
        ((427, 320), (288, 224)),
        ((512, 256), (352, 192)),
        ((110, 100), (256, 256)),
    ],
)
def test_an_image_gets_the_size_nearest_to_its_aspect_ratio(
    image: tuple[int, int], expected: tuple[int, int]
) -> None:
    assert size_of_aspect(*image, 256, 32) == expected
    nearest = min(
        aspect_sizes(256, 32), key=lambda size: abs(np.log(size[0] / size[1] * image[1] / image[0]))
    )
    assert expected == nearest
    followed = frame_transform([("aspect", 256, 32)], image)
    assert followed.input_size == expected
    assert followed.inspected_area == (0, 0, *image)
