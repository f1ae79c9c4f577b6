"""Calibration scores: raw scores of images that are known to be good or defective, and which part
each shows.
"""

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import IntEnum
from itertools import compress
from typing import Any, NamedTuple, TypeAlias

from anomalib_sgfr.core.processes import gathered
from anomalib_sgfr.post_processing.thresholds import supported_rate, units_needed

__all__ = [
    "CalibrationScores",
    "Group",
    "Split",
    "file_of",
    "in_all_processes",
    "named",
    "require_group",
    "unit_of",
]


Group: TypeAlias = str | Callable[[str], str] | None


class Split(IntEnum):
    """What is known of an image."""

    TRAINING = 0  # good; scored without the atoms of its own unit
    HELD_OUT = 1  # good, not trained on
    DEFECTIVE = 2


def file_of(path: str) -> str:
    """The file that a path leads to, so that two paths of one file compare equal; empty for no
    path.
    """
    return os.path.realpath(path) if path else ""


class CalibrationScores(NamedTuple):
    """Calibration scores: raw scores of images that are known to be good or defective.

    Attributes:
        scores (tuple[float, ...]): In units of the raw anomaly map.
        kinds (tuple[int, ...]): A :class:`Split` for each.
        paths (tuple[str, ...]): File of each; empty where it is not known.
        peaks (tuple[float, ...]): Largest value of each one's raw anomaly map, which other layers
            than the score's may contribute to.
        current (tuple[bool, ...]): Whether the score is of the present banks: not where an update
            could not score an image again.
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
        kind: Split,
        paths: Iterable[str],
        peaks: Iterable[float] | None = None,
    ) -> "CalibrationScores":
        """Scores of images of one kind; without peaks, those of a map of the same layers as the
        score.
        """
        values, files = tuple(scores), tuple(paths)
        largest = values if peaks is None else tuple(peaks)
        return cls(values, (int(kind),) * len(values), files, largest, (True,) * len(values))

    @classmethod
    def restored(cls, stored: Any) -> "CalibrationScores":  # noqa: ANN401
        """From what :meth:`plain` gave, or an earlier version, whose score was the map's peak; else
        empty.
        """
        if not isinstance(stored, Mapping):
            return cls()
        scores = stored.get("scores", ())
        stored = {"peaks": scores, "current": (True,) * len(scores), **stored}
        return cls(*(tuple(stored.get(name, ())) for name in cls._fields))

    def plain(self) -> dict[str, list[Any]]:
        """Lists, to store."""
        return {name: list(values) for name, values in zip(self._fields, self, strict=True)}

    def joined(self, other: "CalibrationScores") -> "CalibrationScores":
        """With the scores of another; of an image that both hold, the other's counts."""
        kept = self.excluding(other.paths)
        return CalibrationScores(*(ours + theirs for ours, theirs in zip(kept, other, strict=True)))  # type: ignore[arg-type]

    def excluding(self, paths: Iterable[str]) -> "CalibrationScores":
        """Without the images of some files, by whatever path."""
        files = {file_of(path) for path in paths if path}
        return self.subset([file_of(path) not in files for path in self.paths])

    def subset(self, chosen: Sequence[bool]) -> "CalibrationScores":
        """Of some of the images, one flag each."""
        return CalibrationScores(*(tuple(compress(values, chosen)) for values in self))  # type: ignore[arg-type]

    @property
    def good(self) -> "CalibrationScores":
        """Of the images that are known to be good."""
        return self.subset([kind != Split.DEFECTIVE for kind in self.kinds])

    def of_kind(self, kind: Split) -> "CalibrationScores":
        """Of the images of one kind."""
        return self.subset([each == kind for each in self.kinds])

    @property
    def defective(self) -> "CalibrationScores":
        """Of the images that are known to be defective."""
        return self.of_kind(Split.DEFECTIVE)

    def units(self, group: str | None) -> list[str]:
        """Name of the unit that each image is of, see :func:`unit_of`."""
        return [
            unit_of(path, group) if path else f"\0{number}"
            for number, path in enumerate(self.paths)
        ]

    def said(self, group: str | None, rate: float) -> str:
        """How sure a rate of false alarms is that is calibrated on the good ones."""
        units, needed = len(set(self.good.units(group))), units_needed(rate)
        said = (
            f"{len(self.good.scores)} good images ({units} independent) at a false-alarm rate of"
            f" {100 * rate:g}%; the true rate may be up to {100 * supported_rate(units):.2g}% at"
            " 95% confidence"
        )
        return said if units >= needed else f"{said}, {100 * rate:g}% needs {needed}"


def unit_of(path: str, group: Group) -> str:
    """Name of the unit that an image is of: pictures of one part are one unit.

    Args:
        path (str): The image file.
        group (Group): Regular expression, searched in the path with ``/`` between folders. What its
            groups match, or all of it if it has none, names the unit. Or what gives the name of a
            path.

    Returns:
        str: The name; the path itself without a ``group``, or where that matches nothing.
    """
    if callable(group):
        return group(path)
    found = re.search(group, path.replace("\\", "/")) if group else None
    if found is None:
        return path
    return "\0".join(part or "" for part in found.groups()) if found.re.groups else found[0]


def named(path: str, group: str) -> str:
    """Name of the product, camera ... that an image is of, to show.

    Args:
        path (str): The image file.
        group (str): As in :func:`unit_of`.

    Returns:
        str: What the groups of the expression match, or all that it matches; ``"(others)"`` where
            it matches nothing.
    """
    found = re.search(group, path.replace("\\", "/"))
    if found is None:
        return "(others)"
    return " ".join(part or "" for part in found.groups()) or found[0]


def require_group(group: str | None, paths: Sequence[str] = ()) -> None:
    """Refuse what is no regular expression, or tells none of the images apart.

    Args:
        group (str | None): As in :func:`unit_of`.
        paths (Sequence[str]): Images, of which it must match one at least.

    Raises:
        ValueError: If it does not.
    """
    if group is None:
        return
    try:
        re.compile(group)
    except re.error as error:
        msg = f"group '{group}' is not a regular expression: {error}."
        raise ValueError(msg) from error
    if paths and not any(re.search(group, path.replace("\\", "/")) for path in paths):
        msg = f"group '{group}' matches no image's path: one is '{paths[0]}'."
        raise ValueError(msg)


def in_all_processes(calibration_scores: CalibrationScores) -> CalibrationScores:
    """What all processes of a run know, the same in each; an image that several know counts once."""
    first, *others = gathered(calibration_scores)
    for theirs in others:
        first = first.joined(theirs)
    return first
