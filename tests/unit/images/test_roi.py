"""Regions of interest: read, refused by name, and transformed as images are."""

from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.pre_processing import PreProcessor
from PIL import Image
from torchvision.transforms.v2 import CenterCrop, Compose, Normalize, Pad, Resize, Transform

from anomalib_sgfr import Sgfr
from anomalib_sgfr.images.roi import read_roi, roi_at_input
from tests.conftest import write_image


def mask(size: tuple[int, int]) -> np.ndarray:
    inside = np.zeros(size, bool)
    inside[size[0] // 3 : -size[0] // 8, size[1] // 4 : -size[1] // 3] = True
    return inside


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "I;16", "LA"])
def test_a_mask_of_any_mode_is_read(mode: str, tmp_path: Path) -> None:
    inside = mask((40, 30))
    if mode == "I;16":
        image = Image.fromarray(inside.astype(np.uint16) * 60000)
    else:
        image = Image.fromarray(inside.astype(np.uint8) * 255).convert(mode)
    image.save(tmp_path / "mask.png")
    np.testing.assert_array_equal(read_roi(tmp_path / "mask.png").numpy(), inside)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda path: None,  # noqa: ARG005
            "mask.png' cannot be read: there is no such file.*white where to inspect",
        ),
        (
            lambda path: path.write_bytes(b"not an image"),
            "mask.png' cannot be read: UnidentifiedImageError",
        ),
        (
            lambda path: Image.fromarray(np.ones((9, 9), np.uint8)).save(path),
            "leaves nothing to inspect: its brightest pixel is 1.*white is 255",
        ),
        (
            lambda path: write_image(path, 0),
            "mask.png' is no mask: .*% of its pixels are grey",
        ),
    ],
)
def test_a_wrong_mask_is_refused_by_name(make: object, message: str, tmp_path: Path) -> None:
    make(tmp_path / "mask.png")  # type: ignore[operator]
    with pytest.raises(ValueError, match=message):
        read_roi(tmp_path / "mask.png")


@pytest.mark.parametrize(
    "transform",
    [
        Resize((32, 48), antialias=True),
        Resize((200, 130), antialias=True),
        Resize(40, antialias=True),
        Compose([Resize(64, antialias=True), CenterCrop(56), Normalize([0.5] * 3, [0.2] * 3)]),
        Compose([Pad(9), Resize((64, 64))]),
    ],
)
def test_a_pixel_is_inside_if_resizing_mixes_nothing_outside_into_it(transform: Transform) -> None:
    inside = torch.from_numpy(mask((120, 90)))
    region = roi_at_input(inside, PreProcessor(transform))
    images = torch.rand(2, 3, 120, 90)
    images[1] = torch.where(inside, images[0], images[1])  # differ outside alone
    first, second = transform(images)
    same = (first - second).abs().amax(0) < 1e-5
    assert region.shape == same.shape
    assert bool(same[region > 0].all())
    # and not much less than half covered pixels are left out
    share = transform(inside.expand(3, -1, -1).float())
    full = share.amax()
    assert int(region.sum()) >= 0.95 * int((share[0] > full - 1e-4).sum())


def test_a_region_that_is_cropped_away_is_refused() -> None:
    inside = torch.zeros(90, 90, dtype=torch.bool)
    inside[:8, :8] = True
    with pytest.raises(
        ValueError, match="here: nothing of its white is left at the model's input of 32 x 32"
    ):
        roi_at_input(inside, PreProcessor(CenterCrop(32)), "here")


def test_without_a_transform_the_region_is_kept() -> None:
    inside = torch.from_numpy(mask((20, 30)))
    assert torch.equal(roi_at_input(inside, None), inside.to(torch.uint8))
    assert roi_at_input(inside, Sgfr.configure_pre_processor((64, 64))).shape == (64, 64)
