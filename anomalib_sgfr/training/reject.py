"""Missed defects: patches of rejected images for the defect banks, and limits from good images."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from scipy import ndimage
from torch import Tensor

from anomalib_sgfr.core.k_center import k_center_greedy
from anomalib_sgfr.core.patch_grid import origins, patches_in_region, to_patches
from anomalib_sgfr.defect_bank import DefectPatches, defect_index, nearest_distance, resemblance
from anomalib_sgfr.memory_bank import MemoryBank
from anomalib_sgfr.post_processing.calibration import Group, leave_one_out
from anomalib_sgfr.torch_model import FittedState, SgfrModel

__all__ = [
    "MARGIN",
    "MOST",
    "Defect",
    "Limits",
    "add_defects",
    "date_of",
    "find_defect",
    "find_limits",
    "without_last",
    "worst_region",
]

MOST = 500  # patches in the defect bank of a scale
_MOST_OF_IMAGE = 50
_LEAST = 0.8  # residual, over that of nominal patches, of a patch that shows the defect
_SHARE = 0.5  # of the way from the median of the score map to its peak
MARGIN = 0.01  # of the limits, for what precision and formats differ in


class Defect(NamedTuple):
    """Patches of the defect in one image.

    Attributes:
        image (str): Date and path.
        atoms (list[Tensor]): Of each scale, shape ``(n, d)``.
        places (list[Tensor]): Their rows, columns, and the grid's rows and columns, ``(n, 4)``.
    """

    image: str
    atoms: list[Tensor]
    places: list[Tensor]

    @property
    def number(self) -> int:
        """Number of patches."""
        return sum(map(len, self.atoms))


@torch.no_grad()
def worst_region(score_map: Tensor) -> Tensor:
    """Region around the peak of a score map: what is connected to it and near it in value.

    That is above half of the way from the map's median to its peak.

    Args:
        score_map (Tensor): Shape ``(H, W)``.

    Returns:
        Tensor: Mask of the region, shape ``(H, W)``, ``bool``.
    """
    level = torch.lerp(score_map.median(), score_map.amax(), _SHARE)
    above = score_map >= level
    parts, _ = ndimage.label(above.cpu().numpy())
    found = torch.from_numpy(parts).to(score_map.device)
    return found == found.flatten()[score_map.argmax()]


@torch.no_grad()
def find_defect(model: SgfrModel, image: Tensor, name: str, region: Tensor) -> Defect:
    """Patches that show a defect: those in its region that the memory banks do not rebuild.

    Args:
        model (SgfrModel): A fitted model in evaluation mode.
        image (Tensor): Pre-processed, shape ``(3, H, W)``.
        name (str): Date and path of the image.
        region (Tensor): Mask of the defect, shape ``(H, W)``, ``bool``.

    Returns:
        Defect: Its patches; a scale may have none.
    """
    embeddings = model.embed(image[None])
    residuals = model.score_embeddings(embeddings, image.shape[-2:]).residuals
    defect = Defect(name, [], [])
    for scale, embedding, residual in zip(
        model.embedder.scales, embeddings, residuals, strict=True
    ):
        grid = embedding.shape[-2:]
        shown = patches_in_region(region, grid, scale.stride) & (residual[0, 0] >= _LEAST)
        there = shown.flatten().nonzero()[:, 0]
        patches = to_patches(embedding)
        if len(there) > _MOST_OF_IMAGE:  # from the one that is rebuilt worst on
            start = residual.flatten()[there].argmax()[None]
            chosen, _ = k_center_greedy(patches[there], _MOST_OF_IMAGE, start)
            there = there[chosen.sort().values]
        where = origins(torch.zeros(1, dtype=torch.int64, device=image.device), grid)
        defect.atoms.append(patches[there])
        defect.places.append(where[there, 1:])
    return defect


def add_defects(
    fitted_state: FittedState, defects: Sequence[Defect], limits: Sequence[float]
) -> FittedState:
    """Memory banks with more defects.

    Args:
        fitted_state (FittedState): The banks.
        defects (Sequence[Defect]): New ones.
        limits (Sequence[float]): Limits of their patches, of each scale.
    """
    states = []
    for scale, (state, limit) in enumerate(zip(fitted_state.states, limits, strict=True)):
        known = state.defects
        for number, defect in enumerate(defects, len(fitted_state.rejected)):
            atoms, places = defect.atoms[scale], defect.places[scale]
            origin = torch.cat((torch.full_like(places[:, :1], number), places), 1)
            new = DefectPatches(atoms, torch.full_like(atoms[:, 0], limit), origin)
            known = new if known is None else known.joined(new)
        states.append(state._replace(defects=known if known and len(known.atoms) else None))
    rejected = [*fitted_state.rejected, *(defect.image for defect in defects)]
    return fitted_state._replace(states=states, rejected=rejected)


class Limits(NamedTuple):
    """Limits of resemblance, and the images that set them.

    Attributes:
        values (list[float]): Of each scale: no patch of a known good image resembles a defect more;
            zero where a scale has no defect patches.
        images (list[str]): The image of each scale that resembles a defect most; empty without one.
    """

    values: list[float]
    images: list[str]


def find_limits(
    model: SgfrModel,
    pre_processor: Any,  # noqa: ANN401
    paths: Sequence[str],
    defects: Sequence[Defect],
    group: Group = None,
) -> Limits:
    """Limits of resemblance to new defects from good images, each without the atoms of its group.

    Args:
        model (SgfrModel): A fitted model; its own defect banks do not matter.
        pre_processor (Any): Its pre-processor.
        paths (Sequence[str]): Files of good images, at least one.
        defects (Sequence[Defect]): The new ones.
        group (Group): What names an image's group, see
            :func:`~anomalib_sgfr.post_processing.calibration.group_of`.

    Returns:
        Limits: Of each scale.
    """
    scales = range(len(model.banks))
    atoms = [torch.cat([defect.atoms[scale] for defect in defects]) for scale in scales]
    own = model.with_banks(model.fitted_state.without_defects())
    found = leave_one_out(own, pre_processor, paths, _resemblance_to(own, atoms), group=group)
    largest, at = found.max(1)
    has = [len(part) > 0 for part in atoms]
    return Limits(
        [float(largest[scale]) + MARGIN if has[scale] else 0.0 for scale in scales],
        [paths[int(at[scale])] if has[scale] else "" for scale in scales],
    )


def _resemblance_to(model: SgfrModel, atoms: Sequence[Tensor]) -> Callable[..., Tensor]:
    """Measure of images: the largest resemblance of their patches at each scale, ``(S, B)``."""

    def measure(
        embeddings: list[Tensor], size: Sequence[int], banks: list[MemoryBank] | None
    ) -> Tensor:
        residuals = model.score_embeddings(embeddings, size, banks).residuals
        found = []
        for bank, part, embedding, residual in zip(
            model.banks, atoms, embeddings, residuals, strict=True
        ):
            if not len(part):
                found.append(residual.new_full((len(residual),), -math.inf))
                continue
            index = defect_index(part)
            distance = bank.map_patches(partial(nearest_distance, index=index), embedding)
            of_patches = resemblance(residual.flatten(1), distance.flatten(1) / bank.residual_scale)
            found.append(of_patches.amax(1))
        return torch.stack(found)

    return measure


def without_last(fitted_state: FittedState) -> FittedState:
    """Memory banks without the defects that were rejected last, all with one date.

    Args:
        fitted_state (FittedState): With at least one rejected image.
    """
    last = date_of(fitted_state.rejected[-1])
    left = [image for image in fitted_state.rejected if date_of(image) != last]
    states = []
    for state in fitted_state.states:
        defects = state.defects
        if defects is not None:
            defects = defects.rows(defects.origin[:, 0] < len(left))
        states.append(state._replace(defects=defects if defects and len(defects.atoms) else None))
    return fitted_state._replace(states=states, rejected=left)


def date_of(image: str) -> str:
    """Date of a rejected image, in front of its path."""
    return image.partition(" ")[0]
