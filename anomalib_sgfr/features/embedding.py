"""Patch embeddings: backbone features, averaged locally and aligned to the grid of each scale."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from anomalib_sgfr.core import gpu
from anomalib_sgfr.features.backbone import build_extractor, require_size
from anomalib_sgfr.features.layers import (
    Scale,
    ScoreLayers,
    backbone_layers,
    build_scales,
    resolve_layers,
    resolve_score_layers,
)
from anomalib_sgfr.features.weights import load_pretrained

__all__ = ["Copies", "PatchEmbedder", "align_features", "embed_copies", "pool"]

Copies = Literal["none", "mirrored", "turned"]  # augmentation: none, flips, right angles
# Quarter turns of each copy, and whether left and right are exchanged before; the first is the
# image itself.
_COPIES: dict[Copies, tuple[tuple[int, bool], ...]] = {
    "mirrored": ((0, False), (0, True), (2, False), (2, True)),
    "turned": ((0, False), (1, False), (2, False), (3, False)),
}


def pool(feature: Tensor) -> Tensor:
    """Average each position of a feature map with its neighbours, with zeros beyond the border.

    The weights are 1, 4, 6, 4, 1 (sixteenths) along each axis, close to a Gaussian of standard
    deviation 1.

    Args:
        feature (Tensor): Shape ``(B, C, h, w)``.

    Returns:
        Tensor: Of the same shape.
    """
    if not (torch.compiler.is_compiling() or feature.requires_grad) and gpu.serve(feature):
        return gpu.binomial(feature)
    for padding in (1, 1, 0, 0):  # four averages of two by two, which are fast in every runtime
        feature = functional.avg_pool2d(feature, 2, stride=1, padding=padding)
    return feature


def align_features(
    features: Sequence[Tensor], strides: Sequence[int], scales: Sequence[Scale]
) -> list[Tensor]:
    """Patch embeddings of each scale from feature maps of several strides.

    Each map is averaged locally, as in the locally aware patch features of PatchCore (Roth et al.,
    CVPR 2022, sec. 3.1). Maps that are finer than the grid of their scale are resized (bilinear);
    several maps of a scale are concatenated along the channels.

    Args:
        features (Sequence[Tensor]): Maps of shape ``(B, C_i, h_i, w_i)``.
        strides (Sequence[int]): Their strides.
        scales (Sequence[Scale]): See :func:`~anomalib_sgfr.features.layers.build_scales`.

    Returns:
        list[Tensor]: Embeddings of each scale, shape ``(B, d, h, w)``.
    """
    embeddings = []
    for scale in scales:
        grid = features[strides.index(scale.stride)].shape[-2:]
        aligned = [
            feature
            if strides[index] == scale.stride
            else functional.interpolate(feature, size=grid, mode="bilinear", align_corners=False)
            for index in scale.layer_indices
            for feature in (pool(features[index]),)
        ]
        embeddings.append(aligned[0] if len(aligned) == 1 else torch.cat(aligned, 1))
    return embeddings


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

    It is built with random weights, so that a checkpoint restores without network and weights
    package; :meth:`load_pretrained` reads the pretrained ones.

    Args:
        backbone (str): Name of a timm model, convolutional or transformer.
        layers (Sequence[str] | None): Of the anomaly map, see
            :func:`~anomalib_sgfr.features.layers.resolve_layers`.
        score_layers (ScoreLayers): Of the image score, see
            :func:`~anomalib_sgfr.features.layers.resolve_score_layers`.

    Attributes:
        layers (list[str]): Layers of map and score, in network order.
        scales (list[Scale]): Scales of the embeddings, the finest first.

    Raises:
        ValueError: If backbone or layers are unknown.
    """

    def __init__(
        self, backbone: str, layers: Sequence[str] | None = None, score_layers: ScoreLayers = None
    ) -> None:
        super().__init__()
        self.backbone = backbone
        in_map = resolve_layers(backbone, layers)
        weights = resolve_score_layers(backbone, layers, score_layers)
        chosen = [layer for layer in backbone_layers(backbone) if layer.name in {*in_map, *weights}]
        self.layers = [layer.name for layer in chosen]
        self.channels = [layer.channels for layer in chosen]
        self.strides = [layer.stride for layer in chosen]
        roles = [(layer in in_map, weights.get(layer, 0.0)) for layer in self.layers]
        self.scales = build_scales(self.strides, roles)
        self.extractor = build_extractor(backbone, self.layers)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Read a pickle of version 0.2, which had another pooling to choose."""
        if state.pop("pooling", "binomial") != "binomial":
            msg = "the model has pooling 'box': load it with version 0.2.0, or fit again."
            raise ValueError(msg)
        super().__setstate__(state)

    def load_pretrained(self) -> None:
        """Load pretrained weights, see :func:`~anomalib_sgfr.features.weights.load_pretrained`.

        Raises:
            RuntimeError: If there are none; the message says what to install.
        """

        def build(name: str) -> nn.Module:
            return build_extractor(name, self.layers, pre_trained=True)

        load_pretrained(self.extractor, self.backbone, build)

    def train(self, mode: bool = True) -> "PatchEmbedder":
        """Set the mode; the backbone stays in evaluation mode, with frozen batch statistics."""
        super().train(mode)
        self.extractor.eval()
        return self

    @property
    def widths(self) -> list[int]:
        """Length of a patch's embedding, for each scale."""
        return [sum(self.channels[i] for i in scale.layer_indices) for scale in self.scales]

    @property
    def scale_strides(self) -> list[int]:
        """Stride of each scale, the finest first."""
        return [scale.stride for scale in self.scales]

    def forward(self, images: Tensor) -> list[Tensor]:
        """Embed images.

        Args:
            images (Tensor): Normalised images, shape ``(B, 3, H, W)``.

        Returns:
            list[Tensor]: Embeddings of each scale, the finest first, shape ``(B, d, h, w)``.
        """
        dtype = next(self.extractor.parameters()).dtype
        features = self._features(images if images.dtype == dtype else images.to(dtype))
        channels_first = []
        for layer, channels in zip(self.layers, self.channels, strict=True):
            feature = features[layer]
            last = feature.shape[1] != channels  # some backbones have the channels last
            channels_first.append(feature.permute(0, 3, 1, 2) if last else feature)
        return align_features(channels_first, self.strides, self.scales)

    def _features(self, images: Tensor) -> dict[str, Tensor]:
        if torch.compiler.is_compiling():
            return self.extractor(images)
        try:
            return self.extractor(images)
        except (AssertionError, RuntimeError):  # of a size, but rarely with its name
            height, width = images.shape[-2:]
            if not images.is_meta:
                require_size(self.backbone, self.layers, (height, width))
            raise
