"""A threshold chosen from scores of images, and what it rests on."""

import logging
import math
from typing import Any

import torch

from anomalib_sgfr.core.casts import ExemptFromCasts
from anomalib_sgfr.core.thresholds import alarm_threshold, dividing_threshold
from anomalib_sgfr.inspection.evidence import Evidence
from anomalib_sgfr.inspection.reporting import ReportingScale

__all__ = ["DEFAULT_RATE", "ChosenThreshold"]

logger = logging.getLogger(__name__)

DEFAULT_RATE = 0.01


class ChosenThreshold(ExemptFromCasts, ReportingScale):
    """A post-processor whose threshold is chosen from scores, or set by hand.

    With good and defective ones it lies between them, see :func:`~anomalib_sgfr.core.thresholds.dividing_threshold`;
    the pixels' is what masks suggest. With good ones alone, or at a rate that was asked for, it is the one that good
    parts exceed at that rate, see :func:`~anomalib_sgfr.core.thresholds.alarm_threshold`.

    Args:
        **kwargs (Any): As anomalib's post-processor takes them.

    Attributes:
        evidence (Evidence): What the threshold rests on.
        value (float | None): Threshold that was set by hand, in units of the raw map.
        false_alarm_rate (float | None): Share of good images that may be labelled anomalous; ``None`` for 1%, and only
            where there is no defect.
        group (str | None): Regular expression that names the unit in an image's path.
    """

    false_alarm_rate: float | None
    group: str | None

    def __init__(self, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(**kwargs)
        self.false_alarm_rate = self.group = None
        self.value: float | None = None
        self.evidence = Evidence()
        self._is_set = False

    @property
    def rate(self) -> float:
        """Share of good images that may be labelled anomalous, where the threshold rests on good ones."""
        return DEFAULT_RATE if self.false_alarm_rate is None else self.false_alarm_rate

    @property
    def is_set(self) -> bool:
        """Whether there is a threshold."""
        return self._is_set

    @property
    def learns_from_validation(self) -> bool:
        """Whether validation images have a say; not where the rate or the threshold itself was asked for."""
        return self.false_alarm_rate is None and self.value is None

    @property
    def basis(self) -> str:
        """What the threshold rests on, in words."""
        good, bad = self.evidence.good, self.evidence.defective
        if self.value is not None:
            return "a value set by hand"
        if not self.evidence.scores:
            return "scores that are not kept" if self._is_set else "nothing: there is none"
        if bad.scores and self.false_alarm_rate is None:
            highest, lowest = max(good.scores, default=0.0), min(bad.scores)
            lie = "are apart" if highest < lowest else "overlap: at the largest F1 score"
            return f"{len(good.scores)} good and {len(bad.scores)} defective images, which {lie}"
        return self.evidence.said(self.group, self.rate)

    def forget(self) -> None:
        """Have no threshold, until one is chosen: that of another bank means nothing."""
        for bound in (self._image_threshold, self._pixel_threshold):
            bound.fill_(torch.nan)
        self._is_set = False

    def take(self, evidence: Evidence, pixel: float | None = None) -> None:
        """Choose the threshold anew.

        Args:
            evidence (Evidence): What it is to rest on; where there is none, there is no threshold.
            pixel (float | None): Threshold of pixels that defects suggest, if there are any.
        """
        self.evidence = evidence
        if not evidence.scores and self.value is None:
            self.forget()
            logger.warning("There is no image to choose a threshold from: no labels and no masks are given.")
            return
        self.choose(pixel)
        logger.info("Threshold %.4g rests on %s.", float(self._image_threshold), self.basis)

    def choose(self, pixel: float | None = None) -> None:
        """Choose the threshold from the evidence.

        Args:
            pixel (float | None): As in :meth:`take`.

        Raises:
            ValueError: If there is nothing to choose it from.
        """
        by_defects = pixel if self._divides else None
        if self.value is None:
            threshold, its_peaks = self._from_evidence()
        else:
            threshold = its_peaks = self.value
            if self.evidence.good.scores:  # the map may hear other scales: as much above as its own would be
                image, of_map = self._from_evidence()
                its_peaks = self.value * of_map / image if image > 0.0 else self.value
        self._image_threshold.fill_(threshold)
        self._pixel_threshold.fill_(its_peaks if by_defects is None else by_defects)
        for bound in (self.image_min, self.pixel_min):
            bound.fill_(0.0)
        for bound, its in ((self.image_max, self._image_threshold), (self.pixel_max, self._pixel_threshold)):
            bound.copy_(2.0 * its)
        self.linear = False
        self._is_set = True

    @property
    def _divides(self) -> bool:
        """Whether the threshold lies between good and defective ones."""
        return self.learns_from_validation and bool(self.evidence.defective.scores) and bool(self.evidence.good.scores)

    def _from_evidence(self) -> tuple[float, float]:
        """Thresholds of scores, and of pixels by the peaks of maps: what is a peak's share of alarms is an image's."""
        good, bad = self.evidence.good, self.evidence.defective
        if self._divides:
            return dividing_threshold(good.scores, bad.scores), dividing_threshold(good.peaks, bad.peaks)
        units = good.units(self.group)
        return alarm_threshold(good.scores, self.rate, units), alarm_threshold(good.peaks, self.rate, units)

    @property
    def pixel_by_defects(self) -> float | None:
        """The pixels' threshold, if masks of defects suggested it and not the peaks of maps."""
        if self.value is not None or not self._is_set or not self._divides:
            return None
        pixel = float(self._pixel_threshold)
        return None if math.isclose(pixel, self._from_evidence()[1], rel_tol=1e-6) else pixel

    @property
    def peak_threshold(self) -> float:
        """As :attr:`mask_threshold`; where masks of defects chose that, as peaks would: good ones may lie above it."""
        pixel = self.pixel_by_defects
        return self.mask_threshold if not pixel else self.mask_threshold * self._from_evidence()[1] / pixel
