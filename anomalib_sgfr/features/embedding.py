"""Patch embeddings: backbone features, locally averaged, aligned and concatenated."""

from collections.abc import Callable, Sequence
from typing import get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from anomalib_sgfr.core import gpu
from anomalib_sgfr.core.arguments import BankPer, Copies, Pooling
from anomalib_sgfr.features.backbone import accepts_size, build_extractor, size_error
from anomalib_sgfr.features.layers import (
    Scale,
    backbone_layers,
    build_scales,
    resolve_layers,
    resolve_score_layers,
)
from anomalib_sgfr.features.weights import load_pretrained

__all__ = ["PatchEmbedder", "align_features", "embed_copies", "pool"]

# Quarter turns of each copy, and whether left and right are exchanged before; the first is the
# image itself.
_COPIES: dict[Copies, tuple[tuple[int, bool], ...]] = {
    "mirrored": ((0, False), (0, True), (2, False), (2, True)),
    "turned": ((0, False), (1, False), (2, False), (3, False)),
}


def pool(feature: Tensor, pooling: Pooling = "binomial") -> Tensor:
    """Average each place of a feature map with its neighbours; beyond the border there are zeros.

    Args:
        feature (Tensor): Shape ``(B, C, h, w)``.
        pooling (Pooling): ``"box"``: 3 x 3 neighbours alike, as PatchCore does. ``"binomial"``: 5 x
            5, with the weights 1, 4, 6, 4, 1 (sixteenths) along each axis, close to a Gaussian of
            standard deviation 1.

    Returns:
        Tensor: Of the same shape.
    """
    if pooling == "box":
        return functional.avg_pool2d(feature, 3, stride=1, padding=1)
    if not (torch.compiler.is_compiling() or feature.requires_grad) and gpu.serve(feature):
        return gpu.binomial(feature)
    for padding in (
        1,
        1,
        0,
        0,
    ):  # averages of two, four times over: what every runtime has, and has fast
        feature = functional.avg_pool2d(feature, 2, stride=1, padding=padding)
    return feature


def align_features(
    features: Sequence[Tensor],
    strides: Sequence[int],
    scales: Sequence[Scale],
    pooling: Pooling = "binomial",
) -> list[Tensor]:
    """Turn feature maps of several strides into maps of patch embeddings, one for each scale.

    Each map is averaged locally, as in the locally aware patch features of PatchCore (Roth et al.,
    CVPR 2022, sec. 3.1). What is finer than its scale's grid is resized (bilinear); several maps of
    a scale are concatenated over channels.

    Args:
        features (Sequence[Tensor]): Maps of shape ``(B, C_i, h_i, w_i)``.
        strides (Sequence[int]): Their strides.
        scales (Sequence[Scale]): See :func:`~anomalib_sgfr.features.layers.build_scales`.
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
            for index in scale.layer_indices
            for feature in (pool(features[index], pooling),)
        ]
        made.append(aligned[0] if len(aligned) == 1 else torch.cat(aligned, 1))
    return made


def embed_copies(
    embed: Callable[[Tensor], list[Tensor]], images: Tensor, copies: Copies
) -> list[Tensor]:
    """Embed images and flipped or rotated copies of them, each patch where it lies in the image.

    Args:
        embed (Callable[[Tensor], list[Tensor]]): From images to embeddings of each scale.
        images (Tensor): Shape ``(B, 3, H, W)``.
        copies (Copies): ``"mirrored"``: flipped left to right, top to bottom, and both.
            ``"turned"``: rotated by each right angle. ``"none"``: the images alone.

    Returns:
        list[Tensor]: Embeddings of each scale, the images first and then one copy of all after the
        other, shape ``(C B, d, h, w)``.
    """
    if copies == "none":
        return embed(images)
    found = []
    for quarters, mirrored in _COPIES[copies]:
        copy_of = torch.rot90(images.flip(-1) if mirrored else images, quarters, (-2, -1))
        back = [torch.rot90(part, -quarters, (-2, -1)) for part in embed(copy_of)]
        found.append([part.flip(-1) if mirrored else part for part in back])
    return [torch.cat(scale) for scale in zip(*found, strict=True)]


class PatchEmbedder(nn.Module):
    """Frozen timm backbone followed by :func:`align_features`.

    Built with random weights: neither network nor weights package is touched before
    :meth:`load_pretrained`, so that a checkpoint restores anywhere.

    Args:
        backbone (str): Name of a timm model, convolutional or transformer.
        layers (Sequence[str] | None): That the map hears, see
            :func:`~anomalib_sgfr.features.layers.resolve_layers`.
        pooling (Pooling): See :func:`pool`.
        score_layers (Sequence[str] | None): That the score hears, see
            :func:`~anomalib_sgfr.features.layers.resolve_score_layers`.
        bank_per (BankPer): See :func:`~anomalib_sgfr.features.layers.build_scales`.

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
        of_map, of_score = (
            resolve_layers(backbone, layers),
            resolve_score_layers(backbone, layers, score_layers),
        )
        stages = [
            stage for stage in backbone_layers(backbone) if stage.layer in {*of_map, *of_score}
        ]
        self.layers = [stage.layer for stage in stages]
        self.channels = [stage.channels for stage in stages]
        self.strides = [stage.stride for stage in stages]
        roles = [(layer in of_map, layer in of_score) for layer in self.layers]
        self.scales = build_scales(self.strides, roles, bank_per)
        self.extractor = build_extractor(backbone, self.layers)

    def load_pretrained(self) -> None:
        """Read the backbone's pretrained weights, from an installed weights package or as timm
        does.

        Raises:
            RuntimeError: If they are not to be had; the message says what to install.
        """
        load_pretrained(
            self.extractor,
            self.backbone,
            lambda name: build_extractor(name, self.layers, pre_trained=True),
        )

    def train(self, mode: bool = True) -> "PatchEmbedder":
        """Keep the backbone in evaluation mode always: its batch statistics are frozen."""
        super().train(mode)
        self.extractor.eval()
        return self

    @property
    def widths(self) -> list[int]:
        """Number of values of a patch's embedding, scale by scale."""
        return [
            sum(self.channels[member] for member in scale.layer_indices) for scale in self.scales
        ]

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
        features = self._features(
            images if images.dtype == weights.dtype else images.to(weights.dtype)
        )
        return align_features(
            [
                feature
                if feature.shape[1] == channels
                else feature.permute(0, 3, 1, 2)  # some backbones put channels last
                for feature, channels in zip(
                    (features[layer] for layer in self.layers), self.channels, strict=True
                )
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
        except (
            AssertionError,
            RuntimeError,
        ) as error:  # what backbones say of a size, often without its name
            height, width = images.shape[-2:]
            if images.is_meta or accepts_size(self.backbone, tuple(self.layers), (height, width)):
                raise
            raise ValueError(size_error(self.backbone, self.layers, (height, width))) from error
