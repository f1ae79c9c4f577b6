"""Calibration scores of images, and the state of the threshold that they give."""

import math
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from enum import IntEnum
from functools import reduce
from itertools import compress, groupby
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from anomalib_sgfr.console import progress
from anomalib_sgfr.core.processes import failing_together, gathered, share
from anomalib_sgfr.images.pre_processor import read_prepared
from anomalib_sgfr.memory_bank import MemoryBank
from anomalib_sgfr.post_processing.thresholds import (
    combined_threshold,
    conformal_threshold,
    describe_rate,
    f1_threshold,
    few_groups_warning,
    with_margin,
)
from anomalib_sgfr.torch_model import SgfrModel

__all__ = [
    "DEFAULT_RATE",
    "STATE_KEY",
    "CalibrationScores",
    "Group",
    "NominalScores",
    "Split",
    "ThresholdState",
    "gather_scores",
    "group_label",
    "group_of",
    "leave_one_out",
    "nominal_scores",
    "real_path",
    "remove_threshold",
    "require_group",
    "rescore",
    "score_images",
    "select_evenly",
    "upgrade_checkpoint",
]

# What names the group of an image: a regular expression on its path, or a function of it.
Group: TypeAlias = str | Callable[[str], str] | None
_Source: TypeAlias = Literal["none", "good", "labels", "hand", "unknown"]

DEFAULT_RATE = 0.01
STATE_KEY = "threshold"  # of the state in the post-processor's configuration
_CONFIG_KEY = "anomalib_post_processor_config"  # of that in a checkpoint
_BATCH = 16
# least validation images of each kind whose masks set the pixel threshold, as for a sign test
_LEAST_LABELLED = 5


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
        peaks (tuple[float, ...]): Largest value of each raw map; other layers may contribute to it
            than to the score.
        current (tuple[bool, ...]): Whether the present memory banks gave the score.
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
        """Name of each image's group; one of its own where the file is not known."""
        return [
            group_of(path, group) if path else f"\0{number}"
            for number, path in enumerate(self.paths)
        ]


class NominalScores(NamedTuple):
    """Raw scores of images, and the largest values of their raw maps."""

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
    """Leave-one-group-out scores of images: each without the atoms of its group.

    Where no other atoms would be left, the largest score of three mirror images is taken.

    Args:
        model (SgfrModel): A fitted model.
        pre_processor (Any): Its pre-processor.
        paths (Sequence[str]): Image files.
        leave_out (bool): Whether to leave out the group's atoms.
        group (Group): What names an image's group, see :func:`group_of`.

    Returns:
        NominalScores: In the order of ``paths``.
    """
    if not paths:
        return NominalScores([], [])

    def measure(
        embeddings: list[Tensor], size: Sequence[int], banks: list[MemoryBank] | None
    ) -> Tensor:
        result = model.score_embeddings(embeddings, size, banks)
        return torch.stack((result.pred_score, result.anomaly_map.amax(dim=(1, 2, 3))))

    found = leave_one_out(model, pre_processor, paths, measure, leave_out=leave_out, group=group)
    return NominalScores(*found.tolist())


