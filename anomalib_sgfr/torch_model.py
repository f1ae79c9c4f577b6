"""The Sgfr torch model: image -> patch embeddings -> self-expressive residuals -> anomaly map and
score.
"""

import copy
from collections.abc import Sequence
from functools import reduce
from typing import Any, NamedTuple

import torch
from anomalib.data import InferenceBatch
from anomalib.data.utils.tiler import Tiler
from anomalib.models.components import DynamicBufferMixin
from torch import Tensor, nn

from anomalib_sgfr.anomaly_map import Blur, Smoothing, interpolate
from anomalib_sgfr.core.arguments import BankPer, Copies, Pooling
from anomalib_sgfr.core.certificate import Certificate
from anomalib_sgfr.core.linear_algebra import projected_out, require_finite
from anomalib_sgfr.core.patch_grid import patches_in_region
from anomalib_sgfr.features.embedding import PatchEmbedder
from anomalib_sgfr.features.tiling import embed_tiles
from anomalib_sgfr.memory_bank import MemoryBank, MemoryBankState, residual_maps

__all__ = ["FittedState", "ScoreMaps", "SgfrModel"]

_LEAST = 1e-12  # weight of the patches around a pixel that has none
# Turns by so many quarters, and whether the left and the right change places before; the image
# itself is the first.
_COPIES: dict[Copies, tuple[tuple[int, bool], ...]] = {
    "mirrored": ((0, False), (0, True), (2, False), (2, True)),
    "turned": ((0, False), (1, False), (2, False), (3, False)),
}


class FittedState(NamedTuple):
    """All that a fit learnt.

    Attributes:
        states (list[MemoryBankState]): Of each scale, the finest first.
        images (list[str]): Paths of the images that the atoms' origins number.
    """

    states: list[MemoryBankState]
    images: list[str]


