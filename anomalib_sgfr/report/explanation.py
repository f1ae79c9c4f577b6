"""Why a part of an image is anomalous: which nominal patches rebuilt it, from where, and what was
left.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from anomalib_sgfr.core.certificate import ScaleCertificate
from anomalib_sgfr.core.patch_grid import PatchIndex, to_patches
from anomalib_sgfr.torch_model import SgfrModel

__all__ = ["Contribution", "Explanation", "Reconstruction", "Region", "explain"]

# patches between the centres of two regions, at least: what is drawn around them does not overlap
_APART = 6


@dataclass(frozen=True)
class Contribution:
    """An atom's part in a rebuilt patch.

    Attributes:
        atom (int): Row of its scale's bank.
        coefficient (float): Its coefficient.
        distance (float): From the patch to the atom.
        image (str | None): Path of the training image that the atom began as a patch of, if known.
        row (int): Row of that patch in the image.
        column (int): Column of that patch in the image.
        grid (tuple[int, int]): Rows and columns of that image's patches; -1 like the others where
            it is not known.
        patches (int): Nominal patches the atom stands for; it is their mean, unless an update added
            it.
        spread (float): Root mean square of their distances from it, at most.
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
    """How a patch of one scale was rebuilt.

    Attributes:
        scale (int): Number of the scale, from the finest, 0.
        grid (tuple[int, int]): Rows and columns of the image's patches at this scale.
        row (int): Row of the patch.
        column (int): Column of the patch.
        residual (float): What the contributions leave of the patch, in the unit of the anomaly map.
        nominal (float): Residuals of the nominal patches that the contributing atoms stand for
            average to no more, by the certificate of the bank.
        nominal_largest (float): None of those patches has a larger residual.
        contributions (tuple[Contribution, ...]): What it was rebuilt from, the largest coefficient
            first.
    """

    scale: int
    grid: tuple[int, int]
    row: int
    column: int
    residual: float
    nominal: float
    nominal_largest: float
    contributions: tuple[Contribution, ...]


@dataclass(frozen=True)
class Region:
    """A place of an image where it is rebuilt worst.

    Attributes:
        row (int): Row of the patch of the finest scale that the score hmaps.
        column (int): Column of that patch.
        score (float): Of the score map there.
        reconstructions (tuple[Reconstruction, ...]): Of the patch that lies there, of each scale
            of the score, the finest first.
    """

    row: int
    column: int
    score: float
    reconstructions: tuple[Reconstruction, ...]

    @property
    def residual(self) -> float:
        """Sum over scales, as the score map sums them."""
        return sum(part.residual for part in self.reconstructions)


@dataclass(frozen=True)
class Explanation:
    """An image's maps and its worst regions.

    Attributes:
        anomaly_map (Tensor): Raw map, shape ``(H, W)``.
        score_map (Tensor): What the score is the maximum of, shape ``(H, W)``.
        residuals (tuple[Tensor, ...]): Residual of each patch over the bank's ``nominal``, for each
            scale of shape ``(h, w)``, the finest first.
        grid (tuple[int, int]): Rows and columns that the regions' places count in.
        regions (tuple[Region, ...]): The worst first: the place that raised the score.
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
        image (Tensor): Pre-processed, shape ``(3, H, W)``.
        regions (int): Most regions to explain; they are at least six patches apart.

    Returns:
        Explanation: The maps and the worst regions, by what the score hmaps.

    Raises:
        RuntimeError: If the model is not fitted.
        ValueError: If ``regions`` is below one or the image is not one.

    Example:
        >>> from anomalib_sgfr import explain
        >>> from anomalib.data.utils import read_image
        >>> pixels = model.pre_processor.transform(read_image(image, as_tensor=True))
        >>> explanation = explain(model.model, pixels, regions=1)
        >>> len(explanation.regions)
        1
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
    score_scales = [number for number, scale in enumerate(model.embedder.scales) if scale.in_score]
    rows, columns = residuals[score_scales[0]].shape[2:]
    # the map at the patches' own resolution: its largest value over each patch
    coarse = torch.nn.functional.adaptive_max_pool2d(maps.score_map[0], (rows, columns))[0]
    inside = model.patches_inside([part.shape[2:] for part in residuals])
    if inside is not None:
        coarse = coarse.masked_fill(~inside[score_scales[0]], -torch.inf)
    places = _worst(coarse, regions)
    by_scale = [
        _reconstructions(
            model,
            scale,
            certificate.scales[scale],
            embeddings[scale],
            residuals[scale],
            places,
            (rows, columns),
        )
        for scale in score_scales
    ]
    found = [
        Region(*place, float(coarse[place]), parts)
        for place, parts in zip(places, zip(*by_scale, strict=True), strict=True)
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
    places: list[tuple[int, int]],
    finest: tuple[int, int],
) -> list[Reconstruction]:
    """How the patches of one scale were rebuilt at places of the finest grid."""
    rows, columns = residual.shape[2:]
    patches = to_patches(embedding)
    own = [PatchIndex(*place, finest).on((rows, columns)) for place in places]
    chosen = patches[[place.row * columns + place.column for place in own]]
    support, code = model.banks[scale].solver.code(chosen, model.banks[scale].atoms)
    found = []
    for (row, column, grid), patch, its_support, its_code in zip(
        own, chosen, support, code, strict=True
    ):
        counts = certificate.counts[its_support]
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
            )
        )
    return found


def _worst(scores: Tensor, number: int) -> list[tuple[int, int]]:
    """The largest of scores ``(h, w)``, one at a time, leaving out what is close to those taken."""
    left = scores.clone()
    places: list[tuple[int, int]] = []
    while len(places) < number and bool((left > -torch.inf).any()):
        row, column = divmod(int(left.argmax()), scores.shape[1])
        places.append((row, column))
        left[
            max(0, row - _APART + 1) : row + _APART, max(0, column - _APART + 1) : column + _APART
        ] = -torch.inf
    return places


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
