"""Layers: the places of a backbone that features can be taken from, and which of them make a scale."""

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

import timm
import torch
from timm.models.efficientnet import EfficientNetFeatures
from timm.models.mobilenetv3 import MobileNetV3Features
from torch import Tensor, nn

from anomalib_sgfr.core.arguments import BankPer
from anomalib_sgfr.features.weights import require_backbone

__all__ = [
    "LayerInfo",
    "Scale",
    "backbone_layers",
    "build_scales",
    "is_sequential",
    "layers_of_strides",
    "resolve_layers",
    "resolve_score_layers",
    "sequential_features",
]

_MAP_STRIDES = (4, 8, 16)
_COARSEST_OF_MAP = 16
_SCORE_STRIDES = (8, 16, 32)
_OF_BLOCKS = (EfficientNetFeatures, MobileNetV3Features)
_SIDE = 256  # of an image that is divided by every stride
_FINEST = 8  # stride of the finest scale, where there is a layer of it


class LayerInfo(NamedTuple):
    """One place of a backbone where features can be taken: layer name, stride in input pixels,
    number of channels.
    """

    layer: str
    stride: int
    channels: int


class Scale(NamedTuple):
    """Layers whose features make one embedding of each patch, and what it is heard in.

    Attributes:
        layer_indices (tuple[int, ...]): Places of the layers in network order, from fine to coarse.
        stride (int): Of the grid of patches, in input pixels.
        in_map (bool): Whether the anomaly map hears it.
        in_score (bool): Whether the image's score does.
    """

    layer_indices: tuple[int, ...]
    stride: int
    in_map: bool = True
    in_score: bool = True


@cache
def backbone_layers(backbone: str) -> tuple[LayerInfo, ...]:
    """List the stages of a backbone, from timm's feature information, without allocating its
    weights.

    Args:
        backbone (str): Name of a timm model.

    Returns:
        tuple[LayerInfo, ...]: Stages in network order.

    Raises:
        ValueError: If timm does not know the name or the model offers no intermediate features.
    """
    require_backbone(backbone)
    try:
        with torch.device("meta"):
            network: Any = timm.create_model(backbone, pretrained=False, features_only=True)
            info: Any = network.feature_info
    except (RuntimeError, AttributeError, TypeError) as error:
        # timm has no error of its own for it. All of its own models work; of those a user
        # registers, RuntimeError is what timm says of one it cannot take apart, AttributeError is
        # one that knows no feature_info, TypeError one whose function takes no features_only.
        msg = f"backbone '{backbone}' offers no intermediate features through timm: {error}"
        raise ValueError(msg) from error
    listed = tuple(
        LayerInfo(item["module"], item["reduction"], item["num_chs"]) for item in info.info
    )
    return _blocks(network, listed) if isinstance(network, _OF_BLOCKS) else listed


