"""Calibration scores: raw scores of images that are known to be good or defective."""

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from enum import IntEnum
from itertools import compress, groupby
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from anomalib_sgfr.console import progress
from anomalib_sgfr.core.processes import failing_together, gathered, share
from anomalib_sgfr.images.pre_processor import read_prepared
from anomalib_sgfr.post_processing.thresholds import groups_needed, supported_rate
from anomalib_sgfr.torch_model import ScoreMaps, SgfrModel

__all__ = [
    "CalibrationScores",
    "Group",
    "NominalScores",
    "Split",
    "gather_scores",
    "group_label",
    "group_of",
    "nominal_scores",
    "real_path",
    "require_group",
    "rescore",
    "score_images",
    "select_evenly",
]

# What names the group of an image: a regular expression on its path, or a function of it.
Group: TypeAlias = str | Callable[[str], str] | None

_BATCH = 16


class Split(IntEnum):
    """What is known of an image."""

    TRAINING = 0  # good; scored without the atoms of its own group
    HELD_OUT = 1  # good, not trained on
    DEFECTIVE = 2


class CalibrationScores(NamedTuple):
    """Raw scores of images that are known to be good or defective.

    Checkpoints store the fields under their names, and pickles in their order.

    Attributes:
        scores (tuple[float, ...]): Raw scores.
        kinds (tuple[int, ...]): A :class:`Split` for each.
        paths (tuple[str, ...]): Image files; empty where a file is not known.
        peaks (tuple[float, ...]): Largest value of each raw anomaly map, to which other layers may
            contribute than to the score.
        current (tuple[bool, ...]): Whether the score is from the present memory banks; an update
            may be unable to score an image again.
    """

    scores: tuple[float, ...] = ()
    kinds: tuple[int, ...] = ()
    paths: tuple[str, ...] = ()
    peaks: tuple[float, ...] = ()
    current: tuple[bool, ...] = ()

    @classmethod
    def of(
        cls,
        scores: Iterable[float],
        split: Split,
        paths: Iterable[str],
        peaks: Iterable[float] | None = None,
    ) -> "CalibrationScores":
        """Scores of images of one split; without ``peaks``, the scores are taken for them."""
        values, files = tuple(scores), tuple(paths)
        largest = values if peaks is None else tuple(peaks)
        return cls(values, (int(split),) * len(values), files, largest, (True,) * len(values))

    @classmethod
    def from_dict(cls, stored: Any) -> "CalibrationScores":  # noqa: ANN401
        """Inverse of :meth:`to_dict`; reads earlier versions' dictionaries, and ``None``."""
        if not isinstance(stored, Mapping):
            return cls()
        scores = stored.get("scores", ())
        stored = {"peaks": scores, "current": (True,) * len(scores), **stored}
        return cls(*(tuple(stored.get(name, ())) for name in cls._fields))

    def to_dict(self) -> dict[str, list[Any]]:
        """Lists by field, to store in a checkpoint."""
        return {name: list(values) for name, values in zip(self._fields, self, strict=True)}

    def joined(self, other: "CalibrationScores") -> "CalibrationScores":
        """Scores of both; of an image in both, those of the other."""
        kept = self.exclude(other.paths)
        return CalibrationScores(*(ours + theirs for ours, theirs in zip(kept, other, strict=True)))  # type: ignore[arg-type]

    def exclude(self, paths: Iterable[str]) -> "CalibrationScores":
        """Scores without those of some files, whatever path leads to them."""
        files = {real_path(path) for path in paths if path}
        return self.subset([real_path(path) not in files for path in self.paths])

    def subset(self, chosen: Sequence[bool]) -> "CalibrationScores":
        """Scores of some of the images, by one flag each."""
        return CalibrationScores(*(tuple(compress(values, chosen)) for values in self))  # type: ignore[arg-type]

    def of_split(self, split: Split) -> "CalibrationScores":
        """Scores of the images of one split."""
        return self.subset([kind == split for kind in self.kinds])

    @property
    def good(self) -> "CalibrationScores":
        """Scores of the images that are known to be good."""
        return self.subset([kind != Split.DEFECTIVE for kind in self.kinds])

    @property
    def defective(self) -> "CalibrationScores":
        """Scores of the images that are known to be defective."""
        return self.of_split(Split.DEFECTIVE)

    def groups(self, group: str | None) -> list[str]:
        """Name of each image's group, see :func:`group_of`; one of its own without a path."""
        return [
            group_of(path, group) if path else f"\0{number}"
            for number, path in enumerate(self.paths)
        ]

    def description(self, group: str | None, rate: float) -> str:
        """Number of good images, and the false-alarm rate that they support, as a phrase."""
        number, needed = len(set(self.good.groups(group))), groups_needed(rate)
        phrase = (
            f"{len(self.good.scores)} good images ({number} independent) at a false-alarm rate of"
            f" {100 * rate:g}%; the true rate may be up to {100 * supported_rate(number):.2g}% at"
            " 95% confidence"
        )
        return phrase if number >= needed else f"{phrase}, {100 * rate:g}% needs {needed}"


