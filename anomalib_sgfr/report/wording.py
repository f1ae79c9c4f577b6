"""Sentences and texts of a report."""

import os
import shlex
from collections.abc import Sequence
from pathlib import PurePath
from typing import NamedTuple

from anomalib_sgfr.report.contents import ReportContents, WatchedStream
from anomalib_sgfr.report.fit_record import FitRecord
from anomalib_sgfr.report.statistics import Counts, interval

__all__ = [
    "Share",
    "caveats",
    "change_commands",
    "duration_text",
    "images_shown",
    "layer_summary",
    "memory_text",
    "printable",
    "product_name",
    "relative_names",
    "stream_summary",
    "summary",
    "summary_of_all",
]

_GENERIC_FOLDERS = {"data", "images", "img", "test"}
_FEW = 30  # images; rates of fewer are uncertain


def summary(counts: Counts, threshold: float | None, left_out: int = 0, unreadable: int = 0) -> str:
    """Image-level result for new images at the current threshold.

    Args:
        counts (Counts): Counts of new images.
        threshold (float | None): Current threshold, if there is one.
        left_out (int): Number of images that chose the threshold or were trained on.
        unreadable (int): Number of images that could not be read.

    Returns:
        str: A sentence.
    """
    if not (counts.good + counts.defective + counts.unlabelled + left_out):
        if unreadable > 1:
            return f"None of {unreadable} images could be read."
        return "The image could not be read." if unreadable else "No image was inspected."
    if threshold is None:
        return "There is no threshold, so no image is called good or anomalous: choose one below."
    results = _results(counts)
    if results:
        return f"At the current threshold, {results}."
    return (
        "All images tested chose the threshold or were trained on, so the results on new images"
        " are unknown."
    )


def stream_summary(stream: WatchedStream) -> str:
    """What a monitor has found of a stream.

    Args:
        stream (WatchedStream): The stream.

    Returns:
        str: Two sentences at most.
    """
    if stream.changed_at is None:
        latest = stream.evidence[-1] if stream.evidence else 1.0
        return (
            f"Conditions have not changed in {stream.images} images, as far as scores show it: the"
            f" evidence is {latest:.3g}, the alarm comes at {stream.limit:.4g}."
        )
    return (
        f"Conditions have changed: scores are {stream.direction} than those of the calibration"
        f" images. The alarm came after {stream.changed_at} of {stream.images} images; the change"
        f" began about image {(stream.start or 0) + 1}."
    )


def layer_summary(stream: WatchedStream) -> str:
    """Which scale has changed most, and where; empty if that is not known."""
    if not stream.layers:
        return ""
    most = max(stream.layers, key=lambda layer: abs(layer.deviations))
    percent = 100.0 * (most.after / most.before - 1.0) if most.before else 0.0
    said = (
        f"The residuals of {most.layers} (stride {most.stride}) have changed most: by"
        f" {percent:+.0f}%, {abs(most.deviations):.1f} standard deviations of the images before."
    )
    if stream.maps is not None:
        across, down = (min(2, int(3 * share)) for share in stream.maps.peak)
        rows, columns = ("top", "middle", "bottom"), ("left", "centre", "right")
        said += f" The anomaly map has changed most at the {rows[down]} {columns[across]}."
    return said


def change_commands(stream: WatchedStream, checkpoint: str) -> list[tuple[str, str]]:
    """What to do about a change: when, and the command.

    Args:
        stream (WatchedStream): A stream that has changed.
        checkpoint (str): Path of the checkpoint; empty if unknown.

    Returns:
        list[tuple[str, str]]: Explanation and command of each way, for printing.
    """
    path = PurePath(checkpoint or "CKPT")
    ckpt, adapted = (
        printable(shlex.quote(str(file))) for file in (path, path.with_stem(f"{path.stem}_adapted"))
    )
    paths = [file for file in stream.new_images if printable(file) == file]
    images = shlex.join(paths) if paths else "GOOD_IMAGES"
    lasting = "Light, camera, focus or position has changed, and will stay so: adapt the model."
    level = "Only the level of the scores has moved: calibrate the threshold on good images of now."
    many = "The threshold stays. If there are a hundred further good images of now, calibrate it."
    again = "Then watch with the new checkpoint, with a new table and monitor."
    return [
        (lasting, f"anomalib-sgfr adapt {ckpt} {images}"),
        (many, f"anomalib-sgfr threshold {adapted} --held_out GOOD_FOLDER"),
        ("Some parts are new, but good: accept them.", f"anomalib-sgfr accept {ckpt} {images}"),
        (level, f"anomalib-sgfr threshold {ckpt} --held_out GOOD_FOLDER"),
        (again, "anomalib-sgfr watch NEW_CKPT FOLDER --out new.csv"),
    ]


def summary_of_all(counts: Counts, left_out: int) -> str:
    """Image-level result for all images; empty if all are new.

    Args:
        counts (Counts): Counts of all images.
        left_out (int): Number of images that chose the threshold or were trained on.

    Returns:
        str: A sentence.
    """
    results = _results(counts)
    if not (left_out and results):
        return ""
    return (
        f"All images, including {left_out} that chose the threshold or were trained on: {results}."
    )


def _results(counts: Counts) -> str:
    labelled = counts.good or counts.defective
    kinds = ("good images", "defective images", f"{'unlabelled ' if labelled else ''}images")
    results = ("called anomalous", "missed", "called anomalous")
    return ", and ".join(
        f"{hits} of {number} {kind} {_is(hits)} {result}"
        for (hits, number), kind, result in zip(counts.rates, kinds, results, strict=True)
        if number
    )


