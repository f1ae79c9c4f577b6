"""Torch model of Sgfr: image to patch embeddings, residuals, anomaly map and score."""

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from anomalib.data import InferenceBatch
from anomalib.data.utils.tiler import Tiler
from anomalib.models.components import DynamicBufferMixin
from torch import Tensor, nn

from anomalib_sgfr.anomaly_map import AnomalyMapGenerator, ScoreMaps
from anomalib_sgfr.core.certificate import Certificate
from anomalib_sgfr.core.linear_algebra import projected_out, require_finite
from anomalib_sgfr.features.embedding import Copies, PatchEmbedder, embed_copies
from anomalib_sgfr.features.layers import ScoreLayers
from anomalib_sgfr.features.tiling import embed_tiles
from anomalib_sgfr.memory_bank import MemoryBank, MemoryBankState, residual_maps

__all__ = ["FittedState", "ScoreMaps", "SgfrModel"]


class FittedState(NamedTuple):
    """What a fit learns: the memory banks and the images that their atoms come from.

    Attributes:
        states (list[MemoryBankState]): State of each scale's bank, the finest first.
        images (list[str]): Paths of the training images, by the numbers in the atoms' origins.
        rejected (list[str]): Date and path of each image of a rejected defect, by the numbers in
            the origins of its patches.
    """

    states: list[MemoryBankState]
    images: list[str]
    rejected: list[str] = []  # noqa: RUF012  # of a NamedTuple, never changed

    def without_defects(self) -> "FittedState":
        """The same memory banks without defect banks."""
        states = [state._replace(defects=None) for state in self.states]
        return self._replace(states=states, rejected=[])


