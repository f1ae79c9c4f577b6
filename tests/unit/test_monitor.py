"""The monitor's alarm: its probability, what it finds, and its state."""

import itertools
import json
import math
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anomalib_sgfr.monitor import Monitor
from anomalib_sgfr.post_processing.calibration import group_label, group_of

RNG = np.random.default_rng


def alarm(monitor: Monitor, scores: Sequence[float]) -> int | None:
    """Number of images until the alarm."""
    for score in scores:
        if monitor.update(score).changed:
            return monitor.changed_at
    return None


@pytest.mark.parametrize("share", [0.0, 0.05, 0.1])
def test_ordinary_streams_raise_no_alarm(share: float) -> None:
    rng, alarms = RNG(0), 0
    for _ in range(60):
        scores = rng.normal(size=1500)
        scores[rng.random(1500) < share] += 20.0
        alarms += alarm(Monitor(rng.normal(size=50)), scores.tolist()) is not None
    assert alarms <= 2  # of 60, at a probability of 1%


@given(
    number=st.integers(10, 400),
    rate=st.floats(1e-4, 0.9),
    share=st.floats(0.0, 0.49),
    seed=st.integers(0, 10**6),
)
@settings(deadline=None, max_examples=60)
def test_no_bet_gains_on_the_mean(number: int, rate: float, share: float, seed: int) -> None:
    """Of a stream with as many defects as may be, and calibration scores as rare as may be."""
    uniform = RNG(seed).random(number)
    margin = math.sqrt(math.log(4 / rate) / (6 * number))
    # the mean p-value of a good image is the mean of the calibration scores' quantiles
    extreme = np.clip(uniform - uniform.mean() + 0.5 - margin, 0.0, 1.0)
    for quantiles in (extreme, 1.0 - extreme):
        if abs(quantiles.mean() - 0.5) > margin:
            continue
        monitor = Monitor(quantiles.tolist(), false_alarm_probability=rate, defect_share=share)
        bets = monitor.streams[""]
        grid = (np.arange(4000) + 0.5) / 4000  # good images, by their quantiles
        below = np.searchsorted(np.sort(quantiles), grid) / number
        returns = np.array([bets.returns(1.0 - place) for place in np.unique(below)])
        weights = np.unique(below, return_counts=True)[1] / 4000
        good, defective = weights @ returns, np.array(bets.returns(0.0))
        for defects in (0.0, share):
            mean = (1.0 - defects) * good + defects * defective
            assert (mean <= 1.0 + 1e-3).all()
        assert (returns >= 0.0).all()


@pytest.mark.parametrize(("shift", "direction"), [(2.0, "higher"), (-2.0, "lower")])
@pytest.mark.parametrize("before", [0, 500])
def test_a_sudden_change_is_found_soon(shift: float, direction: str, before: int) -> None:
    rng = RNG(1)
    monitor = Monitor(rng.normal(size=300))
    assert alarm(monitor, rng.normal(size=before).tolist()) is None
    found = alarm(monitor, (shift + rng.normal(size=300)).tolist())
    assert found is not None
    assert before < found <= before + 60
    assert monitor.reading.direction == direction
    assert monitor.update(0.0).changed  # and it stays
    monitor.reset()
    assert not monitor.reading.changed
    assert monitor.evidence == 1.0


@pytest.mark.parametrize("number", [6, 30, 300])
def test_the_fastest_alarm_is_as_said(number: int) -> None:
    monitor = Monitor([float(score) for score in range(number)])
    assert monitor.fastest is not None
    found = alarm(monitor, [1e6] * (monitor.fastest + 1))
    assert found is not None
    assert monitor.fastest - 3 <= found <= monitor.fastest + 1


def test_a_slow_change_is_found() -> None:
    rng = RNG(2)
    monitor = Monitor(rng.normal(size=300))
    found = alarm(monitor, (np.linspace(0, 2, 2000) + rng.normal(size=2000)).tolist())
    assert found is not None
    assert found < 1500


