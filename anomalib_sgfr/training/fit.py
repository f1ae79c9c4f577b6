"""Fit: from the samplers of a training pass to memory banks, suspected images and threshold."""

import csv
import logging
import math
from collections.abc import Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import NamedTuple, get_args

import torch
from lightning.pytorch import Trainer
from torch import nn

from anomalib_sgfr.console import bar_is_on, bars
from anomalib_sgfr.core.clusters import Clusters, reassign, recentred, renumber_images
from anomalib_sgfr.core.processes import several
from anomalib_sgfr.core.sampler import SubspaceSampler
from anomalib_sgfr.features.embedding import Copies
from anomalib_sgfr.features.layers import Scale
from anomalib_sgfr.images.bit_depth import require_bit_depth
from anomalib_sgfr.memory_bank import MemoryBank, MemoryBankState
from anomalib_sgfr.post_processing.calibration import ThresholdState, nominal_scores
from anomalib_sgfr.post_processing.post_processor import SgfrPostProcessor
from anomalib_sgfr.report.crops import thumbnails as make_thumbnails
from anomalib_sgfr.run_paths import atomic_write
from anomalib_sgfr.torch_model import FittedState, SgfrModel
from anomalib_sgfr.training.distributed import unite
from anomalib_sgfr.training.reject import hold_limits

__all__ = [
    "FitResult",
    "bank_sizes",
    "build_banks",
    "build_samplers",
    "check_arguments",
    "exclude_suspects",
    "fit",
    "report_certificate",
    "write_suspects",
]

logger = logging.getLogger(__name__)

_SIZES = {8: 1000, 31: 5000, float("inf"): 3000}  # atoms, by the largest stride
_ROUNDING = 1e-12  # 7% of 100 images are 7, not 8


class FitResult(NamedTuple):
    """What a fit has made, before the model uses any of it.

    Attributes:
        fitted_state (FittedState): Memory banks, without the atoms of suspected images, and with
            thumbnails if these were asked for.
        suspects (list[tuple[str, float]]): Training images suspected of being mislabelled and their
            raw scores, the largest first.
        threshold (ThresholdState | None): Threshold for these banks; ``None`` without a
            post-processor of Sgfr's own.
    """

    fitted_state: FittedState
    suspects: list[tuple[str, float]]
    threshold: ThresholdState | None


def fit(
    model: SgfrModel,
    fitted_state: FittedState,
    pre_processor: nn.Module | None,
    paths: Sequence[str],
    *,
    trim: float = 0.0,
    thumbnails: bool = False,
    earlier: FittedState | None = None,
    post_processor: SgfrPostProcessor | None = None,
    trainer: Trainer | None = None,
) -> FitResult:
    """Make all of a fit; if anything fails, the model is as it was.

    Args:
        model (SgfrModel): The model that is fitted; it is not changed.
        fitted_state (FittedState): Its new memory banks, from :func:`build_banks`.
        pre_processor (nn.Module | None): Its pre-processor.
        paths (Sequence[str]): Training images.
        trim (float): Share of them to suspect, see :func:`exclude_suspects`.
        thumbnails (bool): Whether to make thumbnails.
        earlier (FittedState | None): What an update adds to; its thumbnails are kept.
        post_processor (SgfrPostProcessor | None): Calibrates the threshold on the training images
            that are not suspected.
        trainer (Trainer | None): Says whether to show a progress bar.

    Returns:
        FitResult: Banks, suspected images and threshold.
    """
    fitted = model.with_banks(fitted_state)
    suspects: list[tuple[str, float]] = []
    if trim:
        left, suspects = exclude_suspects(fitted, pre_processor, paths, trim)
        if left is not None:
            # an update keeps its residual scales, a first fit measures them anew
            states = [
                state._replace(residual_scale=whole.residual_scale)
                for state, whole in zip(left.states, fitted_state.states, strict=True)
            ]
            fitted = model.with_banks(left._replace(states=states))
    if thumbnails:
        crops = make_thumbnails(fitted, pre_processor, earlier)
        for bank, its_crops in zip(fitted.banks, crops, strict=True):
            bank.thumbnails = its_crops
    threshold = None
    if post_processor is not None:
        excluded = [path for path, _ in suspects]
        trusted = [path for path in paths if path not in set(excluded)]
        if not trusted:
            trusted, excluded = list(paths), []
        update = earlier is not None
        with bars(shown=bar_is_on(trainer)):
            if fitted.rejected:  # what an update keeps
                good = post_processor.known_good(trusted, excluded)
                hold_limits(fitted, pre_processor, good, post_processor.state.group)
            threshold = post_processor.calibrate(
                fitted, pre_processor, trusted, update=update, excluded=excluded
            )
    return FitResult(fitted.fitted_state, suspects, threshold)