class SgfrModel(DynamicBufferMixin, nn.Module):
    """Backbone, memory banks and anomaly map, without Lightning; exports to ONNX and OpenVINO.

    In training mode the forward pass returns patch embeddings; in evaluation mode it returns an
    anomaly map and a score.

    Args:
        backbone (str): Name of a timm model. Defaults to ``"tf_efficientnet_lite0"``.
        layers (Sequence[str] | None): Layers that contribute to the anomaly map; ``None`` for the
            stages of stride 4, 8 and 16.
        solver (str): As :class:`~anomalib_sgfr.memory_bank.MemoryBank`; so for ``num_atoms`` and
            ``regularisation``.
        num_atoms (int): Size of the support. Defaults to ``5``.
        regularisation (float): Strength of the ridge penalty. Defaults to ``0.001``.
        blur (float): Standard deviation of the Gaussian that smooths the map, in pixels of the
            model's input; ``0`` for none. Defaults to ``4.0``.
        score_layers (ScoreLayers): Layers that contribute to the score, or a weight for each. See
            :func:`~anomalib_sgfr.features.layers.resolve_score_layers`.

    Attributes:
        banks (Sequence[MemoryBank]): Memory bank of each scale, the finest first.
        image_paths (Tensor): Encoded ``images``.
        rejected_images (Tensor): Encoded ``rejected``.
        region (Tensor): Pixels to inspect, one inside and zero outside, shape ``(H, W)``,
            ``uint8``; empty for all.
        tiler (Tiler | None): Lengths of tiles to embed images in; what else it holds is not used.
        bit_depth (int): Bits that the camera gives, for images of more than 8 bits whose files do
            not say.

    Raises:
        ValueError: If an argument is out of range or the backbone or a layer is unknown.

    Examples:
        >>> from anomalib_sgfr import SgfrModel
        >>> torch_model = SgfrModel(layers=["blocks.1", "blocks.2"])
        >>> embeddings = torch_model.train()(torch.zeros(2, 3, 64, 64))
        >>> [grid.shape for grid in embeddings]
        [torch.Size([2, 24, 8, 8]), torch.Size([2, 40, 8, 8])]
    """

    banks: Sequence[MemoryBank]
    image_paths: Tensor
    rejected_images: Tensor
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
        score_layers: ScoreLayers = None,
    ) -> None:
        super().__init__()
        self.tiler: Tiler | None = None
        self.embedder = PatchEmbedder(backbone, layers, score_layers)
        self.anomaly_map_generator = AnomalyMapGenerator(self.embedder.scales, blur)
        # a ModuleList is a sequence of modules, but not one of a type
        self.banks = nn.ModuleList(  # type: ignore[assignment]
            MemoryBank(solver, num_atoms, regularisation) for _ in self.embedder.scales
        )
        for name in ("image_paths", "rejected_images", "region"):
            self.register_buffer(name, torch.empty(0, dtype=torch.uint8))
        self.register_load_state_dict_pre_hook(SgfrModel._adopt_earlier)

    def _adopt_earlier(self, state: dict[str, Any], prefix: str, *_: object) -> None:
        """Read a state dict of version 0.1, with the Gaussian's kernel and without a region."""
        state.setdefault(f"{prefix}region", torch.empty(0, dtype=torch.uint8))
        state.pop(f"{prefix}blur.kernel", None)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:  # noqa: ANN401
        """Store no list of rejected images where it is empty."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not self.rejected_images.numel():
            destination.pop(f"{prefix}rejected_images", None)

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:  # noqa: ANN401
        # no hook: those of a copy get the module that it was copied from
        if f"{prefix}rejected_images" not in state:
            self.rejected_images = torch.empty_like(self.rejected_images[:0])
            state[f"{prefix}rejected_images"] = self.rejected_images
        super()._load_from_state_dict(state, prefix, *args)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Read an earlier pickle: the Gaussian blur as a module of its own, no defects."""
        modules = state["_modules"]
        state["_buffers"].setdefault("rejected_images", torch.empty(0, dtype=torch.uint8))
        if "blur" in modules:
            blur = modules.pop("blur")
            generator = AnomalyMapGenerator(modules["embedder"].scales, 0.0)
            generator.blur = blur
            modules["anomaly_map_generator"] = generator
            state.pop("_smoothing", None)
        super().__setstate__(state)

    @property
    def is_fitted(self) -> bool:
        """Whether every bank has atoms."""
        return all(bank.is_fitted for bank in self.banks)

    @property
    def images(self) -> list[str]:
        """Paths of the training images that atoms come from, by the numbers in their origins."""
        return _decoded(self.image_paths)

    @images.setter
    def images(self, paths: Sequence[str]) -> None:
        self.image_paths = _encoded(paths).to(self.image_paths.device)

    @property
    def rejected(self) -> list[str]:
        """Date and path of each image of a rejected defect, by the numbers in the origins."""
        return _decoded(self.rejected_images)

    @property
    def fitted_state(self) -> FittedState:
        """Copy of what the banks hold."""
        return FittedState([bank.state for bank in self.banks], self.images, self.rejected)

    def load_fitted_state(self, fitted_state: FittedState) -> None:
        """Replace what the banks hold.

        Args:
            fitted_state (FittedState): A state for each bank.
        """
        for bank, state in zip(self.banks, fitted_state.states, strict=True):
            bank.set(*state)
        self.images = fitted_state.images
        self.load_defects(fitted_state)

    def load_defects(self, fitted_state: FittedState) -> None:
        """Replace the defect banks alone.

        Args:
            fitted_state (FittedState): With defects for each bank.
        """
        for bank, state in zip(self.banks, fitted_state.states, strict=True):
            bank.defects.set(state.defects, bank.stored.device)
        self.rejected_images = _encoded(fitted_state.rejected).to(self.image_paths.device)

    def with_banks(self, fitted_state: FittedState) -> "SgfrModel":
        """Copy with other banks, which shares all other modules and leaves this model as it is.

        Args:
            fitted_state (FittedState): A state for each bank.
        """
        other = copy.copy(self)
        # a shallow copy shares the registries of modules and buffers: give it its own
        other._modules, other._buffers = dict(self._modules), dict(self._buffers)  # noqa: SLF001
        other.banks = nn.ModuleList(  # type: ignore[assignment]  # see above
            bank.empty_like().to(bank.stored.device) for bank in self.banks
        )
        other.load_fitted_state(fitted_state)
        return other

    def banks_without(self, images: Sequence[int]) -> list[MemoryBank] | None:
        """Banks to score with, without the atoms that come from some training images.

        Args:
            images (Sequence[int]): Indices into ``images``.

        Returns:
            list[MemoryBank] | None: The banks, or ``None`` if one would be left without an atom.
        """
        kept = [
            ~torch.isin(bank.origin[:, 0], torch.tensor(images).to(bank.origin))
            for bank in self.banks
        ]
        if not all(bool(mask.any()) for mask in kept):
            return None
        return [bank.subset(mask) for bank, mask in zip(self.banks, kept, strict=True)]

    def certificate(self) -> Certificate:
        """Bound the residual of every nominal patch that the banks were fitted to.

        Returns:
            Certificate: The bounds, in the units of the anomaly map.

        Raises:
            RuntimeError: If the model is not fitted.
        """
        self._require_fitted()
        scales = self.embedder.scales
        return Certificate(
            tuple(bank.certificate() for bank in self.banks),
            tuple(scale.in_map for scale in scales),
            tuple(scale.score_weight for scale in scales),
        )

    def forward(self, images: Tensor) -> list[Tensor] | InferenceBatch:
        """Embed images (training mode) or score them (evaluation mode).

        Args:
            images (Tensor): Normalised images, shape ``(B, 3, H, W)``.

        Returns:
            list[Tensor] | InferenceBatch: In training mode as :meth:`embed`. In evaluation mode
            ``anomaly_map`` of shape ``(B, 1, H, W)``, and ``pred_score`` of shape ``(B,)``, as in
            :class:`~anomalib_sgfr.anomaly_map.ScoreMaps`.

        Raises:
            RuntimeError: In evaluation mode, if the model is not fitted.
            ValueError: If an embedding is not finite.
        """
        return self.embed(images) if self.training else self.score_maps(images).prediction

    def embed(
        self, images: Tensor, copies: Copies = "none", *, with_nuisance: bool = False
    ) -> list[Tensor]:
        """Embed images, without what lies outside the region, and tile by tile if there is a tiler.

        Args:
            images (Tensor): Normalised images, shape ``(B, 3, H, W)``.
            copies (Copies): Copies of the images to embed too, see
                :func:`~anomalib_sgfr.features.embedding.embed_copies`.
            with_nuisance (bool): Whether to keep the banks' nuisance directions, for banks that
                start anew.

        Returns:
            list[Tensor]: Patch embeddings of each scale, the finest first, shape ``(C B, d, h,
            w)`` for ``C`` copies, one copy of all images after the other.

        Raises:
            ValueError: If tiles, the size of the images or that of the region cannot be right.
        """
        if self.region.numel():
            self._require_size_of_region(images.shape[-2:])
            images = torch.where(self.region > 0, images, torch.zeros_like(images))

        def embed(images: Tensor) -> list[Tensor]:
            if self.tiler is None:
                embeddings = self.embedder(images)
            else:
                embeddings = embed_tiles(self.embedder, images, self.tiler)
            if with_nuisance or not any(bank.nuisance.numel() for bank in self.banks):
                return embeddings
            return [
                projected_out(part, bank.nuisance)
                for part, bank in zip(embeddings, self.banks, strict=True)
            ]

        return embed_copies(embed, images, copies)

    def _require_size_of_region(self, size: Sequence[int]) -> None:
        known = all(isinstance(length, int) for length in size)
        if known and tuple(size) != tuple(self.region.shape):
            of, its = (" x ".join(map(str, lengths)) for lengths in (size, self.region.shape))
            msg = (
                f"the region of interest is {its} pixels, the image {of}: images must be of the"
                " shape of the roi."
            )
            raise ValueError(msg)

    def patches_inside(self, grids: Sequence[Sequence[int]]) -> list[Tensor] | None:
        """Mask of the patches of each scale that have a pixel in the region.

        Args:
            grids (Sequence[Sequence[int]]): Rows and columns of each scale.

        Returns:
            list[Tensor] | None: Masks of the grids, ``bool``; ``None`` without a region.
        """
        return self.anomaly_map_generator.patches_inside(grids, self.region)

    def score_maps(self, images: Tensor) -> ScoreMaps:
        """Score images, in any mode of the model.

        Args:
            images (Tensor): Normalised images, shape ``(B, 3, H, W)``.

        Returns:
            ScoreMaps: Maps of shape ``(B, 1, H, W)``.

        Raises:
            RuntimeError: If the model is not fitted.
            ValueError: If an embedding is not finite.
        """
        return self.score_embeddings(self.embed(images), images.shape[-2:])

    def score_embeddings(
        self,
        embeddings: Sequence[Tensor],
        size: Sequence[int],
        banks: Sequence[MemoryBank] | None = None,
    ) -> ScoreMaps:
        """Score embeddings.

        Args:
            embeddings (Sequence[Tensor]): As :meth:`embed` gives them, shape ``(B, d, h, w)``.
            size (Sequence[int]): Height and width ``(H, W)`` of the maps.
            banks (Sequence[MemoryBank] | None): Other banks than the model's own.

        Returns:
            ScoreMaps: Maps of shape ``(B, 1, H, W)``.

        Raises:
            RuntimeError: If the model is not fitted.
            ValueError: If an embedding is not finite.
        """
        self._require_fitted()
        residuals = residual_maps(list(self.banks if banks is None else banks), embeddings)
        inside = self.patches_inside([part.shape[-2:] for part in residuals])
        if inside is not None:
            residuals = [part * mask for part, mask in zip(residuals, inside, strict=True)]
        maps: ScoreMaps = self.anomaly_map_generator(residuals, size, self.region)
        # last, and of all scales at once: a GPU has all its work by then, and is waited for once
        require_finite(torch.stack([part.sum() for part in residuals]), "an embedding")
        return maps

    def _require_fitted(self) -> None:
        if not self.is_fitted:
            msg = (
                "the model has no bank: fit it first, or load a checkpoint that was saved after its"
                " fit ended."
            )
            raise RuntimeError(msg)


def _encoded(texts: Sequence[str]) -> Tensor:
    """Texts as bytes ``(n,)``, ``uint8``, which a state dict can store."""
    return torch.tensor(
        list("\0".join(texts).encode("utf-8", "surrogateescape")), dtype=torch.uint8
    )


def _decoded(stored: Tensor) -> list[str]:
    """Inverse of :func:`_encoded`."""
    text = bytes(stored.tolist()).decode("utf-8", "surrogateescape")
    return text.split("\0") if text else []