@torch.no_grad()
def leave_one_out(
    model: SgfrModel,
    pre_processor: Any,  # noqa: ANN401
    paths: Sequence[str],
    measure: Callable[[list[Tensor], Sequence[int], list[MemoryBank] | None], Tensor],
    *,
    leave_out: bool = True,
    group: Group = None,
) -> Tensor:
    """Measurements of images, each without the atoms of its group.

    Where no other atoms would be left, the largest value of three mirror images is taken.

    Args:
        model (SgfrModel): A fitted model.
        pre_processor (Any): Its pre-processor.
        paths (Sequence[str]): Image files, at least one.
        measure (Callable): From embeddings of ``B`` images, as
            :meth:`~anomalib_sgfr.torch_model.SgfrModel.embed` gives them, height and width, and
            memory banks (``None`` for the model's) to values of shape ``(n, B)``.
        leave_out (bool): Whether to leave out the group's atoms.
        group (Group): What names an image's group, see :func:`group_of`.

    Returns:
        Tensor: Shape ``(n, N)``, ``float32``, in the order of ``paths``.
    """
    numbers_of: dict[str, list[int]] = {}  # numbers of the training images of each group
    for number, image in enumerate(model.images if leave_out else ()):
        numbers_of.setdefault(group_of(image, group), []).append(number)
    groups = [group_of(path, group) for path in paths]
    # images of one training group follow each other, as they share what is left of the banks
    order = sorted(
        range(len(paths)), key=lambda index: (groups[index] in numbers_of, groups[index], index)
    )
    values: list[Tensor] = []
    indices_of: list[int] = []
    for batch, images in _batches(order, paths, pre_processor, model):
        embeddings, size = model.embed(images), images.shape[-2:]
        for left_out, rows_and_indices in groupby(
            enumerate(batch), lambda item: numbers_of.get(groups[item[1]], [])
        ):
            rows, indices = map(list, zip(*rows_and_indices, strict=True))
            banks = model.banks_without(left_out)
            if banks is not None:
                found = measure([scale[rows] for scale in embeddings], size, banks)
            else:
                ways = [images[rows].flip(axes) for axes in ((-1,), (-2,), (-2, -1))]
                found = torch.stack([measure(model.embed(way), size, None) for way in ways]).amax(0)
            values.append(found.cpu().float())
            indices_of += indices
    return torch.cat(values, 1)[:, torch.tensor(indices_of).argsort()]


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
        pre_processor (Any): Its pre-processor.
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
        pre_processor (Any): Its pre-processor.
        group (Group): What names an image's group, see :func:`group_of`.

    Returns:
        CalibrationScores: In the same order. Images whose files are gone keep earlier scores, which
        are then not ``current``.
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
    return reduce(CalibrationScores.joined, gathered(scores))


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
    sizes: Counter[str] = Counter()
    rounds = defaultdict[int, list[int]](list)  # the first image of each group, the second ...
    for index, path in enumerate(paths):
        name = group_of(path, group)
        rounds[sizes[name]].append(index)
        sizes[name] += 1
    chosen: list[int] = []
    for indices in rounds.values():
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
        group (Group): Regular expression, searched in the path with ``/`` between folders: its
            groups, or the whole match, are the name. Or a function from a path to the name.

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
    """Name of the group of an image to show, as in :func:`group_of`; ``"(others)"`` without one."""
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


