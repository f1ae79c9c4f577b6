"""Features of a backbone's layers: anomalib's own extractor, or what stands in for it where that
cannot give them.

Sizes of images that a backbone takes.
"""

from collections.abc import Sequence
from functools import cache, lru_cache

import timm
import torch
from anomalib.models.components import TimmFeatureExtractor
from torch import Tensor, nn

from anomalib_sgfr.features.layers import (
    backbone_layers,
    is_sequential,
    resolve_layers,
    resolve_score_layers,
    sequential_features,
)

__all__ = ["accepts_size", "build_extractor", "default_size", "require_size", "size_error"]


def build_extractor(backbone: str, layers: Sequence[str], pre_trained: bool = False) -> nn.Module:
    """Build a frozen backbone that gives the features of some layers.

    Args:
        backbone (str): Name of a timm model, convolutional or transformer.
        layers (Sequence[str]): Layers to take features from, in network order.
        pre_trained (bool): Whether timm is to read its weights; random ones if not. Defaults to
            ``False``.

    Returns:
        nn.Module: From images, shape ``(B, 3, H, W)``, to a dictionary of maps by layer, shape
        ``(B, C, h, w)``, or with the channels last for some backbones.
    """
    names = list(layers)
    extractor: nn.Module
    plain = (
        len({stage.stride for stage in backbone_layers(backbone)}) == 1
    )  # a plain transformer: one stride
    if is_sequential(backbone):
        extractor = _BlockExtractor(backbone, names, pre_trained)
    elif plain and _takes_any_size(backbone):
        tokens = TimmFeatureExtractor(backbone, names, pre_trained=pre_trained, output_fmt="NLC")
        tokens.output_fmt = "NCHW"  # the same route gives maps, which "NLC" only opens for any name
        extractor = tokens
    elif (
        plain or "vit" in backbone.lower()
    ):  # anomalib's extractor would take the latter for a plain ViT
        extractor = _StageExtractor(backbone, names, pre_trained)
    else:
        extractor = TimmFeatureExtractor(backbone, names, pre_trained=pre_trained)
    return extractor.eval().requires_grad_(requires_grad=False)


@cache
def _takes_any_size(backbone: str) -> bool:
    """Whether a transformer resamples its position embeddings to the image, as anomalib's extractor
    asks it to.
    """
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
        names = [stage.layer for stage in backbone_layers(backbone)]
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
    """Features of any block of a network that is a row of them, which is run no farther than they
    need.

    anomalib's extractor gives the last block of each stride alone, and runs the network to its end.
    Parameters have the names that they have there.
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


_DEFAULT_SIZE = (256, 256)
_PATCHES = 28  # along each side, where 256 pixels do not hold a whole number


@lru_cache(maxsize=2)
def _weightless(backbone: str, layers: tuple[str, ...]) -> nn.Module:
    with torch.device("meta"):
        return build_extractor(backbone, layers)


@lru_cache(maxsize=256)
def accepts_size(backbone: str, layers: tuple[str, ...], size: tuple[int, int]) -> bool:
    """Whether a backbone takes images of a size: tried without weights and without numbers.

    Args:
        backbone (str): Name of a timm model.
        layers (tuple[str, ...]): Layers to take features from.
        size (tuple[int, int]): Height and width.
    """
    if not _is_particular(backbone) and not any(length % 32 for length in size):
        return True
    try:
        _weightless(backbone, layers)(torch.zeros(1, 3, *size, device="meta"))
    except Exception:  # noqa: BLE001  # each backbone has its own
        return False
    return True


def _is_particular(backbone: str) -> bool:
    """Whether a backbone may not take any multiple of 32: transformers, mostly, by what timm knows
    of them.
    """
    config = timm.get_pretrained_cfg(backbone, allow_unregistered=True)
    one_stride = len({stage.stride for stage in backbone_layers(backbone)}) == 1
    return one_stride or bool(getattr(config, "fixed_input_size", False))


def _sizes_to_try(backbone: str, size: tuple[int, int]) -> list[tuple[int, int]]:
    """Sizes that a backbone may take, the closest to a given one first, and that it was trained
    with.
    """
    stages = backbone_layers(backbone)
    steps = {min(stage.stride for stage in stages), max(stage.stride for stage in stages), 32}
    rounded = [
        tuple(max(step, round(length / step) * step) for length in size) for step in sorted(steps)
    ]
    config = timm.get_pretrained_cfg(backbone, allow_unregistered=True)
    trained = [] if config is None else [(int(config.input_size[-2]), int(config.input_size[-1]))]
    return [*((height, width) for height, width in rounded), *trained]


def default_size(
    backbone: str, layers: Sequence[str] | None = None, score_layers: Sequence[str] | None = None
) -> tuple[int, int]:
    """Height and width to resize images to: 256 x 256, or what comes near it for a backbone that
    does not take that.

    A transformer whose patches do not divide 256 gets 28 patches along each side, 392 pixels for
    patches of 14; one of a fixed size gets that.

    Args:
        backbone (str): Name of a timm model.
        layers (Sequence[str] | None): See :func:`~anomalib_sgfr.features.layers.resolve_layers`.
        score_layers (Sequence[str] | None): See
            :func:`~anomalib_sgfr.features.layers.resolve_score_layers`.
    """
    try:
        of_map, of_score = (
            resolve_layers(backbone, layers),
            resolve_score_layers(backbone, layers, score_layers),
        )
    except ValueError:  # a mistake that is named where the backbone is built
        return _DEFAULT_SIZE
    stages = backbone_layers(backbone)
    chosen = tuple(stage.layer for stage in stages if stage.layer in {*of_map, *of_score})
    patch = max(stage.stride for stage in stages if stage.layer in of_map)
    many = (_PATCHES * patch, _PATCHES * patch)
    trained = _sizes_to_try(backbone, _DEFAULT_SIZE)[-1]
    fitting = (
        size for size in (_DEFAULT_SIZE, many, trained) if accepts_size(backbone, chosen, size)
    )
    return next(fitting, _DEFAULT_SIZE)


def size_error(backbone: str, layers: Sequence[str], size: tuple[int, int]) -> str:
    """What to tell a user of a size that a backbone does not take, with one that it takes."""
    chosen = tuple(layers)
    fitting = [
        other for other in _sizes_to_try(backbone, size) if accepts_size(backbone, chosen, other)
    ]
    hint = "".join(f": {height} x {width} would do" for height, width in fitting[:1])
    return f"backbone '{backbone}' does not take images of {size[0]} x {size[1]} pixels{hint}."


def require_size(backbone: str, layers: Sequence[str], size: tuple[int, int]) -> None:
    """Refuse a size that a backbone does not take.

    Args:
        backbone (str): Name of a timm model.
        layers (Sequence[str]): Layers to take features from.
        size (tuple[int, int]): Height and width.

    Raises:
        ValueError: With a size that it takes, if one is found.
    """
    others = [size, *_sizes_to_try(backbone, size)]
    if not accepts_size(backbone, tuple(layers), size) and any(
        accepts_size(backbone, tuple(layers), other) for other in others
    ):
        raise ValueError(size_error(backbone, layers, size))