def _blocks(network: nn.Module, listed: Sequence[LayerInfo]) -> tuple[LayerInfo, ...]:
    """Every block of a network that is a row of them, of which timm lists the last of each stride
    alone.
    """
    names = [stage.layer for stage in listed]
    images = torch.zeros(1, 3, _SIDE, _SIDE, device="meta")
    every = [
        LayerInfo(layer, _SIDE // feature.shape[-1], feature.shape[1])
        for layer, feature in sequential_features(network, images)
    ]
    return tuple(
        stage for stage in every if stage.layer in names or stage.layer.startswith("blocks.")
    )


def sequential_features(network: Any, images: Tensor) -> Iterator[tuple[str, Tensor]]:  # noqa: ANN401
    """Features of a network that is a row of blocks, by the names of its layers, one after the
    other.
    """
    feature = network.bn1(network.conv_stem(images))
    feature = network.act1(feature) if hasattr(network, "act1") else feature
    yield "bn1", feature
    for number, block in enumerate(network.blocks):
        feature = block(feature)
        yield f"blocks.{number}", feature


def layers_of_strides(backbone: str, strides: Sequence[int]) -> list[str]:
    """One layer for each stride that a backbone has.

    Up to stride 16 the last, where a network has said most of what it says at that resolution;
    beyond, the first, before what is there to tell ImageNet's classes apart.

    Args:
        backbone (str): Name of a timm model.
        strides (Sequence[int]): Wanted.

    Returns:
        list[str]: Layer names in network order; none for a stride that the backbone lacks.
    """
    stages = backbone_layers(backbone)
    found = [
        of_stride[-1 if stride <= _COARSEST_OF_MAP else 0]
        for stride in strides
        if (of_stride := [stage.layer for stage in stages if stage.stride == stride])
    ]
    return [stage.layer for stage in stages if stage.layer in found]


def resolve_layers(backbone: str, layers: Sequence[str] | None = None) -> list[str]:
    """Choose or validate the layers that the anomaly map hears.

    Args:
        backbone (str): Name of a timm model.
        layers (Sequence[str] | None): Layer names, in any order, or ``None`` for the stages of
            stride 4, 8 and 16 (see :func:`layers_of_strides`). A backbone of one stride throughout (a
            plain vision transformer) then gives the blocks that end the first half and the first
            three quarters of its depth.

    Returns:
        list[str]: Layer names in network order.

    Raises:
        ValueError: If a name is unknown or repeated, ``layers`` is empty, or the backbone has no
            stage to default to.
    """
    stages = backbone_layers(backbone)
    if layers is not None:
        return _validated(backbone, "layers", layers)
    names = [stage.layer for stage in stages]
    if len(names) > 1 and len({stage.stride for stage in stages}) == 1:
        return [names[len(names) // 2 - 1], names[3 * len(names) // 4 - 1]]
    if not any(stage.stride in _MAP_STRIDES and stage.stride in _SCORE_STRIDES for stage in stages):
        msg = (
            f"backbone '{backbone}' has no stage of stride 8 or 16; pass layers, some of:"
            f" {_listing(stages)}."
        )
        raise ValueError(msg)
    return layers_of_strides(backbone, _MAP_STRIDES)


def resolve_score_layers(
    backbone: str, layers: Sequence[str] | None = None, score_layers: Sequence[str] | None = None
) -> list[str]:
    """Choose or validate the layers that the image's score hears.

    Args:
        backbone (str): Name of a timm model.
        layers (Sequence[str] | None): As given for the map.
        score_layers (Sequence[str] | None): Layer names, in any order. ``None`` for those of the
            map, if these were given or the backbone is of one stride throughout; otherwise the
            stages of stride 8, 16 and 32.

    Returns:
        list[str]: Layer names in network order.

    Raises:
        ValueError: As :func:`resolve_layers`.
    """
    if score_layers is not None:
        return _validated(backbone, "score_layers", score_layers)
    stages = backbone_layers(backbone)
    of_map = resolve_layers(backbone, layers)
    if layers is not None or len({stage.stride for stage in stages}) == 1:
        return of_map
    return layers_of_strides(backbone, _SCORE_STRIDES)


def _validated(backbone: str, argument: str, layers: Sequence[str]) -> list[str]:
    stages = backbone_layers(backbone)
    names = [stage.layer for stage in stages]
    if isinstance(layers, str) or not layers or len(set(layers)) != len(layers):
        msg = (
            f"{argument} must be a list of one or more different names, got {layers!r};"
            f" '{backbone}' has: {_listing(stages)}."
        )
        raise ValueError(msg)
    unknown = [layer for layer in layers if layer not in names]
    if unknown:
        msg = (
            f"{argument} {unknown} are not in backbone '{backbone}', which has: {_listing(stages)}."
        )
        raise ValueError(msg)
    return sorted(layers, key=names.index)


def _listing(stages: Sequence[LayerInfo]) -> str:
    return ", ".join(f"{stage.layer} (stride {stage.stride})" for stage in stages)


@cache
def is_sequential(backbone: str) -> bool:
    """Whether a backbone is a stem and a row of blocks, any of which :func:`sequential_features` gives."""
    with torch.device("meta"):
        return isinstance(
            timm.create_model(backbone, pretrained=False, features_only=True), _OF_BLOCKS
        )


def build_scales(
    strides: Sequence[int],
    roles: Sequence[tuple[bool, bool]] | None = None,
    bank_per: BankPer = "layer",
) -> list[Scale]:
    """Which layers make a scale.

    A layer finer than stride 8 goes to the grid of stride 8, if there is a layer of that: patches
    of 4 x 4 pixels are too many for what they tell.

    Args:
        strides (Sequence[int]): Of the layers, in network order.
        roles (Sequence[tuple[bool, bool]] | None): Of each, whether the map and whether the score
            hears it; ``None`` for both.
        bank_per (BankPer): ``"layer"``: each layer is a scale. ``"stride"``: those of one grid and
            role are one.

    Returns:
        list[Scale]: The finest first.
    """
    roles = [(True, True)] * len(strides) if roles is None else list(roles)
    grids = [max(stride, _FINEST) if _FINEST in strides else stride for stride in strides]
    order = sorted(range(len(strides)), key=lambda index: (grids[index], strides[index], index))
    groups: dict[tuple[Any, ...], list[int]] = {}
    for index in order:
        alone = () if bank_per == "stride" else (index,)
        groups.setdefault((grids[index], *roles[index], *alone), []).append(index)
    return [
        Scale(tuple(layer_indices), grid, *roles[layer_indices[0]])
        for (grid, *_), layer_indices in groups.items()
    ]
