"""Patch embeddings: backbone features, locally averaged, aligned and concatenated."""

from collections.abc import Sequence
from functools import cache, lru_cache
from typing import get_args

import timm
import torch
from anomalib.models.components import TimmFeatureExtractor
from torch import Tensor, nn
from torch.nn import functional

from anomalib_sgfr.core import kernels, on_card
from anomalib_sgfr.core.arguments import BankPer, Pooling
from anomalib_sgfr.features.backbones import load_pretrained
from anomalib_sgfr.features.layers import (
    Scale,
    backbone_stages,
    blocks_of,
    is_row_of_blocks,
    resolve_layers,
    resolve_score_layers,
    scales_of,
)

__all__ = [
    "PatchEmbedder",
    "assemble",
    "default_size",
    "pool",
    "refusal",
    "require_size",
    "takes",
]

_DEFAULT_SIZE = (256, 256)
_PATCHES = 28  # along each side, where 256 pixels do not hold a whole number


def pool(feature: Tensor, pooling: Pooling = "binomial") -> Tensor:
    """Average each place of a feature map with its neighbours; beyond the border there are zeros.

    Args:
        feature (Tensor): Shape ``(B, C, h, w)``.
        pooling (Pooling): ``"box"``: 3 x 3 neighbours alike, as PatchCore does. ``"binomial"``: 5 x 5, with the weights
            1, 4, 6, 4, 1 (sixteenths) along each axis, close to a Gaussian of standard deviation 1.

    Returns:
        Tensor: Of the same shape.
    """
    if pooling == "box":
        return functional.avg_pool2d(feature, 3, stride=1, padding=1)
    if not (torch.compiler.is_compiling() or feature.requires_grad) and on_card.serve(feature):
        return kernels.binomial(feature)
    for padding in (1, 1, 0, 0):  # averages of two, four times over: what every runtime has, and has fast
        feature = functional.avg_pool2d(feature, 2, stride=1, padding=padding)
    return feature


def assemble(
    features: Sequence[Tensor], strides: Sequence[int], scales: Sequence[Scale], pooling: Pooling = "binomial"
) -> list[Tensor]:
    """Turn feature maps of several strides into maps of patch embeddings, one for each scale.

    Each map is averaged locally, as in the locally aware patch features of PatchCore (Roth et al., CVPR 2022, sec.
    3.1). What is finer than its scale's grid is resized (bilinear); several maps of a scale are concatenated over
    channels.

    Args:
        features (Sequence[Tensor]): Maps of shape ``(B, C_i, h_i, w_i)``.
        strides (Sequence[int]): Their strides.
        scales (Sequence[Scale]): See :func:`~anomalib_sgfr.features.layers.scales_of`.
        pooling (Pooling): See :func:`pool`.

    Returns:
        list[Tensor]: Embeddings of each scale, shape ``(B, d, h, w)``.
    """
    made = []
    for scale in scales:
        grid = features[strides.index(scale.stride)].shape[-2:]
        aligned = [
            feature
            if strides[index] == scale.stride
            else functional.interpolate(feature, size=grid, mode="bilinear", align_corners=False)
            for index in scale.members
            for feature in (pool(features[index], pooling),)
        ]
        made.append(aligned[0] if len(aligned) == 1 else torch.cat(aligned, 1))
    return made


