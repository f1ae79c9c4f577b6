r"""Defect bank of one scale: patches of rejected defects, which raise residuals of similar ones.

A patch with residual :math:`r`, at distance :math:`d_j` from the patch :math:`j` of a defect,
resembles it by :math:`s_j = \log(r / d_j)`: above zero where it lies nearer to the defect than to
what nominal patches rebuild. Its residual becomes

.. math:: r \, (1 + g \, \min(1, \max(0, \max_j (s_j - l_j))))

with the gain :math:`g` and limits :math:`l_j`, which no patch of the images that are known to be
good exceeds. So no residual is ever lowered, and those of known good images stay. The largest
:math:`s_j - l_j` is that of the least :math:`d_j e^{l_j}`, the distance with its limit. Patches
with a limit of more than ``SAME`` raise nothing: a good image has the same.
"""

import math
from typing import Any, NamedTuple

import torch
from anomalib.models.components import DynamicBufferMixin
from torch import Tensor, nn
from torch.nn import functional

from anomalib_sgfr.core.clusters import Clusters
from anomalib_sgfr.core.linear_algebra import KeepsDtype, middle
from anomalib_sgfr.core.solvers import Bound

__all__ = [
    "GAIN",
    "SAME",
    "DefectBank",
    "DefectIndex",
    "DefectPatches",
    "defect_index",
    "nearest_distance",
    "raised",
    "resemblance",
]

GAIN = 3.0  # of new defect banks
_EARLIER_GAIN = 2.0  # of state dicts that do not tell
# Resemblance from which on a patch is the same as the defect's: it lies nearer than a hundredth of
# its residual, where rounding decides which of two patches lies nearer.
SAME = math.log(100.0)
_LEAST = 1e-30  # of lengths under a logarithm


class DefectPatches(NamedTuple):
    """Patches of rejected defects at one scale, as a checkpoint stores them.

    Attributes:
        atoms (Tensor): Their embeddings, shape ``(K, d)``.
        limits (Tensor): Resemblance to each above which residuals are raised, shape ``(K,)``.
        origin (Tensor): For each the number of the rejected image, row, column, and the grid's rows
            and columns, shape ``(K, 5)``, ``int32``.
        gain (float): Share of itself by which a residual is raised at most.
    """

    atoms: Tensor
    limits: Tensor
    origin: Tensor
    gain: float = GAIN

    def joined(self, other: "DefectPatches") -> "DefectPatches":
        """These patches, and others after them; the gain stays."""
        atoms, limits, origin = (torch.cat(pair) for pair in zip(self[:3], other[:3], strict=True))
        return DefectPatches(atoms, limits, origin, self.gain)

    def rows(self, index: Tensor) -> "DefectPatches":
        """Some of the patches, by index or mask."""
        return DefectPatches(self.atoms[index], self.limits[index], self.origin[index], self.gain)


class DefectIndex(NamedTuple):
    """Defect patches made ready for :func:`nearest_distance`, by :func:`defect_index`.

    Attributes:
        rows (Tensor): ``(b - centre, |b - centre|^2, 1)`` times ``exp(2 limit)`` of each patch
            ``b``, shape ``(K, d + 2)``.
        centre (Tensor): Mean of the patches, shape ``(d,)``.
    """

    rows: Tensor
    centre: Tensor


def defect_index(atoms: Tensor, limits: Tensor | None = None) -> DefectIndex:
    """Make defect patches ready for :func:`nearest_distance`.

    Args:
        atoms (Tensor): Shape ``(K, d)``, at least one.
        limits (Tensor | None): Of each, shape ``(K,)``; ``None`` for plain distances.

    Returns:
        DefectIndex: Of the same dtype.
    """
    centre = middle(atoms)  # a common offset would cost digits
    atoms = atoms - centre
    length = atoms.square().sum(1, keepdim=True)
    rows = torch.cat((atoms, length, torch.ones_like(length)), 1)
    return DefectIndex(rows if limits is None else rows * (2.0 * limits).exp()[:, None], centre)


def nearest_distance(patches: Tensor, index: DefectIndex) -> Tensor:
    """Least distance of each patch from a defect patch with its limit, in operations that export.

    Args:
        patches (Tensor): Shape ``(N, d)``.
        index (DefectIndex): Of the defect patches.

    Returns:
        Tensor: Least ``d exp(limit)``, shape ``(N,)``; NaN where a patch is not finite.
    """
    patches = patches - index.centre
    length = patches.square().sum(1, keepdim=True)
    points = functional.pad(-2.0 * patches, (0, 1), value=1.0)
    squared = (index.rows @ torch.cat((points, length), 1).T).amin(0)
    return squared.clamp_min(0.0).sqrt()


def resemblance(residual: Tensor, distance: Tensor) -> Tensor:
    """Logarithm of residual over distance from a defect patch.

    Args:
        residual (Tensor): Lengths of residuals.
        distance (Tensor): Distances in the same unit and of the same shape.

    Returns:
        Tensor: Of the same shape; NaN where one of them is.
    """
    return residual.clamp_min(_LEAST).log() - distance.clamp_min(_LEAST).log()


