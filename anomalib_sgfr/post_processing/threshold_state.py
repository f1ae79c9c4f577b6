"""State of a threshold: its value, what was requested, and the scores it is calibrated on."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np

from anomalib_sgfr.post_processing.calibration import CalibrationScores, Split
from anomalib_sgfr.post_processing.thresholds import (
    combined_threshold,
    conformal_threshold,
    f1_threshold,
    few_groups_warning,
    with_margin,
)

__all__ = [
    "DEFAULT_RATE",
    "STATE_KEY",
    "ThresholdSource",
    "ThresholdState",
    "remove_threshold",
    "upgrade_checkpoint",
]

# key of the post-processor's configuration in a checkpoint, and of the state in that
_CONFIG_KEY = "anomalib_post_processor_config"
STATE_KEY = "threshold"

DEFAULT_RATE = 0.01
# least validation images of each kind whose masks set the pixel threshold, as for a sign test
_LEAST_LABELLED = 5

ThresholdSource: TypeAlias = Literal["none", "good", "labels", "hand", "unknown"]


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
        group (str | None): Regular expression that names an image's group, see
            :func:`~anomalib_sgfr.post_processing.calibration.group_of`.
        masks (float | None): Threshold of the raw map with the largest F1 score on the masks of
            validation images; used where there are enough labelled images.
        image (float): Threshold of the raw score; NaN for none.
        pixel (float): Threshold of the raw map.
        peak (float): Threshold of the raw map's largest value that as many good images exceed as
            exceed ``image``.
        by (ThresholdSource): What set it: nothing, good images, labelled images, the user, or
            scores that are not kept.
        power (float): Exponent of score normalisation, see
            :class:`~anomalib_sgfr.post_processing.normalisation.ScoreNormaliser`.
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
    by: ThresholdSource = "none"
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
        if self.by == "labels":
            good, bad = len(self.scores.good.scores), len(self.scores.defective.scores)
            phrase = f"{good} good and {bad} defective images"
        else:
            phrase = self.scores.description(self.group, self.rate)
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
        chosen: float
        by: ThresholdSource
        if self.value is not None:
            chosen, by = self.value, "hand"
        elif self.false_alarm_rate is not None:
            chosen, by = image, "good"
        else:
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

    def _with_thresholds(self, image: float, peak: float, by: ThresholdSource) -> "ThresholdState":
        """State with thresholds in the precision that scores are compared in."""
        held_out, bad = self.scores.of_split(Split.HELD_OUT), self.scores.defective
        enough = min(len(held_out.scores), len(bad.scores)) >= _LEAST_LABELLED
        from_masks = self.uses_validation and enough and self.masks is not None
        pixel = self.masks if from_masks else peak
        image, pixel, peak = (float(np.float32(each)) for each in (image, pixel, peak))
        return self._replace(image=image, pixel=pixel, peak=peak, by=by, linear=False)

    def validated(
        self, seen: CalibrationScores, masks: float | None, trained_on: Sequence[str]
    ) -> "ThresholdState":
        """State calibrated with labelled validation images.

        Args:
            seen (CalibrationScores): Scores of the validation images.
            masks (float | None): Threshold of the raw map with the largest F1 score on their masks.
            trained_on (Sequence[str]): Training images, which are left out of the good ones of
                ``seen``.
        """
        fresh = seen.defective.joined(seen.good.exclude(trained_on))
        return self._replace(scores=self.scores.joined(fresh), masks=masks).calibrated()

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
        """State from a checkpoint of an earlier version, or of anomalib's own post-processor.

        Args:
            config (Mapping[str, Any]): Configuration of the post-processor.
            image (float): Threshold of the raw score; NaN for none.
            pixel (float): Threshold of the raw map.
        """
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
        """State with thresholds that were stored without it, which its scores need not give.

        Args:
            image (float): Threshold of the raw score; NaN for none.
            pixel (float): Threshold of the raw map.
        """
        if math.isnan(image):
            return self._replace(image=image, pixel=pixel, peak=pixel, by="none")
        by: ThresholdSource = "hand" if self.value is not None else "unknown"
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
