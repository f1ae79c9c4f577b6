"""Patch embeddings: their shapes, grids and scales, and the local average."""

import numpy as np
import pytest
import timm
import torch
from scipy import ndimage
from torch.nn import functional

from anomalib_sgfr.core.arguments import Pooling
from anomalib_sgfr.features.embedding import PatchEmbedder, align_features, pool
from anomalib_sgfr.features.layers import Scale, backbone_layers, build_scales


@pytest.mark.parametrize(
    ("backbone", "size", "shapes"),
    [
        (
            "tf_efficientnet_lite0",
            256,
            [(2, 24, 32, 32), (2, 40, 32, 32), (2, 112, 16, 16), (2, 192, 8, 8)],
        ),
        ("resnet18", 96, [(2, 64, 12, 12), (2, 128, 12, 12), (2, 256, 6, 6), (2, 512, 3, 3)]),
        # no multiple of a stride
        ("resnet18", 90, [(2, 64, 12, 12), (2, 128, 12, 12), (2, 256, 6, 6), (2, 512, 3, 3)]),
        # rounds sizes down
        ("convnext_atto", 100, [(2, 40, 12, 12), (2, 80, 12, 12), (2, 160, 6, 6), (2, 320, 3, 3)]),
        (
            "vit_tiny_patch16_224",
            96,
            [(2, 192, 6, 6)] * 2,
        ),  # a plain transformer has but one stride
        ("deit_tiny_patch16_224", 256, [(2, 192, 16, 16)] * 2),  # one without "vit" in its name
        # a pyramid with "vit" in its name
        ("mobilevit_xxs", 256, [(2, 24, 32, 32), (2, 48, 32, 32), (2, 64, 16, 16), (2, 320, 8, 8)]),
        # channels last
        (
            "swin_tiny_patch4_window7_224",
            224,
            [(2, 96, 28, 28), (2, 192, 28, 28), (2, 384, 14, 14), (2, 768, 7, 7)],
        ),
        ("mixer_s16_224", 224, [(2, 512, 14, 14)] * 2),  # a plain token mixer of fixed size
    ],
)
def test_embedding_shapes(backbone: str, size: int, shapes: list[tuple[int, ...]]) -> None:
    embedder = PatchEmbedder(backbone)
    assert [embedding.shape for embedding in embedder(torch.randn(2, 3, size, size))] == shapes
    assert embedder.channels == [shape[1] for shape in shapes]
    assert len(embedder.scales) == len(embedder.scale_strides) == len(shapes)


@pytest.mark.parametrize("backbone", ["resnet18", "convnext_atto"])
@pytest.mark.parametrize("size", [64, 90, 100])
def test_finer_layers_go_to_the_grid_of_stride_8_at_any_size(backbone: str, size: int) -> None:
    layers = [layer.name for layer in backbone_layers(backbone) if layer.stride in {4, 8, 16}]
    images = torch.randn(1, 3, size, size)
    fine, middle, coarse = PatchEmbedder(backbone, layers)(images)
    assert fine.shape[2:] == middle.shape[2:]
    joined, same = PatchEmbedder(backbone, layers, bank_per="stride")(images)
    assert joined.shape[1] == fine.shape[1] + middle.shape[1]
    assert joined.shape[2:] == middle.shape[2:]
    assert same.shape == coarse.shape


@pytest.mark.parametrize(
    ("strides", "by_layer", "by_stride"),
    [
        ([4, 8, 16], [((0,), 8), ((1,), 8), ((2,), 16)], [((0, 1), 8), ((2,), 16)]),
        (
            [2, 4, 8, 16],
            [((0,), 8), ((1,), 8), ((2,), 8), ((3,), 16)],
            [((0, 1, 2), 8), ((3,), 16)],
        ),
        (
            [4, 16],
            [((0,), 4), ((1,), 16)],
            [((0,), 4), ((1,), 16)],
        ),  # with no layer of stride 8, each on its own
        ([16, 16], [((0,), 16), ((1,), 16)], [((0, 1), 16)]),
        ([4], [((0,), 4)], [((0,), 4)]),
    ],
)
def test_which_layers_make_a_scale(
    strides: list[int],
    by_layer: list[tuple[tuple[int, ...], int]],
    by_stride: list[tuple[tuple[int, ...], int]],
) -> None:
    assert [(scale.layer_indices, scale.stride) for scale in build_scales(strides)] == by_layer
    assert [
        (scale.layer_indices, scale.stride) for scale in build_scales(strides, bank_per="stride")
    ] == by_stride


