"""Layers of a backbone that features can be taken from, and the scales that they make."""

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple, TypeAlias

import timm
import torch
from timm.models.efficientnet import EfficientNetFeatures
from timm.models.mobilenetv3 import MobileNetV3Features
from torch import Tensor

from anomalib_sgfr.features.weights import require_backbone

__all__ = [
    "LayerInfo",
    "Scale",
    "ScoreLayers",
    "backbone_layers",
    "build_scales",
    "earlier_score_layers",
    "has_one_stride",
    "is_sequential",
    "layers_of_strides",
    "resolve_layers",
    "resolve_score_layers",
    "sequential_features",
]

ScoreLayers: TypeAlias = Sequence[str] | dict[str, float] | None

_MAP_STRIDES = (4, 8, 16)
_SCORE_STRIDES = (8, 16, 32)
# Of the image score. Stride 4 sees defects that no other does, and is the noisiest on textures.
_WEIGHTS = {4: 0.25}
_SEQUENTIAL = (EfficientNetFeatures, MobileNetV3Features)
_TRACED_SIDE = 256  # pixels: a multiple of every stride
_FINEST_GRID = 8  # stride of the finest scale, if there is a layer of it


class LayerInfo(NamedTuple):
    """A layer that features can be taken from.

    Attributes:
        name (str): timm's name.
        stride (int): Pixels of the image per position, along each axis.
        channels (int): Number of channels.
    """

    name: str
    stride: int
    channels: int


class Scale(NamedTuple):
    """Patch embeddings of one grid, and what their residuals contribute to.

    Attributes:
        layer_indices (tuple[int, ...]): Layers whose features are concatenated, in network order.
        stride (int): Pixels of the image per patch, along each axis.
        in_map (bool): Whether it contributes to the anomaly map.
        score_weight (float): Weight of its residuals in the image score; zero for none.
    """

    layer_indices: tuple[int, ...]
    stride: int
    in_map: bool = True
    score_weight: float = 1.0

    @property
    def contributes_to(self) -> str:
        """Anomaly map, image score or both, in words."""
        weight = "" if self.score_weight == 1.0 else f" by {self.score_weight:g}"
        parts = (("map", self.in_map), (f"score{weight}", self.score_weight > 0.0))
        return " and ".join(name for name, takes_part in parts if takes_part)


def _weightless_network(backbone: str) -> Any:  # noqa: ANN401
    """Timm's feature network on PyTorch's meta device."""
    with torch.device("meta"):
        return timm.create_model(backbone, pretrained=False, features_only=True)


