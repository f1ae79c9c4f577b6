"""What a report says in sentences."""

import os
from collections.abc import Sequence
from pathlib import PurePath
from typing import NamedTuple

from anomalib_sgfr.report.contents import Digest
from anomalib_sgfr.report.fit_record import FitRecord
from anomalib_sgfr.report.statistics import Counts, interval

__all__ = [
    "Share",
    "caveats",
    "memory_of",
    "names_of",
    "of_all",
    "pictured_of",
    "product_of",
    "seconds_of",
    "shown",
    "verdict",
]

_PLAIN = {"data", "images", "img", "test"}  # names of folders
_FEW = 30  # images that a rate is hardly known from


def verdict(counts: Counts, threshold: float | None, left_out: int = 0, unreadable: int = 0) -> str:
    """What the run found in new images, at the threshold in force.

    Args:
        counts (Counts): Of new images.
        threshold (float | None): In force, if there is one.
        left_out (int): Images that chose the threshold or were trained on.
        unreadable (int): Images that could not be read.
    """
    if not (counts.good + counts.bad + counts.unknown + left_out):
        if unreadable:
            return (
                f"None of {unreadable} images could be read."
                if unreadable > 1
                else "The image could not be read."
            )
        return "No image was inspected."
    if threshold is None:
        return "There is no threshold, so nothing is called good or anomalous: choose one below."
    said = _found(counts)
    if said:
        return f"At the threshold in force, {said}."
    return (
        "All images tested chose the threshold or were trained on: how the model does on new ones"
        " is not shown."
    )


def of_all(counts: Counts, left_out: int) -> str:
    """What the run found in all images, those that are not new among them; empty if all are new.

    Args:
        counts (Counts): Of all images.
        left_out (int): Those of them that chose the threshold or were trained on.
    """
    found = _found(counts)
    if not (left_out and found):
        return ""
    return (
        f"Of all images, {left_out} that chose the threshold or were trained on included: {found}."
    )


def _found(counts: Counts) -> str:
    said = []
    if counts.good:
        said.append(
            f"{counts.alarms} of {counts.good} good images {_is(counts.alarms)} called anomalous"
        )
    if counts.bad:
        said.append(f"{counts.missed} of {counts.bad} defective images {_is(counts.missed)} missed")
    if counts.unknown:
        of = "images" if not (counts.good or counts.bad) else "images whose truth is not known"
        said.append(
            f"{counts.called} of {counts.unknown} {of} {_is(counts.called)} called anomalous"
        )
    return ", and ".join(said)


def _is(number: int) -> str:
    return "is" if number == 1 else "are"


def caveats(digest: Digest, counts: Counts, pictured: int) -> list[str]:
    """What has to be known before the page is relied on.

    Args:
        digest (Digest): What the page shows.
        counts (Counts): Of new images.
        pictured (int): Images with pictures.
    """
    said = [f"{digest.warning}."] if digest.warning else []
    if digest.unreadable:
        number = len(digest.unreadable) + len(digest.units)
        said.append(f"{len(digest.unreadable)} of {number} images could not be read, see below.")
    said += _not_new(digest)
    if not digest.units:
        return said + list(digest.notes)
    any_good, any_bad = (
        any(unit.scored.truth == truth for unit in digest.units) for truth in (0, 1)
    )
    new = "new " if not all(unit.is_new for unit in digest.units) else ""
    if any_good and not any_bad:
        said.append("No defect was tested: that defects are found is not shown.")
    elif any_bad and not counts.bad:
        said.append("No new defect was tested: that new ones are found is not shown.")
    if (any_bad or any_good) and not counts.good:
        said.append(f"No {new}good image was tested: how many would be false alarms is not shown.")
    if not (any_good or any_bad):
        said.append(
            "The truth of the images is not known here, so there are no rates of false alarms and"
            " of misses."
        )
    few = [
        name
        for name, number in (("good", counts.good), ("defective", counts.bad))
        if 0 < number < _FEW
    ]
    if few:
        said.append(
            f"Few {new}{' and '.join(few)} images were tested: read the intervals, not the rates."
        )
    if counts.good or counts.bad:
        said.append(
            "The intervals take each image for an independent one; pictures of one part are not."
        )
    if pictured < len(digest.units):
        said.append(
            f"The pictures of {len(digest.units) - pictured} images are left out; their scores are"
            " all here."
        )
    return said + list(digest.notes)