def test_images_of_one_part_count_as_one() -> None:
    rng = RNG(3)
    calibration = rng.normal(size=100).tolist()
    one, many = (Monitor(calibration, group=r"part(\d+)") for _ in range(2))
    alone = Monitor(calibration)  # each image for itself
    for part, score in enumerate(rng.normal(1.5, size=30).tolist()):
        one.update(score, f"line/part{part}.png")
        for view in range(4):  # four times the same picture
            many.update(score, f"line\\part{part}-{view}.png")
            alone.update(score, f"line\\part{part}-{view}.png")
    assert many.evidence == pytest.approx(one.evidence)
    assert many.images == 4 * one.images
    assert alone.evidence > one.evidence


@pytest.mark.parametrize("cut", [0, 7, 13])
def test_the_state_is_a_file_that_goes_on(cut: int, tmp_path: Path) -> None:
    rng = RNG(5)
    scores = rng.normal(0.5, size=40).tolist()
    paths = [f"{number // 3}/x.png" for number in range(40)]
    whole = Monitor(rng.normal(size=60), group=r"(\d+)/", parts=30, threshold=2.5)
    halves = Monitor(whole.calibration, group=r"(\d+)/", parts=30, threshold=2.5)
    for score, path in zip(scores[:cut], paths[:cut], strict=True):
        halves.update(score, path)
    halves.save(tmp_path / "line.json")
    halves = Monitor.read(tmp_path / "line.json")
    for score, path in zip(scores[cut:], paths[cut:], strict=True):
        halves.update(score, path)
    for score, path in zip(scores, paths, strict=True):
        whole.update(score, path)
    whole.save(tmp_path / "whole.json")
    halves.save(tmp_path / "halves.json")
    assert json.loads((tmp_path / "whole.json").read_text()) == json.loads(
        (tmp_path / "halves.json").read_text()
    )
    assert {path.name for path in tmp_path.iterdir()} == {"line.json", "whole.json", "halves.json"}


@pytest.mark.parametrize("group", [r"part\d", r"(part)(\d)?", r"(x)?(\d)", r"()part"])
@pytest.mark.parametrize("path", ["in/part1-2.png", "in\\part1.png", "part.png"])
def test_parts_are_the_groups_of_the_calibration(group: str, path: str) -> None:
    monitor = Monitor([float(number) for number in range(30)], group=group)
    part = monitor._part_of(path)
    assert (path if part is None else part) == group_of(path, group)


def test_each_stream_has_its_own_evidence_and_share_of_the_probability() -> None:
    rng = RNG(7)
    calibration = rng.normal(size=200).tolist()
    monitor = Monitor(calibration, by=r"cam(\d)", false_alarm_probability=0.02)
    alone = {
        camera: Monitor(calibration, false_alarm_probability=0.02 / (k * (k + 1)))
        for k, camera in enumerate("312", 1)
    }
    for camera in [*"312", *rng.choice(list("123"), 600).tolist()]:
        score = float(rng.normal(2.0 if camera == "1" else 0.0))
        reading = monitor.update(score, f"line\\cam{camera}\\x.png")
        assert reading == alone[camera].update(score)._replace(stream=camera)
    assert [name for name, its in monitor.streams.items() if its.changed_at is not None] == ["1"]
    assert list(monitor.streams) == ["3", "1", "2"]
    assert monitor.images == 603
    assert monitor.changed_at is not None
    assert monitor.changed_at > (monitor.streams["1"].changed_at or 0)
    # the shares of any number of streams are at most the whole
    shares = [2.0 / monitor._stream(f"more {number}").limit for number in range(500)]
    assert sum(shares) + sum(2.0 / its.limit for its in list(monitor.streams.values())[:3]) <= 0.02


def test_many_ordinary_streams_raise_no_alarm() -> None:
    rng, alarms = RNG(8), 0
    for _ in range(40):
        monitor = Monitor(rng.normal(size=60).tolist(), by="(.*)")
        for number, score in enumerate(rng.normal(size=3000)):
            monitor.update(score, str(number % 6))
        alarms += monitor.changed_at is not None
    assert alarms <= 2  # of 40, at a probability of 1%


