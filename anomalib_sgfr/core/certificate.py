"""The certificate of a bank: how badly any nominal patch that was seen can be rebuilt, without
seeing it again.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from anomalib_sgfr.core.clusters import Clusters
from anomalib_sgfr.core.linear_algebra import middle, ridge_spectrum
from anomalib_sgfr.core.neighbours import nearest, search_index

__all__ = ["Certificate", "ScaleCertificate", "certify"]

_ROUNDING = 1.0 + 1e-4  # of float32 distances, sums and solutions, with room
_ROWS = 1024


@dataclass(frozen=True)
class ScaleCertificate:
    """Bounds on the residual of every nominal patch of one scale seen in a fit.

    Attributes:
        patches (int): Number of patches.
        largest (float): No patch has a larger residual.
        mean (float): The residuals average to no more.
        bounds (Tensor): For each atom, the largest residual of the patches it stands for, shape
            ``(M,)``.
        means (Tensor): For each atom, what the residuals of those patches average to at most, shape
            ``(M,)``.
        counts (Tensor): For each atom, the number of those patches, shape ``(M,)``, ``int64``.
    """

    patches: int
    largest: float
    mean: float
    bounds: Tensor
    means: Tensor
    counts: Tensor

    def over(self, unit: float) -> "ScaleCertificate":
        """The same in another unit, given in the present one."""
        if unit == 1.0:
            return self
        bounds, means = self.bounds / unit, self.means / unit
        largest, mean = self.largest / unit * _ROUNDING, self.mean / unit * _ROUNDING
        return replace(self, largest=largest, mean=mean, bounds=bounds, means=means)

    def histogram(self, bins: int = 20) -> tuple[Tensor, Tensor]:
        """Histogram that bounds the distribution of residuals: each patch at the bound of its atom.

        Args:
            bins (int): Number of bins of equal width from zero to ``largest``.

        Returns:
            tuple[Tensor, Tensor]: Numbers of patches, shape ``(bins,)``, ``int64``, and edges,
                shape ``(bins + 1,)``.

        Raises:
            ValueError: If ``bins`` is below one.
        """
        if bins < 1:
            msg = f"bins must be at least 1, got {bins}."
            raise ValueError(msg)
        edges = torch.linspace(
            0.0, max(self.largest, torch.finfo(torch.float32).tiny), bins + 1, dtype=torch.float32
        )
        place = torch.bucketize(self.bounds.detach().cpu(), edges[1:-1])
        return torch.zeros(bins, dtype=torch.int64).index_add(0, place, self.counts.cpu()), edges


@dataclass(frozen=True)
class Certificate:
    """Bounds of all scales together, in the units of the anomaly map.

    The map is the sum over the scales that it hears of their residuals, each averaged with weights
    that sum to one; the score is the maximum of such a sum over those that it hears. So ``largest``
    and ``largest_score`` bound the maps and the scores of the training images.

    Attributes:
        scales (tuple[ScaleCertificate, ...]): Of each scale, the finest first.
        in_map (tuple[bool, ...]): Which of them the map hears.
        in_score (tuple[bool, ...]): Which of them the score hears.
    """

    scales: tuple[ScaleCertificate, ...]
    in_map: tuple[bool, ...]
    in_score: tuple[bool, ...]

    @property
    def patches(self) -> int:
        """Number of patches, of all scales."""
        return sum(scale.patches for scale in self.scales)

    @property
    def largest(self) -> float:
        """No sum of residuals over the map's scales is larger."""
        return sum(scale.largest for scale in self._heard(self.in_map))

    @property
    def mean(self) -> float:
        """Sum over the map's scales of what the residuals average to at most."""
        return sum(scale.mean for scale in self._heard(self.in_map))

    @property
    def largest_score(self) -> float:
        """No training image has a larger score."""
        return sum(scale.largest for scale in self._heard(self.in_score))

    def _heard(self, flags: Sequence[bool]) -> list[ScaleCertificate]:
        return [scale for scale, heard in zip(self.scales, flags, strict=True) if heard]


