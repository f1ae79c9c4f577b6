"""Layers by default and by name, and the alignment of feature maps."""

from collections.abc import Callable

import numpy as np
import pytest
import timm
import torch
from scipy import ndimage
from torch import nn
from torch.nn import functional

from anomalib_sgfr.core.arguments import Pooling
from anomalib_sgfr.features.embedding import (
    PatchEmbedder,
    assemble,
    backbone_stages,
    pool,
    resolve_layers,
    scales_of,
)


@pytest.mark.parametrize(
    ("backbone", "layers"),
    [
        ("tf_efficientnet_lite0", ["blocks.2", "blocks.4"]),
        ("resnet18", ["layer2", "layer3"]),
        ("wide_resnet50_2", ["layer2", "layer3"]),
        ("convnext_atto", ["stages.1", "stages.2"]),
        ("vit_tiny_patch16_224", ["blocks.5", "blocks.8"]),
    ],
)
def test_default_layers_are_strides_8_and_16(backbone: str, layers: list[str]) -> None:
    assert resolve_layers(backbone) == layers


@pytest.mark.parametrize(
    ("backbone", "size", "shapes"),
    [
        ("tf_efficientnet_lite0", 256, [(2, 40, 32, 32), (2, 112, 16, 16)]),
        ("resnet18", 96, [(2, 128, 12, 12), (2, 256, 6, 6)]),
        ("resnet18", 90, [(2, 128, 12, 12), (2, 256, 6, 6)]),  # no multiple of a stride
        ("convnext_atto", 100, [(2, 80, 12, 12), (2, 160, 6, 6)]),  # rounds sizes down
        ("vit_tiny_patch16_224", 96, [(2, 384, 6, 6)]),  # layers of one stride are one scale
        ("deit_tiny_patch16_224", 256, [(2, 384, 16, 16)]),  # a plain transformer without "vit" in its name
        ("mobilevit_xxs", 256, [(2, 48, 32, 32), (2, 64, 16, 16)]),  # a pyramid with "vit" in its name
        ("swin_tiny_patch4_window7_224", 224, [(2, 192, 28, 28), (2, 384, 14, 14)]),  # channels last
        ("mixer_s16_224", 224, [(2, 1024, 14, 14)]),  # a plain token mixer of fixed size
    ],
)
def test_embedding_shapes(backbone: str, size: int, shapes: list[tuple[int, ...]]) -> None:
    embedder = PatchEmbedder(backbone)
    assert [embedding.shape for embedding in embedder(torch.randn(2, 3, size, size))] == shapes
    assert sum(embedder.channels) == sum(shape[1] for shape in shapes)
    assert embedder.scales == len(shapes)


@pytest.mark.parametrize("backbone", ["resnet18", "convnext_atto"])
@pytest.mark.parametrize("size", [64, 90, 100])
def test_finer_layers_join_that_of_stride_8_at_any_size(backbone: str, size: int) -> None:
    layers = [stage.layer for stage in backbone_stages(backbone) if stage.stride in {4, 8, 16}]
    fine, coarse = PatchEmbedder(backbone)(torch.randn(1, 3, size, size))
    joined, same = PatchEmbedder(backbone, layers)(torch.randn(1, 3, size, size))
    assert joined.shape[2:] == fine.shape[2:]
    assert joined.shape[1] > fine.shape[1]
    assert same.shape == coarse.shape


@pytest.mark.parametrize(
    ("strides", "scales"),
    [
        ([4, 8, 16], [[0, 1], [2]]),
        ([16, 4, 2, 8], [[2, 1, 3], [0]]),
        ([8, 16, 32], [[0], [1], [2]]),
        ([4, 16], [[0], [1]]),  # with no layer of stride 8, each on its own
        ([16, 16], [[0, 1]]),
        ([4], [[0]]),
    ],
)
def test_layers_finer_than_stride_8_join_it(strides: list[int], scales: list[list[int]]) -> None:
    assert scales_of(strides) == scales


def test_embedding_is_of_the_layers_named_in_any_order() -> None:
    torch.manual_seed(0)
    embedder = PatchEmbedder("resnet18", ["layer3", "layer1"])
    assert embedder.layers == ["layer1", "layer3"]
    images = torch.randn(1, 3, 64, 64)
    network = timm.create_model("resnet18", features_only=True, out_indices=(1, 3)).eval()
    network.load_state_dict(embedder.extractor.feature_extractor.state_dict())
    with torch.no_grad():
        expected = assemble(network(images), [4, 16])
    assert [part.shape[1:] for part in expected] == [(64, 16, 16), (256, 4, 4)]
    for found, wanted in zip(embedder(images), expected, strict=True):
        torch.testing.assert_close(found, wanted)


