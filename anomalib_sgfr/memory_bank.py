"""Memory bank of one scale, and the residual maps of all scales."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from anomalib.models.components import DynamicBufferMixin
from torch import Tensor, nn

from anomalib_sgfr.core.certificate import ScaleCertificate, certify
from anomalib_sgfr.core.chunks import in_chunks, in_parts, mapped, number_of_parts
from anomalib_sgfr.core.clusters import Clusters, moved
from anomalib_sgfr.core.linear_algebra import KeepsDtype, float64_device
from anomalib_sgfr.core.self_expression import nominal_residual
from anomalib_sgfr.core.solvers import find_solver
from anomalib_sgfr.defect_bank import DefectBank, DefectPatches, raised

__all__ = ["MemoryBank", "MemoryBankState", "residual_maps"]


_EXPONENT = 14  # of the largest value in 16 bits, which go up to 2^16
_LEAST = 2.0**-100  # smaller banks count as zero; the unit is still a normal number


class MemoryBankState(NamedTuple):
    """State of the memory bank of one scale, as a fit makes it and a checkpoint stores it.

    Attributes:
        clusters (Clusters): Atoms, what they stand for and where they were seen.
        threshold (float): Distance above which the sampler would have taken another atom; where a
            later fit that adds to these atoms goes on.
        thumbnails (Tensor | None): Small images of where atoms were seen, ``(M, 24, 24, 3)``,
            ``uint8``.
        residual_scale (float | None): What residuals are divided by, see
            :func:`~anomalib_sgfr.core.self_expression.nominal_residual`; ``None`` to compute it.
        nuisance (Tensor | None): Directions that atoms and patches are compared without,
            orthonormal rows ``(n, d)``; see :mod:`~anomalib_sgfr.core.linear_algebra`.
        defects (DefectPatches | None): Patches of rejected defects.
    """

    clusters: Clusters
    threshold: float = 0.0
    thumbnails: Tensor | None = None
    residual_scale: float | None = None
    nuisance: Tensor | None = None
    defects: DefectPatches | None = None

    def rows(self, index: Tensor) -> "MemoryBankState":
        """Some of the atoms, by index or mask."""
        thumbnails = None if self.thumbnails is None else self.thumbnails[index]
        return self._replace(clusters=self.clusters.rows(index), thumbnails=thumbnails)


class MemoryBank(KeepsDtype, DynamicBufferMixin, nn.Module):
    """Memory bank of one scale: atoms, their statistics, and the solver that rebuilds patches.

    Args:
        solver (str): Name of a solver in ``SOLVERS``. Defaults to
            ``"affine"``.
        num_atoms (int): Size ``k`` of the support. Defaults to ``5``.
        regularisation (float): Strength of the ridge penalty relative to the data's own scale.
            Defaults to ``0.001``.

    Attributes:
        stored (Tensor): The atoms over ``unit``, shape ``(M, d)``, ``float16``; empty until the
            bank is learnt.
        unit (Tensor): A power of two that makes the largest value of ``stored`` 2^14 to 2^15.
        radius, count, squares, origin (Tensor): What each atom stands for and where it was seen, as
            in :class:`~anomalib_sgfr.core.clusters.Clusters`.
        threshold, thumbnails (Tensor): As in :class:`MemoryBankState`; no thumbnails are an empty
            tensor.
        nominal (Tensor): Buffer of ``residual_scale``, under the name that checkpoints have.
        nuisance (Tensor): As in :class:`MemoryBankState`, ``float32``; left out when patches are
            embedded.
        solver (Solver): Rebuilds patches, and holds what follows from the atoms, which is never
            stored.
        defects (DefectBank): Patches of rejected defects, which raise the residuals of patches that
            resemble them.

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

    _DOUBLES = ("squares", "threshold")

    def __init__(
        self, solver: str = "affine", num_atoms: int = 5, regularisation: float = 1e-3
    ) -> None:
        super().__init__()
        self.solver_name = solver
        self.solver = find_solver(solver)(num_atoms, regularisation)
        self.defects = DefectBank()
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
        self.register_load_state_dict_pre_hook(MemoryBank._adopt_earlier)
        self.register_load_state_dict_post_hook(MemoryBank._derive)

    @property
    def is_fitted(self) -> bool:
        """Whether there is an atom."""
        return self.stored.numel() > 0

    @property
    def size(self) -> int:
        """Number of atoms."""
        return len(self.stored)

    @property
    def residual_scale(self) -> Tensor:
        """Length that residuals are divided by, a scalar, ``float32``."""
        return self.nominal

    @property
    def atoms(self) -> Tensor:
        """The atoms, shape ``(M, d)``, ``float32``."""
        return self.stored.float() * self.unit

    @property
    def clusters(self) -> Clusters:
        """Copy of the atoms and their statistics; offsets are not stored."""
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
            self.clusters,
            float(self.threshold),
            thumbnails,
            float(self.residual_scale),
            nuisance,
            self.defects.state,
        )

    def set(
        self,
        bank: Tensor | Clusters,
        threshold: float = 0.0,
        thumbnails: Tensor | None = None,
        residual_scale: float | None = None,
        nuisance: Tensor | None = None,
        defects: DefectPatches | None = None,
    ) -> None:
        """Replace the atoms; they are rounded to 16 bits, which the statistics account for.

        Args:
            bank (Tensor | Clusters): Atoms, shape ``(M, d)``, or atoms with what they stand for.
            threshold (float): As in :class:`MemoryBankState`.
            thumbnails (Tensor | None): As in :class:`MemoryBankState`.
            residual_scale (float | None): As in :class:`MemoryBankState`.
            nuisance (Tensor | None): As in :class:`MemoryBankState`.
            defects (DefectPatches | None): As in :class:`MemoryBankState`.
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
        if residual_scale is None:
            residual_scale = nominal_residual(
                clusters.atoms, self.solver.num_atoms, self.solver.regularisation
            )
        self.nominal = torch.tensor(residual_scale, dtype=torch.float32, device=device)
        self.nuisance = none.float() if nuisance is None else nuisance.float().clone().to(device)
        self.defects.set(defects, device)
        self._derive()

    def empty_like(self) -> "MemoryBank":
        """A bank with the same solver and without atoms."""
        return MemoryBank(self.solver_name, self.solver.num_atoms, self.solver.regularisation)

    def subset(self, atoms: Tensor) -> "MemoryBank":
        """A bank of some of the atoms, to score with; of all, if none or all are chosen.

        Args:
            atoms (Tensor): Which, a mask of shape ``(M,)``.
        """
        if bool(atoms.all()) or not bool(atoms.any()):
            return self
        fewer = self.empty_like()
        fewer.stored, fewer.unit = self.stored[atoms.to(self.stored.device)], self.unit.clone()
        fewer.nominal = self.nominal.clone()
        fewer.defects.set(self.defects.state, self.stored.device)
        fewer._derive()  # noqa: SLF001  # of this class
        return fewer

    def _derive(self, *_: object) -> None:
        """Let the solver compute what follows from the atoms, whenever these have changed."""
        self.solver.prepare(self.atoms)

    def _adopt_earlier(self, state: dict[str, Any], prefix: str, *_: object) -> None:
        """Read a state dict of version 0.1: one grid for all origins, and no nuisance."""
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
        """Pickle so that a device without 64 bits of floating point can read it."""
        bits = {name: getattr(self, name).view(torch.int64) for name in self._DOUBLES}
        return {**self.__dict__, "_buffers": {**self._buffers, **bits}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Compute again what was left out, also for a pickle of version 0.2."""
        solver = None
        if isinstance(state.get("solver"), str):  # its buffers were the bank's own
            arguments = (state.pop(name) for name in ("num_atoms", "regularisation"))
            state["solver_name"] = state.pop("solver")
            solver = find_solver(state["solver_name"])(*arguments)
            for name in ("operator", "index_atoms", "index_centre"):
                state["_buffers"].pop(name, None)
        state["_modules"].setdefault("defects", DefectBank())
        super().__setstate__(state)
        if solver is not None:
            self.solver = solver
        for name in self._DOUBLES:
            kept = getattr(self, name)
            if kept.dtype == torch.int64:
                setattr(self, name, kept.to(float64_device(kept.device)).view(torch.float64))
        self._derive()

    def certificate(self) -> ScaleCertificate:
        """Bounds on the residuals of all nominal patches, over ``residual_scale``."""
        clusters = self.clusters
        bound = self.solver.bound(clusters)
        if self.defects.size:
            bound = self.defects.bound(clusters, bound)
        return certify(clusters, bound).over(float(self.residual_scale))

    def residuals(self, patches: Tensor) -> Tensor:
        """Length of the residual of each patch, in chunks of bounded memory.

        Args:
            patches (Tensor): Embeddings, shape ``(N, d)``, ``float32``.

        Returns:
            Tensor: Shape ``(N,)``; not finite where a patch is not.
        """
        # half precision would blur small residuals
        with torch.autocast(patches.device.type, enabled=False):
            return self.map_patches(
                lambda part: self.solver.residual_norm(part, self.atoms), patches
            )

    def map_patches(self, step: Callable[[Tensor], Tensor], patches: Tensor) -> Tensor:
        """Apply a function to patches, in bounded memory.

        Args:
            step (Callable[[Tensor], Tensor]): From patches ``(n, d)`` to results ``(n, ...)``.
            patches (Tensor): Embeddings, shape ``(N, d)``, ``float32``.

        Returns:
            Tensor: Shape ``(N, ...)``.
        """
        if torch.compiler.is_exporting():
            return step(patches)
        # values in temporary tensors while a patch is rebuilt
        values = self.size + self.defects.size + 4 * self.solver.num_atoms * self.stored.shape[1]
        return in_chunks(step, patches, values)


