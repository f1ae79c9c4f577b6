"""Solvers: how patches are rebuilt from a memory bank, by name.

A new solver is a subclass of :class:`Solver` in ``SOLVERS``; nothing else depends on which
there are.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from anomalib_sgfr.core import gpu, self_expression
from anomalib_sgfr.core.chunks import in_chunks
from anomalib_sgfr.core.clusters import Clusters
from anomalib_sgfr.core.linear_algebra import KeepsDtype, middle, ridge_spectrum
from anomalib_sgfr.core.neighbours import Index, nearest, search_index

__all__ = [
    "SOLVERS",
    "AffineSolver",
    "Bank",
    "OmpSolver",
    "RidgeSolver",
    "Solver",
    "SolverName",
    "find_solver",
]

_EXPLAINING_ATOMS = 5  # of a code over the whole bank
_ROWS = 1024

# From distances of patches from their atoms, ``(M,)``, to bounds on the residuals of these patches.
Bound = Callable[[Tensor], Tensor]


class Bank(Protocol):
    """Memory bank as a solver sees it.

    Attributes:
        solver (Any): Its solver.
        size (int): Number of atoms.
        atoms (Tensor): The atoms, shape ``(M, d)``, ``float32``.
        residual_scale (Tensor): What residuals are divided by, a scalar.
    """

    solver: Any

    @property
    def size(self) -> int:
        """Number of atoms."""

    @property
    def atoms(self) -> Tensor:
        """The atoms."""

    @property
    def residual_scale(self) -> Tensor:
        """What residuals are divided by."""

    def map_patches(self, step: Callable[[Tensor], Tensor], patches: Tensor) -> Tensor:
        """Apply a function to patches ``(N, d)``, in bounded memory."""


class Solver(KeepsDtype, ABC):
    """Base class of solvers.

    Args:
        num_atoms (int): Size ``k`` of the support. Defaults to ``5``.
        regularisation (float): Strength of the ridge penalty. Defaults to ``0.001``.

    Attributes:
        arguments (tuple[str, ...]): Arguments that its results depend on.
        uses_all_atoms (bool): Whether the support is the whole bank whatever ``num_atoms``.
        derived (tuple[str, ...]): Buffers that :meth:`prepare` fills; never stored.

    Raises:
        ValueError: If an argument is out of range.
    """

    arguments: ClassVar[tuple[str, ...]] = ("num_atoms", "regularisation")
    uses_all_atoms: ClassVar[bool] = False
    derived: ClassVar[tuple[str, ...]] = ()

    def __init__(self, num_atoms: int = 5, regularisation: float = 1e-3) -> None:
        super().__init__()
        self_expression.check_arguments(num_atoms, regularisation)
        self.num_atoms = num_atoms
        self.regularisation = regularisation
        for name in self.derived:
            self.register_buffer(name, torch.empty(0, dtype=torch.float32), persistent=False)

    def __getstate__(self) -> dict[str, Any]:
        """Pickle without what follows from the atoms."""
        empty = {name: torch.empty(0, dtype=torch.float32) for name in self.derived}
        return {**self.__dict__, "_buffers": {**self._buffers, **empty}}

    def prepare(self, atoms: Tensor) -> None:
        """Compute what follows from the atoms, after every change of them.

        Args:
            atoms (Tensor): Shape ``(M, d)``, ``float32``; may be empty.
        """
        for name in self.derived:
            setattr(self, name, torch.empty(0, dtype=torch.float32, device=atoms.device))

    @abstractmethod
    def residual_norm(self, patches: Tensor, atoms: Tensor) -> Tensor:
        """Length of what the atoms leave of each patch, in plain PyTorch that exports.

        Args:
            patches (Tensor): Shape ``(N, d)``, ``float32``.
            atoms (Tensor): Shape ``(M, d)``, those of :meth:`prepare`.

        Returns:
            Tensor: Shape ``(N,)``; not finite where a patch is not.
        """

    @abstractmethod
    def code(self, patches: Tensor, atoms: Tensor) -> tuple[Tensor, Tensor]:
        """Atoms that patches are rebuilt from, and their coefficients, for explanations.

        Args:
            patches (Tensor): Shape ``(N, d)``.
            atoms (Tensor): Shape ``(M, d)``.

        Returns:
            tuple[Tensor, Tensor]: Rows of atoms ``(N, k)``, ``int64``, and coefficients ``(N, k)``.
        """

    @abstractmethod
    def bound(self, clusters: Clusters) -> Bound:
        r"""Bound on the residual of patches at given distances from their atoms.

        Args:
            clusters (Clusters): Atoms and the patches that they stand for.

        Returns:
            Bound: From distances :math:`\beta` of each atom, ``(M,)``, to bounds, ``(M,)``.
        """

    @classmethod
    def residuals(cls, banks: Sequence[Bank], patches: Sequence[Tensor]) -> list[Tensor]:
        """Lengths of what is left of the patches of all scales, over each bank's residual scale.

        Args:
            banks (Sequence[Bank]): One of each scale, with solvers of this class.
            patches (Sequence[Tensor]): Of each scale, shape ``(N, d)``, ``float32``.

        Returns:
            list[Tensor]: Of each scale, shape ``(N,)``, ``float32``.
        """
        return [
            bank.map_patches(_with_atoms(bank.solver.residual_norm, bank), part)
            / bank.residual_scale
            for bank, part in zip(banks, patches, strict=True)
        ]

    @classmethod
    def gpu_maps(cls, banks: Sequence[Bank], embeddings: Sequence[Tensor]) -> list[Tensor] | None:
        """The same of embedding maps ``(B, d, h, w)`` by a GPU kernel; ``None`` without one.

        Args:
            banks (Sequence[Bank]): As :meth:`residuals`.
            embeddings (Sequence[Tensor]): Of each scale.

        Returns:
            list[Tensor] | None: Of each scale, shape ``(B, 1, h, w)``, ``float32``.
        """
        del banks, embeddings
        return None


class AffineSolver(Solver):
    r"""Affine combination of the nearest atoms: ``core.self_expression.affine``.

    The bound: the nearest atom alone is a code, of length one where the optimal has at least
    :math:`1/\sqrt k`. With regularisation :math:`\lambda`,

    .. math:: \|r\|^2 \le \beta^2 + \lambda (1 - 1/k) \, \tfrac1k \sum_{j \le k} (\beta + D_j)^2,

    with :math:`D_j` the distance of the atom from its ``j``-th nearest. Rounding may take another
    atom than the nearest where one is near enough; :math:`\beta^2` then grows by :math:`3 (d + 5)
    \epsilon (\|a - m\| + 2 \beta)^2`, with :math:`m` the centre of the search.
    """

    derived = ("index_atoms", "index_centre")
    index_atoms: Tensor
    index_centre: Tensor

    def __init__(self, num_atoms: int = 5, regularisation: float = 1e-3) -> None:
        super().__init__(num_atoms, regularisation)
        self._columns: tuple[Tensor, Tensor] | None = None  # atoms, and what a GPU kernel reads

    def __getstate__(self) -> dict[str, Any]:
        """Pickle without what follows from the atoms."""
        return {**super().__getstate__(), "_columns": None}

    @property
    def _index(self) -> Index:
        return Index(self.index_atoms, self.index_centre)

    @property
    def _by_products(self) -> bool:
        return self_expression.by_products(self.num_atoms, self.regularisation)

    def prepare(self, atoms: Tensor) -> None:
        """Make the search index."""
        super().prepare(atoms)
        if len(atoms):
            self.index_atoms, self.index_centre = search_index(atoms)

    def residual_norm(self, patches: Tensor, atoms: Tensor) -> Tensor:
        """Length of what is left of each patch."""
        return self_expression.affine_distance(
            patches, atoms, self.num_atoms, self.regularisation, self._index
        )

    def code(self, patches: Tensor, atoms: Tensor) -> tuple[Tensor, Tensor]:
        """Nearest atoms and their coefficients."""
        found = self_expression.affine(patches, atoms, self.num_atoms, self.regularisation)
        return found.support, found.code

    def bound(self, clusters: Clusters) -> Bound:
        """Bound from the distance to the nearest atom and its neighbours."""
        atoms, radius = clusters.atoms, clusters.radius.double()
        if len(atoms) == 1:
            return lambda distance: distance.square().sqrt()
        k = min(self.num_atoms, len(atoms))
        neighbours = _neighbour_distances(atoms, max(k, 2))
        spread, share = neighbours[:, :k], self.regularisation * (1.0 - 1.0 / k)
        about = (atoms - middle(atoms)).double().norm(dim=1)
        precision = torch.finfo(atoms.dtype).eps
        error = 3.0 * (atoms.shape[1] + 5) * precision * (about + 2.0 * radius).square()
        near = neighbours[:, 1] <= radius + (radius.square() + error).sqrt()
        penalty = torch.where(near, error, 0.0)

        def bound(distance: Tensor) -> Tensor:
            squared = distance.square() + penalty
            if share:
                reach = (distance[:, None] + spread).square().mean(1)
                squared = squared + share * (reach + penalty)
            return squared.sqrt()

        return bound

    @classmethod
    def residuals(cls, banks: Sequence[Bank], patches: Sequence[Tensor]) -> list[Tensor]:
        """Lengths of what is left, by the equations of all scales at once where possible.

        The steps of a solution are many, and each is short for one scale.
        """
        solver = banks[0].solver
        alike = {(bank.solver.num_atoms, bank.solver.regularisation) for bank in banks}
        if len(alike) > 1 or not solver._by_products:  # noqa: SLF001
            return super().residuals(banks, patches)
        if not all(bank.size > solver.num_atoms for bank in banks):
            return super().residuals(banks, patches)
        products = [
            bank.map_patches(_with_atoms(bank.solver._products, bank), part)  # noqa: SLF001
            for bank, part in zip(banks, patches, strict=True)
        ]
        lengths = solver._solve(torch.cat(products))  # noqa: SLF001
        parts = lengths.split([part.shape[0] for part in patches])
        return [part / bank.residual_scale for part, bank in zip(parts, banks, strict=True)]

    @classmethod
    def gpu_maps(cls, banks: Sequence[Bank], embeddings: Sequence[Tensor]) -> list[Tensor] | None:
        """The same by a GPU kernel, where all scales fit it."""
        pairs = list(zip(banks, embeddings, strict=True))
        if not all(bank.solver._runs_on_gpu(bank, part) for bank, part in pairs):  # noqa: SLF001
            return None
        return [bank.solver._gpu_map(bank, part) for bank, part in pairs]  # noqa: SLF001

    def _products(self, patches: Tensor, atoms: Tensor) -> Tensor:
        return self_expression.affine_products(patches, atoms, self.num_atoms, self._index)

    def _solve(self, products: Tensor) -> Tensor:
        """Lengths, shape ``(N,)``, from products ``(N, k', k')``."""

        def solve(part: Tensor) -> Tensor:
            return self_expression.length_of_products(part, self.num_atoms, self.regularisation)

        if torch.compiler.is_exporting():
            return solve(products)
        return in_chunks(solve, products, 4 * (self.num_atoms + 1) ** 2)

    def _runs_on_gpu(self, bank: Bank, embedding: Tensor) -> bool:
        if torch.compiler.is_exporting() or not self._by_products:
            return False
        return gpu.fits(self.num_atoms, bank.size) and gpu.serve(embedding)

    def _gpu_map(self, bank: Bank, embedding: Tensor) -> Tensor:
        index = self._index
        return gpu.affine_lengths(
            embedding,
            index,
            self._gpu_columns(index),
            bank.size,
            self.num_atoms,
            self.regularisation,
            bank.residual_scale,
        )

    def _gpu_columns(self, index: Index) -> Tensor:
        """Atoms as the kernel reads them, kept until they change or move."""
        if torch.compiler.is_compiling():
            return gpu.columns_of(index)
        kept = self._columns  # another thread may replace it
        if kept is None or kept[0] is not index.atoms:
            self._columns = kept = index.atoms, gpu.columns_of(index)
        return kept[1]


class OmpSolver(Solver):
    r"""Orthogonal matching pursuit, see :func:`~anomalib_sgfr.core.self_expression.omp`.

    The bound: the nearest atom alone leaves no more than its distance. Rounding may take another
    atom than the best; :math:`\beta^2` grows by :math:`2 (d + 4) \epsilon (\|a\| + \beta)^2`.
    """

    arguments = ("num_atoms",)

    def residual_norm(self, patches: Tensor, atoms: Tensor) -> Tensor:
        """Length of what is left of each patch."""
        return self_expression.omp(patches, atoms, self.num_atoms).residual.norm(dim=1)

    def code(self, patches: Tensor, atoms: Tensor) -> tuple[Tensor, Tensor]:
        """Atoms in the order chosen, and their coefficients."""
        found = self_expression.omp(patches, atoms, self.num_atoms)
        return found.support, found.code

    def bound(self, clusters: Clusters) -> Bound:
        """Bound from the distance to the nearest atom."""
        length, precision = _lengths(clusters)
        reach = (length + clusters.radius.double()).square()
        # four times the error of a product of d values
        penalty = 2.0 * (clusters.atoms.shape[1] + 4) * precision * reach
        return lambda distance: (distance.square() + penalty).sqrt()


class RidgeSolver(Solver):
    r"""Ridge regression on all atoms: ``core.self_expression.ridge_operator``.

    The bound: :math:`\|r\|^2 \le \beta^2 + \alpha`, with the :math:`\alpha` of the operator. By
    rounding, the residual grows by :math:`(d + 4) \epsilon (\|a\| + \beta)`, and by the largest
    singular value of the bank that counts as zero.
    """

    arguments = ("regularisation",)
    uses_all_atoms = True
    derived = ("operator",)
    operator: Tensor

    def prepare(self, atoms: Tensor) -> None:
        """Make the residual operator, shape ``(d, d)``."""
        super().prepare(atoms)
        if len(atoms):
            self.operator = self_expression.ridge_operator(atoms, self.regularisation)

    def residual_norm(self, patches: Tensor, atoms: Tensor) -> Tensor:
        """Length of what is left of each patch."""
        del atoms
        return self_expression.ridge(patches, self.operator).norm(dim=1)

    def code(self, patches: Tensor, atoms: Tensor) -> tuple[Tensor, Tensor]:
        """Atoms of the largest contributions, at most five, and their coefficients."""
        code = self_expression.ridge_code(patches, atoms, self.regularisation)
        number = min(_EXPLAINING_ATOMS, len(atoms))
        support = (code.abs() * atoms.norm(dim=1)).topk(number, dim=1).indices
        return support, code.gather(1, support)

    def bound(self, clusters: Clusters) -> Bound:
        """Bound from the distance to the atom and the strength of the penalty."""
        length, precision = _lengths(clusters)
        width = clusters.atoms.shape[1]
        _, singular, _, kept = ridge_spectrum(clusters.atoms, self.regularisation)
        penalty = self.regularisation * length.square().sum() / width
        rounding = (width + 4) * precision * (length + clusters.radius.double())
        beyond = rounding + torch.where(kept > 0, 0.0, singular).amax()
        return lambda distance: (distance.square() + penalty).sqrt() + beyond


SolverName = Literal["affine", "omp", "ridge"]  # what the command line offers
SOLVERS: dict[str, type[Solver]] = {"affine": AffineSolver, "omp": OmpSolver, "ridge": RidgeSolver}


def find_solver(name: str) -> type[Solver]:
    """Class of a solver.

    Args:
        name (str): Key of ``SOLVERS``.

    Raises:
        ValueError: If there is none of this name.
    """
    if name not in SOLVERS:
        msg = f"solver must be one of {', '.join(SOLVERS)}, got '{name}'."
        raise ValueError(msg)
    return SOLVERS[name]


def _with_atoms(step: Callable[[Tensor, Tensor], Tensor], bank: Bank) -> Callable[[Tensor], Tensor]:
    """A function of patches and atoms as one of patches; of atoms computed for each call."""
    return lambda patches: step(patches, bank.atoms)


def _lengths(clusters: Clusters) -> tuple[Tensor, float]:
    """Lengths of the atoms, ``(M,)``, ``float64``, and the precision of their values."""
    return clusters.atoms.double().norm(dim=1), torch.finfo(clusters.atoms.dtype).eps


def _neighbour_distances(atoms: Tensor, k: int) -> Tensor:
    """Distances of each atom from its ``k`` nearest with itself, shape ``(M, k)``, ``float64``."""
    index = search_index(atoms)
    rows = [
        (part[:, None] - atoms[nearest(part, index, k)]).norm(dim=2) for part in atoms.split(_ROWS)
    ]
    return torch.cat(rows).double().sort(1).values
