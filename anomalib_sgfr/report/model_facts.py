"""Facts of a fitted model for a report, and which images of a run its checkpoint knows."""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from anomalib_sgfr.post_processing.calibration import (
    CalibrationScores,
    Split,
    nominal_scores,
    real_path,
    select_evenly,
)
from anomalib_sgfr.post_processing.post_processor import SgfrPostProcessor
from anomalib_sgfr.report.crops import TrainingCrops
from anomalib_sgfr.report.fit_record import FitRecord, versions
from anomalib_sgfr.report.media import webp
from anomalib_sgfr.torch_model import SgfrModel

__all__ = ["ModelFacts", "ScaleFacts", "SuspectedImage", "facts_of", "known_images", "sha256_of"]

_SUSPECTED = 6  # images to show
_INSPECTED = 60  # training images to score without their own atoms
_SIDE = 160  # pixels of such an image
_BINS = 30
_NAMES = 2  # folder names that have to agree where a folder was moved
_NOT_SHOWN = {"pre_processor", "post_processor", "evaluator", "visualizer"}


class ScaleFacts(NamedTuple):
    """Memory bank of a scale, and its certificate.

    Attributes:
        layers (str): Layers of its features.
        stride (int): Pixels from one patch to the next.
        contributes_to (str): Anomaly map, image score or both.
        atoms (int): Number of atoms.
        width (int): Number of features of an atom.
        patches (int): Number of nominal patches of the fit.
        mean (float): Upper bound of their mean residual.
        largest (float): Upper bound of their largest residual.
        histogram (list[int]): Number of patches by the bound of their residual, in bins of equal
            width from 0 to ``largest``.
    """

    layers: str
    stride: int
    contributes_to: str
    atoms: int
    width: int
    patches: int
    mean: float
    largest: float
    histogram: list[int]


class SuspectedImage(NamedTuple):
    """Training image that may be mislabelled.

    Attributes:
        path (str): The file.
        score (float): Normalised score without the image's own atoms.
        image (bytes | None): The image as WebP; ``None`` if the file is gone.
    """

    path: str
    score: float
    image: bytes | None


class ModelFacts(NamedTuple):
    """Facts of a model.

    Attributes:
        backbone (str): Name of the backbone.
        scales (list[ScaleFacts]): Memory banks, the finest first.
        certified (float): Upper bound of the raw score of every training image.
        arguments (list[tuple[str, str]]): Arguments of the model.
        fit (FitRecord | None): Record of the fit; ``None`` if the checkpoint has none.
        images (int): Number of training images that atoms come from.
        suspected (list[SuspectedImage]): Suspected mislabelled images, the highest score first.
        inspected (int): Number of training images that the suspected ones are chosen from.
        checkpoint (str): Path of the checkpoint; empty if unknown.
        sha256 (str): SHA-256 of the checkpoint; empty if unknown.
        versions (dict[str, str]): Versions of the packages that made the report.
        rejected (list[str]): Date and path of each image of a rejected defect.
    """

    backbone: str
    scales: list[ScaleFacts]
    certified: float
    arguments: list[tuple[str, str]]
    fit: FitRecord | None
    images: int
    suspected: list[SuspectedImage]
    inspected: int
    checkpoint: str
    sha256: str
    versions: dict[str, str]
    rejected: list[str] = []  # noqa: RUF012  # of a NamedTuple, never changed


def facts_of(module: Any, checkpoint: str = "") -> ModelFacts:  # noqa: ANN401
    """Facts of a fitted Sgfr.

    Args:
        module (Any): The Lightning model.
        checkpoint (str): Path of its checkpoint, if known.

    Returns:
        ModelFacts: The facts.
    """
    model: SgfrModel = module.model
    suspected, inspected = _suspected(module)
    return ModelFacts(
        backbone=str(module.hparams.get("backbone", "")),
        scales=_scales(model),
        certified=model.certificate().largest_score,
        arguments=_arguments(module.hparams),
        fit=getattr(module, "fit_record", None),
        images=len(model.images),
        suspected=suspected,
        inspected=inspected,
        checkpoint=checkpoint,
        sha256=sha256_of(checkpoint),
        versions=versions(),
        rejected=model.rejected,
    )


def sha256_of(file: str) -> str:
    """SHA-256 of a file's content; empty if it cannot be read."""
    try:
        with Path(file).open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError:
        return ""


def _scales(model: SgfrModel) -> list[ScaleFacts]:
    found = []
    embedder, bounds = model.embedder, model.certificate().scales
    for scale, bank, bound in zip(embedder.scales, model.banks, bounds, strict=True):
        counts, _ = bound.histogram(_BINS)
        found.append(
            ScaleFacts(
                layers=", ".join(embedder.layers[index] for index in scale.layer_indices),
                stride=scale.stride,
                contributes_to=scale.contributes_to,
                atoms=len(bank.atoms),
                width=bank.atoms.shape[1],
                patches=bound.patches,
                mean=bound.mean,
                largest=bound.largest,
                histogram=counts.tolist(),
            )
        )
    return found


