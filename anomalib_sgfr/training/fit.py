"""Training images that may be defective: found by what the atoms of the others leave of them.

What a fit learns: the samplers it starts with, and what it makes of them when the stream has
passed.

All that a fit makes of what was learnt, before any of it is taken into use.
"""

import csv
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from anomalib_sgfr.core.clusters import Clusters, reassign, recentred, renumber_images
from anomalib_sgfr.core.processes import several
from anomalib_sgfr.core.sampler import SubspaceSampler
from anomalib_sgfr.features.layers import Scale
from anomalib_sgfr.memory_bank import MemoryBank, MemoryBankState
from anomalib_sgfr.post_processing.calibration import nominal_scores
from anomalib_sgfr.post_processing.threshold_state import ThresholdState
from anomalib_sgfr.report.crops import thumbnails as make_thumbnails
from anomalib_sgfr.run_paths import atomic_write
from anomalib_sgfr.torch_model import FittedState, SgfrModel
from anomalib_sgfr.training.distributed import unite

__all__ = [
    "Calibrate",
    "FitResult",
    "bank_sizes",
    "learn",
    "make",
    "samplers_for",
    "without_suspects",
    "write_suspects",
]

logger = logging.getLogger(__name__)

_ROUNDING = 1e-12  # 7% of 100 images are 7, not 8


def without_suspects(
    model: SgfrModel,
    pre_processor: Any,  # noqa: ANN401
    paths: Sequence[str],
    share: float,
) -> tuple[FittedState | None, list[tuple[str, float]]]:
    """Leave out the atoms of the training images that the atoms of the others rebuild worst.

    What they stood for is accounted to the atoms that stay, so that the certificate still covers
    all that was seen.

    Args:
        model (SgfrModel): A fitted model; it stays as it is.
        pre_processor (Any): Its pre-processor.
        paths (Sequence[str]): Training images.
        share (float): Share of them to suspect.

    Returns:
        tuple[FittedState | None, list[tuple[str, float]]]: What is left of what the model learnt,
        ``None`` if nothing would be left of a scale, so that all of it is to stay; and the suspects
        with their raw scores, the worst first.
    """
    scores = nominal_scores(model, pre_processor, paths).scores
    worst = sorted(zip(paths, scores, strict=True), key=lambda item: -item[1])
    suspects = worst[: math.ceil(share * len(paths) * (1.0 - _ROUNDING))]
    suspected = {path for path, _ in suspects}
    fitted_state = model.fitted_state
    numbers = torch.tensor(
        [number for number, path in enumerate(fitted_state.images) if path in suspected]
    )
    left: list[MemoryBankState] = []
    for state in fitted_state.states:
        dropped = torch.isin(state.clusters.origin[:, 0], numbers.to(state.clusters.origin))
        if bool(dropped.all()):
            logger.warning(
                "Without the suspects there would be no atom: the bank is kept as it is."
            )
            return None, suspects
        stays = state.rows(~dropped)
        left.append(stays._replace(clusters=reassign(stays.clusters, state.clusters.rows(dropped))))
    scale_clusters, images = renumber_images(
        [state.clusters for state in left], dict(enumerate(fitted_state.images))
    )
    return (
        FittedState(
            [
                state._replace(clusters=clusters)
                for state, clusters in zip(left, scale_clusters, strict=True)
            ],
            images,
        ),
        suspects,
    )


def write_suspects(suspects: Sequence[tuple[str, float]], table: Path) -> None:
    """Write suspects as CSV, whole or not at all, and to the log."""
    logger.info("Suspected of being defective, the worst first:")
    for path, score in suspects:
        logger.info("  %.4g  %s", score, path)
    with atomic_write(table) as part, part.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("image", "score"), *suspects])


_SIZES = {8: 1000, 31: 5000, float("inf"): 3000}  # by the largest stride


def bank_sizes(scales: Sequence[Scale], bank_size: int | Sequence[int] | None) -> list[int]:
    """Most atoms of each scale's bank.

    Args:
        scales (Sequence[Scale]): The finest first.
        bank_size (int | Sequence[int] | None): One number for all, or one for each scale. ``None``
            for 1,000 up to stride 8, which has many patches alike, 5,000 beyond, and 3,000 from
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
    if isinstance(bank_size, int):
        sizes = [bank_size] * len(scales)
    else:
        sizes = list(bank_size)
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


def samplers_for(
    banks: Sequence[MemoryBank],
    sizes: Sequence[int],
    tolerance: float,
    update: bool,
    global_rank: int,
) -> list[SubspaceSampler]:
    """Samplers for a fit that starts now, one for each scale.

    Args:
        banks (Sequence[MemoryBank]): The model's.
        sizes (Sequence[int]): Largest number of atoms of each.
        tolerance (float): Of the sum over scales of what is left of an embedding: each may use up
            an equal share.
        update (bool): Whether to go on from the atoms that the banks have.
        global_rank (int): Of this process; what was seen before counts once among all of them.

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