@torch.no_grad()
def certify(
    clusters: Clusters, solver: str, num_atoms: int = 1, regularisation: float = 0.0
) -> ScaleCertificate:
    r"""Bound the residuals of all patches a cover stands for.

    A patch at distance at most :math:`\beta` from an atom has a residual of at most :math:`\beta`
    by ``"omp"``, and by ``"affine"`` without regularisation, because the atom alone would do as
    well. With regularisation :math:`\lambda`, comparing the optimum with that code, of length one
    where the optimal has at least :math:`1/\sqrt k`, gives

    .. math:: \|r\|^2 \le \beta^2 + \lambda (1 - 1/k) \, \tfrac1k \sum_{j \le k} (\beta + D_j)^2,

    with :math:`D_j` the distance of the atom from its ``j``-th nearest; for ``"ridge"``,
    :math:`\|r\|^2 \le \beta^2 + \alpha` with the :math:`\alpha` of
    :func:`~anomalib_sgfr.core.self_expression.ridge_operator`. On average over an atom's patches
    none is larger than at the root of their mean squared distance (Jensen).

    Rounding may make a solver take another atom than the best. So :math:`\beta^2` grows by

    .. math:: 2 (d + 4) \epsilon (\|a\| + \beta)^2 \quad\text{and}\quad 3 (d + 5) \epsilon (\|a - m\| + 2 \beta)^2

    for ``"omp"`` and ``"affine"``, with :math:`\epsilon` the precision of the atoms :math:`a` in
    :math:`d` dimensions and :math:`m` the centre of the search; for ``"affine"`` only where another
    atom is near enough to be taken. For ``"ridge"``, the residual grows by :math:`(d + 4) \epsilon
    (\|a\| + \beta)`, and by the largest singular value of the bank that counts as zero.

    Args:
        clusters (Clusters): Atoms and what they stand for.
        solver (str): ``"affine"``, ``"omp"`` or ``"ridge"``.
        num_atoms (int): Size ``k`` of the support.
        regularisation (float): As the solver takes it.

    Returns:
        ScaleCertificate: The bounds.
    """
    radius = clusters.radius.double()
    length, width = clusters.atoms.double().norm(dim=1), clusters.atoms.shape[1]
    precision = torch.finfo(clusters.atoms.dtype).eps
    penalty, beyond = torch.zeros_like(radius), torch.zeros_like(radius)
    spread, share = torch.zeros_like(radius)[:, None], 0.0
    if solver == "omp":  # four times the error of a product of d values
        penalty = 2.0 * (width + 4) * precision * (length + radius).square()
    elif solver == "ridge":
        _, singular, _, kept = ridge_spectrum(clusters.atoms, regularisation)
        penalty = penalty + regularisation * length.square().sum() / width
        beyond = (width + 4) * precision * (length + radius) + torch.where(
            kept > 0, 0.0, singular
        ).amax()
    elif len(clusters.atoms) > 1:
        k = min(num_atoms, len(clusters.atoms))
        nearest_two = _neighbour_distances(clusters.atoms, max(k, 2))
        spread, share = nearest_two[:, :k], regularisation * (1.0 - 1.0 / k)
        about = (clusters.atoms - middle(clusters.atoms)).double().norm(dim=1)
        error = 3.0 * (width + 5) * precision * (about + 2.0 * radius).square()
        near = nearest_two[:, 1] <= radius + (radius.square() + error).sqrt()
        penalty = torch.where(near, error, 0.0)

    def bound(distance: Tensor) -> Tensor:
        squared = distance.square() + penalty
        if share:
            squared = squared + share * ((distance[:, None] + spread).square().mean(1) + penalty)
        return squared.sqrt() + beyond

    high = bound(radius)
    means = torch.minimum(bound((clusters.squares / clusters.count.clamp_min(1)).sqrt()), high)
    patches = int(clusters.count.sum())
    return ScaleCertificate(
        patches=patches,
        largest=float(high.amax() * _ROUNDING),
        mean=float((means * clusters.count).sum() / patches * _ROUNDING),
        bounds=(high * _ROUNDING).to(clusters.atoms.dtype),
        means=(means * _ROUNDING).to(clusters.atoms.dtype),
        counts=clusters.count,
    )


def _neighbour_distances(atoms: Tensor, k: int) -> Tensor:
    """Distances of each atom from its ``k`` nearest, itself first, shape ``(M, k)``, ``float64``."""
    index = search_index(atoms)
    rows = [
        (part[:, None] - atoms[nearest(part, index, k)]).norm(dim=2) for part in atoms.split(_ROWS)
    ]
    return torch.cat(rows).double().sort(1).values
