"""Facts of a fitted model for a report: memory banks, certificate, arguments, suspected images."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from anomalib_sgfr.images.pre_processor import read_prepared
from anomalib_sgfr.post_processing.calibration import (
    CalibrationScores,
    Split,
    nominal_scores,
    select_evenly,
)
from anomalib_sgfr.report.crops import displayable
from anomalib_sgfr.report.fit_record import FitRecord, versions
from anomalib_sgfr.report.media import webp
from anomalib_sgfr.torch_model import SgfrModel

__all__ = ["ModelFacts", "ScaleFacts", "SuspectedImage", "facts_of", "sha256_of"]

_SUSPECTED = 6  # images to show
_INSPECTED = 60  # training images to score without their own atoms
_SIDE = 160  # pixels of such an image
_BINS = 30
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
        parts = (("map", scale.in_map), ("score", scale.in_score))
        counts, _ = bound.histogram(_BINS)
        found.append(
            ScaleFacts(
                layers=", ".join(embedder.layers[index] for index in scale.layer_indices),
                stride=scale.stride,
                contributes_to=" and ".join(name for name, takes_part in parts if takes_part),
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
    model, prepare = module.model, module.pre_processor
    scores = _leave_one_out_scores(module)
    normalise = getattr(module.post_processor, "reported", float)
    worst = sorted(scores, key=lambda item: -item[1])[:_SUSPECTED]
    suspected = [
        SuspectedImage(path, normalise(score), _training_image(path, prepare, model.bit_depth))
        for path, score in worst
    ]
    return suspected, len(scores)


def _leave_one_out_scores(module: Any) -> list[tuple[str, float]]:  # noqa: ANN401
    """Raw scores of training images without their own atoms: stored ones, else of some images."""
    model, processor = module.model, module.post_processor
    if getattr(module, "suspects", None):
        return list(module.suspects)
    stored = getattr(processor, "calibration_scores", CalibrationScores())
    training = stored.subset([kind == Split.TRAINING for kind in stored.kinds])
    if training.scores:
        return list(zip(training.paths, training.scores, strict=True))
    present = [path for path in model.images if Path(path).is_file()]
    group = getattr(processor, "group", None)
    chosen = select_evenly(present, _INSPECTED, group)
    if not chosen:
        return []
    found = nominal_scores(model, module.pre_processor, chosen, group=group).scores
    return list(zip(chosen, found, strict=True))


def _training_image(path: str, pre_processor: Any, bit_depth: int) -> bytes | None:  # noqa: ANN401
    """A training image as the model sees it, WebP; ``None`` if it cannot be read."""
    try:
        with torch.no_grad():
            image = read_prepared(path, pre_processor, bit_depth)
            return webp(displayable(pre_processor, image), _SIDE)
    except (OSError, ValueError, SyntaxError):
        return None
