"""Patch embeddings: backbone features, locally averaged, aligned and concatenated."""

from collections.abc import Iterator, Sequence
from functools import cache, lru_cache
from typing import Any, NamedTuple, get_args

import timm
import torch
from anomalib.models.components import TimmFeatureExtractor
from timm.models.efficientnet import EfficientNetFeatures
from timm.models.mobilenetv3 import MobileNetV3Features
from torch import Tensor, nn
from torch.nn import functional

from anomalib_sgfr.core.arguments import BankPer, Pooling
from anomalib_sgfr.features.backbones import load_pretrained, require_known

__all__ = [
    "PatchEmbedder",
    "Scale",
    "Stage",
    "assemble",
    "backbone_stages",
    "default_size",
    "pool",
    "refusal",
    "require_size",
    "resolve_layers",
    "resolve_score_layers",
    "scales_of",
    "strided_layers",
    "takes",
]

_MAP_STRIDES = (4, 8, 16)
_COARSEST_OF_MAP = 16
_SCORE_STRIDES = (8, 16, 32)
_DEFAULT_SIZE = (256, 256)
_PATCHES = 28  # along each side, where 256 pixels do not hold a whole number
_OF_BLOCKS = (EfficientNetFeatures, MobileNetV3Features)
_SIDE = 256  # of an image that is divided by every stride
_FINEST = 8  # stride of the finest scale, where there is a layer of it


class Stage(NamedTuple):
    """One place of a backbone where features can be taken: layer name, stride in input pixels, number of channels."""

    layer: str
    stride: int
    channels: int


class Scale(NamedTuple):
    """Layers whose features make one embedding of each patch, and what it is heard in.

    Attributes:
        members (tuple[int, ...]): Places of the layers in network order, from fine to coarse.
        stride (int): Of the grid of patches, in input pixels.
        in_map (bool): Whether the anomaly map hears it.
        in_score (bool): Whether the image's score does.
    """

    members: tuple[int, ...]
    stride: int
    in_map: bool = True
    in_score: bool = True


@cache
def backbone_stages(backbone: str) -> tuple[Stage, ...]:
    """List the stages of a backbone, from timm's feature information, without allocating its weights.

    Args:
        backbone (str): Name of a timm model.

    Returns:
        tuple[Stage, ...]: Stages in network order.

    Raises:
        ValueError: If timm does not know the name or the model offers no intermediate features.
    """
    require_known(backbone)
    try:
        with torch.device("meta"):
            network: Any = timm.create_model(backbone, pretrained=False, features_only=True)
            info: Any = network.feature_info
    except (RuntimeError, AttributeError, TypeError) as error:
        # timm has no error of its own for it. All of its own models work; of those a user registers, RuntimeError is
        # what timm says of one it cannot take apart, AttributeError is one that knows no feature_info, TypeError one
        # whose function takes no features_only.
        msg = f"backbone '{backbone}' offers no intermediate features through timm: {error}"
        raise ValueError(msg) from error
    listed = tuple(Stage(item["module"], item["reduction"], item["num_chs"]) for item in info.info)
    return _blocks(network, listed) if isinstance(network, _OF_BLOCKS) else listed


