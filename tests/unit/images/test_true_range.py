"""Batches whose files anomalib cannot read whole, and training pictures that look misread."""

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
    for name, picture in (
        ("0", values),
        ("1", (values >> 4).astype(np.uint8)),
        ("2", values[::-1].copy()),
    ):
        Image.fromarray(picture).save(tmp_path / f"{name}.png")
    return [str(tmp_path / f"{number}.png") for number in range(3)]


def batch_of(files: list[str], transform: Any = None) -> ImageBatch:
    images: list[Any] = [read_image(file, as_tensor=True) for file in files]
    images = images if transform is None else [transform(image) for image in images]
    return ImageBatch(image=torch.stack(images), image_path=files)


@pytest.mark.parametrize(
    "transform", [None, Resize((32, 32)), Compose([Resize((36, 40)), CenterCrop(32)])]
)
def test_deep_images_of_a_batch_are_replaced_and_altered_as_their_data_set_alters_them(
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


def test_what_anomalib_makes_one_size_of_stays_one_size(files: list[str]) -> None:
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


def test_a_data_set_of_somebody_elses_says_how_it_reads_or_is_refused(files: list[str]) -> None:
    batch = batch_of(files)
    before = batch.image.clone()
    with pytest.raises(
        ValueError, match=rf"SimpleNamespace does not say .* {READS_HIGH_BIT_DEPTH} = True"
    ):
        reread_images(batch, SimpleNamespace(), 12)
    reread_images(batch, SimpleNamespace(**{READS_HIGH_BIT_DEPTH: True}), 12)
    assert torch.equal(batch.image, before)


def test_images_whose_files_are_not_there_or_not_named_are_left(files: list[str]) -> None:
    batch = batch_of(files)
    before = batch.image.clone()
    batch.image_path = ["nowhere.png", "b", "c"]
    reread_images(batch, SimpleNamespace(), 12)
    reread_images(ImageBatch(image=batch.image), SimpleNamespace(), 12)
    assert torch.equal(batch.image, before)


def test_larger_values_than_the_models_are_refused_by_name(files: list[str]) -> None:
    with pytest.raises(
        ValueError,
        match=r"0.png holds values up to \d+, more than the 10 bits .* pass bit_depth=12",
    ):
        reread_images(batch_of(files), SimpleNamespace(augmentations=None), 10)


def test_plain_files_are_read_by_anomalib(files: list[str]) -> None:
    anomalibs = read_image(files[1], as_tensor=True)
    assert torch.equal(read_tensor(files[1]), anomalibs)
    assert read_tensor(files[1]).stride() == anomalibs.stride()  # resized alike, to the last bit
    assert read_tensor(files[0], 12).stride() == anomalibs.stride()


def good(count: int) -> torch.Tensor:
    return torch.rand(count, 3, 64, 80)


def flat(count: int, share: float, value: float = 1.0) -> torch.Tensor:
    images = good(count)
    images[:, :, : round(64 * share)] = value
    return images


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_a_set_of_nearly_one_value_is_refused_by_name(value: float) -> None:
    looks = ConstantImageCheck()
    looks.see(flat(3, 0.95, value), ["a.png", "b.png", "c.png"])
    with pytest.raises(
        ValueError,
        match=rf"3 of 3 training pictures look misread.*a.png \(9\d% of it is {value:.3g}\)",
    ):
        looks.judge()


def test_a_bright_background_is_no_reason() -> None:
    looks = ConstantImageCheck()
    looks.see(flat(20, 0.8), None)
    looks.judge()


def test_one_bad_picture_in_a_good_set_is_told_by_name(caplog: pytest.LogCaptureFixture) -> None:
    looks = ConstantImageCheck()
    looks.see(good(2), ["a.png", "b.png"])
    looks.see(flat(1, 1.0), ["white.png"])
    with caplog.at_level(logging.WARNING):
        looks.judge()
    assert "1 of 3 training pictures: white.png (100% of it is 1)" in caplog.text
    looks.judge()  # says it once
    assert caplog.text.count("white.png") == 1


def test_a_bad_set_is_refused_before_all_of_it_was_seen_a_mixed_one_after() -> None:
    looks = ConstantImageCheck()
    looks.see(flat(15, 1.0), None)
    with pytest.raises(ValueError, match=r"16 of 16 .*picture 1 "):
        looks.see(flat(1, 1.0), None)
    looks = ConstantImageCheck()
    looks.see(flat(15, 1.0), None)
    looks.see(good(2), None)
    with pytest.raises(ValueError, match="15 of 17"):
        looks.judge()


def test_who_says_how_to_read_them_is_told_and_not_refused(
    caplog: pytest.LogCaptureFixture,
) -> None:
    looks = ConstantImageCheck(vouched=True)
    looks.see(flat(20, 1.0), None)
    with caplog.at_level(logging.WARNING):
        looks.judge()
    assert "20 of 20" in caplog.text


def test_batches_pass_as_they_are_and_are_completed_where_that_is_clear() -> None:
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
