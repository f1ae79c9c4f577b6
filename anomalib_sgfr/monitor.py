"""Monitor of a stream of scores: whether they still look like those of the calibration images."""

import json
import math
import re
import threading
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from itertools import chain
from operator import index
from pathlib import Path
from typing import Any, Literal, NamedTuple

from anomalib_sgfr.run_paths import atomic_write

__all__ = ["Monitor", "MonitorReading"]

# Stakes of the bets on low and on high p-values; the last bet stakes nothing.
_STAKES = ((0.5, 0.0), (1.5, 0.0), (0.0, 0.5), (0.0, 1.5), (0.0, 0.0))
_MOVED = 0.001  # share of the capital that is dealt out anew at each part
_HALF = 0.5  # mean p-value of unchanged conditions
_VERSION = 2
_OTHERS = "(others)"  # stream of paths that `by` does not match, as in reports


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
        stream (str): Camera, product ... of the image, of which all of this is said; empty for a
            monitor of one stream.

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
    stream: str = ""


class _Stream:
    """Test martingale of one stream, against the calibration scores that it is compared with.

    Args:
        calibration (Sequence[float]): Scores of good images.
        parts (int): Number of parts that they show.
        false_alarm_probability (float): This stream's share of the monitor's.
        defect_share (float): Largest ordinary share of defective images.
    """

    def __init__(
        self,
        calibration: Sequence[float],
        parts: int,
        false_alarm_probability: float,
        defect_share: float,
    ) -> None:
        self.calibration = tuple(sorted(calibration))
        self.parts = parts
        # half of the probability, as the other half is for the margins
        self.limit = 2.0 / false_alarm_probability
        above = _margin(parts, false_alarm_probability)
        self.margins = (above + defect_share / 2.0, above)
        # no bet may lose more than all
        low, high = (1.0 / (_HALF + margin) for margin in self.margins)
        self.stakes = [(min(first, low), min(second, high)) for first, second in _STAKES]
        self.images = 0
        self.changed_at: int | None = None
        self.log_capital = 0.0
        self.shares = [1.0 / len(_STAKES)] * len(_STAKES)
        self.part: str | None = None  # whose images are still coming
        self.factors: list[list[float]] = []  # of each of its images

    @property
    def fastest(self) -> int | None:
        bets = zip(self.stakes, self.returns(0.0), strict=True)
        most = (1.0 - _MOVED) * max(factor for (low, _), factor in bets if low > 0.0)
        return math.ceil(math.log(len(_STAKES) * self.limit) / math.log(most)) if most > 1 else None

    @property
    def evidence(self) -> float:
        return math.exp(min(self.log_capital, 700.0))

    @property
    def direction(self) -> Literal["higher", "lower"] | None:
        if self.changed_at is None:
            return None
        bets = list(zip(self.shares, _STAKES, strict=True))
        on_low, on_high = (sum(share for share, stakes in bets if stakes[end]) for end in (0, 1))
        return "higher" if on_low >= on_high else "lower"

    def take(self, score: float, part: str | None) -> float:
        """Take an image of a part, or one for itself; returns its p-value."""
        number = len(self.calibration)
        first, last = (find(self.calibration, score) for find in (bisect_left, bisect_right))
        p_value = (number - (first + last) / 2.0) / number
        if part is None or part != self.part:
            self._settle()
        self.part = part
        self.factors.append(self.returns(p_value))
        self.images += 1
        if part is None:
            self._settle()
        return p_value

    def returns(self, p_value: float) -> list[float]:
        """What each bet multiplies by; of mean 1 at most while conditions are as they were."""
        low, high = (_HALF - p_value - self.margins[0], p_value - _HALF - self.margins[1])
        return [max(0.0, 1.0 + first * low + second * high) for first, second in self.stakes]

    def _settle(self) -> None:
        """Multiply the capital by the mean over the images of a part."""
        if not self.factors:
            return
        means = [sum(factors) / len(self.factors) for factors in zip(*self.factors, strict=True)]
        self.factors = []
        dealt = [(1.0 - _MOVED) * share + _MOVED / len(_STAKES) for share in self.shares]
        grown = [share * mean for share, mean in zip(dealt, means, strict=True)]
        total = sum(grown)
        self.log_capital += math.log(total)
        self.shares = [share / total for share in grown]
        if self.changed_at is None and self.evidence >= self.limit:
            self.changed_at = self.images

    _STATE = ("images", "changed_at", "log_capital", "shares", "part", "factors")

    @property
    def state(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._STATE}

    @state.setter
    def state(self, state: Mapping[str, Any]) -> None:
        _require_counts(state)
        shares, factors = state["shares"], state["factors"]
        if not all(len(part) == len(_STAKES) for part in (shares, *factors)):
            msg = f"shares and factors must be lists of {len(_STAKES)}"
            raise ValueError(msg)
        if not all(map(math.isfinite, (state["log_capital"], *shares, *chain(*factors)))):
            msg = "a number is not finite"
            raise ValueError(msg)
        for name in self._STATE:
            setattr(self, name, state[name])


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

    With ``by``, images are told apart by camera, product ..., each with a martingale and an alarm
    of its own. The ``k``-th of these streams to appear has ``1 / (k (k + 1))`` of the probability,
    which makes all of it over any number of streams. A stream is compared with the calibration
    images of its own name, or with all if these are too few for an alarm.

    Args:
        calibration (Sequence[float]): Scores of good images, as predictions hold them.
        false_alarm_probability (float): Over the whole stream, or all streams. Defaults to
            ``0.01``.
        defect_share (float): Largest ordinary share of defective images. Defaults to ``0.1``.
        group (str | None): Regular expression that finds in a path the name of the part that an
            image shows; images of one part that follow each other count as one. Defaults to
            ``None``, each image for itself.
        parts (int | None): Number of parts that the calibration images show; ``None`` for as many
            as images, or as ``group`` finds in ``paths``.
        threshold (float | None): Raw threshold that the scores are normalised by, if known.
        by (str | None): Regular expression that finds in a path the name of the stream. Defaults to
            ``None``, one stream.
        paths (Sequence[str] | None): Files of the calibration images, in which ``by`` and ``group``
            find their names.

    Attributes:
        images (int): Number of images taken.
        changed_at (int | None): That number at the first alarm; ``None`` without one.
        streams (dict[str, _Stream]): Each stream's martingale by name, in order of appearance, with
            ``images``, ``evidence``, ``limit``, ``changed_at`` and ``direction``.

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
        by: str | None = None,
        paths: Sequence[str] | None = None,
    ) -> None:
        self.calibration = tuple(sorted(map(float, calibration)))
        self.false_alarm_probability = false_alarm_probability
        self.defect_share = defect_share
        self.group, self.by = group, by
        self._group, self._by = (_compiled(*item) for item in (("group", group), ("by", by)))
        self.threshold = threshold
        files = [""] * len(calibration) if paths is None else list(paths)
        if len(files) != len(calibration):
            msg = f"paths must name {len(calibration)} calibration images, got {len(files)}."
            raise ValueError(msg)
        if parts is None:
            parts = self._number_of_parts(files) if paths else len(files)
        self.parts = parts
        self._check()
        self._own: dict[str, tuple[list[float], int]] = {}  # scores and number of parts, by stream
        names = [self.stream_of(path) for path in files] if by and paths else []
        for name in dict.fromkeys(names):
            own = [index for index, its in enumerate(names) if its == name]
            scores = [float(calibration[index]) for index in own]
            self._own[name] = (scores, self._number_of_parts([files[index] for index in own]))
        first = self._share(0)
        if _margin(self.parts, first) + defect_share / 2.0 >= _HALF:
            msg = (
                f"{self.parts} calibration images of different parts are too few for an alarm with"
                f" a probability of {first:g}: calibrate on more."
            )
            raise ValueError(msg)
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
        """Start anew, with no stream seen."""
        self.images = 0
        self.changed_at: int | None = None
        self.streams: dict[str, _Stream] = {}
        self._latest, self._p_value = "", math.nan
        if self.by is None:
            self._stream("")

    @classmethod
    def of_checkpoint(cls, path: str | Path, **arguments: Any) -> "Monitor":  # noqa: ANN401
        """Monitor for the model of a checkpoint, by its calibration scores.

        Args:
            path (str | Path): The checkpoint.
            **arguments: As of the class: ``false_alarm_probability``, ``defect_share``, ``by``.

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
            paths=good.paths,
            **arguments,
        )

    def _share(self, number: int) -> float:
        """False-alarm probability of the stream that appears after ``number`` others."""
        weight = 1.0 if self.by is None else 1.0 / ((number + 1) * (number + 2))
        return self.false_alarm_probability * weight

    def _stream(self, name: str) -> _Stream:
        """The stream of a name, which is made if it has not been seen."""
        if name not in self.streams:
            share = self._share(len(self.streams))
            scores, parts = self._own.get(name, ([], 0))
            if _margin(parts, share) + self.defect_share / 2.0 >= _HALF:
                scores, parts = list(self.calibration), self.parts
            self.streams[name] = _Stream(scores, parts, share, self.defect_share)
        return self.streams[name]

    @property
    def fastest(self) -> int | None:
        """Number of parts that an alarm takes where every score is above all calibration scores.

        Of several streams that of the latest image, of none yet the first one's; ``None`` if this
        stream came so late that its share of the probability allows no alarm.
        """
        return self._current.fastest

    @property
    def _current(self) -> _Stream:
        """The stream of the latest image; before the first one, what it would be."""
        if self._latest in self.streams:
            return self.streams[self._latest]
        return _Stream(self.calibration, self.parts, self._share(0), self.defect_share)

    @property
    def evidence(self) -> float:
        """Evidence against unchanged conditions, of all complete parts of the latest's stream."""
        return self._current.evidence

    @property
    def reading(self) -> MonitorReading:
        """The latest reading; its p-value is NaN before the first image of this process."""
        stream = self._current
        changed = stream.changed_at is not None
        return MonitorReading(
            self._p_value, stream.evidence, changed, stream.direction, self._latest
        )

    def update(self, score: float, path: str = "") -> MonitorReading:
        """Take one image of a stream.

        Args:
            score (float): Its score, as predictions hold it.
            path (str): Its file, in which ``by`` finds the stream and ``group`` the part.

        Returns:
            MonitorReading: What is known then of its stream.

        Raises:
            ValueError: If the score is not finite.
        """
        if not math.isfinite(score):
            msg = f"score must be a finite number, got {score}."
            raise ValueError(msg)
        with self._lock:
            self._latest = self.stream_of(path)
            stream = self._stream(self._latest)
            self._p_value = stream.take(score, self._part_of(path))
            self.images += 1
            if self.changed_at is None and stream.changed_at is not None:
                self.changed_at = self.images
            return self.reading

    def _part_of(self, path: str) -> str | None:
        """The part that an image shows, as in `calibration.group_of`, which needs PyTorch."""
        found = self._group.search(path.replace("\\", "/")) if self._group else None
        if found is None:
            return None
        return "\0".join(part or "" for part in found.groups()) if found.re.groups else found[0]

    def _number_of_parts(self, paths: Sequence[str]) -> int:
        found = [self._part_of(path) for path in paths]
        return len(set(found) - {None}) + found.count(None)

    def stream_of(self, path: str) -> str:
        """Name of the stream that an image belongs to, as reports name groups.

        Args:
            path (str): Its file.

        Returns:
            str: What ``by`` finds; ``"(others)"`` if nothing, empty for a monitor of one stream.
        """
        if self._by is None:
            return ""
        found = self._by.search(path.replace("\\", "/"))
        if found is None:
            return _OTHERS
        return " ".join(part or "" for part in found.groups()) or found[0]

    def save(self, file: str | Path) -> None:
        """Write all of it into a JSON file, whole or not at all.

        Args:
            file (str | Path): The file.
        """
        with self._lock:
            state = {
                "version": _VERSION,
                "calibration": list(self.calibration),
                **{name: getattr(self, name) for name in _ARGUMENTS},
                "by": self.by,
                "own": self._own,
                "images": self.images,
                "changed_at": self.changed_at,
                "latest": self._latest,
                "streams": {name: stream.state for name, stream in self.streams.items()},
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
            state = json.loads(Path(file).read_bytes())
            monitor = cls._restored(state) if state["version"] in {1, _VERSION} else None
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            msg = (
                f"'{file}' is not a file that a Monitor saved, or is damaged ({error!r}): make a"
                " new one with Monitor.of_checkpoint."
            )
            raise ValueError(msg) from error
        if monitor is None:
            msg = f"'{file}' is of another version's monitor: make a new one."
            raise ValueError(msg)
        return monitor

    @classmethod
    def _restored(cls, state: Mapping[str, Any]) -> "Monitor":
        """Monitor of the content of a file; whatever is wrong with it raises an exception."""
        if state["version"] == 1:  # of one stream, whose state lay beside the rest
            state = {**state, "by": None, "own": {}, "latest": "", "streams": {"": state}}
        _require_counts(state)
        arguments = {name: state[name] for name in (*_ARGUMENTS, "by")}
        if arguments["threshold"] is not None:
            arguments["threshold"] = float(arguments["threshold"])
        monitor = cls(state["calibration"], **arguments)
        monitor._own = {
            name: ([float(score) for score in scores], int(parts))
            for name, (scores, parts) in state["own"].items()
        }
        monitor.images, monitor.changed_at = state["images"], state["changed_at"]
        monitor._latest = state["latest"]
        for name, its in state["streams"].items():
            monitor._stream(name).state = its
        return monitor


_ARGUMENTS = ("false_alarm_probability", "defect_share", "group", "parts", "threshold")


def _require_counts(state: Mapping[str, Any]) -> None:
    """Require numbers of images that can be."""
    images, changed_at = state["images"], state["changed_at"]
    least = 0 if changed_at is None else 1
    if not least <= (changed_at or 0) <= index(images):
        msg = f"images is {images!r}, and changed_at {changed_at!r}"
        raise ValueError(msg)


def _margin(parts: int, probability: float) -> float:
    """Bound of the mean of ``parts`` uniform numbers beyond 1/2; half of the probability."""
    return math.sqrt(math.log(4.0 / probability) / (6.0 * max(1, parts)))


def _compiled(name: str, expression: str | None) -> re.Pattern[str] | None:
    try:
        return None if expression is None else re.compile(expression)
    except re.error as error:
        msg = f"{name} '{expression}' is not a regular expression: {error}."
        raise ValueError(msg) from error