def _not_new(digest: Digest) -> list[str]:
    """Sentences about images that the model or the threshold was made with."""
    chose, trained = (
        sum(getattr(unit, name) for unit in digest.units) for name in ("chose", "trained_on")
    )
    said = []
    if chose:
        said.append(
            f"{chose} of the {len(digest.units)} images tested also chose the threshold, and"
            f" {_are_left_out(chose)}: on new images expect more mistakes than on these."
        )
    if trained:
        said.append(
            f"{trained} of the {len(digest.units)} images tested"
            f" {'was' if trained == 1 else 'were'} trained on, and {_are_left_out(trained)}: they"
            " score lower than new ones."
        )
    if digest.by_name:
        said.append(
            f"{digest.by_name} of these are told by their names, in a folder of the same name: the"
            " files that the checkpoint names are gone."
        )
    return said


def _are_left_out(number: int) -> str:
    return f"{_is(number)} left out of the rates above"


def seconds_of(seconds: float) -> str:
    """A time, in words."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"  # noqa: PLR2004


def memory_of(fit: FitRecord) -> str:
    """Of machine and card, in words."""
    held = f"{fit.memory / 2**30:.1f} GiB" if fit.memory else "not known"
    card = f", {fit.card_memory / 2**30:.1f} GiB of the card" if fit.card_memory else ""
    return f"{held}{card} ({fit.device})"


def shown(path: str) -> str:
    """A path as it can be shown: bytes of no encoding and control characters by their numbers."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return "".join(
        sign if sign.isprintable() else sign.encode("unicode_escape").decode("ascii")
        for sign in text
    )


class Share(NamedTuple):
    """A share of images, in words.

    Attributes:
        number (int): Of images.
        rate (str): The share.
        said (str): How many of them, and the interval.
        cell (str): All of it, for a table.
    """

    number: int
    rate: str
    said: str
    cell: str

    @classmethod
    def of(cls, hits: int, number: int) -> "Share":
        """With its interval."""
        low, high = (f"{100 * part:.1f}%" for part in interval(hits, number))
        rate = f"{100 * hits / number:.1f}%" if number else "-"
        said = f"{hits} of {number}, 95% interval {low} to {high}"
        return cls(number, rate, said, f"{hits}, {rate} ({low} to {high})")


def product_of(folder: str) -> str:
    """Name of the first folder upwards that says more than that it holds images."""
    own = next(
        (part for part in reversed(PurePath(folder).parts) if part.lower() not in _PLAIN), ""
    )
    return f"{own}: " if own.strip("/\\") else ""


def names_of(paths: Sequence[str]) -> tuple[str, list[str]]:
    """The folder that all are in, and what is left of each path."""
    folders = {str(PurePath(path).parent) for path in paths if path}
    try:
        common = os.path.commonpath(folders) if folders else ""
    except ValueError:  # absolute and relative ones
        common = ""
    left = [str(PurePath(path).relative_to(common)) if common and path else path for path in paths]
    return shown(common), [shown(name) or f"image {number}" for number, name in enumerate(left, 1)]


def pictured_of(pictured: int, number: int) -> str:
    """How many images are shown with pictures."""
    if pictured == number:
        return f"All {number} images." if number != 1 else "The one image."
    return (
        f"{pictured} of {number} images are shown with pictures: mistakes, those nearest the"
        f" threshold and the highest scores; the pictures of {number - pictured} are left out,"
        " their scores are not."
    )