class ScoreMaps(NamedTuple):
    """What is heard of an image's residuals.

    Attributes:
        anomaly_map (Tensor): The sum over the scales that the map hears, shape ``(B, 1, H, W)``.
        score_map (Tensor): The sum over those that the score hears, of the same shape: the score is
            its maximum.
    """

    anomaly_map: Tensor
    score_map: Tensor

    @property
    def predicted(self) -> InferenceBatch:
        """Map and score, shape ``(B,)``, as anomalib takes them; what is no number scores as the
        largest: not good.
        """
        score = self.score_map.amax(dim=(1, 2, 3))
        most = torch.finfo(score.dtype).max
        score = torch.where(
            score < most, score, most
        )  # NaN is not less; infinity would be reported as NaN
        return InferenceBatch(anomaly_map=self.anomaly_map, pred_score=score)

    @property
    def places(self) -> Tensor:
        """Row and column of the pixel that raised each score, shape ``(B, 2)``, ``int64``."""
        highest = self.score_map.flatten(1).argmax(1)
        columns = self.score_map.shape[-1]
        return torch.stack((highest // columns, highest % columns), 1)


class SgfrModel(DynamicBufferMixin, nn.Module):
    """Score images by how badly banks of nominal patch embeddings, one for each scale, rebuild
    their patches.

    In training mode the forward pass returns patch embeddings; in evaluation it returns an anomaly
    map and a score. Knows nothing of Lightning and exports to ONNX and OpenVINO.

    Args:
        backbone (str): Name of a timm model. Defaults to ``"tf_efficientnet_lite0"``.
        layers (Sequence[str] | None): Layers that the anomaly map hears; ``None`` for the stages of
            stride 4, 8 and 16.
        solver (str): See :class:`~anomalib_sgfr.memory_bank.MemoryBank`; so for ``num_atoms`` and
            ``regularisation``.
        num_atoms (int): Size of the support. Defaults to ``5``.
        regularisation (float): Strength of the ridge penalty. Defaults to ``0.001``.
        blur (float): Standard deviation of the Gaussian that smooths the map, in pixels of the
            model's input; ``0`` for none. Defaults to ``4.0``.
        pooling (Pooling): How features are averaged with their neighbours, ``"binomial"`` or
            ``"box"``; see :func:`~anomalib_sgfr.features.embedding.pool`. Defaults to
            ``"binomial"``.
        score_layers (Sequence[str] | None): Layers that the score hears; ``None`` for ``layers``,
            if these are given, or the stages of stride 8, 16 and 32.
        bank_per (BankPer): Whether each layer has a bank, or each stride; see
            :func:`~anomalib_sgfr.features.layers.build_scales`. Defaults to ``"layer"``.

    Attributes:
        banks (Sequence[MemoryBank]): A :class:`~anomalib_sgfr.memory_bank.MemoryBank` for each
            scale, the finest first.
        image_paths (Tensor): Encoded ``images``.
        region (Tensor): Pixels to inspect, one inside and zero outside, shape ``(H, W)``,
            ``uint8``; empty for all.
        tiler (Tiler | None): Lengths of tiles to embed images in; what else it holds is not used.
        bit_depth (int): Bits that the camera gives, for pictures of more than 8 bits whose files do
            not say.

    Raises:
        ValueError: If an argument is out of range or the backbone or a layer is unknown.
    """

    banks: Sequence[MemoryBank]
    image_paths: Tensor
    region: Tensor
    bit_depth: int = 8

    def __init__(
        self,
        backbone: str = "tf_efficientnet_lite0",
        layers: Sequence[str] | None = None,
        solver: str = "affine",
        num_atoms: int = 5,
        regularisation: float = 1e-3,
        blur: float = 4.0,
        pooling: Pooling = "binomial",
        score_layers: Sequence[str] | None = None,
        bank_per: BankPer = "layer",
    ) -> None:
        super().__init__()
        if not 0.0 <= blur < float("inf"):
            msg = f"blur must be a finite number of pixels, at least 0, got {blur}."
            raise ValueError(msg)
        self.tiler: Tiler | None = None
        self.embedder = PatchEmbedder(backbone, layers, pooling, score_layers, bank_per)
        self.blur: nn.Module = Blur(blur) if blur > 0 else nn.Identity()
        # it is one, but does not say of what
        self.banks = nn.ModuleList(  # type: ignore[assignment]
            MemoryBank(solver, num_atoms, regularisation) for _ in self.embedder.scales
        )
        self.register_buffer("image_paths", torch.empty(0, dtype=torch.uint8))
        self.register_buffer("region", torch.empty(0, dtype=torch.uint8))
        self.register_load_state_dict_pre_hook(SgfrModel._adopt_earlier)
        self._smoothing = Smoothing(self.blur)

    def _adopt_earlier(self, state: dict[str, Any], prefix: str, *_: object) -> None:
        """Read what knew no region."""
        state.setdefault(f"{prefix}region", torch.empty(0, dtype=torch.uint8))

    @property
    def is_fitted(self) -> bool:
        """Whether there are banks to rebuild patches from."""
        return all(bank.is_fitted for bank in self.banks)

    @property
    def images(self) -> list[str]:
        """Paths of the training images that atoms come from, as the banks' origins number them."""
        encoded = bytes(self.image_paths.tolist()).decode("utf-8", "surrogateescape")
        return encoded.split("\0") if encoded else []

    @images.setter
    def images(self, paths: Sequence[str]) -> None:
        encoded = "\0".join(paths).encode("utf-8", "surrogateescape")
        self.image_paths = torch.tensor(
            list(encoded), dtype=torch.uint8, device=self.image_paths.device
        )

    @property
    def fitted_state(self) -> FittedState:
        """All that the banks hold."""
        return FittedState([bank.state for bank in self.banks], self.images)

    def load_fitted_state(self, fitted_state: FittedState) -> None:
        """Take what was learnt into use, in place of what was there.

        Args:
            fitted_state (FittedState): A state for each bank.
        """
        for bank, state in zip(self.banks, fitted_state.states, strict=True):
            bank.set(*state)
        self.images = fitted_state.images

    def with_banks(self, fitted_state: FittedState) -> "SgfrModel":
        """The same model with other banks, to try: shares all else, and changes nothing of this
        one.

        Args:
            fitted_state (FittedState): A state for each bank.
        """
        other = copy.copy(self)
        # a shallow copy shares the registries; with its own, it has banks of its own
        other._modules, other._buffers = dict(self._modules), dict(self._buffers)  # noqa: SLF001
        other.banks = nn.ModuleList(  # type: ignore[assignment]  # see above
            MemoryBank(bank.solver, bank.num_atoms, bank.regularisation).to(bank.stored.device)
            for bank in self.banks
        )
        other.load_fitted_state(fitted_state)
        return other

    def banks_without(self, images: Sequence[int]) -> list[MemoryBank] | None:
        """The banks without the atoms that come from some training images, to score with.

        Args:
            images (Sequence[int]): Their places in ``images``.

        Returns:
            list[MemoryBank] | None: The banks, or ``None`` if one would be left without an atom.
        """
        stay = [
            ~torch.isin(bank.origin[:, 0], torch.tensor(images).to(bank.origin))
            for bank in self.banks
        ]
        if not all(bool(chosen.any()) for chosen in stay):
            return None
        return [bank.subset(chosen) for bank, chosen in zip(self.banks, stay, strict=True)]

    def certificate(self) -> Certificate:
        """Bound the residual of every nominal patch the banks were learnt from.

        Returns:
            Certificate: The bounds, in the units of the anomaly map.

        Raises:
            RuntimeError: If the model is not fitted.
        """
        self._require_banks()
        scales = self.embedder.scales
        return Certificate(
            tuple(bank.certificate() for bank in self.banks),
            tuple(scale.in_map for scale in scales),
            tuple(scale.in_score for scale in scales),
        )

    def forward(self, images: Tensor) -> list[Tensor] | InferenceBatch:
        """Embed images (training mode) or score them (evaluation mode).

        Args:
            images (Tensor): Normalised images, shape ``(B, 3, H, W)``.

        Returns:
            list[Tensor] | InferenceBatch: In training mode as :meth:`embed`. In evaluation mode
            ``anomaly_map`` of shape ``(B, 1, H, W)``, and ``pred_score`` of shape ``(B,)``, the
            maximum of the score map: both in units of what is left of nominal patches, summed over
            the scales that each hears, see :class:`ScoreMaps`.

        Raises:
            RuntimeError: In evaluation mode, if the model is not fitted.
            ValueError: If an embedding is not finite.
        """
        return self.embed(images) if self.training else self.score_maps(images).predicted

    def score_maps(self, images: Tensor) -> ScoreMaps:
        """What :meth:`forward` is made of in evaluation mode, with the place that raised the score."""
        return self._score_maps_of(self.embed(images), images.shape[-2:])

    def embed(self, images: Tensor) -> list[Tensor]:
        """Embed images, tile by tile if there is a tiler; what lies outside the region is not seen,
        if there is one.

        Args:
            images (Tensor): Normalised images, shape ``(B, 3, H, W)``.

        Returns:
            list[Tensor]: Patch embeddings of each scale, the finest first, shape ``(B, d, h, w)``.

        Raises:
            ValueError: If tiles, the size of the images or that of the region cannot be right.
        """
        return self._embed(self._seen(images))

    def _seen(self, images: Tensor) -> Tensor:
        """Images without what lies outside the region."""
        if not self.region.numel():
            return images
        self._require_regions_size(images.shape[-2:])
        return torch.where(self.region > 0, images, torch.zeros_like(images))

    def _embed(self, images: Tensor, plain: bool = False) -> list[Tensor]:
        found = (
            self.embedder(images)
            if self.tiler is None
            else embed_tiles(self.embedder, images, self.tiler)
        )
        if plain or not any(bank.nuisance.numel() for bank in self.banks):
            return found
        return [
            projected_out(part, bank.nuisance) for part, bank in zip(found, self.banks, strict=True)
        ]

    def embed_copies(
        self, images: Tensor, copies: Copies = "none", plain: bool = False
    ) -> list[Tensor]:
        """Embed images and copies of them; each patch of a copy where it lies in the image itself.

        Args:
            images (Tensor): Normalised images, shape ``(B, 3, H, W)``.
            copies (Copies): ``"mirrored"``: left to right, top to bottom, and both. ``"turned"``:
                by each right angle.
            plain (bool): For banks that start anew, which have no nuisance yet.

        Returns:
            list[Tensor]: Patch embeddings of each scale, the images first and then one copy of each
            after the other, shape ``(C B, d, h, w)``.

        Raises:
            ValueError: As :meth:`embed`.
        """
        seen = self._seen(images)
        if copies == "none":
            return self._embed(seen, plain)
        found = []
        for quarters, mirrored in _COPIES[copies]:
            copy_of = torch.rot90(seen.flip(-1) if mirrored else seen, quarters, (-2, -1))
            back = [torch.rot90(part, -quarters, (-2, -1)) for part in self._embed(copy_of, plain)]
            found.append([part.flip(-1) if mirrored else part for part in back])
        return [torch.cat(scale) for scale in zip(*found, strict=True)]

    def patches_inside(self, grids: Sequence[Sequence[int]]) -> list[Tensor] | None:
        """Patches that are learnt and scored, if there is a region: those of which it has a pixel.

        Args:
            grids (Sequence[Sequence[int]]): Rows and columns of each scale.

        Returns:
            list[Tensor] | None: Masks of the grids, ``bool``; ``None`` if all are.
        """
        if not self.region.numel():
            return None
        return [
            patches_in_region(self.region, grid, stride)
            for grid, stride in zip(grids, self.embedder.scale_strides, strict=True)
        ]

    def _require_regions_size(self, size: Sequence[int]) -> None:
        known = all(isinstance(length, int) for length in size)
        if known and tuple(size) != tuple(self.region.shape):
            of, its = (" x ".join(map(str, lengths)) for lengths in (size, self.region.shape))
            msg = (
                f"the region of interest is {its} pixels, the image {of}: pictures must be of the"
                " shape of the roi."
            )
            raise ValueError(msg)

    def score(
        self,
        embeddings: Sequence[Tensor],
        size: Sequence[int],
        banks: Sequence[MemoryBank] | None = None,
    ) -> InferenceBatch:
        """Score embeddings: rebuild each from the bank of its scale, and turn what is left into a
        map.

        Args:
            embeddings (Sequence[Tensor]): Patch embeddings of each scale, shape ``(B, d, h, w)``.
            size (Sequence[int]): Height and width ``(H, W)`` of the map.
            banks (Sequence[MemoryBank] | None): Other banks than the model's own.

        Returns:
            InferenceBatch: As :meth:`forward` in evaluation mode.

        Raises:
            RuntimeError: If the model is not fitted.
            ValueError: If an embedding is not finite.
        """
        return self._score_maps_of(embeddings, size, banks).predicted

    def _score_maps_of(
        self,
        embeddings: Sequence[Tensor],
        size: Sequence[int],
        banks: Sequence[MemoryBank] | None = None,
    ) -> ScoreMaps:
        residuals = self._residual_maps(embeddings, banks)
        ears = self.combine(residuals, size)
        _require_finite(residuals)  # last: a card has its work by then, and is waited for once
        return ears

    def residual_maps(
        self, embeddings: Sequence[Tensor], banks: Sequence[MemoryBank] | None = None
    ) -> list[Tensor]:
        """What the banks cannot rebuild; arguments as :meth:`score`.

        Returns:
            list[Tensor]: Length of the residual of each patch over the bank's ``nominal``, for each
            scale of shape ``(B, 1, h, w)``.

        Raises:
            RuntimeError: If the model is not fitted.
            ValueError: If an embedding is not finite.
        """
        found = self._residual_maps(embeddings, banks)
        _require_finite(found)
        return found

    def _residual_maps(
        self, embeddings: Sequence[Tensor], banks: Sequence[MemoryBank] | None = None
    ) -> list[Tensor]:
        self._require_banks()
        found = residual_maps(list(self.banks if banks is None else banks), embeddings)
        inside = self.patches_inside([part.shape[-2:] for part in found])
        return (
            found
            if inside is None
            else [part * mask for part, mask in zip(found, inside, strict=True)]
        )

    def combine(self, residuals: Sequence[Tensor], size: Sequence[int]) -> ScoreMaps:
        """Make maps of all scales' residuals: the sum of each, interpolated (bilinear) and smoothed
        by the Gaussian.

        With a region, what is smoothed is averaged over patches inside it alone, and the maps are
        zero outside.

        Args:
            residuals (Sequence[Tensor]): Of each scale, shape ``(B, 1, h, w)``, ``float32``.
            size (Sequence[int]): Height and width ``(H, W)`` of the maps.

        Returns:
            ScoreMaps: Shapes ``(B, 1, H, W)``.
        """
        lengths = [*size, *(length for part in residuals for length in part.shape[-2:])]
        if self.region.numel() or all(isinstance(length, int) for length in lengths):
            return self._heard(self.smoothed(residuals, size))
        # unknown while exporting: one Gaussian of each sum
        summed = self._heard([interpolate(part, size) for part in residuals])
        return ScoreMaps(*(self.blur(heard) for heard in summed))

    def smoothed(self, residuals: Sequence[Tensor], size: Sequence[int]) -> list[Tensor]:
        """What each scale adds to :meth:`combine`, whose arguments these are.

        Returns:
            list[Tensor]: Of each scale, shape ``(B, 1, H, W)``.
        """
        inside = self.patches_inside([part.shape[-2:] for part in residuals])
        with torch.autocast(residuals[0].device.type, enabled=False):
            spread = [self._smoothing(part, size) for part in residuals]
            if inside is None:
                return spread
            weights = [self._smoothing(mask[None, None].float(), size) for mask in inside]
            means = [
                part / weight.clamp_min(_LEAST)
                for part, weight in zip(spread, weights, strict=True)
            ]
            return [torch.where(self.region > 0, mean, torch.zeros_like(mean)) for mean in means]

    def _heard(self, parts: Sequence[Tensor]) -> ScoreMaps:
        """Sums of what each ear hears; one sum where both hear the same."""
        scales = self.embedder.scales
        anomaly_map = reduce(
            torch.add, [part for part, scale in zip(parts, scales, strict=True) if scale.in_map]
        )
        if all(scale.in_map == scale.in_score for scale in scales):
            return ScoreMaps(anomaly_map, anomaly_map)
        score = [part for part, scale in zip(parts, scales, strict=True) if scale.in_score]
        return ScoreMaps(anomaly_map, reduce(torch.add, score))

    def _require_banks(self) -> None:
        if not self.is_fitted:
            msg = (
                "the model has no bank: fit it first, or load a checkpoint that was saved after its"
                " fit ended."
            )
            raise RuntimeError(msg)


def _require_finite(residuals: Sequence[Tensor]) -> None:
    require_finite(
        torch.stack([part.sum() for part in residuals]), "an embedding"
    )  # one wait for a card, not one each