def check_arguments(
    tolerance: float, trim: float, bit_depth: int | None, copies: str, seed: int | None
) -> None:
    """Refuse arguments of a fit that are out of range.

    Raises:
        ValueError: The message names the argument.
    """
    SubspaceSampler(1, tolerance)
    if not 0.0 <= trim <= 0.5:  # noqa: PLR2004
        msg = f"trim must lie between 0 and 0.5, got {trim}."
        raise ValueError(msg)
    require_bit_depth(bit_depth)
    if copies not in get_args(Copies):
        msg = f"copies must be one of {', '.join(get_args(Copies))}, got '{copies}'."
        raise ValueError(msg)
    if seed is not None and not (isinstance(seed, Integral) and -(2**63) <= seed < 2**64):
        msg = f"seed must be a whole number of 64 bits, got {seed!r}."
        raise ValueError(msg)


def bank_sizes(scales: Sequence[Scale], bank_size: int | Sequence[int] | None) -> list[int]:
    """Largest number of atoms of each scale's memory bank.

    Args:
        scales (Sequence[Scale]): The finest first.
        bank_size (int | Sequence[int] | None): One number for all, or one for each scale. ``None``
            for 1,000 up to stride 8, which has many similar patches, 5,000 beyond, and 3,000 from
            stride 32, which has few.

    Returns:
        list[int]: One for each scale.

    Raises:
        ValueError: If there is not one for each scale, or one is below one.
    """
    if bank_size is None:
        return [
            next(size for stride, size in _SIZES.items() if scale.stride <= stride)
            for scale in scales
        ]
    sizes = [bank_size] * len(scales) if isinstance(bank_size, int) else list(bank_size)
    if len(sizes) != len(scales):
        strides = ", ".join(str(scale.stride) for scale in scales)
        msg = (
            f"bank_size must be one number, or one for each scale (of strides {strides}), got"
            f" {sizes}."
        )
        raise ValueError(msg)
    for size in sizes:
        SubspaceSampler(size)  # refuses what is out of range
    return sizes


def build_samplers(
    banks: Sequence[MemoryBank],
    sizes: Sequence[int],
    tolerance: float,
    update: bool,
    global_rank: int,
) -> list[SubspaceSampler]:
    """Samplers at the start of a fit, one for each scale.

    Args:
        banks (Sequence[MemoryBank]): The model's.
        sizes (Sequence[int]): Largest number of atoms of each.
        tolerance (float): Residual of a patch, summed over scales, below which it needs no atom;
            each scale has an equal share.
        update (bool): Whether to start from the atoms of the banks.
        global_rank (int): Of this process; the first one alone counts what was seen before.

    Returns:
        list[SubspaceSampler]: In the order of the banks.
    """
    samplers = []
    for bank, size in zip(banks, sizes, strict=True):
        sampler = SubspaceSampler(size, tolerance / len(banks))
        if update:
            clusters = bank.clusters
            if global_rank > 0:
                clusters = clusters._replace(
                    count=torch.zeros_like(clusters.count),
                    squares=torch.zeros_like(clusters.squares),
                )
            sampler.resume(clusters, float(bank.threshold))
        samplers.append(sampler)
    return samplers


def build_banks(
    samplers: Sequence[SubspaceSampler],
    images: Mapping[int, str],
    earlier: FittedState | None = None,
    device: torch.device | None = None,
) -> FittedState:
    """Memory banks from the samplers of all processes.

    A process whose samplers have observed nothing takes part without atoms.

    Args:
        samplers (Sequence[SubspaceSampler]): Of each scale.
        images (Mapping[int, str]): Paths by the numbers in the atoms' origins.
        earlier (FittedState | None): What an update adds to. Its atoms do not move to the means of
            their clusters, and residual scales stay. A full bank keeps a part of its atoms only, so
            that earlier images may score differently.
        device (torch.device | None): One that the process group communicates on.

    Returns:
        FittedState: The same in all processes.

    Raises:
        ValueError: If no process has observed anything.
    """
    found = [
        (
            (Clusters.empty(device), sampler.threshold_)
            if several() and not sampler.patches_seen_
            else sampler.fitted_state(sampler.working_size if several() else None)
        )
        for sampler in samplers
    ]
    scale_clusters, paths = renumber_images([clusters for clusters, _ in found], images)
    thresholds = [threshold for _, threshold in found]
    own = FittedState(list(map(MemoryBankState, scale_clusters, thresholds)), paths)
    united = unite(own, [sampler.bank_size for sampler in samplers], samplers[0].tolerance)
    if earlier is not None:
        states = [
            state._replace(
                residual_scale=before.residual_scale,
                nuisance=before.nuisance,
                defects=before.defects,
            )
            for state, before in zip(united.states, earlier.states, strict=True)
        ]
        united = united._replace(rejected=earlier.rejected)
    else:
        states = [
            state._replace(
                clusters=recentred(
                    state.clusters,
                    sampler.tolerance if state.threshold <= sampler.tolerance else torch.inf,
                )
            )
            for state, sampler in zip(united.states, samplers, strict=True)
        ]
    return united._replace(states=states)