def test_a_stream_is_compared_with_its_own_calibration_images_where_they_suffice() -> None:
    rng = RNG(9)
    offsets = {"a": 0.0, "b": 5.0, "few": 9.0}
    names = ["a"] * 100 + ["b"] * 100 + ["few"] * 3
    scores = [offsets[name] + float(rng.normal()) for name in names]
    paths = [f"fit/{name}/{number // 2}.png" for number, name in enumerate(names)]
    monitor = Monitor(scores, by="(a|b|few|new)/", group=r"(\w+/\d+)", paths=paths)
    assert monitor.parts == 102  # two photographs of each
    for _ in range(300):
        for name in ("a", "b"):
            monitor.update(offsets[name] + float(rng.normal()), f"in/{name}/x.png")
    assert monitor.changed_at is None
    assert [its.parts for its in monitor.streams.values()] == [50, 50]
    assert monitor.streams["b"].calibration == tuple(sorted(scores[100:200]))
    for name in ("few", "new"):
        monitor.update(0.0, f"in/{name}/x.png")
        assert monitor.streams[name].calibration == monitor.calibration
        assert monitor.streams[name].parts == 102
    # of one stream, each camera would seem to have changed
    mixed = Monitor(scores)
    assert alarm(mixed, [5.0 + float(rng.normal()) for _ in range(300)]) is not None


def test_a_stream_that_comes_too_late_for_an_alarm_says_so() -> None:
    monitor = Monitor([float(number) for number in range(8)], by="(.*)")
    found = []
    for name in range(30):
        monitor.update(100.0, str(name))
        found.append(monitor.fastest)
    assert found[0] is not None
    assert found[-1] is None
    assert alarm(monitor, [100.0] * 2000) is None  # all of them in the stream ""
    monitor.update(100.0, "0")
    assert not monitor.reading.changed


@pytest.mark.parametrize("by", [r"cam\d", r"(cam)(\d)?", r"(x)?(\d)", r"()part"])
@pytest.mark.parametrize("path", ["in/cam1/2.png", "in\\cam1.png", "part.png"])
def test_streams_are_named_as_reports_name_groups(by: str, path: str) -> None:
    monitor = Monitor([float(number) for number in range(30)], by=by)
    assert monitor.update(1.0, path).stream == group_label(path, by)


def test_the_state_of_streams_goes_on(tmp_path: Path) -> None:
    rng = RNG(10)
    paths = [f"{name}/{number}.png" for name in "ab" for number in range(40)]
    arguments: dict[str, Any] = {"by": "^(.)/", "group": r"(\d+)\.", "paths": paths}
    calibration = rng.normal(size=80).tolist()
    whole, halves = Monitor(calibration, **arguments), Monitor(calibration, **arguments)
    for number, score in enumerate(rng.normal(3.0, size=300).tolist()):
        path = f"{'abc'[number % 3]}/{number // 6}.png"
        assert whole.update(score, path) == halves.update(score, path)
        halves.save(tmp_path / "line.json")
        halves = Monitor.read(tmp_path / "line.json")
        assert halves.reading[1:] == whole.reading[1:]
    assert whole.changed_at is not None
    whole.save(tmp_path / "whole.json")
    assert (tmp_path / "whole.json").read_text() == (tmp_path / "line.json").read_text()


def test_a_state_of_one_stream_of_the_first_version_goes_on(tmp_path: Path) -> None:
    rng = RNG(11)
    scores = rng.normal(0.8, size=60).tolist()
    monitor = Monitor(rng.normal(size=60).tolist(), group=r"(\d+)/", parts=50, threshold=2.0)
    for number in range(31):
        monitor.update(scores[number], f"{number // 2}/x.png")
    stream = monitor.streams[""]
    first_version = {
        "version": 1,
        "calibration": list(monitor.calibration),
        "false_alarm_probability": 0.01,
        "defect_share": 0.1,
        "group": r"(\d+)/",
        "parts": 50,
        "threshold": 2.0,
        "images": 31,
        "changed_at": None,
        "log_capital": stream.log_capital,
        "shares": stream.shares,
        "part": "15",
        "factors": stream.factors,
    }
    (tmp_path / "line.json").write_text(json.dumps(first_version))
    again = Monitor.read(tmp_path / "line.json")
    for number in range(31, 60):
        path = f"{number // 2}/x.png"
        assert again.update(scores[number], path) == monitor.update(scores[number], path)
    assert again.threshold == 2.0


