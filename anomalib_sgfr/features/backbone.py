"""Frozen backbones that give the features of some layers, and the image sizes that they accept."""

from collections.abc import Iterator, Sequence
from functools import cache, lru_cache

import timm
import torch
from anomalib.models.components import TimmFeatureExtractor
from torch import Tensor, nn

from anomalib_sgfr.features.layers import (
    ScoreLayers,
    backbone_layers,
    has_one_stride,
    is_sequential,
    resolve_layers,
    resolve_score_layers,
    sequential_features,
)

__all__ = ["accepts_size", "build_extractor", "default_size", "require_size"]

_DEFAULT_SIZE = (256, 256)
_PATCHES = 28  # along each side, where patches do not divide 256 pixels


def build_extractor(backbone: str, layers: Sequence[str], pre_trained: bool = False) -> nn.Module:
    """Build a frozen backbone that gives the features of some layers.

    Args:
        backbone (str): Name of a timm model, convolutional or transformer.
        layers (Sequence[str]): Layers to take features from, in network order.
        pre_trained (bool): Whether timm reads its weights; they are random otherwise. Defaults to
            ``False``.

    Returns:
        nn.Module: From images, shape ``(B, 3, H, W)``, to a dictionary of feature maps by layer,
        shape ``(B, C, h, w)``, or with the channels last for some backbones.
    """
    names = list(layers)
    one_stride = has_one_stride(backbone)
    extractor: nn.Module
    if is_sequential(backbone):
        extractor = _BlockExtractor(backbone, names, pre_trained)
    elif one_stride and _has_dynamic_size(backbone):
        # anomalib accepts any layer's name with "NLC" alone, and gives maps with "NCHW"
        extractor = TimmFeatureExtractor(backbone, names, pre_trained=pre_trained, output_fmt="NLC")
        extractor.output_fmt = "NCHW"
    elif one_stride or "vit" in backbone.lower():  # anomalib takes the latter for a plain ViT
        extractor = _StageExtractor(backbone, names, pre_trained)
    else:
        extractor = TimmFeatureExtractor(backbone, names, pre_trained=pre_trained)
    return extractor.eval().requires_grad_(requires_grad=False)


@cache
def _has_dynamic_size(backbone: str) -> bool:
    """Whether a transformer can resample its position embeddings, as anomalib asks it to."""
    try:
        with torch.device("meta"):
            timm.create_model(backbone, pretrained=False, dynamic_img_size=True)
    except TypeError:
        return False
    return True


class _StageExtractor(nn.Module):
    """timm's own feature pyramid, for backbones that anomalib's extractor cannot build."""

    def __init__(self, backbone: str, layers: list[str], pre_trained: bool) -> None:
        super().__init__()
        names = [layer.name for layer in backbone_layers(backbone)]
        self.layers = layers
        self.pyramid = timm.create_model(
            backbone,
            pretrained=pre_trained,
            features_only=True,
            out_indices=[names.index(layer) for layer in layers],
        )

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            return dict(zip(self.layers, self.pyramid(images), strict=True))


class _BlockExtractor(nn.Module):
    """Features of any block of a sequential network, run only up to the last one needed.

    anomalib's extractor gives only the last block of each stride, and runs the network to its end.
    Parameters have the same names as there.
    """

    def __init__(self, backbone: str, layers: list[str], pre_trained: bool) -> None:
        super().__init__()
        self.layers = layers
        self.feature_extractor = timm.create_model(
            backbone, pretrained=pre_trained, features_only=True, exportable=True
        )

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        features: dict[str, Tensor] = {}
        with torch.no_grad():
            for layer, feature in sequential_features(self.feature_extractor, images):
                if layer in self.layers:
                    features[layer] = feature
                if len(features) == len(self.layers):
                    break
        return features


@lru_cache(maxsize=2)
def _weightless_extractor(backbone: str, layers: tuple[str, ...]) -> nn.Module:
    with torch.device("meta"):
        return build_extractor(backbone, layers)


@lru_cache(maxsize=256)
def accepts_size(backbone: str, layers: tuple[str, ...], size: tuple[int, int]) -> bool:
    """Whether a backbone accepts images of a size; tried on PyTorch's meta device.

    Args:
        backbone (str): Name of a timm model.
        layers (tuple[str, ...]): Layers to take features from.
        size (tuple[int, int]): Height and width.

    Returns:
        bool: Whether features can be taken.
    """
    config = timm.get_pretrained_cfg(backbone, allow_unregistered=True)
    fixed_size = bool(getattr(config, "fixed_input_size", False))
    # any other backbone accepts multiples of 32
    if not (has_one_stride(backbone) or fixed_size or any(length % 32 for length in size)):
        return True
    try:
        _weightless_extractor(backbone, layers)(torch.zeros(1, 3, *size, device="meta"))
    except Exception:  # noqa: BLE001  # errors differ by backbone
        return False
    return True


def _sizes_to_try(backbone: str, size: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """Sizes that a backbone may accept: close to a given one, and the size of its training."""
    strides = [layer.stride for layer in backbone_layers(backbone)]
    for step in sorted({min(strides), max(strides), 32}):
        height, width = (max(step, round(length / step) * step) for length in size)
        yield height, width
    config = timm.get_pretrained_cfg(backbone, allow_unregistered=True)
    if config is not None:
        yield int(config.input_size[-2]), int(config.input_size[-1])


def default_size(
    backbone: str, layers: Sequence[str] | None = None, score_layers: ScoreLayers = None
) -> tuple[int, int]:
    """Height and width to resize images to: 256 x 256, or a size near it that a backbone accepts.

    A transformer whose patches do not divide 256 gets 28 patches along each side, 392 pixels for
    patches of 14; one of a fixed size gets that.

    Args:
        backbone (str): Name of a timm model.
        layers (Sequence[str] | None): See :func:`~anomalib_sgfr.features.layers.resolve_layers`.
        score_layers (ScoreLayers): See
            :func:`~anomalib_sgfr.features.layers.resolve_score_layers`.

    Returns:
        tuple[int, int]: Height and width; 256 x 256 if the arguments are wrong, which building the
        backbone then says.
    """
    try:
        map_layers = resolve_layers(backbone, layers)
        scored = resolve_score_layers(backbone, layers, score_layers)
    except ValueError:
        return _DEFAULT_SIZE
    known = backbone_layers(backbone)
    chosen = tuple(layer.name for layer in known if layer.name in {*map_layers, *scored})
    patch = max(layer.stride for layer in known if layer.name in map_layers)
    *_, trained = _sizes_to_try(backbone, _DEFAULT_SIZE)
    for size in (_DEFAULT_SIZE, (_PATCHES * patch, _PATCHES * patch), trained):
        if accepts_size(backbone, chosen, size):
            return size
    return _DEFAULT_SIZE


def require_size(backbone: str, layers: Sequence[str], size: tuple[int, int]) -> None:
    """Refuse a size that a backbone does not accept.

    Args:
        backbone (str): Name of a timm model.
        layers (Sequence[str]): Layers to take features from.
        size (tuple[int, int]): Height and width.

    Raises:
        ValueError: If it is not accepted, and another size is.
    """
    chosen = tuple(layers)
    if accepts_size(backbone, chosen, size):
        return
    for height, width in _sizes_to_try(backbone, size):
        if accepts_size(backbone, chosen, (height, width)):
            msg = (
                f"backbone '{backbone}' does not take images of {size[0]} x {size[1]} pixels:"
                f" {height} x {width} would do."
            )
            raise ValueError(msg)
