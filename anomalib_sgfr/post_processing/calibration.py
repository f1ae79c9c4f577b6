"""Calibration scores: nominal images scored as if none of their part had been trained on."""

from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from anomalib_sgfr.console import progress
from anomalib_sgfr.core.processes import failing_together, share
from anomalib_sgfr.images.pre_processor import read_prepared
from anomalib_sgfr.post_processing.calibration_scores import (
    CalibrationScores,
    Group,
    Split,
    in_all_processes,
    unit_of,
)
from anomalib_sgfr.torch_model import ScoreMaps, SgfrModel

__all__ = ["NominalScores", "nominal_scores", "rescored", "scored", "spread_over"]

_BATCH = 16


class NominalScores(NamedTuple):
    """What images come to, one after the other.

    Attributes:
        scores (list[float]): Raw scores.
        peaks (list[float]): Largest values of the raw maps, which may hear other scales.
    """

    scores: list[float]
    peaks: list[float]


@torch.no_grad()
def nominal_scores(
    model: SgfrModel,
    pre_processor: Any,  # noqa: ANN401
    paths: Sequence[str],
    *,
    leave_out: bool = True,
    group: Group = None,
) -> NominalScores:
    """Raw scores of nominal images, and the largest values of their maps.

    Args:
        model (SgfrModel): A fitted model.
        pre_processor (Any): Its pre-processor.
        paths (Sequence[str]): Images.
        leave_out (bool): Whether to score each without the atoms that come from images of its unit.
            Where no other atoms would be left, all are used, and the image is mirrored: the worst
            of three ways counts.
        group (Group): What makes a unit, see
            :func:`~anomalib_sgfr.post_processing.calibration_scores.unit_of`.

    Returns:
        NominalScores: Of each image.
    """
    own: dict[str, list[int]] = {}
    for number, image in enumerate(model.images if leave_out else ()):
        own.setdefault(unit_of(image, group), []).append(number)
    # those of one unit together: they share what is left of the banks; those of no atom's unit
    # first, all of them do
    units = [unit_of(path, group) for path in paths]
    order = sorted(range(len(paths)), key=lambda index: (units[index] in own, units[index], index))
    found_of = torch.zeros(2, len(paths), dtype=torch.float32)
    for batch, images in _batches(order, paths, pre_processor, model):
        embeddings = model.embed(images)
        for unit, found in groupby(
            enumerate(batch), lambda item: units[item[1]] if units[item[1]] in own else None
        ):
            rows, places = map(list, zip(*found, strict=True))
            numbers = own[unit] if unit is not None else []
            banks = model.banks_without(numbers)
            if banks is not None:
                result = model.score_embeddings(
                    [part[rows] for part in embeddings], images.shape[-2:], banks
                )
                found_of[:, places] = _largest(result)
            else:
                found_of[:, places] = _mirrored(model, images[rows])
    return NominalScores(*found_of.tolist())


def _largest(result: ScoreMaps) -> Tensor:
    """Scores and peaks ``(2, B)``."""
    return torch.stack((result.pred_score, result.anomaly_map.amax(dim=(1, 2, 3)))).cpu()


def _mirrored(model: SgfrModel, images: Tensor) -> Tensor:
    ways = [model.score_maps(images.flip(axes)) for axes in ((-1,), (-2,), (-2, -1))]
    return torch.stack([_largest(way) for way in ways]).amax(0)


def _batches(
    order: Sequence[int],
    paths: Sequence[str],
    pre_processor: Any,  # noqa: ANN401
    model: SgfrModel,
) -> Iterator[tuple[list[int], Tensor]]:
    """Places and images, prepared, of one size in a batch."""
    held: list[int] = []
    images: list[Tensor] = []
    for place in progress(order, len(order), "Calibration"):
        image = read_prepared(paths[place], pre_processor, model.bit_depth)
        if held and (len(held) == _BATCH or image.shape != images[0].shape):
            yield held, torch.stack(images).to(model.image_paths.device)
            held, images = [], []
        held.append(place)
        images.append(image)
    if held:
        yield held, torch.stack(images).to(model.image_paths.device)


def spread_over(paths: Sequence[str], most: int, group: Group = None) -> list[str]:
    """Some of the images, evenly spread over the list, and over as many units as there are.

    Args:
        paths (Sequence[str]): Images.
        most (int): How many at most.
        group (Group): What makes a unit.

    Returns:
        list[str]: All of them, or ``most``: the first of each unit before the second of any.
    """
    if len(paths) <= most:
        return list(paths)
    rounds: dict[str, int] = {}
    turn = []
    for path in paths:
        unit = unit_of(path, group)
        turn.append(rounds.get(unit, 0))
        rounds[unit] = turn[-1] + 1
    chosen: list[int] = []
    for number in range(max(turn) + 1):
        of_turn = [place for place, its in enumerate(turn) if its == number]
        left = most - len(chosen)
        if len(of_turn) >= left:
            chosen += [of_turn[step * len(of_turn) // left] for step in range(left)]
            break
        chosen += of_turn
    return [paths[place] for place in sorted(chosen)]


def scored(
    model: SgfrModel,
    pre_processor: Any,  # noqa: ANN401
    paths: Sequence[str],
    kind: Split,
    group: Group = None,
) -> CalibrationScores:
    """Score images in all processes together: good ones each without the atoms of its part.

    Args:
        model (SgfrModel): A fitted model.
        pre_processor (Any): Its pre-processor.
        paths (Sequence[str]): Images.
        kind (Split): What they are.
        group (Group): What makes a part.

    Returns:
        CalibrationScores: The same in all processes, which share the work.
    """
    own = share(paths)
    leave_out = kind != Split.DEFECTIVE
    with failing_together():
        scores, peaks = nominal_scores(model, pre_processor, own, leave_out=leave_out, group=group)
    return in_all_processes(CalibrationScores.of(scores, kind, own, peaks))


def rescored(
    calibration_scores: CalibrationScores,
    model: SgfrModel,
    pre_processor: Any,  # noqa: ANN401
    group: Group = None,
) -> CalibrationScores:
    """Scores of other banks made anew where the images are still there, in all processes together.

    Args:
        calibration_scores (CalibrationScores): Of other banks than the model's.
        model (SgfrModel): A fitted model.
        pre_processor (Any): Its pre-processor.
        group (Group): What makes a part.

    Returns:
        CalibrationScores: Of the same images, in the same order; those that are gone keep their
        scores, which are then not ``current``.
    """
    there = calibration_scores.subset(
        [bool(path) and Path(path).is_file() for path in calibration_scores.paths]
    )
    anew: dict[str, Sequence[float]] = {}
    for kind in Split:
        found = scored(model, pre_processor, there.of_kind(kind).paths, kind, group)
        anew |= {
            path: both for path, *both in zip(found.paths, found.scores, found.peaks, strict=True)
        }
    before = list(zip(calibration_scores.scores, calibration_scores.peaks, strict=True))
    now = [anew.get(path, was) for path, was in zip(calibration_scores.paths, before, strict=True)]
    return calibration_scores._replace(
        scores=tuple(score for score, _ in now),
        peaks=tuple(peak for _, peak in now),
        current=tuple(path in anew for path in calibration_scores.paths),
    )