def _blocks(network: nn.Module, listed: Sequence[Stage]) -> tuple[Stage, ...]:
    """Every block of a network that is a row of them, of which timm lists the last of each stride alone."""
    names = [stage.layer for stage in listed]
    images = torch.zeros(1, 3, _SIDE, _SIDE, device="meta")
    every = [Stage(layer, _SIDE // feature.shape[-1], feature.shape[1]) for layer, feature in _through(network, images)]
    return tuple(stage for stage in every if stage.layer in names or stage.layer.startswith("blocks."))


def _through(network: Any, images: Tensor) -> Iterator[tuple[str, Tensor]]:  # noqa: ANN401
    """Features of a network that is a row of blocks, by the names of its layers, one after the other."""
    feature = network.bn1(network.conv_stem(images))
    feature = network.act1(feature) if hasattr(network, "act1") else feature
    yield "bn1", feature
    for number, block in enumerate(network.blocks):
        feature = block(feature)
        yield f"blocks.{number}", feature


def strided_layers(backbone: str, strides: Sequence[int]) -> list[str]:
    """One layer for each stride that a backbone has.

    Up to stride 16 the last, where a network has said most of what it says at that resolution; beyond, the first,
    before what is there to tell ImageNet's classes apart.

    Args:
        backbone (str): Name of a timm model.
        strides (Sequence[int]): Wanted.

    Returns:
        list[str]: Layer names in network order; none for a stride that the backbone lacks.
    """
    stages = backbone_stages(backbone)
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
        layers (Sequence[str] | None): Layer names, in any order, or ``None`` for the stages of stride 4, 8 and 16 (see
            :func:`strided_layers`). A backbone of one stride throughout (a plain vision transformer) then gives the
            blocks that end the first half and the first three quarters of its depth.

    Returns:
        list[str]: Layer names in network order.

    Raises:
        ValueError: If a name is unknown or repeated, ``layers`` is empty, or the backbone has no stage to default to.
    """
    stages = backbone_stages(backbone)
    if layers is not None:
        return _validated(backbone, "layers", layers)
    names = [stage.layer for stage in stages]
    if len(names) > 1 and len({stage.stride for stage in stages}) == 1:
        return [names[len(names) // 2 - 1], names[3 * len(names) // 4 - 1]]
    if not any(stage.stride in _MAP_STRIDES and stage.stride in _SCORE_STRIDES for stage in stages):
        msg = f"backbone '{backbone}' has no stage of stride 8 or 16; pass layers, some of: {_listing(stages)}."
        raise ValueError(msg)
    return strided_layers(backbone, _MAP_STRIDES)


def resolve_score_layers(
    backbone: str, layers: Sequence[str] | None = None, score_layers: Sequence[str] | None = None
) -> list[str]:
    """Choose or validate the layers that the image's score hears.

    Args:
        backbone (str): Name of a timm model.
        layers (Sequence[str] | None): As given for the map.
        score_layers (Sequence[str] | None): Layer names, in any order. ``None`` for those of the map, if these were
            given or the backbone is of one stride throughout; otherwise the stages of stride 8, 16 and 32.

    Returns:
        list[str]: Layer names in network order.

    Raises:
        ValueError: As :func:`resolve_layers`.
    """
    if score_layers is not None:
        return _validated(backbone, "score_layers", score_layers)
    stages = backbone_stages(backbone)
    of_map = resolve_layers(backbone, layers)
    if layers is not None or len({stage.stride for stage in stages}) == 1:
        return of_map
    return strided_layers(backbone, _SCORE_STRIDES)


def _validated(backbone: str, argument: str, layers: Sequence[str]) -> list[str]:
    stages = backbone_stages(backbone)
    names = [stage.layer for stage in stages]
    if isinstance(layers, str) or not layers or len(set(layers)) != len(layers):
        msg = (
            f"{argument} must be a list of one or more different names, got {layers!r}; '{backbone}' has: "
            f"{_listing(stages)}."
        )
        raise ValueError(msg)
    unknown = [layer for layer in layers if layer not in names]
    if unknown:
        msg = f"{argument} {unknown} are not in backbone '{backbone}', which has: {_listing(stages)}."
        raise ValueError(msg)
    return sorted(layers, key=names.index)


def _listing(stages: Sequence[Stage]) -> str:
    return ", ".join(f"{stage.layer} (stride {stage.stride})" for stage in stages)


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
        scales (Sequence[Scale]): See :func:`scales_of`.
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


def scales_of(
    strides: Sequence[int], roles: Sequence[tuple[bool, bool]] | None = None, bank_per: BankPer = "layer"
) -> list[Scale]:
    """Which layers make a scale.

    A layer finer than stride 8 goes to the grid of stride 8, if there is a layer of that: patches of 4 x 4 pixels are
    too many for what they tell.

    Args:
        strides (Sequence[int]): Of the layers, in network order.
        roles (Sequence[tuple[bool, bool]] | None): Of each, whether the map and whether the score hears it; ``None``
            for both.
        bank_per (BankPer): ``"layer"``: each layer is a scale. ``"stride"``: those of one grid and role are one.

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
    return [Scale(tuple(members), grid, *roles[members[0]]) for (grid, *_), members in groups.items()]


class PatchEmbedder(nn.Module):
    """Frozen timm backbone followed by :func:`assemble`.

    Built with random weights: neither network nor weights package is touched before :meth:`load_pretrained`, so that a
    checkpoint restores anywhere.

    Args:
        backbone (str): Name of a timm model, convolutional or transformer.
        layers (Sequence[str] | None): That the map hears, see :func:`resolve_layers`.
        pooling (Pooling): See :func:`pool`.
        score_layers (Sequence[str] | None): That the score hears, see :func:`resolve_score_layers`.
        bank_per (BankPer): See :func:`scales_of`.

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
        if _is_row_of_blocks(backbone):
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
        layers (Sequence[str] | None): See :func:`resolve_layers`.
        score_layers (Sequence[str] | None): See :func:`resolve_score_layers`.
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


@cache
def _is_row_of_blocks(backbone: str) -> bool:
    with torch.device("meta"):
        return isinstance(timm.create_model(backbone, pretrained=False, features_only=True), _OF_BLOCKS)


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
            for layer, feature in _through(self.feature_extractor, images):
                if layer in self.layers:
                    features[layer] = feature
                if len(features) == len(self.layers):
                    break
        return features
