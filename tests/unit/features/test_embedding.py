"""Patch embeddings: their shapes, grids and scales, and the local average."""

import copy

import numpy as np
import pytest
import timm
import torch
from scipy import ndimage
from torch.nn import functional

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
    assert coarse.shape[2] < middle.shape[2]


@pytest.mark.parametrize(
    ("strides", "grids"),
    [
        ([4, 8, 16], [8, 8, 16]),
        ([2, 4, 8, 16], [8, 8, 8, 16]),
        ([4, 16], [4, 16]),  # no layer of stride 8
        ([16, 16], [16, 16]),
        ([4], [4]),
    ],
)
def test_each_layer_is_a_scale(strides: list[int], grids: list[int]) -> None:
    assert build_scales(strides) == [Scale((index,), grid) for index, grid in enumerate(grids)]


def test_a_scale_contributes_to_what_its_layer_does() -> None:
    assert build_scales([16] * 3, [(True, True), (True, False), (False, True)]) == [
        Scale((0,), 16),
        Scale((1,), 16, score_weight=0.0),
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


def test_finer_maps_are_pooled_then_resized_to_the_grid_of_their_scale() -> None:
    finest, fine, coarse = (
        torch.randn(2, 3, 16, 16),
        torch.randn(2, 4, 8, 8),
        torch.randn(2, 5, 4, 4),
    )
    strides = [4, 8, 16]
    resized, *others = align_features([finest, fine, coarse], strides, build_scales(strides))
    # resizing by two is averaging
    torch.testing.assert_close(resized, functional.avg_pool2d(pool(finest), 2))
    for found, feature in zip(others, (fine, coarse), strict=True):
        assert torch.equal(found, pool(feature))


@pytest.mark.parametrize("shape", [(32, 32), (16, 9), (2, 2), (1, 7), (1, 1)])
def test_pooling_is_a_correlation_with_zeros_beyond_the_border(shape: tuple[int, int]) -> None:
    weights = [1, 4, 6, 4, 1]
    feature = torch.randn(2, 3, *shape, generator=torch.Generator().manual_seed(0))
    kernel = np.outer(weights, weights) / np.sum(weights) ** 2
    expected = ndimage.correlate(feature.double().numpy(), kernel[None, None], mode="constant")
    assert pool(feature).shape == feature.shape
    np.testing.assert_allclose(pool(feature).numpy(), expected, atol=1e-6)


def test_an_earlier_pickle_of_another_pooling_is_refused() -> None:
    embedder = PatchEmbedder("resnet18")
    embedder.pooling = "binomial"  # type: ignore[assignment]
    assert not hasattr(copy.deepcopy(embedder), "pooling")
    embedder.pooling = "box"  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"pooling 'box': load it with version 0\.2\.0"):
        copy.deepcopy(embedder)


def test_backbone_stays_in_evaluation_mode_and_frozen() -> None:
    embedder = PatchEmbedder("resnet18").train()
    assert not embedder.extractor.training
    assert not any(parameter.requires_grad for parameter in embedder.parameters())
    before = {key: value.clone() for key, value in embedder.state_dict().items()}
    embedder(torch.randn(2, 3, 64, 64))
    assert all(torch.equal(value, before[key]) for key, value in embedder.state_dict().items())