@cache
def backbone_layers(backbone: str) -> tuple[LayerInfo, ...]:
    """Layers of a backbone, without allocating its weights.

    Args:
        backbone (str): Name of a timm model.

    Returns:
        tuple[LayerInfo, ...]: timm's feature layers, or every block of a sequential network, in
        network order.

    Raises:
        ValueError: If timm does not know the name, or the model offers no intermediate features.
    """
    require_backbone(backbone)
    try:
        network = _weightless_network(backbone)
        info = network.feature_info.info
    except (RuntimeError, AttributeError, TypeError) as error:
        # of models that a user registers with timm: RuntimeError is timm's for one that it cannot
        # split, AttributeError is of one without feature_info, TypeError without features_only
        msg = f"backbone '{backbone}' offers no intermediate features through timm: {error}"
        raise ValueError(msg) from error
    if not isinstance(network, _SEQUENTIAL):
        return tuple(LayerInfo(item["module"], item["reduction"], item["num_chs"]) for item in info)
    listed = {item["module"] for item in info}
    images = torch.zeros(1, 3, _TRACED_SIDE, _TRACED_SIDE, device="meta")
    return tuple(
        LayerInfo(name, _TRACED_SIDE // feature.shape[-1], feature.shape[1])
        for name, feature in sequential_features(network, images)
        if name in listed or name.startswith("blocks.")
    )


@cache
def is_sequential(backbone: str) -> bool:
    """Whether a backbone is a stem and a sequence of blocks."""
    return isinstance(_weightless_network(backbone), _SEQUENTIAL)


def has_one_stride(backbone: str) -> bool:
    """Whether all layers of a backbone have one stride, as those of a plain transformer."""
    return len({layer.stride for layer in backbone_layers(backbone)}) == 1


def sequential_features(network: Any, images: Tensor) -> Iterator[tuple[str, Tensor]]:  # noqa: ANN401
    """Names and features of the layers of a sequential network, one after the other.

    Args:
        network (Any): timm's, see :func:`is_sequential`.
        images (Tensor): Shape ``(B, 3, H, W)``.

    Yields:
        tuple[str, Tensor]: Name, and features of shape ``(B, C, h, w)``.
    """
    feature = network.bn1(network.conv_stem(images))
    feature = network.act1(feature) if hasattr(network, "act1") else feature
    yield "bn1", feature
    for number, block in enumerate(network.blocks):
        feature = block(feature)
        yield f"blocks.{number}", feature


def layers_of_strides(backbone: str, strides: Sequence[int]) -> list[str]:
    """One layer for each stride that a backbone has.

    Up to stride 16 the last, which has the most abstract features of that resolution; beyond, the
    first, before features specialise in the classes of ImageNet.

    Args:
        backbone (str): Name of a timm model.
        strides (Sequence[int]): Wanted.

    Returns:
        list[str]: Layer names in network order; none for a stride that the backbone lacks.
    """
    layers = backbone_layers(backbone)
    found = [
        names[-1 if stride <= _MAP_STRIDES[-1] else 0]
        for stride in strides
        if (names := [layer.name for layer in layers if layer.stride == stride])
    ]
    return [layer.name for layer in layers if layer.name in found]


def resolve_layers(backbone: str, layers: Sequence[str] | None = None) -> list[str]:
    """Choose or validate the layers that contribute to the anomaly map.

    Args:
        backbone (str): Name of a timm model.
        layers (Sequence[str] | None): Layer names, in any order. ``None`` for layers of stride 4, 8
            and 16 (see :func:`layers_of_strides`); of a backbone of one stride (a plain vision
            transformer) for the blocks at half and three quarters of its depth.

    Returns:
        list[str]: Layer names in network order.

    Raises:
        ValueError: If a name is unknown or repeated, ``layers`` is empty, or the backbone has no
            layer to default to.
    """
    if layers is not None:
        return _validated(backbone, "layers", layers)
    known = backbone_layers(backbone)
    if len(known) > 1 and has_one_stride(backbone):
        return [known[len(known) // 2 - 1].name, known[3 * len(known) // 4 - 1].name]
    if not any(layer.stride in _MAP_STRIDES and layer.stride in _SCORE_STRIDES for layer in known):
        msg = (
            f"backbone '{backbone}' has no layer of stride 8 or 16; pass layers, some of:"
            f" {_listed(known)}."
        )
        raise ValueError(msg)
    return layers_of_strides(backbone, _MAP_STRIDES)


def resolve_score_layers(
    backbone: str, layers: Sequence[str] | None = None, score_layers: ScoreLayers = None
) -> dict[str, float]:
    """Choose or validate the layers that contribute to the image score, and their weights.

    Args:
        backbone (str): Name of a timm model.
        layers (Sequence[str] | None): As given for the map.
        score_layers (ScoreLayers): Layer names in any order, of weight 1, or a weight for each.
            ``None`` for those of the map, if these were given or the backbone has one stride;
            otherwise for layers of stride 8, 16 and 32, and of stride 4 with a weight of 0.25.

    Returns:
        dict[str, float]: Weights of layers, in network order.

    Raises:
        ValueError: As :func:`resolve_layers`, or if a weight is not positive and finite.
    """
    if isinstance(score_layers, Mapping):
        names = _validated(backbone, "score_layers", list(score_layers))
        for name, weight in score_layers.items():
            if not 0.0 < weight < float("inf"):
                msg = (
                    "score_layers must have weights that are positive and finite, got"
                    f" {weight!r} for {name}."
                )
                raise ValueError(msg)
        return {name: float(score_layers[name]) for name in names}
    if score_layers is not None:
        return dict.fromkeys(_validated(backbone, "score_layers", score_layers), 1.0)
    map_layers = resolve_layers(backbone, layers)
    if layers is not None or has_one_stride(backbone):
        return dict.fromkeys(map_layers, 1.0)
    strides = {layer.name: layer.stride for layer in backbone_layers(backbone)}
    names = layers_of_strides(backbone, (*_WEIGHTS, *_SCORE_STRIDES))
    return {name: _WEIGHTS.get(strides[name], 1.0) for name in names}


def earlier_score_layers(backbone: str, layers: Sequence[str] | None = None) -> list[str]:
    """Default layers of the image score before layers had weights.

    Args:
        backbone (str): Name of a timm model.
        layers (Sequence[str] | None): As given for the map.

    Returns:
        list[str]: Layer names in network order, all of weight 1.
    """
    weights = resolve_score_layers(backbone, layers)
    return [name for name, weight in weights.items() if weight == 1.0]


def _validated(backbone: str, argument: str, layers: Sequence[str]) -> list[str]:
    known = backbone_layers(backbone)
    names = [layer.name for layer in known]
    if isinstance(layers, str) or not layers or len(set(layers)) != len(layers):
        msg = (
            f"{argument} must be a list of one or more different names, got {layers!r};"
            f" '{backbone}' has: {_listed(known)}."
        )
        raise ValueError(msg)
    unknown = [layer for layer in layers if layer not in names]
    if unknown:
        msg = f"{argument} {unknown} are not in backbone '{backbone}', which has: {_listed(known)}."
        raise ValueError(msg)
    return sorted(layers, key=names.index)


def _listed(layers: Sequence[LayerInfo]) -> str:
    return ", ".join(f"{layer.name} (stride {layer.stride})" for layer in layers)


def build_scales(
    strides: Sequence[int], roles: Sequence[tuple[bool, float]] | None = None
) -> list[Scale]:
    """Scales of some layers, one for each.

    A layer finer than stride 8 is resized to the grid of stride 8, if there is a layer of that:
    patches of 4 x 4 pixels are many, and add little.

    Args:
        strides (Sequence[int]): Of the layers, in network order.
        roles (Sequence[tuple[bool, float]] | None): Of each, whether it contributes to the map,
            and its weight in the score; ``None`` for all, of weight 1.

    Returns:
        list[Scale]: The finest first.
    """
    roles = [(True, 1.0)] * len(strides) if roles is None else list(roles)
    grids = [max(stride, _FINEST_GRID) if _FINEST_GRID in strides else stride for stride in strides]
    order = sorted(range(len(strides)), key=lambda index: (grids[index], strides[index], index))
    return [Scale((index,), grids[index], *roles[index]) for index in order]
