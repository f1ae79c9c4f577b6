"""Resizing to an image's aspect ratio: a fit's choice reaches data modules, exports do the same."""

import pytest
import torch
from torchvision import tv_tensors
from torchvision.transforms.v2 import CenterCrop, Compose, InterpolationMode, Normalize, Resize

from anomalib_sgfr import Sgfr
from anomalib_sgfr.images.frame_geometry import size_of_aspect
from anomalib_sgfr.images.pre_processor import SgfrPreProcessor, geometric_steps
from anomalib_sgfr.images.resizing import (
    AspectResize,
    ExactAspectResize,
    GridResize,
    adaptable,
    plain,
)

RULE = (128, 32)
IMAGES = [(96, 96), (200, 80), (80, 200), (300, 100), (31, 200)]


@pytest.mark.parametrize("size", IMAGES)
def test_each_image_keeps_its_aspect_ratio(size: tuple[int, int]) -> None:
    images = torch.rand(2, 3, *size)
    expected = Resize(size_of_aspect(*size, *RULE))(images)
    resize = AspectResize((128, 128), RULE)
    assert torch.equal(resize(images), expected)
    assert torch.equal(resize(resize(images)), expected)
    torch.testing.assert_close(ExactAspectResize(*RULE)(images), expected, atol=1e-5, rtol=0)
    resized, grid = GridResize(*RULE)(images)
    torch.testing.assert_close(resized, expected, atol=1e-5, rtol=0)
    assert grid.shape[-2:] == tuple(length // 32 for length in expected.shape[-2:])


@pytest.mark.parametrize("rule", [(256, 32), (392, 14)])
def test_python_and_an_exported_graph_choose_the_same_size_of_every_image(
    rule: tuple[int, int],
) -> None:
    resize = GridResize(*rule)
    lengths = torch.arange(1, 1200, 7)
    height, width = torch.meshgrid(lengths.int(), lengths.int(), indexing="ij")
    # in 32 bits, as runtimes count
    heights, widths = resize.bounds.int().T
    index = (height[..., None] * widths > width[..., None] * heights).sum(-1)
    by_graph = resize.sizes[index].flatten(0, 1).tolist()
    sizes = torch.cartesian_prod(lengths, lengths).tolist()
    assert int(resize.bounds.max()) * 131_071 < 2**31
    assert by_graph == [list(size_of_aspect(*size, *rule)) for size in sizes]


def test_masks_are_resized_with_their_image() -> None:
    mask = tv_tensors.Mask(torch.ones(1, 200, 80, dtype=torch.uint8))
    image, found = AspectResize((128, 128), RULE)(torch.rand(1, 3, 200, 80), mask)
    assert image.shape[-2:] == found.shape[-2:] == (160, 96)
    assert isinstance(found, tv_tensors.Mask)
    assert AspectResize((64, 96))(torch.rand(3, 200, 80)).shape == (3, 64, 96)


@pytest.mark.parametrize(
    "transform",
    [
        Resize((64, 96)),
        Compose([CenterCrop(80), Resize((64, 96)), Normalize([0.5] * 3, [0.5] * 3)]),
    ],
)
def test_what_a_fit_may_change_does_the_same_until_then(transform: object) -> None:
    image = torch.rand(3, 120, 200)
    assert torch.equal(adaptable(transform)(image), transform(image))
    assert torch.equal(plain(adaptable(transform))(image), transform(image))
    assert geometric_steps(adaptable(transform)) == geometric_steps(transform)


@pytest.mark.parametrize(
    "transform",
    [
        None,
        Resize(64),
        Resize((64, 64), antialias=False),
        Resize((8, 8), InterpolationMode.BICUBIC),
    ],
)
def test_other_resizing_is_not_changed(transform: object) -> None:
    assert adaptable(transform) is transform
    processor = SgfrPreProcessor(transform)
    processor.choose_size((32, 64))
    assert processor.transform is transform


def test_a_choice_reaches_whoever_holds_the_transform() -> None:
    processor = Sgfr.configure_pre_processor((128, 128))
    held = processor.resize
    processor.choose_size((160, 96))
    assert held(torch.rand(3, 50, 50)).shape[-2:] == (160, 96)
    assert processor(torch.rand(1, 3, 50, 50)).shape[-2:] == (160, 96)
    chosen = processor.checkpoint_config()
    processor.choose_size((128, 128), RULE)
    assert processor(torch.rand(1, 3, 200, 80)).shape[-2:] == (160, 96)
    each = processor.checkpoint_config()

    other = Sgfr.configure_pre_processor((64, 64))
    held = other.resize
    for config, size, rule in ((chosen, (160, 96), None), (each, (128, 128), RULE)):
        other.load_checkpoint_config(config)
        assert other.resize is held
        assert (tuple(held.size), held.rule) == (size, rule)
        assert other.checkpoint_config() == config


def test_a_checkpoint_of_one_size_is_as_anomalib_writes_it() -> None:
    processor = Sgfr.configure_pre_processor((128, 96))
    (first, *_) = processor.checkpoint_config()["transform"]["init_args"]["transforms"]
    assert first["class_path"].endswith("Resize")
    assert "AspectResize" not in first["class_path"]
    assert set(processor.checkpoint_config()) == {"transform"}
