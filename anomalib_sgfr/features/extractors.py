"""Features of a backbone's layers: anomalib's own extractor, or what stands in for it where that cannot give them."""

from collections.abc import Sequence
from functools import cache

import timm
import torch
from anomalib.models.components import TimmFeatureExtractor
from torch import Tensor, nn

from anomalib_sgfr.features.layers import backbone_stages, blocks_of, is_row_of_blocks

__all__ = ["extractor_of"]


def extractor_of(backbone: str, layers: Sequence[str], pre_trained: bool = False) -> nn.Module:
    """Build a frozen backbone that gives the features of some layers.

    Args:
        backbone (str): Name of a timm model, convolutional or transformer.
        layers (Sequence[str]): Layers to take features from, in network order.
        pre_trained (bool): Whether timm is to read its weights; random ones if not. Defaults to ``False``.

    Returns:
        nn.Module: From images, shape ``(B, 3, H, W)``, to a dictionary of maps by layer, shape ``(B, C, h, w)``, or
        with the channels last for some backbones.
    """
    names = list(layers)
    extractor: nn.Module
    plain = len({stage.stride for stage in backbone_stages(backbone)}) == 1  # a plain transformer: one stride
    if is_row_of_blocks(backbone):
        extractor = _BlockExtractor(backbone, names, pre_trained)
    elif plain and _takes_any_size(backbone):
        tokens = TimmFeatureExtractor(backbone, names, pre_trained=pre_trained, output_fmt="NLC")
        tokens.output_fmt = "NCHW"  # the same route gives maps, which "NLC" only opens for any name
        extractor = tokens
    elif plain or "vit" in backbone.lower():  # anomalib's extractor would take the latter for a plain ViT
        extractor = _StageExtractor(backbone, names, pre_trained)
    else:
        extractor = TimmFeatureExtractor(backbone, names, pre_trained=pre_trained)
    return extractor.eval().requires_grad_(requires_grad=False)


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
