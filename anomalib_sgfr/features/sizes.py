"""Sizes of images that a backbone takes."""

from collections.abc import Sequence
from functools import lru_cache

import timm
import torch
from torch import nn

from anomalib_sgfr.features.extractors import extractor_of
from anomalib_sgfr.features.layers import backbone_stages, resolve_layers, resolve_score_layers

__all__ = ["default_size", "refusal", "require_size", "takes"]

_DEFAULT_SIZE = (256, 256)
_PATCHES = 28  # along each side, where 256 pixels do not hold a whole number


@lru_cache(maxsize=2)
def _weightless(backbone: str, layers: tuple[str, ...]) -> nn.Module:
    with torch.device("meta"):
        return extractor_of(backbone, layers)


@lru_cache(maxsize=256)
def takes(backbone: str, layers: tuple[str, ...], size: tuple[int, int]) -> bool:
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
    """Whether a backbone may not take any multiple of 32: transformers, mostly, by what timm knows of them."""
    config = timm.get_pretrained_cfg(backbone, allow_unregistered=True)
    one_stride = len({stage.stride for stage in backbone_stages(backbone)}) == 1
    return one_stride or bool(getattr(config, "fixed_input_size", False))


def _sizes_to_try(backbone: str, size: tuple[int, int]) -> list[tuple[int, int]]:
    """Sizes that a backbone may take, the closest to a given one first, and that it was trained with."""
    stages = backbone_stages(backbone)
    steps = {min(stage.stride for stage in stages), max(stage.stride for stage in stages), 32}
    rounded = [tuple(max(step, round(length / step) * step) for length in size) for step in sorted(steps)]
    config = timm.get_pretrained_cfg(backbone, allow_unregistered=True)
    trained = [] if config is None else [(int(config.input_size[-2]), int(config.input_size[-1]))]
    return [*((height, width) for height, width in rounded), *trained]


def default_size(
    backbone: str, layers: Sequence[str] | None = None, score_layers: Sequence[str] | None = None
) -> tuple[int, int]:
    """Height and width to resize images to: 256 x 256, or what comes near it for a backbone that does not take that.

    A transformer whose patches do not divide 256 gets 28 patches along each side, 392 pixels for patches of 14; one of
    a fixed size gets that.

    Args:
        backbone (str): Name of a timm model.
        layers (Sequence[str] | None): See :func:`~anomalib_sgfr.features.layers.resolve_layers`.
        score_layers (Sequence[str] | None): See :func:`~anomalib_sgfr.features.layers.resolve_score_layers`.
    """
    try:
        of_map, of_score = resolve_layers(backbone, layers), resolve_score_layers(backbone, layers, score_layers)
    except ValueError:  # a mistake that is named where the backbone is built
        return _DEFAULT_SIZE
    stages = backbone_stages(backbone)
    chosen = tuple(stage.layer for stage in stages if stage.layer in {*of_map, *of_score})
    patch = max(stage.stride for stage in stages if stage.layer in of_map)
    many = (_PATCHES * patch, _PATCHES * patch)
    trained = _sizes_to_try(backbone, _DEFAULT_SIZE)[-1]
    fitting = (size for size in (_DEFAULT_SIZE, many, trained) if takes(backbone, chosen, size))
    return next(fitting, _DEFAULT_SIZE)


def refusal(backbone: str, layers: Sequence[str], size: tuple[int, int]) -> str:
    """What to tell a user of a size that a backbone does not take, with one that it takes."""
    chosen = tuple(layers)
    fitting = [other for other in _sizes_to_try(backbone, size) if takes(backbone, chosen, other)]
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
    if not takes(backbone, tuple(layers), size) and any(takes(backbone, tuple(layers), other) for other in others):
        raise ValueError(refusal(backbone, layers, size))
