"""Monitor of a stream of scores: whether they still look like those of the calibration images."""

import json
import math
import re
import threading
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from anomalib_sgfr.run_paths import atomic_write

__all__ = ["Monitor", "MonitorReading"]

# Stakes of the bets on low and on high p-values; the last bet stakes nothing.
_STAKES = ((0.5, 0.0), (1.5, 0.0), (0.0, 0.5), (0.0, 1.5), (0.0, 0.0))
_MOVED = 0.001  # share of the capital that is dealt out anew at each part
_VERSION = 1


class MonitorReading(NamedTuple):
    """What a monitor has found up to an image.

    Attributes:
        p_value (float): Share of the calibration scores above the image's, those equal to it by
            half.
        evidence (float): Evidence against unchanged conditions, 1 at the start; with unchanged
            conditions its mean is at most 1 at every time.
        changed (bool): Whether conditions have changed, at this image or before.
        direction (Literal["higher", "lower"] | None): Which way scores moved; ``None`` if they did
            not.

    Examples:
        >>> from anomalib_sgfr import Monitor, MonitorReading
        >>> reading = Monitor([0.01 * index for index in range(100)]).update(0.25)
        >>> isinstance(reading, MonitorReading), reading.p_value
        (True, 0.745)
    """

    p_value: float
    evidence: float
    changed: bool
    direction: Literal["higher", "lower"] | None