class PatchEmbedder(nn.Module):
    """Frozen timm backbone followed by :func:`assemble`.

    Built with random weights: neither network nor weights package is touched before :meth:`load_pretrained`, so that a
    checkpoint restores anywhere.

    Args:
        backbone (str): Name of a timm model, convolutional or transformer.
        layers (Sequence[str] | None): That the map hears, see :func:`~anomalib_sgfr.features.layers.resolve_layers`.
        pooling (Pooling): See :func:`pool`.
        score_layers (Sequence[str] | None): That the score hears, see
            :func:`~anomalib_sgfr.features.layers.resolve_score_layers`.
        bank_per (BankPer): See :func:`~anomalib_sgfr.features.layers.scales_of`.

    Attributes:
        layers (list[str]): All of them, in network order.
        scales (list[Scale]): What an image is embedded in, the finest first.

    Raises:
        ValueError: If backbone, layers, pooling or ``bank_per`` are unknown.
    """

    def __init__(
        self,
        backbone: str,
        layers: Sequence[str] | None = None,
        pooling: Pooling = "binomial",
        score_layers: Sequence[str] | None = None,
        bank_per: BankPer = "layer",
    ) -> None:
        super().__init__()
        for name, value, known in (("pooling", pooling, Pooling), ("bank_per", bank_per, BankPer)):
            if value not in get_args(known):
                msg = f"{name} must be one of {', '.join(get_args(known))}, got '{value}'."
                raise ValueError(msg)
        self.pooling: Pooling = pooling
        self.backbone = backbone
        of_map, of_score = resolve_layers(backbone, layers), resolve_score_layers(backbone, layers, score_layers)
        stages = [stage for stage in backbone_stages(backbone) if stage.layer in {*of_map, *of_score}]
        self.layers = [stage.layer for stage in stages]
        self.channels = [stage.channels for stage in stages]
        self.strides = [stage.stride for stage in stages]
        roles = [(layer in of_map, layer in of_score) for layer in self.layers]
        self.scales = scales_of(self.strides, roles, bank_per)
        self.extractor = self._extractor(backbone)

    def _extractor(self, backbone: str, pre_trained: bool = False) -> nn.Module:
        extractor: nn.Module
        plain = len({stage.stride for stage in backbone_stages(backbone)}) == 1  # a plain transformer: one stride
        if is_row_of_blocks(backbone):
            extractor = _BlockExtractor(backbone, self.layers, pre_trained)
        elif plain and _takes_any_size(backbone):
            tokens = TimmFeatureExtractor(backbone, self.layers, pre_trained=pre_trained, output_fmt="NLC")
            tokens.output_fmt = "NCHW"  # the same route gives maps, which "NLC" only opens for any name
            extractor = tokens
        elif plain or "vit" in backbone.lower():  # anomalib's extractor would take the latter for a plain ViT
            extractor = _StageExtractor(backbone, self.layers, pre_trained)
        else:
            extractor = TimmFeatureExtractor(backbone, self.layers, pre_trained=pre_trained)
        return extractor.eval().requires_grad_(requires_grad=False)

    def load_pretrained(self) -> None:
        """Read the backbone's pretrained weights, from an installed weights package or as timm does.

        Raises:
            RuntimeError: If they are not to be had; the message says what to install.
        """
        load_pretrained(self.extractor, self.backbone, lambda name: self._extractor(name, pre_trained=True))

    def train(self, mode: bool = True) -> "PatchEmbedder":
        """Keep the backbone in evaluation mode always: its batch statistics are frozen."""
        super().train(mode)
        self.extractor.eval()
        return self

    @property
    def widths(self) -> list[int]:
        """Number of values of a patch's embedding, scale by scale."""
        return [sum(self.channels[member] for member in scale.members) for scale in self.scales]

    @property
    def scale_strides(self) -> list[int]:
        """Strides of the maps that an image is embedded in, the finest first."""
        return [scale.stride for scale in self.scales]

    def forward(self, images: Tensor) -> list[Tensor]:
        """Embed images.

        Args:
            images (Tensor): Normalised images, shape ``(B, 3, H, W)``.

        Returns:
            list[Tensor]: Embeddings of each scale, the finest first, shape ``(B, d, h, w)``.
        """
        weights = next(self.extractor.parameters())
        features = self._features(images if images.dtype == weights.dtype else images.to(weights.dtype))
        return assemble(
            [
                feature
                if feature.shape[1] == channels
                else feature.permute(0, 3, 1, 2)  # some backbones put channels last
                for feature, channels in zip((features[layer] for layer in self.layers), self.channels, strict=True)
            ],
            self.strides,
            self.scales,
            self.pooling,
        )

    def _features(self, images: Tensor) -> dict[str, Tensor]:
        if torch.compiler.is_compiling():
            return self.extractor(images)
        try:
            return self.extractor(images)
        except (AssertionError, RuntimeError) as error:  # what backbones say of a size, often without its name
            height, width = images.shape[-2:]
            if images.is_meta or takes(self.backbone, tuple(self.layers), (height, width)):
                raise
            raise ValueError(refusal(self.backbone, self.layers, (height, width))) from error


@lru_cache(maxsize=2)
def _weightless(backbone: str, layers: tuple[str, ...]) -> PatchEmbedder:
    """Of all the layers, whoever hears them."""
    with torch.device("meta"):
        return PatchEmbedder(backbone, layers)


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


@cache
def _takes_any_size(backbone: str) -> bool:
    """Whether a transformer resamples its position embeddings to the image, as anomalib's extractor asks it to."""
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
        names = [stage.layer for stage in backbone_stages(backbone)]
        self.layers = layers
        self.pyramid = timm.create_model(
            backbone, pretrained=pre_trained, features_only=True, out_indices=[names.index(layer) for layer in layers]
        )

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            return dict(zip(self.layers, self.pyramid(images), strict=True))


class _BlockExtractor(nn.Module):
    """Features of any block of a network that is a row of them, which is run no farther than they need.

    anomalib's extractor gives the last block of each stride alone, and runs the network to its end. Parameters have the
    names that they have there.
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
            for layer, feature in blocks_of(self.feature_extractor, images):
                if layer in self.layers:
                    features[layer] = feature
                if len(features) == len(self.layers):
                    break
        return features
