"""Domain shift: directions in which good images differ from the fit are projected out."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from anomalib_sgfr.core.linear_algebra import principal_directions, projected_out
from anomalib_sgfr.core.patch_grid import to_patches
from anomalib_sgfr.core.self_expression import affine
from anomalib_sgfr.torch_model import FittedState, SgfrModel

__all__ = ["project_out_shift", "residual_moments"]

_ROWS = 1024  # patches at a time


@torch.no_grad()
def residual_moments(model: SgfrModel, images: Iterable[Tensor]) -> list[Tensor]:
    """Second moments of the residuals of images; they add up over images.

    Args:
        model (SgfrModel): A fitted model in evaluation mode.
        images (Iterable[Tensor]): Good ones, pre-processed, each of shape ``(3, H, W)``.

    Returns:
        list[Tensor]: Of each scale, the sum of the outer products of the residuals with themselves,
        shape ``(d, d)``, ``float64``.
    """
    widths = [bank.stored.shape[1] for bank in model.banks]
    moments = [torch.zeros(width, width, dtype=torch.float64) for width in widths]
    for image in images:
        embeddings = model.embed(image[None])
        inside = model.patches_inside([part.shape[-2:] for part in embeddings])
        for scale, (bank, embedding) in enumerate(zip(model.banks, embeddings, strict=True)):
            patches = to_patches(embedding)
            patches = patches if inside is None else patches[inside[scale].flatten()]
            for part in patches.split(_ROWS):
                found = affine(part, bank.atoms, bank.solver.num_atoms, bank.solver.regularisation)
                residual = found.residual.cpu().double()
                moments[scale] += residual.T @ residual
    return moments


def project_out_shift(model: SgfrModel, moments: Sequence[Tensor], directions: int) -> FittedState:
    """Memory banks without the directions in which good images have the largest residuals.

    Args:
        model (SgfrModel): A fitted model; it is not changed.
        moments (Sequence[Tensor]): From :func:`residual_moments`.
        directions (int): How many to project out of each scale, in addition to those that are
            projected out already.

    Returns:
        FittedState: The projected atoms. Distances only shrink, so that the certificate holds.

    Raises:
        ValueError: As :func:`~anomalib_sgfr.core.linear_algebra.principal_directions`.
    """
    states = []
    for state, moment in zip(model.fitted_state.states, moments, strict=True):
        atoms = state.clusters.atoms
        found = principal_directions(moment, directions).to(atoms)
        known = found if state.nuisance is None else torch.cat((state.nuisance.to(atoms), found))
        clusters = state.clusters._replace(atoms=projected_out(atoms, found))
        defects = state.defects
        if defects is not None:
            defects = defects._replace(atoms=projected_out(defects.atoms, found.float()))
        states.append(
            state._replace(
                clusters=clusters, nuisance=known if len(known) else None, defects=defects
            )
        )
    return model.fitted_state._replace(states=states)