class ThresholdState(NamedTuple):
    """State of a model's threshold, which :meth:`calibrated` sets from the scores and requests.

    Checkpoints store the fields under their names, and pickles in their order.

    Attributes:
        scores (CalibrationScores): Calibration scores.
        false_alarm_rate (float | None): Requested share of good images that may be labelled
            anomalous; then only good images set the threshold. ``None`` for no request.
        value (float | None): Threshold of the raw score that was set by hand.
        read_from (tuple[str, ...]): Images from whose scores that value was read.
        forced (tuple[str, ...]): Images that ``--force`` of a command took for good.
        group (str | None): Regular expression that names an image's group, see :func:`group_of`.
        masks (float | None): Threshold of the raw map with the largest F1 score on the masks of
            validation images; used where there are enough labelled images.
        image (float): Threshold of the raw score; NaN for none.
        pixel (float): Threshold of the raw map.
        peak (float): Threshold of the raw map's largest value that as many good images exceed as
            exceed ``image``.
        by (str): What set it: ``"none"``, ``"good"`` images, ``"labels"``, the user by ``"hand"``,
            or ``"unknown"`` scores that are not kept.
        power (float): Exponent of :func:`~anomalib_sgfr.post_processing.thresholds.normalise`; 1
            for a checkpoint of version 0.2.
        linear (bool): Whether scores are normalised as anomalib does: for a checkpoint of its own
            post-processor.
    """

    scores: CalibrationScores = CalibrationScores()
    false_alarm_rate: float | None = None
    value: float | None = None
    read_from: tuple[str, ...] = ()
    forced: tuple[str, ...] = ()
    group: str | None = None
    masks: float | None = None
    image: float = math.nan
    pixel: float = math.nan
    peak: float = math.nan
    by: _Source = "none"
    power: float = 2.0
    linear: bool = False

    @property
    def rate(self) -> float:
        """False-alarm rate at which good images set the threshold: the requested one, or 1%."""
        return DEFAULT_RATE if self.false_alarm_rate is None else self.false_alarm_rate

    @property
    def is_set(self) -> bool:
        """Whether there is a threshold."""
        return not math.isnan(self.image)

    @property
    def uses_validation(self) -> bool:
        """Whether validation images may set it: neither a rate nor a value was requested."""
        return self.false_alarm_rate is None and self.value is None

    @property
    def independent_images(self) -> int:
        """Number of groups of good images."""
        return len(set(self.scores.good.groups(self.group)))

    @property
    def basis(self) -> str:
        """What the threshold is calibrated on, as a phrase."""
        if self.by == "none":
            return "nothing: there is none"
        if self.by == "unknown":
            return "scores that are not kept"
        if self.by == "hand":
            source = f", read from {len(self.read_from)} images" if self.read_from else ""
            return f"a value set by hand{source}"
        phrase = f"{len(self.scores.good.scores)} good"
        if self.by == "labels":
            phrase += f" and {len(self.scores.defective.scores)} defective images"
        else:
            number = self.independent_images
            phrase += (
                f" images ({number} independent) at a false-alarm rate of {100 * self.rate:g}%;"
                f" {describe_rate(number, self.rate)}"
            )
        outdated = self.scores.current.count(False)
        if outdated:
            phrase += f"; {outdated} of them could not be scored again after the banks changed"
        if self.forced:
            phrase += f"; {len(self.forced)} of them were taken for good by --force"
        return phrase

    @property
    def threshold_images(self) -> tuple[str, ...]:
        """Files of the images that set the threshold: error rates on them are optimistic."""
        if self.by == "hand":
            return self.read_from
        if self.by == "labels":
            return tuple(filter(None, self.scores.paths))
        return tuple(filter(None, self.scores.good.paths)) if self.by == "good" else ()

    @property
    def warning(self) -> str | None:
        """Warning of a threshold that too few good images support; ``None`` if they suffice."""
        return few_groups_warning(self.independent_images, self.rate) if self.by == "good" else None

    def calibrated(self) -> "ThresholdState":
        """State with the threshold that its scores and requests give; none without either."""
        good = self.scores.good
        if not good.scores:
            value = math.nan if self.value is None else self.value
            return self._with_thresholds(value, value, "none" if self.value is None else "hand")
        image, peak = self._conformal_thresholds()
        image, peak = with_margin(image, good.scores), with_margin(peak, good.peaks)
        chosen = image if self.value is None else self.value
        by: _Source = "good" if self.value is None else "hand"
        if self.uses_validation:
            held_out, bad = self.scores.of_split(Split.HELD_OUT), self.scores.defective
            chosen, by = combined_threshold(
                good=held_out.scores,
                bad=bad.scores,
                calibration=good.scores,
                rate=self.rate,
                groups=good.groups(self.group),
                good_groups=held_out.groups(self.group),
                bad_groups=bad.groups(self.group),
            )
            chosen = with_margin(chosen, good.scores)
        # by the same factor above the good images' peaks as above their scores
        chosen_peak = chosen * peak / image if image > 0.0 else max(chosen, peak)
        return self._with_thresholds(chosen, chosen_peak, by)

    def _conformal_thresholds(self) -> tuple[float, float]:
        """Thresholds of the good images' scores and peaks at the rate."""
        good, groups = self.scores.good, self.scores.good.groups(self.group)
        return (
            conformal_threshold(good.scores, self.rate, groups),
            conformal_threshold(good.peaks, self.rate, groups),
        )

    def _with_thresholds(self, image: float, peak: float, by: _Source) -> "ThresholdState":
        """State with thresholds in the precision that scores are compared in."""
        held_out, bad = self.scores.of_split(Split.HELD_OUT), self.scores.defective
        enough = min(len(held_out.scores), len(bad.scores)) >= _LEAST_LABELLED
        from_masks = self.uses_validation and enough and self.masks is not None
        pixel = self.masks if from_masks else peak
        image, pixel, peak = (float(np.float32(each)) for each in (image, pixel, peak))
        return self._replace(image=image, pixel=pixel, peak=peak, by=by, linear=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain data by field, to store in a checkpoint."""
        lists = {"read_from": list(self.read_from), "forced": list(self.forced)}
        return {**self._asdict(), "scores": self.scores.to_dict(), **lists}

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> "ThresholdState":
        """Inverse of :meth:`to_dict`."""
        known = {name: value for name, value in stored.items() if name in cls._fields}
        lists = {name: tuple(known.get(name, ())) for name in ("read_from", "forced")}
        return cls(**{**known, "scores": CalibrationScores.from_dict(known.get("scores")), **lists})

    @classmethod
    def from_earlier_version(
        cls, config: Mapping[str, Any], image: float, pixel: float
    ) -> "ThresholdState":
        """State from the configuration of an earlier version, or of anomalib's post-processor."""
        state = cls(
            scores=CalibrationScores.from_dict(config.get("evidence")),
            false_alarm_rate=config.get("false_alarm_rate"),
            value=config.get("value"),
            group=config.get("group"),
            power=config.get("power", 1.0),  # of version 0.2
            linear=config.get("linear", "false_alarm_rate" not in config),
        )
        return state.with_stored_thresholds(image, pixel)

    def with_stored_thresholds(self, image: float, pixel: float) -> "ThresholdState":
        """State with stored thresholds, which its scores need not give; NaN for none."""
        if math.isnan(image):
            return self._replace(image=image, pixel=pixel, peak=pixel, by="none")
        by: _Source = "hand" if self.value is not None else "unknown"
        peak = pixel
        if self.scores.good.scores:
            own_image, own_peak = self._conformal_thresholds()  # version 0.2 had no margin
            peak = image * own_peak / own_image if own_image > 0.0 else image
            if self.value is None and math.isclose(image, own_image, rel_tol=1e-6):
                by = "good"
            elif self.value is None and self._is_f1_threshold(image):
                by = "labels"
        masks = None if math.isclose(pixel, peak, rel_tol=1e-6) else pixel
        return self._replace(image=image, pixel=pixel, peak=peak, by=by, masks=masks)

    def _is_f1_threshold(self, image: float) -> bool:
        """Whether version 0.2 set a threshold from labelled images."""
        good, bad = self.scores.of_split(Split.HELD_OUT).scores, self.scores.defective.scores
        return bool(good and bad) and math.isclose(image, f1_threshold(good, bad), rel_tol=1e-6)


def upgrade_checkpoint(checkpoint: dict[str, Any]) -> None:
    """Add the state to a checkpoint of an earlier version or of anomalib's own post-processor.

    Args:
        checkpoint (dict[str, Any]): As Lightning read it; changed in place.
    """
    config, tensors = checkpoint.get(_CONFIG_KEY), checkpoint.get("state_dict", {})
    if not config or STATE_KEY in config:
        return
    image, pixel = (
        float(tensors.get(f"post_processor._{which}_threshold", math.nan))
        for which in ("image", "pixel")
    )
    state = ThresholdState.from_earlier_version(config, image, pixel)
    checkpoint[_CONFIG_KEY] = {**config, STATE_KEY: state.to_dict()}


def remove_threshold(checkpoint: dict[str, Any]) -> None:
    """Remove the threshold and its calibration scores from a checkpoint that was read.

    Args:
        checkpoint (dict[str, Any]): As :func:`upgrade_checkpoint` leaves it; changed in place.
    """
    config = checkpoint.get(_CONFIG_KEY)
    if config:
        stored = ThresholdState.from_dict(config[STATE_KEY])
        requests = stored._replace(scores=CalibrationScores(), value=None, read_from=(), masks=None)
        checkpoint[_CONFIG_KEY] = {**config, STATE_KEY: requests.calibrated().to_dict()}