class NominalScores(NamedTuple):
    """Raw scores of images, and the largest values of their raw maps.

    Attributes:
        scores (list[float]): One for each image.
        peaks (list[float]): One for each image; other layers may contribute than to the score.
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
    """Leave-one-group-out scores of images.

    Each image is scored without the atoms of its group. Where no other atoms would be left, all are
    used and the image is mirrored: the largest score of three ways counts.

    Args:
        model (SgfrModel): A fitted model.
        pre_processor (Any): Pre-processor of the model.
        paths (Sequence[str]): Image files.
        leave_out (bool): Whether to leave out the group's atoms.
        group (Group): What names an image's group, see :func:`group_of`.

    Returns:
        NominalScores: In the order of ``paths``.
    """
    numbers_of: dict[str, list[int]] = {}  # numbers of the training images of each group
    for number, image in enumerate(model.images if leave_out else ()):
        numbers_of.setdefault(group_of(image, group), []).append(number)
    groups = [group_of(path, group) for path in paths]
    # images of one training group follow each other, as they share what is left of the banks
    order = sorted(
        range(len(paths)), key=lambda index: (groups[index] in numbers_of, groups[index], index)
    )
    found = torch.zeros(2, len(paths), dtype=torch.float32)
    for batch, images in _batches(order, paths, pre_processor, model):
        embeddings = model.embed(images)
        for left_out, rows_and_indices in groupby(
            enumerate(batch), lambda item: numbers_of.get(groups[item[1]], [])
        ):
            rows, indices = map(list, zip(*rows_and_indices, strict=True))
            banks = model.banks_without(left_out)
            if banks is not None:
                result = model.score_embeddings(
                    [part[rows] for part in embeddings], images.shape[-2:], banks
                )
                found[:, indices] = _scores_and_peaks(result)
            else:
                found[:, indices] = _mirrored_scores(model, images[rows])
    return NominalScores(*found.tolist())


def _scores_and_peaks(result: ScoreMaps) -> Tensor:
    """Raw scores and largest map values, shape ``(2, B)``."""
    return torch.stack((result.pred_score, result.anomaly_map.amax(dim=(1, 2, 3)))).cpu()


def _mirrored_scores(model: SgfrModel, images: Tensor) -> Tensor:
    """Largest scores and peaks of three mirror images."""
    ways = [model.score_maps(images.flip(axes)) for axes in ((-1,), (-2,), (-2, -1))]
    return torch.stack([_scores_and_peaks(way) for way in ways]).amax(0)


def _batches(
    order: Sequence[int],
    paths: Sequence[str],
    pre_processor: Any,  # noqa: ANN401
    model: SgfrModel,
) -> Iterator[tuple[list[int], Tensor]]:
    """Indices and pre-processed images, all of a batch of one size."""
    indices: list[int] = []
    images: list[Tensor] = []
    for index in progress(order, len(order), "Calibration"):
        image = read_prepared(paths[index], pre_processor, model.bit_depth)
        if indices and (len(indices) == _BATCH or image.shape != images[0].shape):
            yield indices, torch.stack(images).to(model.image_paths.device)
            indices, images = [], []
        indices.append(index)
        images.append(image)
    if indices:
        yield indices, torch.stack(images).to(model.image_paths.device)


def score_images(
    model: SgfrModel,
    pre_processor: Any,  # noqa: ANN401
    paths: Sequence[str],
    split: Split,
    group: Group = None,
) -> CalibrationScores:
    """Calibration scores of images: good ones leave-one-group-out. A collective call.

    Args:
        model (SgfrModel): A fitted model.
        pre_processor (Any): Pre-processor of the model.
        paths (Sequence[str]): Image files.
        split (Split): What is known of them.
        group (Group): What names an image's group, see :func:`group_of`.

    Returns:
        CalibrationScores: The same in all processes, which share the work.
    """
    own = share(paths)
    leave_out = split != Split.DEFECTIVE
    with failing_together():
        scores, peaks = nominal_scores(model, pre_processor, own, leave_out=leave_out, group=group)
    return gather_scores(CalibrationScores.of(scores, split, own, peaks))


def rescore(
    earlier: CalibrationScores,
    model: SgfrModel,
    pre_processor: Any,  # noqa: ANN401
    group: Group = None,
) -> CalibrationScores:
    """Calibration scores of the same images from other memory banks. A collective call.

    Args:
        earlier (CalibrationScores): Scores from earlier banks.
        model (SgfrModel): A fitted model with the present banks.
        pre_processor (Any): Pre-processor of the model.
        group (Group): What names an image's group, see :func:`group_of`.

    Returns:
        CalibrationScores: In the same order. Images whose files are gone keep their earlier
        scores, which are then not ``current``.
    """
    there = earlier.subset([bool(path) and Path(path).is_file() for path in earlier.paths])
    anew: dict[str, Sequence[float]] = {}
    for split in Split:
        found = score_images(model, pre_processor, there.of_split(split).paths, split, group)
        anew |= {
            path: values
            for path, *values in zip(found.paths, found.scores, found.peaks, strict=True)
        }
    before = zip(earlier.paths, earlier.scores, earlier.peaks, strict=True)
    now = [anew.get(path, values) for path, *values in before]
    return earlier._replace(
        scores=tuple(score for score, _ in now),
        peaks=tuple(peak for _, peak in now),
        current=tuple(path in anew for path in earlier.paths),
    )


def gather_scores(scores: CalibrationScores) -> CalibrationScores:
    """Scores of all processes, the same in each; an image that several scored counts once."""
    first, *others = gathered(scores)
    for theirs in others:
        first = first.joined(theirs)
    return first


def select_evenly(paths: Sequence[str], most: int, group: Group = None) -> list[str]:
    """Images evenly spread over a list, from as many groups as there are.

    Args:
        paths (Sequence[str]): Image files.
        most (int): Largest number to select.
        group (Group): What names an image's group, see :func:`group_of`.

    Returns:
        list[str]: All of them, or ``most``: the first of each group before the second of any.
    """
    if len(paths) <= most:
        return list(paths)
    sizes: dict[str, int] = {}
    rounds: list[list[int]] = []  # indices of the first image of each group, the second ...
    for index, path in enumerate(paths):
        name = group_of(path, group)
        turn = sizes.get(name, 0)
        sizes[name] = turn + 1
        if turn == len(rounds):
            rounds.append([])
        rounds[turn].append(index)
    chosen: list[int] = []
    for indices in rounds:
        left = most - len(chosen)
        if len(indices) >= left:
            chosen += [indices[step * len(indices) // left] for step in range(left)]
            break
        chosen += indices
    return [paths[index] for index in sorted(chosen)]


def real_path(path: str) -> str:
    """File that a path leads to through links; empty for an empty path."""
    return os.path.realpath(path) if path else ""


def _match(path: str, group: str) -> re.Match[str] | None:
    return re.search(group, path.replace("\\", "/"))


def group_of(path: str, group: Group) -> str:
    """Name of the group of an image: images of one part are one group, as they are not independent.

    Args:
        path (str): Image file.
        group (Group): Regular expression, searched in the path with ``/`` between folders. What its
            groups match names the group, or all that it matches if it has none. Or a function from
            a path to the name.

    Returns:
        str: The name; the path itself without ``group``, or where it matches nothing.
    """
    if callable(group):
        return group(path)
    found = _match(path, group) if group else None
    if found is None:
        return path
    return "\0".join(part or "" for part in found.groups()) if found.re.groups else found[0]


def group_label(path: str, group: str) -> str:
    """Name of the group of an image to show: its product, camera ...

    Args:
        path (str): Image file.
        group (str): Regular expression, as in :func:`group_of`.

    Returns:
        str: What the groups of the expression match, or all that it matches; ``"(others)"`` where
        it matches nothing.
    """
    found = _match(path, group)
    if found is None:
        return "(others)"
    return " ".join(part or "" for part in found.groups()) or found[0]


def require_group(group: str | None, paths: Sequence[str] = ()) -> None:
    """Refuse a group that is not a regular expression, or matches none of the images.

    Args:
        group (str | None): As in :func:`group_of`.
        paths (Sequence[str]): Image files, at least one of which it must match.

    Raises:
        ValueError: If it is not, or does not.
    """
    if group is None:
        return
    try:
        re.compile(group)
    except re.error as error:
        msg = f"group '{group}' is not a regular expression: {error}."
        raise ValueError(msg) from error
    if paths and not any(_match(path, group) for path in paths):
        msg = f"group '{group}' matches no image's path: one is '{paths[0]}'."
        raise ValueError(msg)
