"""Images that anomalib reads wrongly are read again, and constant training images are refused."""

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from anomalib.data import ImageBatch
from anomalib.data.utils import read_image
from PIL import Image
from torchvision.transforms.v2 import CenterCrop, Compose, RandomHorizontalFlip, Resize

from anomalib_sgfr.images.bit_depth import (
    READS_HIGH_BIT_DEPTH,
    ConstantImageCheck,
    read_tensor,
    reread_images,
    to_batch,
)


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """Two of 12 bits, and one of 8 between them."""
    values = np.random.default_rng(0).integers(0, 4096, (40, 48)).astype(np.uint16)
    for name, image in enumerate((values, (values >> 4).astype(np.uint8), values[::-1].copy())):
        Image.fromarray(image).save(tmp_path / f"{name}.png")
    return [str(tmp_path / f"{number}.png") for number in range(3)]


def batch_of(files: list[str], transform: Any = None) -> ImageBatch:
    images: list[Any] = [read_image(file, as_tensor=True) for file in files]
    images = images if transform is None else [transform(image) for image in images]
    return ImageBatch(image=torch.stack(images), image_path=files)


@pytest.mark.parametrize(
    "transform", [None, Resize((32, 32)), Compose([Resize((36, 40)), CenterCrop(32)])]
)
def test_images_of_high_bit_depth_are_replaced_and_transformed_as_their_data_set_does(
    files: list[str], transform: Any
) -> None:
    batch = batch_of(files, transform)
    before = batch.image.clone()
    reread_images(batch, SimpleNamespace(augmentations=transform), 12)
    assert torch.equal(batch.image[1], before[1])
    for number in (0, 2):
        values = (
            torch.from_numpy(np.asarray(Image.open(files[number])) / 4095.0)
            .float()
            .expand(3, -1, -1)
        )
        wanted = values if transform is None else transform(values)
        torch.testing.assert_close(batch.image[number], wanted, atol=1e-5, rtol=0)
        assert not torch.allclose(before[number], wanted, atol=0.1)


def test_a_batch_keeps_its_size(files: list[str]) -> None:
    batch = batch_of(files, Resize((20, 24)))
    reread_images(batch, SimpleNamespace(transform=None), 12)
    assert batch.image.shape == (3, 3, 20, 24)
    assert 0.4 < float(batch.image[0].mean()) < 0.6


def test_augmentations_that_cannot_be_repeated_are_refused_by_name(files: list[str]) -> None:
    flip = Compose([RandomHorizontalFlip(), Resize((32, 32))])
    with pytest.raises(
        ValueError, match=r"0.png holds more than 8 bits .* leave out the augmentations"
    ):
        reread_images(batch_of(files), SimpleNamespace(augmentations=flip), 12)
    reread_images(batch_of(files[1:2]), SimpleNamespace(augmentations=flip), 12)


def test_an_unknown_data_set_says_how_it_reads_or_is_refused(files: list[str]) -> None:
    batch = batch_of(files)
    before = batch.image.clone()
    with pytest.raises(
        ValueError, match=rf"SimpleNamespace does not say .* {READS_HIGH_BIT_DEPTH} = True"
    ):
        reread_images(batch, SimpleNamespace(), 12)
    reread_images(batch, SimpleNamespace(**{READS_HIGH_BIT_DEPTH: True}), 12)
    assert torch.equal(batch.image, before)


def test_images_without_files_are_kept(files: list[str]) -> None:
    batch = batch_of(files)
    before = batch.image.clone()
    batch.image_path = ["nowhere.png", "b", "c"]
    reread_images(batch, SimpleNamespace(), 12)
    reread_images(ImageBatch(image=batch.image), SimpleNamespace(), 12)
    assert torch.equal(batch.image, before)


def test_values_above_the_bit_depth_are_refused_with_the_file(files: list[str]) -> None:
    with pytest.raises(
        ValueError,
        match=r"0.png holds values up to \d+, more than the 10 bits .* pass bit_depth=12",
    ):
        reread_images(batch_of(files), SimpleNamespace(augmentations=None), 10)


def test_plain_files_are_read_as_anomalib_does(files: list[str]) -> None:
    anomalibs = read_image(files[1], as_tensor=True)
    assert torch.equal(read_tensor(files[1]), anomalibs)
    assert read_tensor(files[1]).stride() == anomalibs.stride()  # resized alike, to the last bit
    assert read_tensor(files[0], 12).stride() == anomalibs.stride()


def textured(count: int) -> torch.Tensor:
    return torch.rand(count, 3, 64, 80)


def constant(count: int, share: float = 1.0, value: float = 1.0) -> torch.Tensor:
    """Images with one value in a share of their rows."""
    images = textured(count)
    images[:, :, : round(64 * share)] = value
    return images


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_a_nearly_constant_set_is_refused_with_names(value: float) -> None:
    check = ConstantImageCheck()
    check.update(constant(3, 0.95, value), ["a.png", "b.png", "c.png"])
    with pytest.raises(
        ValueError, match=rf"nearly constant.* 3 of 3: a.png \(9\d% of it is {value:.3g}\)"
    ):
        check.finish()


def test_a_bright_background_is_accepted() -> None:
    check = ConstantImageCheck()
    check.update(constant(20, 0.8), None)
    check.finish()


def test_a_constant_image_in_a_good_set_is_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    check = ConstantImageCheck()
    check.update(textured(2), ["a.png", "b.png"])
    check.update(constant(1), ["white.png"])
    with caplog.at_level(logging.WARNING):
        check.finish()
        check.finish()
    assert caplog.text.count("nearly constant: 1 of 3: white.png (100% of it is 1)") == 1


def test_a_constant_set_is_refused_early_and_a_mixed_one_at_the_end() -> None:
    check = ConstantImageCheck()
    check.update(constant(15), None)
    with pytest.raises(ValueError, match=r"16 of 16: image 1 "):
        check.update(constant(1), None)
    check = ConstantImageCheck()
    check.update(constant(15), None)
    check.update(textured(2), None)
    with pytest.raises(ValueError, match="15 of 17"):
        check.finish()


def test_a_set_that_the_user_confirmed_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    check = ConstantImageCheck(user_confirmed=True)
    check.update(constant(20), None)
    with caplog.at_level(logging.WARNING):
        check.finish()
    assert "20 of 20" in caplog.text


def test_batches_are_kept_or_completed() -> None:
    batch = torch.rand(2, 3, 8, 9)
    assert to_batch(batch, 8) is batch
    assert torch.equal(to_batch(batch.double(), 8), batch)
    assert torch.equal(to_batch((batch * 255).round().byte(), 8), (batch * 255).round() * (1 / 255))
    grey = batch[:, :1]
    assert torch.equal(to_batch(grey, 8), grey.expand(-1, 3, -1, -1))
    assert torch.equal(to_batch(batch.permute(0, 2, 3, 1).numpy(), 8), batch)
    assert torch.equal(to_batch(batch[0], 8), batch[:1])
    for wrong in (batch * 255, batch - 0.5):
        with pytest.raises(ValueError, match="pass them between 0 and 1"):
            to_batch(wrong, 8)