def residual_maps(banks: Sequence[MemoryBank], embeddings: Sequence[Tensor]) -> list[Tensor]:
    """Residual maps of all scales, each over its bank's ``residual_scale``.

    Residuals of patches that resemble rejected defects are raised.

    Args:
        banks (Sequence[MemoryBank]): One of each scale, with solvers of one class.
        embeddings (Sequence[Tensor]): Of each scale, shape ``(B, d, h, w)``.

    Returns:
        list[Tensor]: Of each scale, shape ``(B, 1, h, w)``, ``float32``; not finite where an
        embedding is not.
    """
    solver, exporting = banks[0].solver, torch.compiler.is_exporting()
    # half precision would blur small residuals
    with torch.autocast(embeddings[0].device.type, enabled=False):
        maps = None if exporting else solver.gpu_maps(banks, embeddings)
        if maps is not None and not any(bank.defects.is_able for bank in banks):
            return maps
        # as the channels-last memory of a backbone has them: (B, h * w, d)
        patches = [part.permute(0, 2, 3, 1).flatten(1, 2).float() for part in embeddings]
        if exporting:  # one loop over the images, or parts of large ones, for all scales
            number = number_of_parts([part.shape[1] for part in patches])
            parts = [in_parts(part, number) for part in patches]

            def of_part(*part: Tensor) -> Tensor:
                return torch.cat(_raised(banks, solver.residuals(banks, part), part))

            lengths = mapped(of_part, *parts).split([part.shape[1] for part in parts], 1)
            residuals = [
                length.reshape(part.shape[0], -1)[:, : part.shape[1]]
                for length, part in zip(lengths, patches, strict=True)
            ]
        else:
            patches = [part.flatten(0, 1) for part in patches]
            plain = solver.residuals(banks, patches) if maps is None else maps
            residuals = _raised(banks, [part.flatten() for part in plain], patches)
    return [
        residual.reshape(part.shape[0], 1, *part.shape[2:])
        for residual, part in zip(residuals, embeddings, strict=True)
    ]


def _raised(
    banks: Sequence[MemoryBank], residuals: Sequence[Tensor], patches: Sequence[Tensor]
) -> list[Tensor]:
    """Residuals ``(N,)`` of each scale, raised where patches ``(N, d)`` resemble rejected ones."""

    def distance(bank: MemoryBank, part: Tensor) -> Tensor:
        return bank.map_patches(bank.defects.distance, part) / bank.residual_scale

    return [
        raised(residual, distance(bank, part), bank.defects.gain)
        if bank.defects.is_able
        else residual
        for bank, residual, part in zip(banks, residuals, patches, strict=True)
    ]
