"""Why a part of an image is anomalous: which nominal patches rebuilt it, from where, and what was left."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from anomalib_sgfr import self_expression
from anomalib_sgfr.certificate import Certificate
from anomalib_sgfr.embedding import to_patches
from anomalib_sgfr.torch_model import SgfrModel

__all__ = ["Contribution", "Explanation", "Region", "explain"]

_APART = 6  # patches between the centres of two regions, at least: what is drawn around them does not overlap
_SHOWN = 5  # contributions of a solver that uses all atoms


@dataclass(frozen=True)
class Contribution:
    """An atom's part in a rebuilt patch.

    Attributes:
        atom (int): Row of the bank.
        coefficient (float): Its coefficient.
        distance (float): From the patch to the atom.
        image (str | None): Path of the training image that the atom began as a patch of, if known.
        row (int): Row of that patch in the image.
        column (int): Column of that patch in the image.
        patches (int): Nominal patches the atom stands for; it is their mean, unless an update added it.
        spread (float): Root mean square of their distances from it, at most.
    """

    atom: int
    coefficient: float
    distance: float
    image: str | None
    row: int
    column: int
    patches: int
    spread: float


@dataclass(frozen=True)
class Region:
    """A place of an image where it is rebuilt worst.

    Attributes:
        row (int): Row of the patch.
        column (int): Column of the patch.
        score (float): Of the anomaly map there.
        residual (float): What the contributions leave of the patch; patch scores and this have the same unit.
        nominal (float): Residuals of the nominal patches that the contributing atoms stand for average to no more, by the
            certificate of the bank.
        nominal_largest (float): None of those patches has a larger residual.
        contributions (tuple[Contribution, ...]): What it was rebuilt from, the largest coefficient first.
    """

    row: int
    column: int
    score: float
    residual: float
    nominal: float
    nominal_largest: float
    contributions: tuple[Contribution, ...]


@dataclass(frozen=True)
class Explanation:
    """An image's anomaly map and its worst regions.

    Attributes:
        anomaly_map (Tensor): Raw map, shape ``(H, W)``.
        patch_scores (Tensor): Residual of each patch, shape ``(h, w)``.
        regions (tuple[Region, ...]): The worst first.
    """

    anomaly_map: Tensor
    patch_scores: Tensor
    regions: tuple[Region, ...]


@torch.no_grad()
def explain(model: SgfrModel, image: Tensor, regions: int = 3) -> Explanation:
    """Explain the anomaly map of an image.

    Args:
        model (SgfrModel): A fitted model.
        image (Tensor): Pre-processed, shape ``(3, H, W)``.
        regions (int): Most regions to explain; they are at least six patches apart.

    Returns:
        Explanation: The map and its worst regions.

    Raises:
        RuntimeError: If the model is not fitted.
        ValueError: If ``regions`` is below one or the image is not one.
    """
    if image.ndim != 3:  # noqa: PLR2004
        msg = f"image must have shape (3, H, W), got {tuple(image.shape)}."
        raise ValueError(msg)
    if regions < 1:
        msg = f"regions must be at least 1, got {regions}."
        raise ValueError(msg)
    certificate = model.certificate()
    was_training = model.training
    model.eval()
    try:
        embedding = model.embed(image[None])
        maps = model.score(embedding, image.shape[1:]).anomaly_map
    finally:
        model.train(was_training)
    if maps is None:  # for type checkers: Sgfr always makes one
        msg = "the model made no anomaly map."
        raise RuntimeError(msg)
    anomaly_map = maps[0, 0]
    rows, columns = embedding.shape[2:]
    patches = to_patches(embedding)
    residuals = model.patch_scores(patches).reshape(rows, columns)
    # the map at the patches' own resolution: its largest value over each patch
    coarse = torch.nn.functional.adaptive_max_pool2d(anomaly_map[None], (rows, columns))[0]
    places = _worst(coarse, regions)
    support, code = _code(model, patches[[row * columns + column for row, column in places]])
    found = [
        _region(
            model,
            certificate,
            place,
            float(coarse[place]),
            float(residuals[place]),
            patches[place[0] * columns + place[1]],
            *own,
        )
        for place, *own in zip(places, support, code, strict=True)
    ]
    return Explanation(anomaly_map, residuals, tuple(found))


def _worst(scores: Tensor, number: int) -> list[tuple[int, int]]:
    """The largest of scores ``(h, w)``, one at a time, leaving out what is close to those taken."""
    left = scores.clone()
    places: list[tuple[int, int]] = []
    while len(places) < number and bool((left > -torch.inf).any()):
        row, column = divmod(int(left.argmax()), scores.shape[1])
        places.append((row, column))
        left[max(0, row - _APART + 1) : row + _APART, max(0, column - _APART + 1) : column + _APART] = -torch.inf
    return places


def _code(model: SgfrModel, patches: Tensor) -> tuple[Tensor, Tensor]:
    """Atoms and their coefficients, each ``(N, k)``, for patches ``(N, d)``."""
    if model.solver == "ridge":
        code = self_expression.ridge_code(patches, model.bank, model.regularisation)
        support = (code.abs() * model.bank.norm(dim=1)).topk(min(_SHOWN, len(model.bank)), dim=1).indices
        return support, code.gather(1, support)
    if model.solver == "omp":
        expression = self_expression.omp(patches, model.bank, model.num_atoms)
    else:
        expression = self_expression.affine(patches, model.bank, model.num_atoms, model.regularisation)
    return expression.support, expression.code


def _region(
    model: SgfrModel,
    certificate: Certificate,
    place: tuple[int, int],
    score: float,
    residual: float,
    patch: Tensor,
    support: Tensor,
    code: Tensor,
) -> Region:
    cover, images = model.cover, model.images
    contributions = []
    for index in code.abs().argsort(descending=True).tolist():
        atom = int(support[index])
        image, row, column = cover.origin[atom].tolist()
        count = int(cover.count[atom])
        contributions.append(
            Contribution(
                atom=atom,
                coefficient=float(code[index]),
                distance=float((patch - cover.atoms[atom]).norm()),
                image=images[image] if 0 <= image < len(images) else None,
                row=row,
                column=column,
                patches=count,
                spread=math.sqrt(float(cover.squares[atom]) / max(count, 1)),
            )
        )
    counts = certificate.counts[support]
    return Region(
        *place,
        score=score,
        residual=residual,
        nominal=float((certificate.means[support] * counts).sum() / counts.sum().clamp_min(1)),
        nominal_largest=float(certificate.bounds[support].amax()),
        contributions=tuple(contributions),
    )
