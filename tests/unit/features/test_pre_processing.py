"""Pre-processing: what is exported resizes as the Engine does."""

import pytest
import torch
from torch.nn import functional
from torchvision.transforms.v2 import CenterCrop, Compose, InterpolationMode, Normalize, Resize

from anomalib_sgfr import Sgfr
from anomalib_sgfr.features.pre_processing import ExactResize, SgfrPreProcessor, resizing


@pytest.mark.parametrize(
    ("before", "after"), [(300, 256), (1024, 256), (257, 256), (64, 256), (256, 256), (5, 2), (1, 3)]
)
def test_resizing_is_antialiased_interpolation(before: int, after: int) -> None:
    line = torch.rand(1, 1, before, 4)
    expected = functional.interpolate(line, size=(after, 4), mode="bilinear", antialias=True)
    torch.testing.assert_close(resizing(before, after) @ line, expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("size", [(300, 300), (411, 389), (100, 700)])
def test_the_exported_transform_is_the_engines(size: tuple[int, int]) -> None:
    processor = Sgfr.configure_pre_processor((128, 96))
    images = torch.rand(2, 3, *size)
    torch.testing.assert_close(processor(images), processor.transform(images), atol=1e-5, rtol=0)


def test_a_checkpoint_brings_exact_resizing_back() -> None:
    processor = Sgfr.configure_pre_processor((128, 96))
    restored = SgfrPreProcessor()
    restored.load_checkpoint_config(processor.checkpoint_config())
    assert isinstance(restored.export_transform.transforms[0], ExactResize)
    images = torch.rand(1, 3, 300, 200)
    torch.testing.assert_close(restored(images), processor(images))


@pytest.mark.parametrize(
    "transform",
    [
        None,
        Resize(64),
        Resize((64, 64), interpolation=InterpolationMode.BICUBIC),
        Compose([CenterCrop(32), Normalize([0.5] * 3, [0.5] * 3)]),
        Resize((64, 64), antialias=True),
    ],
)
def test_other_transforms_are_left_to_anomalib(transform: object) -> None:
    processor = SgfrPreProcessor(transform)
    exact = (
        isinstance(transform, Resize)
        and len(transform.size) == 2
        and "bilinear" in str(transform.interpolation).lower()
    )
    assert isinstance(processor.export_transform, ExactResize) == exact
    assert processor(torch.rand(1, 3, 80, 80)).shape[0] == 1