def _arguments(arguments: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [
        (name, ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value))
        for name, value in arguments.items()
        if name not in _NOT_SHOWN
    ]


def _suspected(module: Any) -> tuple[list[SuspectedImage], int]:  # noqa: ANN401
    """Training images with the highest scores, and the number of images with such a score."""
    crops = TrainingCrops(module.model, module.pre_processor)
    scores = _leave_one_out_scores(module)
    processor = module.post_processor
    normalise = processor.reported_score if isinstance(processor, SgfrPostProcessor) else float
    worst = sorted(scores, key=lambda item: -item[1])[:_SUSPECTED]
    suspected = []
    for path, score in worst:
        shown = crops.read(path)
        image = None if shown is None else webp(shown, _SIDE)
        suspected.append(SuspectedImage(path, normalise(score), image))
    return suspected, len(scores)


def _leave_one_out_scores(module: Any) -> list[tuple[str, float]]:  # noqa: ANN401
    """Raw scores of training images without their own atoms: stored ones, else of some images."""
    model, processor = module.model, module.post_processor
    if getattr(module, "suspects", None):
        return list(module.suspects)
    stored = getattr(processor, "calibration_scores", CalibrationScores())
    training = stored.of_split(Split.TRAINING)
    if training.scores:
        return list(zip(training.paths, training.scores, strict=True))
    present = [path for path in model.images if Path(path).is_file()]
    group = getattr(processor, "group", None)
    chosen = select_evenly(present, _INSPECTED, group)
    if not chosen:
        return []
    found = nominal_scores(model, module.pre_processor, chosen, group=group).scores
    return list(zip(chosen, found, strict=True))


def known_images(files: Sequence[str], known: Iterable[str]) -> tuple[list[bool], int]:
    """Tell which images a checkpoint knows.

    An image is known in three cases: its path leads to a known file, also through links; it has
    the content of a known file; or the known file is gone, but its folder and its name are found
    where the image is. A moved folder is recognised by its own name and that of its parent, and
    only if it holds all known images: ``bottle/test/good`` is not taken for a moved
    ``bottle/train/good``.

    Args:
        files (Sequence[str]): Paths of images; empty where unknown.
        known (Iterable[str]): Paths of images that the checkpoint names.

    Returns:
        tuple[list[bool], int]: Whether each of ``files`` is known, and how many of them are known
        by their names alone.
    """
    real = [real_path(path) for path in files]
    paths = {real_path(path) for path in known if path}
    present = {path for path in paths if Path(path).is_file()}
    moved = _moved(paths - present, {str(Path(path).parent) for path in real if path})
    copies = _copies([path for path in real if path and path not in present], present)
    found = [path in present or path in copies for path in real]
    by_name = [path in moved and not is_known for path, is_known in zip(real, found, strict=True)]
    return [one or other for one, other in zip(found, by_name, strict=True)], sum(by_name)


def _copies(files: Iterable[str], known: Iterable[str]) -> set[str]:
    """Files with the content of a known file; only files of equal size are read."""
    by_size = defaultdict(list)
    for path in known:
        by_size[_size(path)].append(path)
    hashes: dict[int, set[str]] = {}
    found = set()
    for path in files:
        size = _size(path)
        if size < 0 or size not in by_size:
            continue
        if size not in hashes:
            hashes[size] = {sha256_of(other) for other in by_size[size]} - {""}
        if sha256_of(path) in hashes[size]:
            found.add(path)
    return found


def _size(path: str) -> int:
    """Size in bytes; -1 without a file."""
    try:
        return Path(path).stat().st_size
    except OSError:
        return -1


def _moved(gone: Iterable[str], folders: Iterable[str]) -> set[str]:
    """New paths of files that are gone, if their folder is in or beside one of ``folders``."""
    names: dict[Path, set[str]] = defaultdict(set)
    for path in map(Path, gone):
        names[path.parent].add(path.name)
    bases = sorted(
        {part for folder in folders for part in (Path(folder), *Path(folder).parents)}, reverse=True
    )
    found = set()
    for folder, files in names.items():
        parts = folder.parts[1:]
        longest_first = (
            base.joinpath(*parts[start:])
            for start in range(len(parts) - _NAMES + 1)
            for base in bases
        )
        new = next((candidate for candidate in longest_first if candidate.is_dir()), None)
        if new is not None and all((new / name).is_file() for name in files):
            found |= {str(new / name) for name in files}
    return found