def raised(residual: Tensor, distance: Tensor, gain: float | Tensor = GAIN) -> Tensor:
    """Residuals, raised where a patch resembles a defect by more than the limit.

    Args:
        residual (Tensor): Lengths of residuals.
        distance (Tensor): As :func:`nearest_distance` gives it, in the same unit and of the same
            shape.
        gain (float | Tensor): Share of itself by which a residual is raised at most.

    Returns:
        Tensor: Of the same shape; none is smaller than it was.
    """
    return residual * (1.0 + gain * resemblance(residual, distance).clamp(0.0, 1.0))


class DefectBank(KeepsDtype, DynamicBufferMixin, nn.Module):
    """Defect bank of one scale; empty until a defect is rejected.

    Attributes:
        stored (Tensor): The patches, shape ``(K, d)``, ``float32``.
        limits (Tensor): As in :class:`DefectPatches`, ``float32``.
        origin (Tensor): As in :class:`DefectPatches`.
        gain (Tensor): As in :class:`DefectPatches`, a scalar, ``float32``.
        index_rows, index_centre (Tensor): What the search for the nearest reads, empty where no
            patch raises a residual; never stored.
    """

    stored: Tensor
    limits: Tensor
    origin: Tensor
    gain: Tensor
    index_rows: Tensor
    index_centre: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("stored", torch.empty(0, dtype=torch.float32))
        self.register_buffer("limits", torch.empty(0, dtype=torch.float32))
        self.register_buffer("origin", torch.empty(0, dtype=torch.int32))
        self.register_buffer("gain", torch.tensor(GAIN, dtype=torch.float32))
        for name in ("index_rows", "index_centre"):
            self.register_buffer(name, torch.empty(0, dtype=torch.float32), persistent=False)
        self.register_load_state_dict_post_hook(DefectBank._derive)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:  # noqa: ANN401
        """Store nothing of an empty bank."""
        if self.size:
            super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:  # noqa: ANN401
        """Read also a state dict of an empty bank, or of a version without defect banks."""
        if f"{prefix}stored" not in state:
            self.set(None, self.stored.device)
            names = ("stored", "limits", "origin", "gain")
            state |= {prefix + name: getattr(self, name) for name in names}
        state.setdefault(f"{prefix}gain", torch.tensor(_EARLIER_GAIN))
        super()._load_from_state_dict(state, prefix, *args)

    def _derive(self, *_: object) -> None:
        able = self.able
        if self.size and bool(able.any()):
            index = defect_index(self.stored[able], self.limits[able])
            self.index_rows, self.index_centre = index
        else:
            self.index_rows, self.index_centre = self.stored[:0], self.stored[:0]

    @property
    def size(self) -> int:
        """Number of patches."""
        return len(self.stored)

    @property
    def able(self) -> Tensor:
        """Mask of the patches that can raise a residual."""
        return self.limits <= SAME

    @property
    def is_able(self) -> bool:
        """Whether a patch can raise a residual."""
        return bool(len(self.index_rows))

    @property
    def state(self) -> DefectPatches | None:
        """Copy of the patches; ``None`` if there is none."""
        if not self.size:
            return None
        parts = (self.stored.clone(), self.limits.clone(), self.origin.clone())
        return DefectPatches(*parts, float(self.gain))

    def set(self, patches: DefectPatches | None, device: torch.device) -> None:
        """Replace the patches.

        Args:
            patches (DefectPatches | None): The new ones; ``None`` for none.
            device (torch.device): Where to keep them.
        """
        none = torch.empty(0)
        kept = patches or DefectPatches(none, none, none)
        self.stored, self.limits = (
            part.detach().float().clone().to(device) for part in (kept.atoms, kept.limits)
        )
        self.origin = kept.origin.int().clone().to(device)
        self.gain = torch.tensor(kept.gain, dtype=torch.float32, device=device)
        self._derive()

    def set_limits(self, limits: Tensor) -> None:
        """Replace the limits, shape ``(K,)``."""
        self.limits = limits.detach().float().clone().to(self.stored.device)
        self._derive()

    def distance(self, patches: Tensor) -> Tensor:
        """Least distance of each patch from a patch of a defect, see :func:`nearest_distance`."""
        return nearest_distance(patches, DefectIndex(self.index_rows, self.index_centre))

    def bound(self, clusters: Clusters, bound: Bound) -> Bound:
        """Bound on raised residuals of the patches that atoms stand for.

        A patch of an atom is no nearer to a defect than the atom less the atom's radius, and no
        residual of an atom's patches is larger than the bound at the radius.

        Args:
            clusters (Clusters): Atoms and the patches that they stand for.
            bound (Bound): On their residuals before they are raised.

        Returns:
            Bound: On their residuals.
        """
        radius = clusters.radius.double()
        away = torch.cdist(clusters.atoms.double(), self.stored.to(radius)) - radius[:, None]
        distance = (away.clamp_min(0.0) * self.limits.to(radius).exp()).amin(1)
        distance = distance / bound(radius).clamp_min(_LEAST)
        share = raised(torch.ones_like(radius), distance, self.gain.to(radius))
        return lambda distance: share * bound(distance)
