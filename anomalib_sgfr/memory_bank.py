"""The bank of one scale: its atoms, what they stand for, and what of a patch they cannot rebuild.

What the banks of all scales cannot rebuild, together.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, get_args

import torch
from anomalib.models.components import DynamicBufferMixin
from torch import Tensor, nn

from anomalib_sgfr.core import gpu, self_expression
from anomalib_sgfr.core.arguments import Solver
from anomalib_sgfr.core.certificate import ScaleCertificate, certify
from anomalib_sgfr.core.chunks import by_rows, in_chunks, mapped
from anomalib_sgfr.core.clusters import Clusters, moved
from anomalib_sgfr.core.linear_algebra import KeepsDtype, float64_device
from anomalib_sgfr.core.neighbours import Index, search_index
from anomalib_sgfr.core.self_expression import nominal_residual

__all__ = ["MemoryBank", "MemoryBankState", "residual_maps"]


_EXPONENT = 14  # of the largest value in 16 bits, which go up to 2^16
_LEAST = 2.0**-100  # a bank smaller than that is one of zeros; its unit is still a normal number


class MemoryBankState(NamedTuple):
    """All that is kept of one scale; what a fit makes, an update adds to, a trim leaves and a
    checkpoint stores.

    Attributes:
        clusters (Clusters): Atoms, what they stand for and where they were seen.
        threshold (float): Distance above which the sampler would have taken another atom; where a
            later fit that adds to these atoms goes on.
        thumbnails (Tensor | None): Small pictures of where atoms were seen, ``(M, 24, 24, 3)``,
            ``uint8``.
        nominal (float | None): What residuals are measured by, see
            :func:`~anomalib_sgfr.core.self_expression.nominal_residual`; ``None`` to find it anew.
        nuisance (Tensor | None): Directions that atoms and patches are compared without,
            orthonormal rows ``(n, d)``; see :mod:`~anomalib_sgfr.core.linear_algebra`.
    """

    clusters: Clusters
    threshold: float = 0.0
    thumbnails: Tensor | None = None
    nominal: float | None = None
    nuisance: Tensor | None = None

    def rows(self, index: Tensor) -> "MemoryBankState":
        """Some of the atoms, by index or mask."""
        pictures = None if self.thumbnails is None else self.thumbnails[index]
        return self._replace(clusters=self.clusters.rows(index), thumbnails=pictures)


class MemoryBank(KeepsDtype, DynamicBufferMixin, nn.Module):
    """Atoms of one scale, and the solver that rebuilds patches from them.

    Args:
        solver (str): ``"affine"``, ``"omp"`` or ``"ridge"``. Defaults to ``"affine"``.
        num_atoms (int): Size ``k`` of the support; ``"ridge"`` uses the whole bank. Defaults to
            ``5``.
        regularisation (float): Strength of the ridge penalty relative to the data's own scale;
            ``"omp"`` has none. See :mod:`~anomalib_sgfr.core.self_expression`, ``affine`` and
            ``ridge_operator``.

    Attributes:
        stored (Tensor): The atoms over ``unit``, shape ``(M, d)``, ``float16``; empty until the
            bank is learnt.
        unit (Tensor): A power of two that makes the largest value of ``stored`` 2^14 to 2^15.
        radius, count, squares, origin (Tensor): What each atom stands for and where it was seen, as
            in :class:`~anomalib_sgfr.core.clusters.Clusters`.
        threshold, thumbnails (Tensor): As in :class:`MemoryBankState`; no thumbnails are an empty
            tensor.
        nominal (Tensor): What residuals are measured by, ``float32``.
        nuisance (Tensor): As in :class:`MemoryBankState`, ``float32``; left out when patches are
            embedded.
        index_atoms, index_centre, operator (Tensor): What follows from the atoms and the arguments:
            the search index of ``"affine"``, and the residual operator of ``"ridge"``, shape ``(d,
            d)``. Never stored.

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
    thumbnails: Tensor
    nominal: Tensor
    nuisance: Tensor
    operator: Tensor
    index_atoms: Tensor
    index_centre: Tensor

    _DOUBLES = ("squares", "threshold")
    _DERIVED = ("operator", "index_atoms", "index_centre")

    def __init__(
        self, solver: str = "affine", num_atoms: int = 5, regularisation: float = 1e-3
    ) -> None:
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
            ("origin", torch.int32),
            ("thumbnails", torch.uint8),
            ("nuisance", torch.float32),
        ):
            self.register_buffer(name, torch.empty(0, dtype=dtype))
        for name in ("unit", "nominal"):
            self.register_buffer(name, torch.ones((), dtype=torch.float32))
        self.register_buffer("threshold", torch.zeros((), dtype=torch.float64))
        for name in self._DERIVED:
            self.register_buffer(name, torch.empty(0, dtype=torch.float32), persistent=False)
        self._kept: tuple[Tensor, Tensor] | None = None  # atoms, and what a kernel reads of them
        self.register_load_state_dict_pre_hook(MemoryBank._adopt_earlier)
        self.register_load_state_dict_post_hook(MemoryBank._derive)

    @property
    def is_fitted(self) -> bool:
        """Whether there is an atom."""
        return self.stored.numel() > 0

    @property
    def atoms(self) -> Tensor:
        """The atoms, shape ``(M, d)``, ``float32``."""
        return self.stored.float() * self.unit

    @property
    def clusters(self) -> Clusters:
        """The atoms with what they stand for, in memory of its own; their offsets are not stored."""
        place = float64_device(self.stored.device)
        atoms = self.atoms.to(place)
        unknown = torch.full_like(atoms, torch.nan, dtype=torch.float64)
        radius, count, squares, origin = (
            part.clone().to(place) for part in (self.radius, self.count, self.squares, self.origin)
        )
        return Clusters(atoms, radius, count, squares, origin, unknown)

    @property
    def state(self) -> MemoryBankState:
        """All that is kept, in memory of its own; ``set(*state)`` takes it up again."""
        thumbnails = self.thumbnails.clone() if self.thumbnails.numel() else None
        nuisance = self.nuisance.clone() if self.nuisance.numel() else None
        return MemoryBankState(
            self.clusters, float(self.threshold), thumbnails, float(self.nominal), nuisance
        )

    def set(
        self,
        bank: Tensor | Clusters,
        threshold: float = 0.0,
        thumbnails: Tensor | None = None,
        nominal: float | None = None,
        nuisance: Tensor | None = None,
    ) -> None:
        """Take atoms into use, replacing any earlier ones, in 16 bits each value; the bounds
        account for the rounding.

        Args:
            bank (Tensor | Clusters): Atoms, shape ``(M, d)``, or atoms with what they stand for.
            threshold (float): As in :class:`MemoryBankState`.
            thumbnails (Tensor | None): As in :class:`MemoryBankState`.
            nominal (float | None): As in :class:`MemoryBankState`.
            nuisance (Tensor | None): As in :class:`MemoryBankState`.
        """
        clusters = (
            bank
            if isinstance(bank, Clusters)
            else Clusters.of(bank.to(float64_device(bank.device)))
        )
        place = clusters.atoms.device
        device = self.stored.device if float64_device(self.stored.device) == place else place
        largest = clusters.atoms.detach().abs().amax().float().clamp_min(_LEAST)
        unit = 2.0 ** (largest.log2().floor() - _EXPONENT)
        stored = (clusters.atoms.detach() / unit).half()
        clusters = moved(clusters, stored.float() * unit)
        self.unit, self.stored = unit.to(device), stored.to(device)
        # nothing is shared with where it came from
        self.radius, self.squares = clusters.radius.float().to(device), clusters.squares
        self.count, self.origin = (
            clusters.count.clone().to(device),
            clusters.origin.int().clone().to(device),
        )
        self.threshold = torch.tensor(threshold, dtype=torch.float64, device=place)
        none = torch.empty(0, dtype=torch.uint8, device=device)
        self.thumbnails = none if thumbnails is None else thumbnails.clone().to(device)
        if nominal is None:
            nominal = nominal_residual(clusters.atoms, self.num_atoms, self.regularisation)
        self.nominal = torch.tensor(nominal, dtype=torch.float32, device=device)
        self.nuisance = none.float() if nuisance is None else nuisance.float().clone().to(device)
        self._derive()

    def subset(self, atoms: Tensor) -> "MemoryBank":
        """A bank of some of the atoms, to score with; of all, if none or all are chosen.

        Args:
            atoms (Tensor): Which, a mask of shape ``(M,)``.
        """
        if bool(atoms.all()) or not bool(atoms.any()):
            return self
        fewer = MemoryBank(self.solver, self.num_atoms, self.regularisation)
        fewer.stored, fewer.unit = self.stored[atoms.to(self.stored.device)], self.unit.clone()
        fewer.nominal = self.nominal.clone()
        fewer._derive()  # of this class
        return fewer

    def _derive(self, *_: object) -> None:
        """Make what follows from the atoms and the arguments: whenever the atoms have changed, and
        only here.
        """
        for name in self._DERIVED:
            setattr(self, name, torch.empty(0, dtype=torch.float32, device=self.stored.device))
        if self.is_fitted and self.solver == "affine":
            self.index_atoms, self.index_centre = search_index(self.atoms)
        elif self.is_fitted and self.solver == "ridge":
            self.operator = self_expression.ridge_operator(self.atoms, self.regularisation)

    def _adopt_earlier(self, state: dict[str, Any], prefix: str, *_: object) -> None:
        """Read what earlier versions stored: one grid for all origins, in 64 bits; the operator; no
        nuisance.
        """
        state.pop(f"{prefix}operator", None)
        if f"{prefix}stored" in state:
            state.setdefault(f"{prefix}nuisance", torch.empty(0, dtype=torch.float32))
            # residuals were taken as they are
            state.setdefault(f"{prefix}nominal", torch.ones((), dtype=torch.float32))
        grid = state.pop(f"{prefix}grid", None)
        if grid is not None:
            origin = state[f"{prefix}origin"]
            grids = torch.where(origin[:, :1] < 0, origin[:, :1], grid)
            state[f"{prefix}origin"] = torch.cat((origin, grids), 1).int()
            self.origin = torch.empty_like(state[f"{prefix}origin"], device=self.origin.device)

    def __getstate__(self) -> dict[str, Any]:
        """Pickle without what follows from the atoms, and as a device without 64 bits of floating
        point can read it.
        """
        state = self.__dict__.copy()
        bits = {name: getattr(self, name).view(torch.int64) for name in self._DOUBLES}
        derived = {name: torch.empty(0, dtype=torch.float32) for name in self._DERIVED}
        state |= {"_buffers": {**self._buffers, **bits, **derived}, "_kept": None}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Make again what was left out."""
        super().__setstate__({"_kept": None, **state})
        for name in self._DOUBLES:
            kept = getattr(self, name)
            if kept.dtype == torch.int64:
                setattr(self, name, kept.to(float64_device(kept.device)).view(torch.float64))
        self._derive()

    def certificate(self) -> ScaleCertificate:
        """Bound the residual of every nominal patch the bank was learnt from, in units of
        ``nominal``.
        """
        found = certify(self.clusters, self.solver, self.num_atoms, self.regularisation)
        return found.over(float(self.nominal))

    def residuals(self, patches: Tensor) -> Tensor:
        """Length of what cannot be rebuilt of each patch, in chunks of bounded memory.

        Args:
            patches (Tensor): Embeddings, shape ``(N, d)``, ``float32``.

        Returns:
            Tensor: Shape ``(N,)``; not finite where a patch is not.
        """
        with torch.autocast(
            patches.device.type, enabled=False
        ):  # half precision would blur small residuals
            return in_chunks(self._length, patches, self._values_per_patch)

    @property
    def by_products(self) -> bool:
        """Whether lengths come from :meth:`products`, which those of other such banks may be put
        beside.
        """
        return self.solver == "affine" and self_expression.by_products(
            self.num_atoms, self.regularisation
        )

    def products(self, embedding: Tensor) -> Tensor:
        """What :func:`~anomalib_sgfr.core.self_expression.length_of_products` needs of embedding
        maps.

        Args:
            embedding (Tensor): Shape ``(B, d, h, w)``.

        Returns:
            Tensor: Shape ``(B, h * w, k', k')``.
        """
        return self._of_patches(self._products, embedding)

    def has_kernel(self, embedding: Tensor) -> bool:
        """Whether :meth:`by_kernel` does what :meth:`lengths` does, for such embedding maps."""
        if torch.compiler.is_exporting() or not self.by_products:
            return False
        return gpu.fits(self.num_atoms, len(self.stored)) and gpu.serve(embedding)

    def by_kernel(self, embedding: Tensor) -> Tensor:
        """What :meth:`lengths` does, over ``nominal`` and as maps ``(B, 1, h, w)``: one launch on a
        graphics card.
        """
        size, index = len(self.stored), self._index
        return gpu.affine_lengths(
            embedding,
            index,
            self._columns(index),
            size,
            self.num_atoms,
            self.regularisation,
            self.nominal,
        )

    def _columns(self, index: Index) -> Tensor:
        """Made for the atoms in use, where they are; kept until they are others, or elsewhere."""
        if torch.compiler.is_compiling():
            return gpu.columns_of(index)
        kept = self._kept  # another thread may replace it
        if kept is None or kept[0] is not index.atoms:
            self._kept = kept = index.atoms, gpu.columns_of(index)
        return kept[1]

    def lengths(self, embedding: Tensor) -> Tensor:
        """What cannot be rebuilt of embedding maps.

        Args:
            embedding (Tensor): Shape ``(B, d, h, w)``.

        Returns:
            Tensor: Shape ``(B, h * w)``.
        """
        return self._of_patches(self._length, embedding)

    def _of_patches(self, step: Callable[[Tensor], Tensor], embedding: Tensor) -> Tensor:
        """What a step finds of each patch of embedding maps, shape ``(B, h * w, ...)``."""
        patches = embedding.flatten(2).transpose(1, 2).float()  # (B, h * w, d)
        if torch.compiler.is_exporting():
            return by_rows(step, patches, embedding.shape[-1])
        return in_chunks(step, patches.flatten(0, 1), self._values_per_patch).unflatten(
            0, patches.shape[:2]
        )

    @property
    def _values_per_patch(self) -> int:
        """In temporary tensors, while it is rebuilt."""
        return self.stored.shape[0] + 4 * self.num_atoms * self.stored.shape[1]

    def _products(self, patches: Tensor) -> Tensor:
        return self_expression.affine_products(patches, self.atoms, self.num_atoms, self._index)

    def _length(self, patches: Tensor) -> Tensor:
        if self.solver == "ridge":
            return self_expression.ridge(patches, self.operator).norm(dim=1)
        if self.solver == "omp":
            return self_expression.omp(patches, self.atoms, self.num_atoms).residual.norm(dim=1)
        return self_expression.affine_distance(
            patches, self.atoms, self.num_atoms, self.regularisation, self._index
        )

    @property
    def _index(self) -> Index:
        return Index(self.index_atoms, self.index_centre)


def residual_maps(banks: Sequence[MemoryBank], embeddings: Sequence[Tensor]) -> list[Tensor]:
    """What each bank cannot rebuild of its embedding maps, in units of its ``nominal``.

    Codes are solved for all scales at once where they can: the steps are many, and each is short
        for one scale.

    Args:
        banks (Sequence[MemoryBank]): One a scale.
        embeddings (Sequence[Tensor]): Of each scale, shape ``(B, d, h, w)``.

    Returns:
        list[Tensor]: Of each scale, shape ``(B, 1, h, w)``, ``float32``; not finite where an
            embedding is not.
    """
    with torch.autocast(
        embeddings[0].device.type, enabled=False
    ):  # half precision would blur small residuals
        if all(bank.has_kernel(part) for bank, part in zip(banks, embeddings, strict=True)):
            return [bank.by_kernel(part) for bank, part in zip(banks, embeddings, strict=True)]
        if _alike(banks):
            products = [bank.products(part) for bank, part in zip(banks, embeddings, strict=True)]
            found = _solved(products, banks[0].num_atoms, banks[0].regularisation)
        else:
            found = [bank.lengths(part) for bank, part in zip(banks, embeddings, strict=True)]
    shapes = [(part.shape[0], 1, *part.shape[2:]) for part in embeddings]
    return [
        part.reshape(shape) / bank.nominal
        for part, shape, bank in zip(found, shapes, banks, strict=True)
    ]


def _alike(banks: Sequence[MemoryBank]) -> bool:
    """Whether the codes of all banks solve the same equations."""
    same = len({(bank.num_atoms, bank.regularisation) for bank in banks}) == 1
    return same and all(bank.by_products and len(bank.stored) > bank.num_atoms for bank in banks)


def _solved(products: Sequence[Tensor], num_atoms: int, regularisation: float) -> list[Tensor]:
    """Lengths of each scale, shape ``(B, h * w)``, from :meth:`MemoryBank.products`."""

    def solve(part: Tensor) -> Tensor:
        return self_expression.length_of_products(part, num_atoms, regularisation)

    together = torch.cat(list(products), 1)  # (B, n, k', k')
    if torch.compiler.is_exporting():
        lengths = mapped(solve, together)
    else:
        lengths = in_chunks(solve, together.flatten(0, 1), 4 * (num_atoms + 1) ** 2).unflatten(
            0, together.shape[:2]
        )
    return list(lengths.split([part.shape[1] for part in products], 1))
