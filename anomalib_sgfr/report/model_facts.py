"""What a report says of the model: banks and certificate, arguments, how it was fitted, and whom it suspects."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from anomalib_sgfr.fitting.fit_record import versions
from anomalib_sgfr.inspection.calibration import nominal_scores, spread_over
from anomalib_sgfr.inspection.evidence import Evidence, Kind
from anomalib_sgfr.report.digest import ModelFacts, ScaleFacts, Suspect
from anomalib_sgfr.report.mimics import training_picture
from anomalib_sgfr.torch_model import SgfrModel

__all__ = ["facts_of", "sha256_of"]

_SUSPECTS, _LOOKED_AT, _BINS = 6, 60, 30
_LEFT_OUT = {"pre_processor", "post_processor", "evaluator", "visualizer"}


def facts_of(module: Any, checkpoint: str = "") -> ModelFacts:  # noqa: ANN401
    """What is known of a fitted Sgfr.

    Args:
        module (Any): The model, or one like it.
        checkpoint (str): Its file, if that is known.
    """
    model: SgfrModel = module.model
    certificate = model.certificate()
    suspects, looked_at = _suspects(module)
    return ModelFacts(
        backbone=str(module.hparams.get("backbone", "")),
        scales=_scales(model),
        certified=certificate.largest_score,
        arguments=_arguments(module.hparams),
        fit=getattr(module, "fit_record", None),
        images=len(model.images),
        suspects=suspects,
        looked_at=looked_at,
        checkpoint=checkpoint,
        sha256=sha256_of(checkpoint),
        versions=versions(),
    )


def sha256_of(file: str) -> str:
    """Of a file's content; empty if it cannot be read."""
    if not file:
        return ""
    try:
        with Path(file).open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError:
        return ""


def _scales(model: SgfrModel) -> list[ScaleFacts]:
    found = []
    embedder, banks = model.embedder, model.banks
    for scale, bank, bound in zip(embedder.scales, banks, model.certificate().scales, strict=True):
        heard = [name for name, hears in (("map", scale.in_map), ("score", scale.in_score)) if hears]
        counts, _ = bound.histogram(_BINS)
        found.append(
            ScaleFacts(
                layers=", ".join(embedder.layers[member] for member in scale.members),
                stride=scale.stride,
                heard=" and ".join(heard),
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
    plain = [(name, value) for name, value in arguments.items() if name not in _LEFT_OUT]
    return [
        (name, ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)) for name, value in plain
    ]


def _suspects(module: Any) -> tuple[list[Suspect], int]:  # noqa: ANN401
    """Training images that are rebuilt worst without their own atoms, by what is known already or by looking."""
    model, processor = module.model, module.post_processor
    scores: list[tuple[str, float]]
    evidence = getattr(processor, "evidence", Evidence())
    training = evidence.some([kind == Kind.TRAINING for kind in evidence.kinds])
    if getattr(module, "suspects", None):
        scores = list(module.suspects)
    elif training.scores:
        scores = list(zip(training.paths, training.scores, strict=True))
    else:
        there = [path for path in model.images if Path(path).is_file()]
        group = getattr(processor, "group", None)
        chosen = spread_over(there, _LOOKED_AT, group)
        found = nominal_scores(model, module.pre_processor, chosen, group=group).scores if chosen else []
        scores = list(zip(chosen, found, strict=True))
    worst = sorted(scores, key=lambda item: -item[1])[:_SUSPECTS]
    reported = getattr(processor, "reported", float)
    pictures = [training_picture(path, module.pre_processor, model.bit_depth) for path, _ in worst]
    suspects = [Suspect(path, reported(score), picture) for (path, score), picture in zip(worst, pictures, strict=True)]
    return suspects, len(scores)
