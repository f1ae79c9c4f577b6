"""Domain shift: directions in which good images differ from the fit are projected out."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from anomalib_sgfr.core.linear_algebra import principal_directions, projected_out
from anomalib_sgfr.core.patch_grid import to_patches
from anomalib_sgfr.core.self_expression import affine
from anomalib_sgfr.images.pre_processor import read_prepared
from anomalib_sgfr.images.reading import image_list
from anomalib_sgfr.post_processing.calibration import (
    CalibrationScores,
    NominalScores,
    Split,
    nominal_scores,
)
from anomalib_sgfr.post_processing.post_processor import SgfrPostProcessor
from anomalib_sgfr.torch_model import FittedState, SgfrModel
from anomalib_sgfr.training.accept import require_good
from anomalib_sgfr.training.reject import hold_limits

__all__ = ["FEWEST", "Adaptation", "adapt", "project_out_shift", "residual_moments"]

FEWEST = 2  # images, as each is scored by the model that the others adapt
_ROWS = 1024  # patches at a time


class Adaptation(NamedTuple):
    """Raw scores before and after a model was adapted, in the order of the images.

    Attributes:
        good (tuple[list[float], list[float]]): Of the good images, each now by the model that the
            others adapt.
        bad (tuple[list[float], list[float]]): Of the defective images.
    """

    good: tuple[list[float], list[float]]
    bad: tuple[list[float], list[float]]


@torch.no_grad()
def adapt(
    module: Any,  # noqa: ANN401
    images: Sequence[str | Path],
    bad: Sequence[str | Path] = (),
    *,
    directions: int = 4,
    force: bool = False,
) -> Adaptation:
    """Adapt a model in place to a domain shift (light, camera) by good images of it.

    The threshold stays, as a value set by hand; the scores of the good images are kept to choose
    another one from. What was accepted before can no longer be taken back.

    Args:
        module (Any): A fitted :class:`~anomalib_sgfr.lightning_model.Sgfr`.
        images (Sequence[str | Path]): Files of at least 2 good images as they look now, better 4 to
            16.
        bad (Sequence[str | Path]): Files of defective images as they look now, to see what is
            found.
        directions (int): How many to project out of the patches of each scale.
        force (bool): Take the images for good despite
            :func:`~anomalib_sgfr.training.accept.objections`.

    Returns:
        Adaptation: Scores before and now.

    Raises:
        ValueError: If there are too few images, one cannot be taken for good, or there are more
            directions than a scale has.
        RuntimeError: If the model is not fitted.
        TypeError: If images are not a list.

    Examples:
        >>> from anomalib_sgfr import Sgfr, adapt
        >>> model = Sgfr.load_from_checkpoint(checkpoint)
        >>> images = [str(path) for path in (parts / "good_test").iterdir()]
        >>> before, now = adapt(model, images).good
        >>> max(now) < max(before)
        True
        >>> model.save_checkpoint("adapted.ckpt")
    """
    module.require_fitted("adapt")
    images, bad = image_list(images, "images"), image_list(bad, "bad")
    if len(images) < FEWEST:
        msg = f"at least {FEWEST} good images are needed, better 4 to 16, got {len(images)}."
        raise ValueError(msg)
    against = require_good(module, images, "images", force=force)
    model, prepare = module.eval().model, module.pre_processor

    def scored(of: SgfrModel, paths: Sequence[str]) -> NominalScores:
        return nominal_scores(of, prepare, paths, leave_out=False)

    device = model.image_paths.device
    moments = [
        residual_moments(model, [read_prepared(path, prepare, model.bit_depth).to(device)])
        for path in images
    ]
    total = [torch.stack(scale).sum(0) for scale in zip(*moments, strict=True)]
    good_before, bad_before = (list(scored(model, paths).scores) for paths in (images, bad))
    good_now, peaks = list[float](), list[float]()
    for path, own_moments in zip(images, moments, strict=True):
        others = [every - one for every, one in zip(total, own_moments, strict=True)]
        adapted = model.with_banks(project_out_shift(model, others, directions))
        if hold_limits(adapted, prepare, [path], leave_out=False):
            for bank, raised in zip(model.banks, adapted.banks, strict=True):
                bank.defects.set_limits(raised.defects.limits)
        found = scored(adapted, [path])
        good_now += found.scores
        peaks += found.peaks
    model.load_fitted_state(project_out_shift(model, total, directions))
    hold_limits(model, prepare, images, leave_out=False)
    module.accepted = None  # the banks that it would restore are gone
    processor = module.post_processor
    if isinstance(processor, SgfrPostProcessor) and processor.is_set:
        state = processor.state
        by_hand = state._replace(value=state.image, read_from=state.threshold_images, by="hand")
        scores = CalibrationScores.of(good_now, Split.HELD_OUT, images, peaks)
        processor.use(by_hand._replace(scores=scores, forced=tuple(against)))
    return Adaptation((good_before, good_now), (bad_before, list(scored(model, bad).scores)))


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