def test_assemble_averages_joins_and_keeps_scales_apart() -> None:
    finest, fine, coarse = torch.randn(2, 3, 16, 16), torch.randn(2, 4, 8, 8), torch.randn(2, 5, 4, 4)
    joined, apart = assemble([coarse, finest, fine], [16, 4, 8], "box")
    assert (joined.shape, apart.shape) == ((2, 7, 8, 8), (2, 5, 4, 4))
    expected = fine[:, :, 2:5, 3:6].mean((2, 3))  # the 3 x 3 neighbourhood of row 3, column 4
    torch.testing.assert_close(joined[:, 3:, 3, 4], expected)
    torch.testing.assert_close(apart, functional.avg_pool2d(coarse, 3, 1, 1))
    averaged = functional.avg_pool2d(functional.avg_pool2d(finest, 3, 1, 1), 2)  # resizing by two is averaging
    torch.testing.assert_close(joined[:, :3], averaged)


@pytest.mark.parametrize("shape", [(32, 32), (16, 9), (2, 2), (1, 7), (1, 1)])
@pytest.mark.parametrize(("pooling", "weights"), [("box", [1, 1, 1]), ("binomial", [1, 4, 6, 4, 1])])
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
    box, binomial = PatchEmbedder("resnet18", pooling="box"), PatchEmbedder("resnet18")
    binomial.load_state_dict(box.state_dict())
    features = list(box.extractor(images).values())
    for embedder in (box, binomial):
        for found, wanted in zip(embedder(images), assemble(features, [8, 16], embedder.pooling), strict=True):
            torch.testing.assert_close(found, wanted)
    with pytest.raises(ValueError, match="pooling must be one of binomial, box, got 'mean'"):
        PatchEmbedder("resnet18", pooling="mean")  # type: ignore[arg-type]


def test_backbone_stays_in_evaluation_mode_and_frozen() -> None:
    embedder = PatchEmbedder("resnet18").train()
    assert not embedder.extractor.training
    assert not any(parameter.requires_grad for parameter in embedder.parameters())
    before = {key: value.clone() for key, value in embedder.state_dict().items()}
    embedder(torch.randn(2, 3, 64, 64))
    assert all(torch.equal(value, before[key]) for key, value in embedder.state_dict().items())


def test_unknown_layers_are_listed_with_the_valid_ones() -> None:
    with pytest.raises(ValueError, match=r"\['layer9'\] are not in backbone 'resnet18'.*layer1 \(stride 4\).*layer4"):
        PatchEmbedder("resnet18", ["layer2", "layer9"])


@pytest.mark.parametrize("layers", [[], "layer2", ["layer2", "layer2"]])
def test_malformed_layers_are_refused(layers: list[str]) -> None:
    with pytest.raises(ValueError, match="one or more different names"):
        PatchEmbedder("resnet18", layers)


def test_unknown_backbone_gets_suggestions() -> None:
    with pytest.raises(ValueError, match=r"'resnet1' is not a timm model\. Similar names: .*resnet18"):
        backbone_stages("resnet1")


def test_stages_are_timms() -> None:
    stages = backbone_stages("tf_efficientnet_lite0")
    assert [stage.stride for stage in stages] == [2, 4, 8, 16, 32]
    assert [stage.channels for stage in stages] == [16, 24, 40, 112, 320]
    np.testing.assert_equal([stage.layer for stage in stages], [f"blocks.{index}" for index in (0, 1, 2, 4, 6)])


def _knows_no_feature_info(**_: object) -> nn.Module:
    return nn.Linear(1, 1)


def _takes_no_features_only() -> nn.Module:
    return nn.Linear(1, 1)


def _cannot_be_taken_apart(**arguments: object) -> nn.Module:
    from timm.models import build_model_with_cfg

    return build_model_with_cfg(nn.Linear, "taken_apart", in_features=1, out_features=1, feature_cfg=None, **arguments)


@pytest.mark.parametrize("make", [_knows_no_feature_info, _takes_no_features_only, _cannot_be_taken_apart])
def test_a_backbone_that_offers_no_features_is_named(
    make: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    import timm.models._registry as registry

    monkeypatch.setitem(registry._model_entrypoints, "featureless", make)
    with pytest.raises(ValueError, match="backbone 'featureless' offers no intermediate features through timm"):
        backbone_stages("featureless")
