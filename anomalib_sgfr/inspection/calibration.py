"""Thresholds from nominal images alone: a chosen rate of false alarms instead of a sample of defects."""

import logging
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from anomalib.data.utils import get_image_filenames
from anomalib.post_processing import PostProcessor
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from anomalib_sgfr.core.casts import ExemptFromCasts
from anomalib_sgfr.features.pre_processing import read_prepared
from anomalib_sgfr.torch_model import SgfrModel

__all__ = ["NominalPostProcessor", "adopted", "alarm_threshold", "nominal_scores"]

logger = logging.getLogger(__name__)

_NOWHERE = -2  # no atom comes from there
_TAIL = 0.25  # share of the largest scores that a tail is fitted to


def alarm_threshold(scores: Sequence[float], rate: float) -> float:
    """Threshold that a new nominal score exceeds with a given probability, at most.

    With enough scores the order statistic of split conformal prediction (Vovk et al. 2005): exceeded with a probability
    of no more than ``rate``, whatever the distribution, by a score exchangeable with these. With fewer than
    ``1 / rate - 1`` no such statistic exists, and an exponential tail through the largest quarter is extrapolated, from
    the largest score up.

    Args:
        scores (Sequence[float]): Of nominal images, in any order.
        rate (float): Probability of a false alarm, between zero and one.

    Returns:
        float: The threshold; an alarm is what exceeds it.

    Raises:
        ValueError: If there is no score, one is not finite, or ``rate`` is out of range.
    """
    ordered = np.sort(np.asarray(scores, float))
    if not 0.0 < rate < 1.0:
        msg = f"rate must lie between 0 and 1, got {rate}."
        raise ValueError(msg)
    if len(ordered) == 0 or not np.isfinite(ordered).all():
        msg = f"alarm_threshold needs finite nominal scores, got {len(ordered)}."
        raise ValueError(msg)
    place = math.ceil((len(ordered) + 1) * (1.0 - rate))
    if place <= len(ordered):
        return float(ordered[place - 1])
    exceeding = max(1, round(_TAIL * len(ordered)))
    base = ordered[-exceeding - 1] if len(ordered) > 1 else ordered[0]
    excess = float((ordered[-exceeding:] - base).mean())
    tail = float(base + excess * math.log(exceeding / ((len(ordered) + 1) * rate)))
    # not below the largest score: no larger rate has a threshold above it
    return max(tail, float(ordered[-1]))


