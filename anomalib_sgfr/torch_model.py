"""The Sgfr torch model: image -> patch embeddings -> self-expressive residual -> anomaly map and score."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, get_args

import torch
from anomalib.data import InferenceBatch
from anomalib.data.utils.tiler import Tiler
from anomalib.models.components import DynamicBufferMixin, GaussianBlur2d
from torch import Tensor, nn
from torch._higher_order_ops import scan  # not yet exported under a public name
from torch.nn import functional

from anomalib_sgfr import plugin, self_expression
from anomalib_sgfr.arguments import Pooling, Solver
from anomalib_sgfr.certificate import Certificate, certify
from anomalib_sgfr.embedding import PatchEmbedder, to_patches
from anomalib_sgfr.sampling import Cover
from anomalib_sgfr.search import Index, search_index

__all__ = ["SgfrModel"]

# Largest number of values one chunk of patches may hold in temporary tensors: 64 MiB of float32.
_CHUNK_VALUES = 2**24
_EXPORTED_PATCHES = 2048  # rebuilt at once in an exported graph


class SgfrModel(DynamicBufferMixin, nn.Module):
    """Score images by how badly a bank of nominal patch embeddings rebuilds their patches.

    In training mode the forward pass returns patch embeddings; in evaluation it returns an anomaly map and a score.
    Knows nothing of Lightning and exports to ONNX and OpenVINO.

    Args:
        backbone (str): Name of a timm model. Defaults to ``"tf_efficientnet_lite0"``.
        layers (Sequence[str] | None): Layers to take features from; ``None`` for the stages of stride 8 and 16.
        solver (str): ``"affine"``, ``"omp"`` or ``"ridge"``. Defaults to ``"affine"``.
        num_atoms (int): Size ``k`` of the support; ``"ridge"`` uses the whole bank. Defaults to ``5``.
        regularisation (float): Strength of the ridge penalty relative to the data's own scale; ``"omp"`` has none. See
            :func:`~anomalib_sgfr.self_expression.affine` and :func:`~anomalib_sgfr.self_expression.ridge_operator`.
        blur (float): Standard deviation of the Gaussian that smooths the map, in pixels of the model's input; ``0`` for
            none. Defaults to ``4.0``.
        pooling (Pooling): How features are averaged with their neighbours, ``"binomial"`` or ``"box"``; see
            :func:`~anomalib_sgfr.embedding.pool`. Defaults to ``"binomial"``.

    Attributes:
        bank (Tensor): Nominal atoms, shape ``(M, d)``; empty until the model is fitted.
        scale (Tensor): Factors of the embeddings' channels, shape ``(d,)``; empty for none.
        bank_radius, bank_count, bank_squares (Tensor): What each atom stands for, shape ``(M,)``; see
            :class:`~anomalib_sgfr.sampling.Cover`.
        operator (Tensor): Residual operator of the ridge solver, shape ``(d, d)``; empty for the other solvers.

    Raises:
        ValueError: If an argument is out of range or the backbone or a layer is unknown.
    """

    def __init__(
        self,
        backbone: str = "tf_efficientnet_lite0",
        layers: Sequence[str] | None = None,
        solver: str = "affine",
        num_atoms: int = 5,
        regularisation: float = 1e-3,
        blur: float = 4.0,
        pooling: Pooling = "binomial",
    ) -> None:
        super().__init__()
        if solver not in get_args(Solver):
            msg = f"solver must be one of {', '.join(get_args(Solver))}, got '{solver}'."
            raise ValueError(msg)
        if num_atoms < 1:
            msg = f"num_atoms must be at least 1, got {num_atoms}."
            raise ValueError(msg)
        if not 0.0 <= regularisation < float("inf"):
            msg = f"regularisation must be a finite number of at least 0, got {regularisation}."
            raise ValueError(msg)
        if not 0.0 <= blur < float("inf"):
            msg = f"blur must be a finite number of pixels, at least 0, got {blur}."
            raise ValueError(msg)
        self.solver = solver
        self.num_atoms = num_atoms
        self.regularisation = regularisation
        self.tiler: Tiler | None = None
        self.embedder = PatchEmbedder(backbone, layers, pooling)
        self.blur: nn.Module = GaussianBlur2d(sigma=blur) if blur > 0 else nn.Identity()
        self.bank: Tensor
        self.operator: Tensor
        self.register_buffer("bank", torch.empty(0))
        self.register_buffer("operator", torch.empty(0))
        self.scale: Tensor
        self.register_buffer("scale", torch.empty(0))
        self.bank_radius: Tensor
        self.bank_count: Tensor
        self.bank_squares: Tensor
        self.register_buffer("bank_radius", torch.empty(0))
        self.register_buffer("bank_count", torch.empty(0, dtype=torch.int64))
        self.register_buffer("bank_squares", torch.empty(0, dtype=torch.float64))
        self.bank_origin: Tensor
        self.bank_images: Tensor
        self.register_buffer("bank_origin", torch.empty(0, dtype=torch.int64))
        self.register_buffer("bank_images", torch.empty(0, dtype=torch.uint8))
        self.bank_thumbnails: Tensor
        self.register_buffer("bank_thumbnails", torch.empty(0, dtype=torch.uint8))
        self._smoothing: dict[tuple[int, int, torch.device], Tensor] = {}
        # The bank as the search wants it: what an exported graph holds. Made from the bank, never stored with it.
        self.index_atoms: Tensor
        self.index_centre: Tensor
        self.register_buffer("index_atoms", torch.empty(0), persistent=False)
        self.register_buffer("index_centre", torch.empty(0), persistent=False)
        self.register_load_state_dict_post_hook(SgfrModel._make_index)
        self.bank_threshold: Tensor
        self.register_buffer("bank_threshold", torch.zeros((), dtype=torch.float64))

    @property
    def is_fitted(self) -> bool:
        """Whether there is a bank to rebuild patches from."""
        return self.bank.numel() > 0

    def set_bank(
        self,
        bank: Tensor | Cover,
        threshold: float = 0.0,
        images: Sequence[str] = (),
        scale: Tensor | None = None,
    ) -> None:
        """Take a learnt bank into use, replacing any earlier one.

        Args:
            bank (Tensor | Cover): Atoms, shape ``(M, d)``, or atoms with what they stand for.
            threshold (float): Distance above which the sampler would have taken another atom; where a later fit that
                adds to this bank goes on.
            images (Sequence[str]): Paths of the images that the atoms' origins number.
            scale (Tensor | None): Factors of channels, shape ``(d,)``, that the atoms' embeddings were multiplied with;
                ``None`` for those that the model has.
        """
        self.scale = self.scale if scale is None else scale.detach().clone()
        cover = bank if isinstance(bank, Cover) else Cover.of(bank)
        bank = cover.atoms
        operator = (
            self_expression.ridge_operator(bank, self.regularisation) if self.solver == "ridge" else torch.empty(0)
        )
        self.bank, self.operator = bank.detach().clone(), operator.to(bank.device)
        self._make_index()
        self.bank_radius, self.bank_count, self.bank_squares = cover.radius, cover.count, cover.squares
        self.bank_origin = cover.origin
        self.bank_thumbnails = torch.empty(0, dtype=torch.uint8, device=bank.device)
        encoded = "\0".join(images).encode("utf-8", "surrogateescape")
        self.bank_images = torch.tensor(list(encoded), dtype=torch.uint8, device=bank.device)
        self.bank_threshold = torch.tensor(threshold, dtype=torch.float64, device=bank.device)

    def _make_index(self, *_: object) -> None:
        if self.solver == "affine" and self.is_fitted:
            self.index_atoms, self.index_centre = search_index(self.bank)

    def __getstate__(self) -> dict[str, Any]:
        """Pickle without what follows from the bank."""
        state = self.__dict__.copy()
        state["_buffers"] = {**self._buffers, "index_atoms": torch.empty(0), "index_centre": torch.empty(0)}
        state["_smoothing"] = {}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Make again what was left out."""
        super().__setstate__(state)
        self._make_index()

    @property
    def cover(self) -> Cover:
        """The bank with what its atoms stand for; their offsets are not stored."""
        unknown = torch.full_like(self.bank, torch.nan, dtype=torch.float64)
        return Cover(self.bank, self.bank_radius, self.bank_count, self.bank_squares, self.bank_origin, unknown)

    @property
    def images(self) -> list[str]:
        """Paths of the training images that atoms come from, as ``cover.origin`` numbers them."""
        encoded = bytes(self.bank_images.tolist()).decode("utf-8", "surrogateescape")
        return encoded.split("\0") if encoded else []

    @contextmanager
    def only(self, atoms: Tensor) -> Iterator[None]:
        """Score with some of the atoms while the context lasts; with all of them if none are chosen.

        Args:
            atoms (Tensor): Which, a mask of shape ``(M,)``.
        """
        whole = self.bank, self.operator, self.index_atoms, self.index_centre
        try:
            if bool(atoms.any()) and not bool(atoms.all()):
                self.bank = self.bank[atoms]
                if self.solver == "ridge":
                    self.operator = self_expression.ridge_operator(self.bank, self.regularisation)
                self._make_index()
            yield
        finally:
            self.bank, self.operator, self.index_atoms, self.index_centre = whole

    def certificate(self) -> Certificate:
        """Bound the residual of every nominal patch the bank was learnt from.

        Returns:
            Certificate: The bounds, in the units of the anomaly map.

        Raises:
            RuntimeError: If the model is not fitted.
        """
        self._require_bank()
        return certify(self.cover, self.solver, self.num_atoms, self.regularisation)

    def forward(self, images: Tensor) -> Tensor | InferenceBatch:
        """Embed images (training mode) or score them (evaluation mode).

        Args:
            images (Tensor): Normalised images, shape ``(B, 3, H, W)``.

        Returns:
            Tensor | InferenceBatch: In training mode patch embeddings, shape ``(B * h * w, d)``. In evaluation mode
            ``anomaly_map`` of shape ``(B, 1, H, W)``, in units of the embedding's Euclidean length, and ``pred_score``
            of shape ``(B,)``, the map's maximum.

        Raises:
            RuntimeError: In evaluation mode, if the model is not fitted.
            ValueError: If an embedding is not finite.
        """
        embedding = self.embed(images)
        if self.training:
            return to_patches(embedding)
        return self.score(embedding, images.shape[-2:])

    def embed(self, images: Tensor) -> Tensor:
        """Embed images as the bank's atoms are.

        Args:
            images (Tensor): Normalised images, shape ``(B, 3, H, W)``.

        Returns:
            Tensor: Patch embeddings, shape ``(B, d, h, w)``.
        """
        embedding = self.features(images)
        return embedding * self.scale[:, None, None] if self.scale.numel() else embedding

    def features(self, images: Tensor) -> Tensor:
        """Embed images before channels are scaled, tile by tile if there is a tiler; arguments as :meth:`embed`."""
        embedding: Tensor = self.embedder(self.tiler.tile(images) if self.tiler else images)
        return self.tiler.untile(embedding) if self.tiler else embedding

    def score(self, embedding: Tensor, size: Sequence[int]) -> InferenceBatch:
        """Score embeddings: rebuild each from the bank, and turn what is left into a map.

        Args:
            embedding (Tensor): Patch embeddings, shape ``(B, d, h, w)``.
            size (Sequence[int]): Height and width ``(H, W)`` of the map.

        Returns:
            InferenceBatch: As :meth:`forward` in evaluation mode.

        Raises:
            RuntimeError: If the model is not fitted.
            ValueError: If an embedding is not finite.
        """
        self._require_bank()
        batch, width, rows, columns = embedding.shape
        patches = embedding.flatten(2).transpose(1, 2).float()  # (B, h * w, d)
        if torch.compiler.is_compiling():
            scores = self._exported_scores(patches, columns)
        else:
            scores = self.patch_scores(patches.reshape(-1, width))
        anomaly_map = self.smooth(scores.reshape(batch, 1, rows, columns), size)
        return InferenceBatch(anomaly_map=anomaly_map, pred_score=anomaly_map.amax(dim=(1, 2, 3)))

    def smooth(self, scores: Tensor, size: Sequence[int]) -> Tensor:
        """Turn patch scores into a map: bilinear interpolation and the Gaussian, as one linear step along each axis.

        Args:
            scores (Tensor): Shape ``(B, 1, h, w)``, ``float32``.
            size (Sequence[int]): Height and width ``(H, W)`` of the map.

        Returns:
            Tensor: Shape ``(B, 1, H, W)``.
        """
        if not all(isinstance(length, int) for length in (*scores.shape[-2:], *size)):  # unknown while exporting
            return self._spread(scores, size)
        vertical, horizontal = (
            self._axis_smoothing(before, after, scores.device)
            for before, after in zip(scores.shape[-2:], size, strict=True)
        )
        with torch.autocast(scores.device.type, enabled=False):
            return vertical @ scores @ horizontal.T

    def _spread(self, scores: Tensor, size: Sequence[int]) -> Tensor:
        blurred: Tensor = self.blur(functional.interpolate(scores, size=size, mode="bilinear", align_corners=False))
        return blurred

    def _axis_smoothing(self, before: int, after: int, device: torch.device) -> Tensor:
        """What :meth:`_spread` does along one axis, shape ``(after, before)``."""
        key = (before, after, device)
        if key not in self._smoothing:
            unit = torch.eye(before, device=device)[:, None, :, None]  # a one in each place, alike in all columns
            columns = self.blur.width if isinstance(self.blur, GaussianBlur2d) else 1
            self._smoothing[key] = self._spread(unit, (after, columns))[:, 0, :, columns // 2].T.contiguous()
        return self._smoothing[key]

    def _require_bank(self) -> None:
        if not self.is_fitted:
            msg = "the model has no bank: fit it first, or load a checkpoint that was saved after its fit ended."
            raise RuntimeError(msg)

    def patch_scores(self, patches: Tensor) -> Tensor:
        """Length of what cannot be rebuilt of each patch, in chunks of bounded memory.

        Args:
            patches (Tensor): Embeddings, shape ``(N, d)``.

        Returns:
            Tensor: Shape ``(N,)``.

        Raises:
            ValueError: If an embedding is not finite.
        """
        values_per_patch = self.bank.shape[0] + 4 * self.num_atoms * self.bank.shape[1]
        chunks = patches.split(max(1, _CHUNK_VALUES // values_per_patch))
        with torch.autocast(patches.device.type, enabled=False):  # half precision would blur small residuals
            return torch.cat([self._length(chunk) for chunk in chunks])

    def _exported_scores(self, patches: Tensor, columns: int) -> Tensor:
        """The same inside an exported graph, image by image, or by parts of a large image: a loop of the graph.

        A loop of Python's over a batch-derived size would bake the batch into the graph, and none at all would let
        memory grow with the batch.
        """
        batch, number, width = patches.shape
        if isinstance(number, int):
            rows = number // columns
            fitting = (size for size in range(rows, 1, -1) if rows % size == 0 and size * columns <= _EXPORTED_PATCHES)
            part = next(fitting, 1)
            patches = patches.reshape(-1, part * columns, width)

        def step(carry: Tensor, chunk: Tensor) -> tuple[Tensor, Tensor]:
            return carry.clone(), self._length(chunk)

        _, scores = scan(step, torch.zeros(1, device=patches.device), patches, dim=0)
        return scores.reshape(batch, number)

    def _length(self, patches: Tensor) -> Tensor:
        if self.solver == "ridge":
            return self_expression.ridge(patches, self.operator).norm(dim=1)
        if self.solver == "omp":
            return self_expression.omp(patches, self.bank, self.num_atoms).residual.norm(dim=1)
        index = Index(self.index_atoms, self.index_centre)
        return self_expression.affine_distance(patches, self.bank, self.num_atoms, self.regularisation, index)


plugin.register()
