"""Layers of backbones: those of timm, the defaults, and what is refused."""

from collections.abc import Callable

import pytest
import timm
import torch
from torch import nn

from anomalib_sgfr.features.embedding import PatchEmbedder
from anomalib_sgfr.features.layers import (
    backbone_layers,
    earlier_score_layers,
    layers_of_strides,
    resolve_layers,
    resolve_score_layers,
)


@pytest.mark.parametrize(
    ("backbone", "layers", "score_layers"),
    [
        ("tf_efficientnet_lite0", ["blocks.1", "blocks.2", "blocks.4"], "blocks.5"),
        ("resnet18", ["layer1", "layer2", "layer3"], "layer4"),
        ("convnext_atto", ["stages.0", "stages.1", "stages.2"], "stages.3"),
    ],
)
def test_the_map_has_fine_layers_by_default_and_the_score_deep_ones(
    backbone: str, layers: list[str], score_layers: str
) -> None:
    deep = [*layers[1:], score_layers]
    assert resolve_layers(backbone) == layers
    weights = resolve_score_layers(backbone)
    assert weights == {layers[0]: 0.25} | dict.fromkeys(deep, 1.0)
    assert list(weights) == [*layers, score_layers]
    assert earlier_score_layers(backbone) == deep
    # what is given is for both
    assert resolve_score_layers(backbone, layers[:1]) == {layers[0]: 1.0}
    assert earlier_score_layers(backbone, layers[:1]) == layers[:1]
    given = resolve_score_layers(backbone, layers, deep[::-1])
    assert list(given.items()) == [(name, 1.0) for name in deep]
    given = resolve_score_layers(backbone, layers, dict.fromkeys(deep[::-1], 0.5))
    assert list(given.items()) == [(name, 0.5) for name in deep]


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_weights_that_cannot_be_are_refused(weight: float) -> None:
    message = "score_layers must have weights that are positive and finite, got .* for blocks.2"
    with pytest.raises(ValueError, match=message):
        resolve_score_layers("tf_efficientnet_lite0", None, {"blocks.4": 1.0, "blocks.2": weight})
    with pytest.raises(ValueError, match=r"score_layers \['stem'\] are not in backbone"):
        resolve_score_layers("tf_efficientnet_lite0", None, {"stem": 1.0})
    with pytest.raises(ValueError, match="score_layers must be a list of one or more"):
        resolve_score_layers("tf_efficientnet_lite0", None, {})


def test_a_plain_transformer_has_the_same_layers_for_map_and_score() -> None:
    backbone, layers = "vit_tiny_patch16_224", ["blocks.5", "blocks.8"]
    assert resolve_layers(backbone) == layers
    assert resolve_score_layers(backbone) == dict.fromkeys(layers, 1.0)
    assert list(resolve_score_layers(backbone, layers[:1])) == layers[:1]
    assert list(resolve_score_layers(backbone, layers, layers[::-1])) == layers


def test_layers_are_those_of_timm_and_the_blocks_between() -> None:
    layers = backbone_layers("tf_efficientnet_lite0")
    assert [layer.name for layer in layers] == [f"blocks.{index}" for index in range(7)]
    assert [layer.stride for layer in layers] == [2, 4, 8, 16, 16, 32, 32]
    assert [layer.channels for layer in layers] == [16, 24, 40, 80, 112, 192, 320]
    listed = timm.create_model("tf_efficientnet_lite0", features_only=True).feature_info.info
    assert {(item["module"], item["reduction"], item["num_chs"]) for item in listed} < set(layers)
    by_stride = layers_of_strides("tf_efficientnet_lite0", (4, 8, 16, 32))
    assert by_stride == ["blocks.1", "blocks.2", "blocks.4", "blocks.5"]
    names = [layer.name for layer in backbone_layers("resnet18")]
    assert names == ["act1", "layer1", "layer2", "layer3", "layer4"]


@pytest.mark.parametrize(
    "backbone", ["tf_efficientnet_lite0", "mobilenetv3_small_050", "mobilenetv4_conv_small"]
)
def test_features_of_blocks_are_those_of_timm_and_later_blocks_do_not_run(backbone: str) -> None:
    torch.manual_seed(0)
    network = timm.create_model(backbone, features_only=True).eval()
    named = {item["module"]: index for index, item in enumerate(network.feature_info.info)}
    layers = [layer.name for layer in backbone_layers(backbone)]
    images = torch.randn(2, 3, 96, 64)
    whole = PatchEmbedder(backbone, layers).extractor
    whole.feature_extractor.load_state_dict(network.state_dict())
    found = whole(images)
    assert list(found) == layers
    with torch.no_grad():
        expected = network(images)
    for layer, index in named.items():
        torch.testing.assert_close(found[layer], expected[index])
    early = PatchEmbedder(backbone, layers[:2]).extractor
    early.feature_extractor.load_state_dict(network.state_dict())
    early.feature_extractor.blocks[-1].register_forward_hook(
        lambda *_: pytest.fail("a later block ran")
    )
    assert all(map(torch.equal, early(images).values(), (found[layer] for layer in layers[:2])))


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (
            ["layer2", "layer9"],
            r"\['layer9'\] are not in backbone 'resnet18'.*layer1 \(stride 4\).*layer4",
        ),
        ([], "one or more different names"),
        ("layer2", "one or more different names"),
        (["layer2", "layer2"], "one or more different names"),
    ],
)
def test_wrong_layers_are_refused(layers: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PatchEmbedder("resnet18", layers)


def test_an_unknown_backbone_gets_suggestions() -> None:
    with pytest.raises(ValueError, match=r"'resnet1' is not a timm model\. Similar .*resnet18"):
        backbone_layers("resnet1")


def _without_feature_info(**_: object) -> nn.Module:
    return nn.Linear(1, 1)


def _without_features_only() -> nn.Module:
    return nn.Linear(1, 1)


def _not_to_be_split(**arguments: object) -> nn.Module:
    from timm.models import build_model_with_cfg

    return build_model_with_cfg(
        nn.Linear, "not_to_be_split", in_features=1, out_features=1, feature_cfg=None, **arguments
    )


@pytest.mark.parametrize("build", [_without_feature_info, _without_features_only, _not_to_be_split])
def test_a_backbone_without_features_is_refused(
    build: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    import timm.models._registry as registry

    monkeypatch.setitem(registry._model_entrypoints, "featureless", build)
    with pytest.raises(ValueError, match="backbone 'featureless' offers no intermediate features"):
        backbone_layers("featureless")
