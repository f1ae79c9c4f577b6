"""The bank of one scale: its atoms, what they stand for, and what of a patch they cannot rebuild."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, get_args

import torch
from anomalib.models.components import DynamicBufferMixin
from torch import Tensor, nn
from torch._higher_order_ops import scan  # not yet exported under a public name

from anomalib_sgfr.core import self_expression
from anomalib_sgfr.core.arguments import Solver
from anomalib_sgfr.core.certificate import ScaleCertificate, certify
from anomalib_sgfr.core.cover import Cover, moved
from anomalib_sgfr.core.search import Index, search_index

__all__ = ["Bank"]

# Largest number of values one chunk of patches may hold in temporary tensors: 64 MiB of float32.
_CHUNK_VALUES = 2**24
_EXPONENT = 14  # of the largest value in 16 bits, which go up to 2^16
_EXPORTED_PATCHES = 2048  # rebuilt at once in an exported graph


class Bank(DynamicBufferMixin, nn.Module):
    """Atoms of one scale, and the solver that rebuilds patches from them.

    Args:
        solver (str): ``"affine"``, ``"omp"`` or ``"ridge"``. Defaults to ``"affine"``.
        num_atoms (int): Size ``k`` of the support; ``"ridge"`` uses the whole bank. Defaults to ``5``.
        regularisation (float): Strength of the ridge penalty relative to the data's own scale; ``"omp"`` has none. See
            :mod:`~anomalib_sgfr.core.self_expression`, ``affine`` and ``ridge_operator``.

    Attributes:
        stored (Tensor): The atoms over ``unit``, shape ``(M, d)``, ``float16``; empty until the bank is learnt.
        unit (Tensor): A power of two that makes the largest value of ``stored`` 2^14 to 2^15.
        radius, count, squares, origin (Tensor): What each atom stands for and where it was seen, as in
            :class:`~anomalib_sgfr.core.cover.Cover`.
        threshold (Tensor): Distance above which the sampler would have taken another atom.
        grid (Tensor): Rows and columns of the training images' patches, which origins count; ``(2,)``, ``int64``.
        thumbnails (Tensor): Small pictures of where atoms were seen, ``(M, 24, 24, 3)``, ``uint8``; empty for none.
        operator (Tensor): Residual operator of the ridge solver, shape ``(d, d)``; empty for the other solvers.

    Raises:
        ValueError: If an argument is out of range.
    """

    stored: Tensor
    unit: Tensor
    radius: Tensor
    count: Tensor
    squares: Tensor
    origin: Tensor
    threshold: Tensor
    grid: Tensor
    thumbnails: Tensor
    operator: Tensor
    index_atoms: Tensor
    index_centre: Tensor

    def __init__(self, solver: str = "affine", num_atoms: int = 5, regularisation: float = 1e-3) -> None:
        super().__init__()
        if solver not in get_args(Solver):
            msg = f"solver must be one of {', '.join(get_args(Solver))}, got '{solver}'."
            raise ValueError(msg)
        self_expression.check_arguments(num_atoms, regularisation)
        self.solver = solver
        self.num_atoms = num_atoms
        self.regularisation = regularisation
        for name, dtype in (
            ("stored", torch.float16),
            ("radius", torch.float32),
            ("count", torch.int64),
            ("squares", torch.float64),
            ("origin", torch.int64),
            ("thumbnails", torch.uint8),
            ("operator", torch.float32),
        ):
            self.register_buffer(name, torch.empty(0, dtype=dtype))
        self.register_buffer("unit", torch.ones(()))
        self.register_buffer("threshold", torch.zeros((), dtype=torch.float64))
        self.register_buffer("grid", torch.zeros(2, dtype=torch.int64))
        # The atoms as the search wants them: what an exported graph holds. Made from the atoms, never stored with them.
        self.register_buffer("index_atoms", torch.empty(0), persistent=False)
        self.register_buffer("index_centre", torch.empty(0), persistent=False)
        self.register_load_state_dict_post_hook(Bank._make_index)

    @property
    def is_learnt(self) -> bool:
        """Whether there is an atom."""
        return self.stored.numel() > 0

    @property
    def atoms(self) -> Tensor:
        """The atoms, shape ``(M, d)``, ``float32``."""
        return self.stored.float() * self.unit

    @property
    def cover(self) -> Cover:
        """The atoms with what they stand for; their offsets are not stored."""
        unknown = torch.full_like(self.atoms, torch.nan, dtype=torch.float64)
        return Cover(self.atoms, self.radius, self.count, self.squares, self.origin, unknown)

    def set(self, bank: Tensor | Cover, threshold: float = 0.0, grid: tuple[int, int] | None = None) -> None:
        """Take atoms into use, replacing any earlier ones, in 16 bits each value; the bounds account for the rounding.

        Args:
            bank (Tensor | Cover): Atoms, shape ``(M, d)``, or atoms with what they stand for.
            threshold (float): Distance above which the sampler would have taken another atom; where a later fit that
                adds to this bank goes on.
            grid (tuple[int, int] | None): Rows and columns that origins count; ``None`` for those so far.
        """
        cover = bank if isinstance(bank, Cover) else Cover.of(bank)
        device = cover.atoms.device
        largest = cover.atoms.abs().amax().clamp_min(torch.finfo(torch.float32).tiny)
        self.unit = 2.0 ** (largest.log2().floor() - _EXPONENT)
        self.stored = (cover.atoms.detach() / self.unit).half()
        cover = moved(cover, self.atoms)
        self.radius, self.count, self.squares, self.origin = cover.radius, cover.count, cover.squares, cover.origin
        self.threshold = torch.tensor(threshold, dtype=torch.float64, device=device)
        self.grid = self.grid.to(device) if grid is None else torch.tensor(grid, device=device)
        self.thumbnails = torch.empty(0, dtype=torch.uint8, device=device)
        self._make_operator()
        self._make_index()

    def _make_operator(self) -> None:
        if self.solver == "ridge":
            self.operator = self_expression.ridge_operator(self.atoms, self.regularisation)

    def _make_index(self, *_: object) -> None:
        if self.solver == "affine" and self.is_learnt:
            self.index_atoms, self.index_centre = search_index(self.atoms)

    def __getstate__(self) -> dict[str, Any]:
        """Pickle without what follows from the atoms."""
        state = self.__dict__.copy()
        state["_buffers"] = {**self._buffers, "index_atoms": torch.empty(0), "index_centre": torch.empty(0)}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Make again what was left out."""
        super().__setstate__(state)
        self._make_index()

    @contextmanager
    def only(self, atoms: Tensor) -> Iterator[None]:
        """Rebuild from some of the atoms while the context lasts; from all of them if none are chosen.

        Args:
            atoms (Tensor): Which, a mask of shape ``(M,)``.
        """
        whole = self.stored, self.operator, self.index_atoms, self.index_centre
        try:
            if bool(atoms.any()) and not bool(atoms.all()):
                self.stored = self.stored[atoms]
                self._make_operator()
                self._make_index()
            yield
        finally:
            self.stored, self.operator, self.index_atoms, self.index_centre = whole

    def certificate(self) -> ScaleCertificate:
        """Bound the residual of every nominal patch the bank was learnt from."""
        return certify(self.cover, self.solver, self.num_atoms, self.regularisation)

    def residuals(self, patches: Tensor) -> Tensor:
        """Length of what cannot be rebuilt of each patch, in chunks of bounded memory.

        Args:
            patches (Tensor): Embeddings, shape ``(N, d)``, ``float32``.

        Returns:
            Tensor: Shape ``(N,)``.

        Raises:
            ValueError: If an embedding is not finite.
        """
        values_per_patch = self.stored.shape[0] + 4 * self.num_atoms * self.stored.shape[1]
        chunks = patches.split(max(1, _CHUNK_VALUES // values_per_patch))
        with torch.autocast(patches.device.type, enabled=False):  # half precision would blur small residuals
            return torch.cat([self._length(chunk) for chunk in chunks])

    def residual_map(self, embedding: Tensor) -> Tensor:
        """The same for embedding maps.

        Args:
            embedding (Tensor): Shape ``(B, d, h, w)``.

        Returns:
            Tensor: Shape ``(B, 1, h, w)``, ``float32``.

        Raises:
            ValueError: If an embedding is not finite.
        """
        batch, width, rows, columns = embedding.shape
        patches = embedding.flatten(2).transpose(1, 2).float()  # (B, h * w, d)
        if torch.compiler.is_compiling():
            found = self._exported(patches, columns)
        else:
            found = self.residuals(patches.reshape(-1, width))
        return found.reshape(batch, 1, rows, columns)

    def _exported(self, patches: Tensor, columns: int) -> Tensor:
        """Residuals inside an exported graph, image by image, or by parts of a large image: a loop of the graph.

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

        _, found = scan(step, torch.zeros(1, device=patches.device), patches, dim=0)
        return found.reshape(batch, number)

    def _length(self, patches: Tensor) -> Tensor:
        if self.solver == "ridge":
            return self_expression.ridge(patches, self.operator).norm(dim=1)
        if self.solver == "omp":
            return self_expression.omp(patches, self.atoms, self.num_atoms).residual.norm(dim=1)
        index = Index(self.index_atoms, self.index_centre)
        return self_expression.affine_distance(patches, self.atoms, self.num_atoms, self.regularisation, index)
