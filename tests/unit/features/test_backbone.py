"""Image sizes of backbones: the default, and others refused with one that is accepted."""

import pytest
import torch
from anomalib.pre_processing import PreProcessor
from torchvision.transforms.v2 import CenterCrop, Compose, Resize

from anomalib_sgfr import Sgfr
from anomalib_sgfr.features.backbone import default_size
from anomalib_sgfr.features.embedding import PatchEmbedder
from anomalib_sgfr.images.pre_processor import output_size


@pytest.mark.parametrize(
    ("backbone", "side"),
    [
        ("tf_efficientnet_lite0", 256),
        ("resnet18", 256),
        ("vit_tiny_patch16_224", 256),
        ("vit_small_patch14_dinov2", 392),
        ("vit_base_patch32_224", 256),
        ("vit_small_patch8_224", 256),
        ("eva02_tiny_patch14_224", 392),
        ("swin_tiny_patch4_window7_224", 224),
        ("beit_base_patch16_224", 224),
        ("coatnet_0_rw_224", 224),
        ("mvitv2_tiny", 256),
        ("convnext_atto", 256),
    ],
)
def test_the_default_size_suits_the_backbone(backbone: str, side: int) -> None:
    assert default_size(backbone) == (side, side)
    made = Sgfr.configure_pre_processor(backbone=backbone)
    assert output_size(made) == (side, side)
    with torch.device("meta"):
        maps = PatchEmbedder(backbone)(torch.zeros(1, 3, side, side))
    if len({part.shape[-1] for part in maps}) > 1:  # a pyramid
        assert [part.shape[-1] for part in maps] == [side // stride for stride in (8, 8, 16, 32)]


def test_a_transformer_of_patches_of_14_works_by_default() -> None:
    model = Sgfr("vit_small_patch14_dinov2", pre_trained=False).eval()
    with torch.no_grad():
        embeddings = model.model.embed(model.pre_processor(torch.rand(1, 3, 100, 120)))
    assert [part.shape[2:] for part in embeddings] == [(28, 28)] * 2


@pytest.mark.parametrize(
    ("backbone", "size", "message"),
    [
        ("vit_small_patch14_dinov2", 256, "images of 256 x 256 pixels: 252 x 252 would do"),
        ("vit_tiny_patch16_224", (250, 100), "images of 250 x 100 pixels: 256 x 96 would do"),
        ("swin_tiny_patch4_window7_224", 256, "images of 256 x 256 pixels: 224 x 224 would do"),
    ],
)
def test_a_size_that_does_not_fit_is_refused_with_one_that_does(
    backbone: str, size: int | tuple[int, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Sgfr(backbone, image_size=size)
    both = (size, size) if isinstance(size, int) else size
    with pytest.raises(ValueError, match=message):
        Sgfr(backbone, pre_processor=PreProcessor(Compose([Resize(300), CenterCrop(both)])))
    with pytest.raises(ValueError, match=message):
        PatchEmbedder(backbone)(torch.zeros(1, 3, *both))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_size": 0}, "image_size must be one or two whole numbers"),
        ({"image_size": (1, 2, 3)}, "image_size must be one or two whole numbers"),
        (
            {"image_size": 64, "pre_processor": PreProcessor(Resize((32, 48)))},
            "image_size is 64 x 64, but the pre_processor makes 32 x 48: pass one of the two",
        ),
        (
            {"image_size": 64, "pre_processor": False},
            "image_size is 64 x 64, but the pre_processor makes no one size",
        ),
        ({"tile_stride": 64}, "tile_stride 64 needs a tile_size"),
        ({"tile_size": 100}, r"tile_size must be a multiple of 32.*\(96, 96\) would do"),
        ({"tile_size": 64, "tile_stride": 96}, "stride must not exceed its tile_size"),
        ({"tile_size": "large"}, "tile_size must be one or two whole numbers"),
    ],
)
def test_wrong_sizes_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sgfr(**arguments)  # type: ignore[arg-type]


def test_other_errors_of_a_backbone_are_kept() -> None:
    embedder = PatchEmbedder("resnet18")
    with pytest.raises(RuntimeError, match="3 channels"):
        embedder(torch.zeros(1, 1, 64, 64))


def test_a_size_that_depends_on_the_image_is_unknown() -> None:
    assert output_size(PreProcessor(Resize(64))) is None
    assert output_size(PreProcessor(Compose([Resize(64), CenterCrop((32, 48))]))) == (32, 48)
    assert output_size(None) is None