def test_ties_count_by_half() -> None:
    monitor = Monitor([1.0] * 10 + [2.0] * 10)
    assert [monitor.update(score).p_value for score in (0.0, 1.0, 1.5, 2.0, 3.0)] == [
        1.0,
        0.75,
        0.5,
        0.25,
        0.0,
    ]


def test_threads_lose_no_image() -> None:
    scores = RNG(6).normal(size=200).tolist()
    monitor = Monitor(scores)
    threads = [
        threading.Thread(target=lambda: [monitor.update(score) for score in scores])
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert monitor.images == 800


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"calibration": [1.0] * 4}, "4 calibration images of different parts are too few for an"),
        ({"calibration": []}, "0 calibration images of different parts are too few for an alarm"),
        ({"parts": 4}, "4 calibration images of different parts are too few for an alarm"),
        ({"parts": 31}, "parts must not exceed the 30 calibration scores, got 31"),
        ({"calibration": [math.nan] * 30}, "calibration must be finite scores"),
        ({"false_alarm_probability": 0.0}, "false_alarm_probability must lie between 0 and 1"),
        ({"by": "cam("}, r"by 'cam\(' is not a regular expression"),
        ({"group": "["}, r"group '\[' is not a regular expression"),
        ({"paths": ["a"]}, "paths must name 30 calibration images, got 1"),
        ({"calibration": [1.0] * 5, "by": "x"}, "few for an alarm with a probability of 0.005"),
        ({"defect_share": 0.5}, "defect_share must lie between 0 and 0.5, got 0.5"),
    ],
)
def test_what_cannot_be_is_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Monitor(**{"calibration": [float(number) for number in range(30)], **arguments})  # type: ignore[arg-type]


def test_a_score_that_is_not_finite_changes_nothing() -> None:
    monitor = Monitor([float(number) for number in range(30)])
    with pytest.raises(ValueError, match="score must be a finite number, got nan"):
        monitor.update(math.nan)
    assert monitor.images == 0


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"version": 1}', '{"version": 9}', "\xff"])
def test_another_file_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "line.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=r"line.json' is (not a file that a Monitor|of another)"):
        Monitor.read(tmp_path / "line.json")


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (["images"], None),
        (["images"], -1),
        (["changed_at"], 9),
        (["calibration"], ["a"]),
        (["threshold"], "a"),
        (["own"], {"a": [["b"], 2]}),
        (["by"], "("),
        *[(["streams", "", "log_capital"], value) for value in ("1", None, math.nan)],
        *[(["streams", "", "shares"], value) for value in ([], ["a"] * 5, [math.inf] * 5, 3)],
        *[(["streams", "", "factors"], value) for value in (3, [3], [[1.0]], [["a"] * 5])],
        (["streams", "", "images"], "4"),
        (["streams", "", "changed_at"], "1"),
    ],
)
def test_a_damaged_state_is_named(keys: list[str], value: object, tmp_path: Path) -> None:
    file = tmp_path / "line.json"
    monitor = Monitor([float(number) for number in range(30)], threshold=1.0)
    monitor.update(3.0)
    monitor.save(file)
    state = json.loads(file.read_text())
    part = state
    for key in keys[:-1]:
        part = part[key]
    part[keys[-1]] = value
    file.write_text(json.dumps(state))
    with pytest.raises(
        ValueError, match=r"line.json' is not a file that a Monitor saved, or is damaged"
    ):
        Monitor.read(file)


def test_evidence_does_not_overflow() -> None:
    monitor = Monitor([float(number) for number in range(300)])
    for _ in itertools.repeat(None, 5000):
        reading = monitor.update(1000.0)
    assert math.isfinite(reading.evidence)