class Monitor:
    """Test martingale over the p-values of a stream, against a fixed set of calibration scores.

    Raises one alarm, whose probability over an endless stream is at most
    ``false_alarm_probability`` while good images come from where the calibration images came from
    and at most ``defect_share`` of all are defective. Half of that probability is for calibration
    scores that by chance are not typical, half for the stream.

    The capital starts at 1 and is shared among bets, each of which multiplies by
    ``1 + l (1/2 - p - m)`` or ``1 + h (p - 1/2 - m')``; a small share is dealt out anew at each
    step, so that a change is found whenever it comes (the simple jumper of Vovk et al., "Retrain or
    not retrain: conformal test martingales for change-point detection", 2021). The margins ``m``
    hold for all calibration sets but a few: the mean p-value of a good image is the mean of ``n``
    uniform numbers, which is sub-Gaussian with variance ``1 / (12 n)``.

    Args:
        calibration (Sequence[float]): Scores of good images, as predictions hold them.
        false_alarm_probability (float): Over the whole stream. Defaults to ``0.01``.
        defect_share (float): Largest ordinary share of defective images. Defaults to ``0.1``.
        group (str | None): Regular expression that finds in a path the name of the part that an
            image shows; images of one part that follow each other count as one. Defaults to
            ``None``, each image for itself.
        parts (int | None): Number of parts that the calibration images show; ``None`` for as many
            as images.
        threshold (float | None): Raw threshold that the scores are normalised by, if known.

    Raises:
        ValueError: If an argument is out of range, or there are too few scores for any alarm.

    Examples:
        >>> from anomalib_sgfr import Monitor
        >>> monitor = Monitor([0.30 + 0.001 * index for index in range(100)])
        >>> monitor.update(0.35).changed
        False
        >>> any(monitor.update(0.45).changed for _ in range(40))
        True
    """

    def __init__(
        self,
        calibration: Sequence[float],
        *,
        false_alarm_probability: float = 0.01,
        defect_share: float = 0.1,
        group: str | None = None,
        parts: int | None = None,
        threshold: float | None = None,
    ) -> None:
        self.calibration = tuple(sorted(map(float, calibration)))
        self.false_alarm_probability = false_alarm_probability
        self.defect_share = defect_share
        self.group = group
        self.parts = len(self.calibration) if parts is None else parts
        self.threshold = threshold
        self._check()
        self._expression = None if group is None else re.compile(group)
        # of the mean of `parts` uniform numbers; half of the probability, both ways
        above = math.sqrt(math.log(4.0 / false_alarm_probability) / (6.0 * max(1, self.parts)))
        self._margins = (above + defect_share / 2.0, above)
        if self._margins[0] >= 0.5:  # noqa: PLR2004  # of the mean p-value
            msg = (
                f"{self.parts} calibration images of different parts are too few for an alarm with"
                f" a probability of {false_alarm_probability:g}: calibrate on more."
            )
            raise ValueError(msg)
        # no bet may lose more than all
        low, high = (1.0 / (0.5 + margin) for margin in self._margins)
        self._stakes = [(min(first, low), min(second, high)) for first, second in _STAKES]
        self._lock = threading.Lock()
        self.reset()

    def _check(self) -> None:
        if not all(map(math.isfinite, self.calibration)):
            msg = "calibration must be finite scores, got NaN or infinity."
            raise ValueError(msg)
        for name, most in (("false_alarm_probability", 1.0), ("defect_share", 0.5)):
            value = getattr(self, name)
            least_fits = value > 0.0 or (name == "defect_share" and value == 0.0)
            if not (least_fits and value < most):
                msg = f"{name} must lie between 0 and {most:g}, got {value}."
                raise ValueError(msg)
        if not 0 <= self.parts <= len(self.calibration):
            msg = (
                f"parts must not exceed the {len(self.calibration)} calibration scores, got"
                f" {self.parts}."
            )
            raise ValueError(msg)

    def reset(self) -> None:
        """Start a new stream."""
        self.images = 0
        self.changed_at: int | None = None
        self._p_value = math.nan
        self._log_capital = 0.0
        self._shares = [1.0 / len(_STAKES)] * len(_STAKES)
        self._part: str | None = None  # whose images are still coming
        self._factors: list[list[float]] = []  # of each of its images

    @classmethod
    def of_checkpoint(cls, path: str | Path, **arguments: Any) -> "Monitor":  # noqa: ANN401
        """Monitor for the model of a checkpoint, by its calibration scores.

        Args:
            path (str | Path): The checkpoint.
            **arguments: As of the class: ``false_alarm_probability``, ``defect_share``.

        Returns:
            Monitor: Before its first image.

        Raises:
            ValueError: If the checkpoint has too few calibration scores, or the model no threshold
                without defects.
        """
        from anomalib_sgfr.lightning_model import Sgfr
        from anomalib_sgfr.post_processing.post_processor import SgfrPostProcessor

        model = Sgfr.load_from_checkpoint(
            path, map_location="cpu", visualizer=False, evaluator=False
        )
        processor = model.post_processor
        if not isinstance(processor, SgfrPostProcessor):
            msg = f"'{path}' has no calibration scores: its post_processor is not Sgfr's."
            raise ValueError(msg)  # noqa: TRY004  # of the file, not of the argument
        good = processor.calibration_scores.good
        good = good.subset(good.current)
        group = processor.state.group
        return cls(
            [processor.reported_score(score) for score in good.scores],
            group=group,
            parts=len(set(good.groups(group))),
            threshold=float(processor.image_threshold) if processor.normalises else None,
            **arguments,
        )

    @property
    def fastest(self) -> int:
        """Number of parts that an alarm takes where every score is above all calibration scores."""
        bets = zip(self._stakes, self._returns(0.0), strict=True)
        most = max(factor for (low, _), factor in bets if low > 0.0)
        return math.ceil(
            math.log(2.0 * len(_STAKES) / self.false_alarm_probability)
            / math.log((1.0 - _MOVED) * most)
        )

    @property
    def evidence(self) -> float:
        """Evidence against unchanged conditions, of all parts that are complete."""
        return math.exp(min(self._log_capital, 700.0))

    @property
    def reading(self) -> MonitorReading:
        """The latest reading; its p-value is NaN before the first image of this process."""
        changed = self.changed_at is not None
        return MonitorReading(self._p_value, self.evidence, changed, self._direction)

    @property
    def _direction(self) -> Literal["higher", "lower"] | None:
        if self.changed_at is None:
            return None
        higher = sum(
            share for share, (low, _) in zip(self._shares, _STAKES, strict=True) if low > 0.0
        )
        lower = sum(
            share for share, (_, high) in zip(self._shares, _STAKES, strict=True) if high > 0.0
        )
        return "higher" if higher >= lower else "lower"

    def update(self, score: float, path: str = "") -> MonitorReading:
        """Take one image of the stream.

        Args:
            score (float): Its score, as predictions hold it.
            path (str): Its file, in which ``group`` finds the part.

        Returns:
            MonitorReading: What is known then.

        Raises:
            ValueError: If the score is not finite.
        """
        if not math.isfinite(score):
            msg = f"score must be a finite number, got {score}."
            raise ValueError(msg)
        with self._lock:
            number = len(self.calibration)
            first, last = (find(self.calibration, score) for find in (bisect_left, bisect_right))
            p_value = (number - (first + last) / 2.0) / number
            part = self._part_of(path)
            if part is None or part != self._part:
                self._settle()
            self._part = part
            self._factors.append(self._returns(p_value))
            self.images += 1
            if part is None:
                self._settle()
            self._p_value = p_value
            return self.reading

    def _part_of(self, path: str) -> str | None:
        """The part that an image shows, as in `calibration.group_of`, which needs PyTorch."""
        found = self._expression.search(path.replace("\\", "/")) if self._expression else None
        if found is None:
            return None
        return "\0".join(part or "" for part in found.groups()) if found.re.groups else found[0]

    def _returns(self, p_value: float) -> list[float]:
        """What each bet multiplies by; of mean 1 at most while conditions are as they were."""
        low, high = (0.5 - p_value - self._margins[0], p_value - 0.5 - self._margins[1])
        return [max(0.0, 1.0 + first * low + second * high) for first, second in self._stakes]

    def _settle(self) -> None:
        """Multiply the capital by the mean over the images of a part."""
        if not self._factors:
            return
        means = [sum(factors) / len(self._factors) for factors in zip(*self._factors, strict=True)]
        self._factors = []
        dealt = [(1.0 - _MOVED) * share + _MOVED / len(_STAKES) for share in self._shares]
        grown = [share * mean for share, mean in zip(dealt, means, strict=True)]
        total = sum(grown)
        self._log_capital += math.log(total)
        self._shares = [share / total for share in grown]
        if self.changed_at is None and self.evidence >= 2.0 / self.false_alarm_probability:
            self.changed_at = self.images

    def save(self, file: str | Path) -> None:
        """Write all of it into a JSON file, whole or not at all.

        Args:
            file (str | Path): The file.
        """
        with self._lock:
            state = {
                "version": _VERSION,
                "calibration": list(self.calibration),
                "false_alarm_probability": self.false_alarm_probability,
                "defect_share": self.defect_share,
                "group": self.group,
                "parts": self.parts,
                "threshold": self.threshold,
                "images": self.images,
                "changed_at": self.changed_at,
                "log_capital": self._log_capital,
                "shares": self._shares,
                "part": self._part,
                "factors": self._factors,
            }
        with atomic_write(Path(file)) as part:
            part.write_text(json.dumps(state), encoding="utf-8")

    @classmethod
    def read(cls, file: str | Path) -> "Monitor":
        """Read what :meth:`save` wrote, and go on from there.

        Args:
            file (str | Path): The file.

        Returns:
            Monitor: As it was.

        Raises:
            ValueError: If the file is not a monitor's.
        """
        try:
            state = json.loads(Path(file).read_text(encoding="utf-8"))
            if state["version"] != _VERSION:
                msg = f"'{file}' is of another version's monitor: make a new one."
                raise ValueError(msg)
            names = ("false_alarm_probability", "defect_share", "group", "parts", "threshold")
            monitor = cls(state["calibration"], **{name: state[name] for name in names})
            monitor.images, monitor.changed_at = state["images"], state["changed_at"]
            monitor._log_capital, monitor._shares = state["log_capital"], list(state["shares"])
            monitor._part, monitor._factors = state["part"], list(state["factors"])
        except (KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
            msg = f"'{file}' is not a file that a Monitor saved: {error!r}."
            raise ValueError(msg) from error
        return monitor
