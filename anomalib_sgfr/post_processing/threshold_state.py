"""The state of a threshold: its value, what was asked for, and the scores that it is calibrated on,
as one object.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np

from anomalib_sgfr.post_processing.calibration_scores import CalibrationScores, Split
from anomalib_sgfr.post_processing.thresholds import (
    Decision,
    clear_of,
    combined_threshold,
    conformal_threshold,
    f1_threshold,
    few_units_warning,
)

__all__ = ["DEFAULT_RATE", "Chosen", "ThresholdState"]

DEFAULT_RATE = 0.01
# least validation images of each kind whose masks choose the pixels' threshold, as for a sign test
_LABELLED = 5

Chosen: TypeAlias = Literal["none", "good", "labels", "hand", "unknown"]


class ThresholdState(NamedTuple):
    """Threshold of a model: made whole by :meth:`chosen`, replaced whole, and kept whole in a
    checkpoint.

    Attributes:
        scores (CalibrationScores): Calibration scores.
        false_alarm_rate (float | None): Share of good images that may be labelled anomalous, if one
            was asked for; then good images alone choose.
        value (float | None): Threshold of the raw score that was set by hand.
        read_from (tuple[str, ...]): Images from whose scores that value was read, if it was.
        forced (tuple[str, ...]): Images that were taken for good against objections, see
            ``--force`` of the commands.
        group (str | None): Regular expression that names the part in an image's path; see
            :func:`~anomalib_sgfr.post_processing.calibration_scores.unit_of`.
        masks (float | None): Threshold of the raw map that masks of labelled defects suggest; taken
            where there are enough labelled images.
        image (float): Threshold of the raw score; NaN for none.
        pixel (float): Threshold of the raw map.
        peak (float): Threshold of the raw map that only as many good images exceed anywhere as
            exceed ``image``.
        by (Chosen): What chose it: nothing, good images alone, labelled images, a hand, or scores
            that are not kept.
        power (float): Exponent of the score in its normalised form, see
            :class:`~anomalib_sgfr.post_processing.normalisation.ReportingScale`.
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
    by: Chosen = "none"
    power: float = 2.0
    linear: bool = False

    @property
    def rate(self) -> float:
        """Share of good images that may be labelled anomalous, where good images alone choose."""
        return DEFAULT_RATE if self.false_alarm_rate is None else self.false_alarm_rate

    @property
    def is_set(self) -> bool:
        """Whether there is a threshold."""
        return not math.isnan(self.image)

    @property
    def learns_from_validation(self) -> bool:
        """Whether validation images have a say: not where a rate or the threshold itself was asked
        for.
        """
        return self.false_alarm_rate is None and self.value is None

    @property
    def units(self) -> int:
        """Number of independent good images."""
        return len(set(self.scores.good.units(self.group)))

    @property
    def basis(self) -> str:
        """What the threshold is calibrated on, in words."""
        good, bad = self.scores.good, self.scores.defective
        if self.by == "hand":
            images = len(self.read_from)
            return (
                f"a value set by hand, read from {images} images"
                if images
                else "a value set by hand"
            )
        if self.by == "unknown":
            return "scores that are not kept"
        if self.by == "none":
            return "nothing: there is none"
        if self.by == "labels":
            said = f"{len(good.scores)} good and {len(bad.scores)} defective images"
        else:
            said = good.said(self.group, self.rate)
        outdated, forced = self.scores.current.count(False), len(self.forced)
        said = (
            f"{said}; {outdated} of them could not be scored again after the banks changed"
            if outdated
            else said
        )
        return f"{said}; {forced} of them were taken for good by --force" if forced else said

    @property
    def chosen_by(self) -> tuple[str, ...]:
        """Files of the images that chose the threshold: those whose rate of false alarms it says
        least about.
        """
        if self.by == "hand":
            return self.read_from
        if self.by == "labels":
            return tuple(filter(None, self.scores.paths))
        return tuple(filter(None, self.scores.good.paths)) if self.by == "good" else ()

    @property
    def warning(self) -> str | None:
        """One sentence about a threshold that too few good images support; ``None`` where there is
        none.
        """
        return few_units_warning(self.units, self.rate) if self.by == "good" else None

    def chosen(self) -> "ThresholdState":
        """The same scores and requests with the threshold that they give; none where there is
        nothing to choose by.
        """
        if not self.scores.good.scores:
            value = math.nan if self.value is None else self.value
            return self._settled(value, value, "none" if self.value is None else "hand")
        image, peak = self._of_good()
        chosen: float
        by: Chosen
        if self.value is not None:
            chosen, by = self.value, "hand"
        elif self.false_alarm_rate is not None:
            chosen, by = image, "good"
        else:
            chosen, by = self._combined()
            chosen = clear_of(chosen, self.scores.good.scores)
        # the peaks' is as much above what good images give as the scores'
        return self._settled(
            chosen, chosen * peak / image if image > 0.0 else max(chosen, peak), by
        )

    def _of_good(self) -> tuple[float, float]:
        """Thresholds of scores, and of the peaks of maps, that good images exceed at the rate;
        clear of any of them.
        """
        good, units = self.scores.good, self.scores.good.units(self.group)
        image, peak = (
            clear_of(conformal_threshold(values, self.rate, units), values)
            for values in (good.scores, good.peaks)
        )
        return image, peak

    def _combined(self) -> Decision:
        """Threshold of scores from good and labelled images."""
        tested, bad, good = (
            self.scores.of_kind(Split.HELD_OUT),
            self.scores.defective,
            self.scores.good,
        )
        return combined_threshold(
            good=tested.scores,
            bad=bad.scores,
            calibration=good.scores,
            rate=self.rate,
            units=good.units(self.group),
            good_units=tested.units(self.group),
            bad_units=bad.units(self.group),
        )

    def _settled(self, image: float, peak: float, by: Chosen) -> "ThresholdState":
        fewest = min(
            len(self.scores.of_kind(Split.HELD_OUT).scores), len(self.scores.defective.scores)
        )
        enough = self.learns_from_validation and fewest >= _LABELLED
        pixel = self.masks if enough and self.masks is not None else peak
        # in the precision that scores are compared in
        image, pixel, peak = (float(np.float32(each)) for each in (image, pixel, peak))
        return self._replace(image=image, pixel=pixel, peak=peak, by=by, linear=False)

    def validated(
        self, seen: CalibrationScores, masks: float | None, trained_on: Sequence[str]
    ) -> "ThresholdState":
        """With labelled validation images, chosen anew.

        Args:
            seen (CalibrationScores): Their scores.
            masks (float | None): Threshold of the raw map that their masks suggest.
            trained_on (Sequence[str]): Training images: as good ones of ``seen`` they prove
                nothing, and are left out.
        """
        fresh = seen.defective.joined(seen.good.excluding(trained_on))
        return self._replace(scores=self.scores.joined(fresh), masks=masks).chosen()

    def plain(self) -> dict[str, Any]:
        """Plain data, to store in a checkpoint."""
        lists = {"read_from": list(self.read_from), "forced": list(self.forced)}
        return {**self._asdict(), "scores": self.scores.plain(), **lists}

    @classmethod
    def restored(cls, stored: Mapping[str, Any]) -> "ThresholdState":
        """From what :meth:`plain` gave."""
        known = {name: value for name, value in stored.items() if name in cls._fields}
        lists = {name: tuple(known.get(name, ())) for name in ("read_from", "forced")}
        return cls(**{**known, "scores": CalibrationScores.restored(known.get("scores")), **lists})

    @classmethod
    def of_earlier(cls, config: Mapping[str, Any], image: float, pixel: float) -> "ThresholdState":
        """From a checkpoint of an earlier version, or of anomalib's own post-processor.

        Args:
            config (Mapping[str, Any]): Of the post-processor.
            image (float): Its threshold of the raw score; NaN for none.
            pixel (float): Its threshold of the raw map.
        """
        state = cls(
            scores=CalibrationScores.restored(config.get("evidence")),
            false_alarm_rate=config.get("false_alarm_rate"),
            value=config.get("value"),
            group=config.get("group"),
            power=config.get("power", 1.0),  # of version 0.2
            linear=config.get("linear", "false_alarm_rate" not in config),
        )
        return state.with_thresholds(image, pixel)

    def with_thresholds(self, image: float, pixel: float) -> "ThresholdState":
        """With thresholds as they are stored, which the scores may give or not.

        Args:
            image (float): Of the raw score; NaN for none.
            pixel (float): Of the raw map.
        """
        if math.isnan(image):
            return self._replace(image=image, pixel=pixel, peak=pixel, by="none")
        by: Chosen = "hand" if self.value is not None else "unknown"
        peak = pixel
        if self.scores.good.scores:
            good, units = (
                self.scores.good,
                self.scores.good.units(self.group),
            )  # as before thresholds were cleared
            its_image, its_peak = (
                conformal_threshold(each, self.rate, units) for each in (good.scores, good.peaks)
            )
            peak = image * its_peak / its_image if its_image > 0.0 else image
            if self.value is None and math.isclose(image, its_image, rel_tol=1e-6):
                by = "good"
            elif self.value is None and self._divides(image):
                by = "labels"
        masks = None if math.isclose(pixel, peak, rel_tol=1e-6) else pixel
        return self._replace(image=image, pixel=pixel, peak=peak, by=by, masks=masks)

    def _divides(self, image: float) -> bool:
        """Whether a threshold is what version 0.2 chose between good and defective images."""
        tested, bad = self.scores.of_kind(Split.HELD_OUT).scores, self.scores.defective.scores
        return bool(tested and bad) and math.isclose(image, f1_threshold(tested, bad), rel_tol=1e-6)