class NominalPostProcessor(ExemptFromCasts, PostProcessor):
    """Labels and masks at a chosen rate of false alarms, set when a fit ends, from nominal images alone.

    Use as Sgfr's ``post_processor``. By default scores of training images are taken, each with the atoms that come from
    the image itself left out of the bank. Where training images resemble each other more than those to come resemble
    them (many photographs of one part, say), that is too bold; name a folder of nominal images then that were not
    trained on.

    Scores and maps are reported as ``s / (s + t)``, with ``t`` the threshold: 0.5 there, and however far outside, a
    larger raw score stays the larger. An image is anomalous if any pixel of its map is.

    Args:
        false_alarm_rate (float): Share of nominal images that may be labelled anomalous. Defaults to ``0.01``.
        held_out (str | None): Folder of nominal images that were not trained on. Defaults to ``None``.
        images (int): Most images to score. Defaults to ``300``.
        **kwargs (Any): As anomalib's post-processor takes them.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        false_alarm_rate: float = 0.01,
        held_out: str | None = None,
        images: int = 300,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(**kwargs)
        if not 0.0 < false_alarm_rate < 1.0:
            msg = f"false_alarm_rate must lie between 0 and 1, got {false_alarm_rate}."
            raise ValueError(msg)
        if images < 1:
            msg = f"images must be at least 1, got {images}."
            raise ValueError(msg)
        self.false_alarm_rate = false_alarm_rate
        self.held_out = held_out
        self.images = images

    def scores_for(self, model: SgfrModel, pre_processor: Any, paths: Sequence[str]) -> list[float]:  # noqa: ANN401
        """Score what the thresholds are to rest on, for a model that was fitted to images; sets nothing.

        Args:
            model (SgfrModel): The model.
            pre_processor (Any): Its pre-processor.
            paths (Sequence[str]): Training images, of which some are scored unless there are others to score.

        Returns:
            list[float]: Raw scores, for :meth:`calibrate`.

        Raises:
            FileNotFoundError: If there is no image in ``held_out``.
        """
        if self.held_out is not None:
            paths = self._held_out_images()
        number = min(self.images, len(paths))
        chosen = [paths[place * len(paths) // number] for place in range(number)]
        return nominal_scores(model, pre_processor, chosen, leave_out=self.held_out is None)

    def _held_out_images(self) -> list[str]:
        try:
            return [str(path) for path in get_image_filenames(str(self.held_out))]
        except (FileNotFoundError, ValueError) as error:
            msg = f"held_out: there is no image in '{self.held_out}'."
            raise FileNotFoundError(msg) from error

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a folder without images before the fit, and not when it ends."""
        super().on_fit_start(trainer, pl_module)
        if self.held_out is not None:
            self._held_out_images()

    @property
    def _checkpoint_config_keys(self) -> tuple[str, ...]:
        return (*super()._checkpoint_config_keys, "false_alarm_rate", "held_out", "images")

    def calibrate(self, scores: Sequence[float]) -> None:
        """Set the thresholds from scores of nominal images.

        Args:
            scores (Sequence[float]): Raw scores.
        """
        threshold = alarm_threshold(scores, self.false_alarm_rate)
        if len(scores) + 1 < 1.0 / self.false_alarm_rate:
            logger.warning(
                "%d nominal images are too few to measure a false-alarm rate of %g: the threshold is extrapolated.",
                len(scores),
                self.false_alarm_rate,
            )
        self._image_threshold.fill_(threshold)
        self._pixel_threshold.fill_(threshold)
        for bound in (self.image_min, self.pixel_min):
            bound.fill_(0.0)
        for bound in (self.image_max, self.pixel_max):
            bound.fill_(2.0 * threshold)
        logger.info(
            "Threshold %.4g: at most %.3g%% of nominal images should exceed it, by %d of them.",
            threshold,
            100 * self.false_alarm_rate,
            len(scores),
        )

    def on_validation_batch_end(self, *args: object, **kwargs: object) -> None:
        """Learn nothing from validation images: some are defective."""

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Learn nothing from validation images."""

    @staticmethod
    def _normalize(preds: Tensor | None, norm_min: Tensor, norm_max: Tensor, threshold: Tensor) -> Tensor | None:
        del norm_min, norm_max
        if preds is None:
            return None
        # where all nominal scores are zero, so may be the threshold
        squashed = preds / (preds + threshold.clamp_min(torch.finfo(threshold.dtype).tiny))
        return torch.where(torch.isnan(threshold), preds, squashed)


def adopted(ours: Any, checkpoint: dict[str, Any], callbacks: list[Any]) -> Any:  # noqa: ANN401
    """Have the kind of post-processor whose thresholds a checkpoint holds: anomalib restores its default kind.

    Args:
        ours (Any): The model's post-processor.
        checkpoint (dict[str, Any]): As Lightning read it.
        callbacks (list[Any]): The trainer's, where the model's post-processor is replaced too.

    Returns:
        Any: A post-processor that the checkpoint's state fits, or ours.
    """
    stored = checkpoint.get("anomalib_post_processor_config") or {}
    if "false_alarm_rate" not in stored or type(ours) is not PostProcessor:
        return ours
    theirs = NominalPostProcessor()
    callbacks[:] = [theirs if callback is ours else callback for callback in callbacks]
    return theirs


@torch.no_grad()
def nominal_scores(model: SgfrModel, pre_processor: Any, paths: Sequence[str], leave_out: bool) -> list[float]:  # noqa: ANN401
    """Raw scores of nominal images.

    Args:
        model (SgfrModel): A fitted model.
        pre_processor (Any): Its pre-processor.
        paths (Sequence[str]): Images.
        leave_out (bool): Whether to score each without the atoms that come from the image itself.

    Returns:
        list[float]: One for each image.
    """
    numbers = {path: number for number, path in enumerate(model.images)} if leave_out else {}
    was_training = model.training
    model.eval()
    scores = []
    try:
        for path in paths:
            image = read_prepared(path, pre_processor)[None].to(model.image_paths.device)
            banks = model.without(numbers.get(path, _NOWHERE))
            found: Any = model.score(model.embed(image), image.shape[-2:], banks)
            scores.append(float(found.pred_score))
    finally:
        model.train(was_training)
    return scores