def learn(
    samplers: Sequence[SubspaceSampler],
    images: Mapping[int, str],
    earlier: FittedState | None = None,
    device: torch.device | None = None,
) -> FittedState:
    """Make of what samplers hold what a model is to take into use, in all processes together.

    A process whose samplers have observed nothing takes part without atoms.

    Args:
        samplers (Sequence[SubspaceSampler]): Of each scale.
        images (Mapping[int, str]): Paths by the numbers in the atoms' origins.
        earlier (FittedState | None): What the fit adds to, if anything. Atoms then stay where they
            are instead of moving to the mean of what they stand for, and residuals keep the unit of
            before. A full bank keeps only a part of its earlier atoms, so that earlier images may
            score otherwise.
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
    own = FittedState(
        [
            MemoryBankState(clusters, threshold)
            for clusters, (_, threshold) in zip(scale_clusters, found, strict=True)
        ],
        paths,
    )
    fitted_state = unite(own, [sampler.bank_size for sampler in samplers], samplers[0].tolerance)
    if earlier is not None:
        both = zip(fitted_state.states, earlier.states, strict=True)
        states = [
            state._replace(nominal=before.nominal, nuisance=before.nuisance)
            for state, before in both
        ]
        return fitted_state._replace(states=states)
    moved = [
        state._replace(
            clusters=recentred(
                state.clusters,
                sampler.tolerance if state.threshold <= sampler.tolerance else torch.inf,
            )
        )
        for state, sampler in zip(fitted_state.states, samplers, strict=True)
    ]
    return fitted_state._replace(states=moved)


# From the fitted model, the images it is known by, and those that are not, to the state of its
# threshold.
Calibrate = Callable[[SgfrModel, Sequence[str], Sequence[str]], ThresholdState]


class FitResult(NamedTuple):
    """What a model, and its post-processor, are to take into use.

    Attributes:
        fitted_state (FittedState): Banks, without the suspects' atoms and with thumbnails, if these
            were asked for.
        suspects (list[tuple[str, float]]): Training images suspected of being defective, and their
            raw scores.
        threshold (ThresholdState | None): State of the threshold for these banks, if there is to be
            one.
    """

    fitted_state: FittedState
    suspects: list[tuple[str, float]]
    threshold: ThresholdState | None


def make(
    model: SgfrModel,
    fitted_state: FittedState,
    pre_processor: Any,  # noqa: ANN401
    paths: Sequence[str],
    *,
    trim: float = 0.0,
    thumbnails: bool = False,
    earlier: FittedState | None = None,
    calibrate: Calibrate | None = None,
) -> FitResult:
    """Make everything; whatever fails, the model is as it was.

    Args:
        model (SgfrModel): The model that is fitted; it stays as it is.
        fitted_state (FittedState): What its fit learnt.
        pre_processor (Any): Its pre-processor.
        paths (Sequence[str]): Training images.
        trim (float): Share of them to suspect, see
            :func:`~anomalib_sgfr.training.fit.without_suspects`.
        thumbnails (bool): Whether to make thumbnails.
        earlier (FittedState | None): What an update adds to; its thumbnails are kept.
        calibrate (Calibrate | None): Makes the state of the threshold from the fitted model, the
            training images that are not suspects, and the suspects.

    Returns:
        FitResult: All of it.
    """
    fitted = model.with_banks(fitted_state)
    suspects: list[tuple[str, float]] = []
    if trim:
        left, suspects = without_suspects(fitted, pre_processor, paths, trim)
        if left is not None:  # the banks would otherwise be empty
            measures = [
                state.nominal for state in fitted_state.states
            ]  # of an update as before, otherwise to be found anew
            states = [
                state._replace(nominal=its)
                for state, its in zip(left.states, measures, strict=True)
            ]
            fitted = model.with_banks(left._replace(states=states))
    if thumbnails:
        pictures = make_thumbnails(fitted, pre_processor, earlier)
        for bank, its_pictures in zip(fitted.banks, pictures, strict=True):
            bank.thumbnails = its_pictures
    suspected = dict(suspects)
    trusted = [path for path in paths if path not in suspected]
    excluded = list(suspected) if trusted else []  # all of them may be suspects
    return FitResult(
        fitted.fitted_state,
        suspects,
        calibrate(fitted, trusted or paths, excluded) if calibrate else None,
    )