def _is(number: int) -> str:
    return "is" if number == 1 else "are"


def caveats(contents: ReportContents, counts: Counts, with_media: int) -> list[str]:
    """Sentences to read before relying on the report.

    Args:
        contents (ReportContents): The report.
        counts (Counts): Counts of new images.
        with_media (int): Number of images that the page shows.

    Returns:
        list[str]: The sentences.
    """
    images, unreadable = contents.images, len(contents.unreadable)
    said = [f"{contents.warning}."] if contents.warning else []
    if unreadable:
        said.append(f"{unreadable} of {unreadable + len(images)} images could not be read.")
    said += _about_known_images(contents)
    if not images:
        return said + list(contents.notes)
    truths = {image.result.truth for image in images}
    new = "" if all(image.is_new for image in images) else "new "
    if 0 in truths and 1 not in truths:
        said.append("No defect was tested, so the rate of missed defects is unknown.")
    elif 1 in truths and not counts.defective:
        said.append("No new defect was tested, so the rate of missed new defects is unknown.")
    if truths & {0, 1} and not counts.good:
        said.append(f"No {new}good image was tested, so the rate of false alarms is unknown.")
    if not truths & {0, 1}:
        said.append(
            "The images have no labels, so the rates of false alarms and misses are unknown."
        )
    tested = (("good", counts.good), ("defective", counts.defective))
    few = [name for name, number in tested if 0 < number < _FEW]
    if few:
        said.append(
            f"Few {new}{' and '.join(few)} images were tested: rely on the intervals, not on the"
            " rates."
        )
    if counts.good or counts.defective:
        said.append(
            "The intervals assume independent images; several images of one part are not"
            " independent."
        )
    if with_media < len(images):
        said.append(
            f"The page leaves out {len(images) - with_media} images, but includes their scores."
        )
    return said + list(contents.notes)


def _about_known_images(contents: ReportContents) -> list[str]:
    """Sentences about images that the model or the threshold depends on."""
    number = len(contents.images)
    chose = sum(image.chose_threshold for image in contents.images)
    trained = sum(image.trained_on for image in contents.images)
    said = []
    if chose:
        said.append(
            f"{chose} of the {number} images tested also chose the threshold, and {_is(chose)}"
            " left out of the rates above: expect more mistakes on new images."
        )
    if trained:
        said.append(
            f"{trained} of the {number} images tested {'was' if trained == 1 else 'were'} trained"
            f" on, and {_is(trained)} left out of the rates above: they score lower than new"
            " images."
        )
    if contents.known_by_name:
        said.append(
            f"{contents.known_by_name} of these are known only by their name and folder, because"
            " the files that the checkpoint names are gone."
        )
    return said


def duration_text(seconds: float) -> str:
    """Duration in seconds or minutes."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"  # noqa: PLR2004


def memory_text(fit: FitRecord) -> str:
    """Peak memory of a fit, in main memory and on the GPU."""
    held = f"{fit.memory / 2**30:.1f} GiB" if fit.memory else "not known"
    on_gpu = f", {fit.card_memory / 2**30:.1f} GiB of the GPU" if fit.card_memory else ""
    return f"{held}{on_gpu} ({fit.device})"


def printable(path: str) -> str:
    """Path in which undecodable bytes and control characters are escaped."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return "".join(
        sign if sign.isprintable() else sign.encode("unicode_escape").decode("ascii")
        for sign in text
    )


class Share(NamedTuple):
    """Share of images, as texts.

    Attributes:
        rate (str): Rate in percent.
        text (str): Count and interval.
        cell (str): Count, rate and interval, for a table.
    """

    rate: str
    text: str
    cell: str

    @classmethod
    def of(cls, hits: int, number: int) -> "Share":
        """Share of ``hits`` among ``number`` images."""
        low, high = (f"{100 * part:.1f}%" for part in interval(hits, number))
        rate = f"{100 * hits / number:.1f}%" if number else "-"
        text = f"{hits} of {number}, 95% interval {low} to {high}"
        return cls(rate, text, f"{hits}, {rate} ({low} to {high})")


def product_name(folder: str) -> str:
    """Innermost part of a path that is no generic name such as ``images``, with a colon."""
    parts = reversed(PurePath(folder).parts)
    own = next((part for part in parts if part.lower() not in _GENERIC_FOLDERS), "")
    return f"{own}: " if own.strip("/\\") else ""


def relative_names(paths: Sequence[str]) -> tuple[str, list[str]]:
    """Common folder of paths, and each path relative to it, both printable."""
    folders = {str(PurePath(path).parent) for path in paths if path}
    try:
        common = os.path.commonpath(folders) if folders else ""
    except ValueError:  # absolute and relative paths
        common = ""
    names = [str(PurePath(path).relative_to(common)) if common and path else path for path in paths]
    return printable(common), [
        printable(name) or f"image {number}" for number, name in enumerate(names, 1)
    ]


def images_shown(with_media: int, number: int) -> str:
    """Sentence on which images the page shows."""
    if with_media == number:
        return f"All {number} images." if number != 1 else "The one image."
    return (
        f"The page shows {with_media} of {number} images: mistakes, those nearest the threshold,"
        " and those with the highest scores. It lists the scores of all."
    )