def test_layers_of_other_roles_are_not_joined() -> None:
    roles = [(True, True), (True, False), (False, True), (True, False)]
    assert build_scales([16] * 4, roles, "stride") == [
        Scale((0,), 16),
        Scale((1, 3), 16, in_score=False),
        Scale((2,), 16, in_map=False),
    ]


def test_embedding_is_of_the_layers_named_in_any_order() -> None:
    torch.manual_seed(0)
    embedder = PatchEmbedder("resnet18", ["layer3", "layer1"])
    assert embedder.layers == ["layer1", "layer3"]
    images = torch.randn(1, 3, 64, 64)
    network = timm.create_model("resnet18", features_only=True, out_indices=(1, 3)).eval()
    network.load_state_dict(embedder.extractor.feature_extractor.state_dict())
    with torch.no_grad():
        expected = align_features(network(images), [4, 16], build_scales([4, 16]))
    assert [part.shape[1:] for part in expected] == [(64, 16, 16), (256, 4, 4)]
    for found, wanted in zip(embedder(images), expected, strict=True):
        torch.testing.assert_close(found, wanted)


def test_assemble_averages_joins_and_keeps_scales_apart() -> None:
    finest, fine, coarse = (
        torch.randn(2, 3, 16, 16),
        torch.randn(2, 4, 8, 8),
        torch.randn(2, 5, 4, 4),
    )
    maps, strides = [finest, fine, coarse], [4, 8, 16]
    joined, apart = align_features(maps, strides, build_scales(strides, bank_per="stride"), "box")
    assert (joined.shape, apart.shape) == ((2, 7, 8, 8), (2, 5, 4, 4))
    expected = fine[:, :, 2:5, 3:6].mean((2, 3))  # the 3 x 3 neighbourhood of row 3, column 4
    torch.testing.assert_close(joined[:, 3:, 3, 4], expected)
    torch.testing.assert_close(apart, functional.avg_pool2d(coarse, 3, 1, 1))
    averaged = functional.avg_pool2d(
        functional.avg_pool2d(finest, 3, 1, 1), 2
    )  # resizing by two is averaging
    torch.testing.assert_close(joined[:, :3], averaged)
    alone, beside, last = align_features(maps, strides, build_scales(strides), "box")
    torch.testing.assert_close(torch.cat((alone, beside), 1), joined)
    assert torch.equal(last, apart)


@pytest.mark.parametrize("shape", [(32, 32), (16, 9), (2, 2), (1, 7), (1, 1)])
@pytest.mark.parametrize(
    ("pooling", "weights"), [("box", [1, 1, 1]), ("binomial", [1, 4, 6, 4, 1])]
)
def test_pooling_is_a_correlation_with_zeros_beyond_the_border(
    shape: tuple[int, int], pooling: Pooling, weights: list[int]
) -> None:
    feature = torch.randn(2, 3, *shape, generator=torch.Generator().manual_seed(0))
    kernel = np.outer(weights, weights) / np.sum(weights) ** 2
    expected = ndimage.correlate(feature.double().numpy(), kernel[None, None], mode="constant")
    assert pool(feature, pooling).shape == feature.shape
    np.testing.assert_allclose(pool(feature, pooling).numpy(), expected, atol=1e-6)


def test_an_embedder_pools_as_it_is_told() -> None:
    torch.manual_seed(0)
    images = torch.randn(1, 3, 64, 64)
    layers = ["layer2", "layer3"]
    box, binomial = PatchEmbedder("resnet18", layers, "box"), PatchEmbedder("resnet18", layers)
    binomial.load_state_dict(box.state_dict())
    features = list(box.extractor(images).values())
    for embedder in (box, binomial):
        for found, wanted in zip(
            embedder(images),
            align_features(features, [8, 16], embedder.scales, embedder.pooling),
            strict=True,
        ):
            torch.testing.assert_close(found, wanted)
    with pytest.raises(ValueError, match="pooling must be one of binomial, box, got 'mean'"):
        PatchEmbedder("resnet18", pooling="mean")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="bank_per must be one of layer, stride, got 'image'"):
        PatchEmbedder("resnet18", bank_per="image")  # type: ignore[arg-type]


def test_backbone_stays_in_evaluation_mode_and_frozen() -> None:
    embedder = PatchEmbedder("resnet18").train()
    assert not embedder.extractor.training
    assert not any(parameter.requires_grad for parameter in embedder.parameters())
    before = {key: value.clone() for key, value in embedder.state_dict().items()}
    embedder(torch.randn(2, 3, 64, 64))
    assert all(torch.equal(value, before[key]) for key, value in embedder.state_dict().items())
