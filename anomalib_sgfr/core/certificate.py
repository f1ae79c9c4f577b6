"""Certificate of a memory bank: bounds on the residuals of all patches that it was fitted to."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import compress

import torch
from torch import Tensor

from anomalib_sgfr.core.clusters import Clusters

__all__ = ["Certificate", "ScaleCertificate", "certify"]

_ROUNDING = 1.0 + 1e-4  # of float32 distances, sums and solutions, with a margin


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

    The map is the sum of the residuals of its scales, each averaged with weights that sum to one;
    the score is the maximum of such a sum, in which each scale has its weight. So ``largest`` and
    ``largest_score`` bound the maps and the scores of the training images.

    Attributes:
        scales (tuple[ScaleCertificate, ...]): Of each scale, the finest first.
        in_map (tuple[bool, ...]): Which of them contribute to the map.
        score_weights (tuple[float, ...]): Weight of each in the score.
    """

    scales: tuple[ScaleCertificate, ...]
    in_map: tuple[bool, ...]
    score_weights: tuple[float, ...]

    @property
    def patches(self) -> int:
        """Number of patches, of all scales."""
        return sum(scale.patches for scale in self.scales)

    @property
    def largest(self) -> float:
        """No sum of residuals over the map's scales is larger."""
        return sum(scale.largest for scale in self._in_map())

    @property
    def mean(self) -> float:
        """Sum over the map's scales of what the residuals average to at most."""
        return sum(scale.mean for scale in self._in_map())

    @property
    def largest_score(self) -> float:
        """No training image has a larger score."""
        return sum(
            weight * scale.largest
            for scale, weight in zip(self.scales, self.score_weights, strict=True)
        )

    def _in_map(self) -> Iterable[ScaleCertificate]:
        return compress(self.scales, self.in_map)


@torch.no_grad()
def certify(clusters: Clusters, bound: Callable[[Tensor], Tensor]) -> ScaleCertificate:
    """Bound the residuals of all patches that clusters stand for.

    On average over the patches of an atom, none is larger than at the root of their mean squared
    distance (Jensen).

    Args:
        clusters (Clusters): Atoms and the patches that they stand for.
        bound (Callable[[Tensor], Tensor]): From distances of patches from their atoms to bounds on
            the residuals, see :meth:`~anomalib_sgfr.core.solvers.Solver.bound`.

    Returns:
        ScaleCertificate: The bounds.
    """
    high = bound(clusters.radius.double())
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
