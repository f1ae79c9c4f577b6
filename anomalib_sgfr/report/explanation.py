"""Explanation of an image's worst regions: atoms, coefficients and residuals of their patches."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from anomalib_sgfr.core.certificate import ScaleCertificate
from anomalib_sgfr.core.patch_grid import PatchIndex, to_patches
from anomalib_sgfr.torch_model import SgfrModel

__all__ = ["Contribution", "Explanation", "Reconstruction", "Region", "explain"]

_APART = 6  # least patches between the centres of two regions, so that their crops do not overlap


@dataclass(frozen=True)
class Contribution:
    """Atom that a patch is reconstructed from.

    Attributes:
        atom (int): Row of the scale's memory bank.
        coefficient (float): Coefficient of the atom.
        distance (float): Distance from the patch to the atom.
        image (str | None): Path of the training image that the atom's first patch comes from.
        row (int): Row of that patch in the image; -1 if unknown.
        column (int): Column of that patch in the image; -1 if unknown.
        grid (tuple[int, int]): Rows and columns of the image's patches; -1 if unknown.
        patches (int): Number of nominal patches that the atom stands for.
        spread (float): Upper bound of the root mean square of their distances from the atom.
    """

    atom: int
    coefficient: float
    distance: float
    image: str | None
    row: int
    column: int
    grid: tuple[int, int]
    patches: int
    spread: float


@dataclass(frozen=True)
class Reconstruction:
    """Reconstruction of a patch of one scale.

    Attributes:
        scale (int): Number of the scale, from the finest, 0.
        grid (tuple[int, int]): Rows and columns of the image's patches at this scale.
        row (int): Row of the patch.
        column (int): Column of the patch.
        residual (float): Residual of the patch, in the unit of the raw anomaly map.
        nominal (float): Certified upper bound of the mean residual of the nominal patches that the
            contributing atoms stand for.
        nominal_largest (float): Certified upper bound of the largest residual of those patches.
        contributions (tuple[Contribution, ...]): Atoms of the reconstruction, the largest
            coefficient first.
        weight (float): Weight of the residual in the image score.
        raised (float): What the residual was multiplied by, as the patch resembles a rejected
            defect; 1 where it does not.
        resembles (str): Number, date and file of that defect, as in the list of rejected ones;
            empty where the residual was not raised.
    """

    scale: int
    grid: tuple[int, int]
    row: int
    column: int
    residual: float
    nominal: float
    nominal_largest: float
    contributions: tuple[Contribution, ...]
    weight: float = 1.0
    raised: float = 1.0
    resembles: str = ""

    @property
    def residual_text(self) -> str:
        """The residual, its weight in the score unless that is 1, and why it was raised."""
        weight = "" if self.weight == 1.0 else f" (of weight {self.weight:g})"
        why = f", x {self.raised:.3g} as it resembles {self.resembles}" if self.resembles else ""
        return f"{self.residual:.3g}{weight}{why}"


@dataclass(frozen=True)
class Region:
    """Region of an image with a large residual.

    Attributes:
        row (int): Row of its patch of the finest scale that contributes to the image score.
        column (int): Column of that patch.
        score (float): Largest value of the score map over that patch.
        reconstructions (tuple[Reconstruction, ...]): Reconstruction of the patch at each scale that
            contributes to the image score, the finest first.
    """

    row: int
    column: int
    score: float
    reconstructions: tuple[Reconstruction, ...]

    @property
    def residual(self) -> float:
        """Weighted sum of the residuals over scales, as in the score map."""
        return sum(part.weight * part.residual for part in self.reconstructions)


@dataclass(frozen=True)
class Explanation:
    """Maps of an image and its worst regions.

    Attributes:
        anomaly_map (Tensor): Raw anomaly map, shape ``(H, W)``.
        score_map (Tensor): Raw score map, whose maximum is the image score, shape ``(H, W)``.
        residuals (tuple[Tensor, ...]): Residual of each patch over the bank's ``residual_scale``,
            of shape ``(h, w)`` for each scale, the finest first.
        grid (tuple[int, int]): Rows and columns of the patches that regions are counted in.
        regions (tuple[Region, ...]): The regions; the first contains the peak of the score map.
    """

    anomaly_map: Tensor
    score_map: Tensor
    residuals: tuple[Tensor, ...]
    grid: tuple[int, int]
    regions: tuple[Region, ...]


@torch.no_grad()
def explain(model: SgfrModel, image: Tensor, regions: int = 3) -> Explanation:
    """Explain the score and the anomaly map of an image.

    Args:
        model (SgfrModel): A fitted model.
        image (Tensor): Pre-processed image, shape ``(3, H, W)``.
        regions (int): Most regions to explain; they are at least six patches apart.

    Returns:
        Explanation: Maps of the image, and the regions with the largest scores.

    Raises:
        RuntimeError: If the model is not fitted.
        ValueError: If ``regions`` is below one, or ``image`` has another shape.

    Examples:
        >>> import torch
        >>> from anomalib_sgfr import explain
        >>> found = explain(model.model, torch.rand(3, 64, 64), regions=1)
        >>> found.anomaly_map.shape, len(found.regions)
        (torch.Size([64, 64]), 1)
    """
    if image.ndim != 3:  # noqa: PLR2004
        msg = f"image must have shape (3, H, W), got {tuple(image.shape)}."
        raise ValueError(msg)
    if regions < 1:
        msg = f"regions must be at least 1, got {regions}."
        raise ValueError(msg)
    certificate = model.certificate()
    embeddings = model.embed(image[None])
    maps = model.score_embeddings(embeddings, image.shape[1:])
    residuals = maps.residuals
    before = _before_raised(model, embeddings, image.shape[1:]) or residuals
    scored = [number for number, scale in enumerate(model.embedder.scales) if scale.score_weight]
    rows, columns = residuals[scored[0]].shape[2:]
    # score map at the resolution of patches: its largest value over each
    coarse = torch.nn.functional.adaptive_max_pool2d(maps.score_map[0], (rows, columns))[0]
    inside = model.patches_inside([part.shape[2:] for part in residuals])
    if inside is not None:
        coarse = coarse.masked_fill(~inside[scored[0]], -torch.inf)
    peaks = _worst(coarse, regions)
    by_scale = [
        _reconstructions(
            model,
            scale,
            certificate.scales[scale],
            embeddings[scale],
            residuals[scale],
            before[scale],
            peaks,
            (rows, columns),
        )
        for scale in scored
    ]
    found = [
        Region(*peak, float(coarse[peak]), parts)
        for peak, parts in zip(peaks, zip(*by_scale, strict=True), strict=True)
    ]
    of_scales = tuple(residual[0, 0] for residual in residuals)
    return Explanation(
        maps.anomaly_map[0, 0], maps.score_map[0, 0], of_scales, (rows, columns), tuple(found)
    )


def _reconstructions(
    model: SgfrModel,
    scale: int,
    certificate: ScaleCertificate,
    embedding: Tensor,
    residual: Tensor,
    before: Tensor,
    peaks: list[tuple[int, int]],
    finest: tuple[int, int],
) -> list[Reconstruction]:
    """Reconstructions of the patches of one scale at positions of the finest grid."""
    rows, columns = residual.shape[2:]
    patches = to_patches(embedding)
    own = [PatchIndex(*peak, finest).on((rows, columns)) for peak in peaks]
    chosen = patches[[peak.row * columns + peak.column for peak in own]]
    support, code = model.banks[scale].solver.code(chosen, model.banks[scale].atoms)
    found = []
    for (row, column, grid), patch, its_support, its_code in zip(
        own, chosen, support, code, strict=True
    ):
        counts = certificate.counts[its_support]
        share, defect = _resemblance(
            model, scale, patch, residual[0, 0, row, column], before[0, 0, row, column]
        )
        found.append(
            Reconstruction(
                scale=scale,
                grid=grid,
                row=row,
                column=column,
                residual=float(residual[0, 0, row, column]),
                nominal=float(
                    (certificate.means[its_support] * counts).sum() / counts.sum().clamp_min(1)
                ),
                nominal_largest=float(certificate.bounds[its_support].amax()),
                contributions=_contributions(model, scale, patch, its_support, its_code),
                weight=model.embedder.scales[scale].score_weight,
                raised=share,
                resembles=defect,
            )
        )
    return found


def _before_raised(
    model: SgfrModel, embeddings: list[Tensor], size: Sequence[int]
) -> list[Tensor] | None:
    """Residuals before any was raised; ``None`` if there is no defect to resemble."""
    if not model.rejected:
        return None
    plain = model.with_banks(model.fitted_state.without_defects())
    return plain.score_embeddings(embeddings, size).residuals


def _resemblance(
    model: SgfrModel, scale: int, patch: Tensor, residual: Tensor, before: Tensor
) -> tuple[float, str]:
    """What a residual was multiplied by, and the rejected defect nearest to its patch."""
    if not bool(residual > before):
        return 1.0, ""
    defects = model.banks[scale].defects
    distance = (defects.stored - patch).norm(dim=1).log() + defects.limits
    nearest = distance.where(defects.able, torch.inf).argmin()
    number = int(defects.origin[nearest, 0])
    date, _, path = model.rejected[number].partition(" ")
    name = f"rejected defect {number + 1} of {date[:10]}, {Path(path).name}"
    return float(residual / before), name


def _worst(scores: Tensor, number: int) -> list[tuple[int, int]]:
    """Rows and columns of the largest scores ``(h, w)``, at least :data:`_APART` apart."""
    left = scores.clone()
    peaks: list[tuple[int, int]] = []
    while len(peaks) < number and bool((left > -torch.inf).any()):
        row, column = divmod(int(left.argmax()), scores.shape[1])
        peaks.append((row, column))
        left[
            max(0, row - _APART + 1) : row + _APART, max(0, column - _APART + 1) : column + _APART
        ] = -torch.inf
    return peaks


def _contributions(
    model: SgfrModel, scale: int, patch: Tensor, support: Tensor, code: Tensor
) -> tuple[Contribution, ...]:
    bank, images = model.banks[scale], model.images
    found = []
    for index in code.abs().argsort(descending=True).tolist():
        atom = int(support[index])
        image, row, column, *grid = bank.origin[atom].tolist()
        count = int(bank.count[atom])
        found.append(
            Contribution(
                atom=atom,
                coefficient=float(code[index]),
                distance=float((patch - bank.atoms[atom]).norm()),
                image=images[image] if 0 <= image < len(images) else None,
                row=row,
                column=column,
                grid=(grid[0], grid[1]),
                patches=count,
                spread=math.sqrt(float(bank.squares[atom]) / max(count, 1)),
            )
        )
    return tuple(found)