def exclude_suspects(
    model: SgfrModel, pre_processor: nn.Module | None, paths: Sequence[str], share: float
) -> tuple[FittedState | None, list[tuple[str, float]]]:
    """Leave out the training images that the atoms of the others rebuild worst.

    The clusters of their atoms go to the atoms that stay, so that the certificate still holds for
    all patches seen.

    Args:
        model (SgfrModel): A fitted model; it is not changed.
        pre_processor (nn.Module | None): Its pre-processor.
        paths (Sequence[str]): Training images.
        share (float): Share of them to suspect.

    Returns:
        tuple[FittedState | None, list[tuple[str, float]]]: The banks without the suspects' atoms,
        ``None`` if a scale would have none left; and the suspects with their raw scores, the
        largest first.
    """
    scores = nominal_scores(model, pre_processor, paths).scores
    ranked = sorted(zip(paths, scores, strict=True), key=lambda item: -item[1])
    suspects = ranked[: math.ceil(share * len(paths) * (1.0 - _ROUNDING))]
    suspected = {path for path, _ in suspects}
    images = model.fitted_state.images
    numbers = torch.tensor([number for number, path in enumerate(images) if path in suspected])
    left: list[MemoryBankState] = []
    for state in model.fitted_state.states:
        dropped = torch.isin(state.clusters.origin[:, 0], numbers.to(state.clusters.origin))
        if bool(dropped.all()):
            logger.warning(
                "Without the suspected images a memory bank would be empty: all atoms are kept."
            )
            return None, suspects
        stays = state.rows(~dropped)
        left.append(stays._replace(clusters=reassign(stays.clusters, state.clusters.rows(dropped))))
    scale_clusters, kept = renumber_images(
        [state.clusters for state in left], dict(enumerate(images))
    )
    states = [
        state._replace(clusters=clusters)
        for state, clusters in zip(left, scale_clusters, strict=True)
    ]
    return model.fitted_state._replace(states=states, images=kept), suspects


def write_suspects(suspects: Sequence[tuple[str, float]], trainer: Trainer) -> None:
    """Log suspected images and write them as CSV into a run's folder, if there are any."""
    if not suspects or not trainer.is_global_zero:
        return
    logger.info("Suspected of being defective, the largest score first:")
    for path, score in suspects:
        logger.info("  %.4g  %s", score, path)
    table = Path(trainer.default_root_dir) / "suspects.csv"
    with atomic_write(table) as part, part.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("image", "score"), *suspects])


def report_certificate(model: SgfrModel, trainer: Trainer) -> None:
    """Log the sizes of a fitted model's banks and its certificate; send it to the loggers."""
    found = model.certificate()
    if trainer.is_global_zero:
        embedder = model.embedder
        for bank, scale, of in zip(model.banks, embedder.scales, found.scales, strict=True):
            _warn_of_outliers(bank, model.images)
            logger.info(
                "Learnt a bank of %d atoms x %d from %d patches of %s, for %s.",
                *bank.atoms.shape,
                of.patches,
                ", ".join(embedder.layers[index] for index in scale.layer_indices),
                scale.contributes_to,
            )
        logger.info(
            "Certified: each rebuilt to within %.4g, on average within %.4g.",
            found.largest,
            found.mean,
        )
    metrics = {
        "certified_residual": found.largest,
        "certified_mean_residual": found.mean,
        "certified_score": found.largest_score,
    }
    for destination in trainer.loggers:
        destination.log_metrics(metrics, trainer.global_step)


def _warn_of_outliers(bank: MemoryBank, images: Sequence[str]) -> None:
    """Name the image of an embedding so large that most others become equal beside it."""
    atoms = bank.atoms
    different = len(torch.unique(bank.stored, dim=0))
    if 2 * different < len(atoms):
        image = int(bank.origin[atoms.abs().amax(1).argmax(), 0])
        logger.warning(
            "%d of %d atoms are alike in 16 bits beside the largest, of %.3g: look at %s.",
            len(atoms) - different,
            len(atoms),
            float(atoms.abs().max()),
            images[image] if image >= 0 else "the training images",
        )
