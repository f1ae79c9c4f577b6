"""Curves of detection, their smallest size, and the measurement with a model that is known."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from sklearn.isotonic import IsotonicRegression

from anomalib_sgfr.report.sensitivity import (
    DetectionCurve,
    Sensitivity,
    SettingResult,
    default_sizes,
    measure_sensitivity,
    monotone,
    recommend,
    smallest_size,
)
from anomalib_sgfr.report.sensitivity_page import (
    SensitivityFacts,
    render_sensitivity,
    sensitivity_as_json,
)
from anomalib_sgfr.report.statistics import interval

GREY = 128
FACTS = SensitivityFacts(
    made="2026-01-01 00:00",
    checkpoint="<model>.ckpt",
    sha256="0" * 64,
    versions={"anomalib-sgfr": "1"},
    threshold=0.5,
    basis="40 good images",
    false_alarm_rate=0.01,
    seed=0,
    has_region=False,
    mm_per_pixel=None,
    notes=[],
)


class Found(NamedTuple):
    score: float
    label: bool
    place: tuple[int, int] | None


class Counter:
    """Finds a defect that changes enough pixels, right of a column."""

    def __init__(self, pixels: int, column: float = 0.0) -> None:
        self.pixels, self.column = pixels, column

    def __call__(self, frames: list[NDArray[np.float32]]) -> list[Found]:
        return [self.one(frame) for frame in frames]

    def one(self, frame: NDArray[np.float32]) -> Found:
        changed = np.argwhere(np.abs(frame[..., 0] - GREY / 255) > 0.02)
        if len(changed) < self.pixels:
            return Found(0.1, label=False, place=(0, 0))
        row, column = changed.mean(0)
        label = bool(column >= self.column * frame.shape[1])
        return Found(0.9, label=label, place=(round(row), round(column)))


def everywhere(_: Path, size: tuple[int, int]) -> NDArray[np.bool_]:
    return np.ones(size, np.bool_)


@pytest.fixture
def good(tmp_path: Path) -> list[Path]:
    """Four flat images, of 100 by 160 pixels."""
    paths = [tmp_path / f"{number}.png" for number in range(4)]
    for path in paths:
        Image.fromarray(np.full((100, 160, 3), GREY, np.uint8)).save(path)
    return paths


def measure(inspect: Any, good: list[Path], **more: Any) -> Sensitivity:
    given: dict[str, Any] = {"kinds": ["spot"], "contrasts": [0.3], "number": 12, **more}
    return measure_sensitivity(inspect, good, everywhere, **given)


@pytest.mark.parametrize("seed", range(5))
def test_monotone_is_isotonic_regression(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rates, weights = rng.random((4, 9)), rng.integers(1, 30, 9).astype(float)
    found = monotone(rates, weights)
    for row, expected in zip(rates, found, strict=True):
        model = IsotonicRegression().fit(np.arange(9), row, sample_weight=weights)
        np.testing.assert_allclose(expected, model.predict(np.arange(9)), atol=1e-9)


def test_the_smallest_size_is_interpolated_by_its_logarithm() -> None:
    found = smallest_size([10, 40], [8, 10], [10, 10])
    assert found.size == pytest.approx(20.0)
    assert (found.low, found.high, found.is_bound) == (0.0, None, False)
    # an exception among larger sizes does not hide it, nor one among smaller ones show it
    assert smallest_size([5, 10, 20, 40], [20, 0, 0, 20], [20] * 4).size == pytest.approx(
        10 ** np.interp(0.9, [40 / 120, 1], np.log10([20, 40])), rel=0.05
    )


def test_the_smallest_size_where_all_or_nothing_is_found() -> None:
    every = smallest_size([3, 6, 12], [50, 50, 50], [50] * 3)
    assert every == (3.0, 0.0, 3.0, True)
    nothing = smallest_size([3, 6, 12], [0, 0, 0], [50] * 3)
    assert nothing == (None, 12.0, None, False)
    step = smallest_size([3, 6, 12, 24], [0, 0, 50, 50], [50] * 4)
    assert step[1:] == (6.0, 12.0, False)  # anywhere between these
    assert smallest_size([3, 6], [0, 0], [0, 0]).size is None
    unsure = smallest_size([3, 6, 12], [0, 1, 9], [10] * 3)  # 90% only just
    assert unsure.size == 12.0
    assert unsure.high is None


def test_sizes_that_were_not_drawn_do_not_count() -> None:
    assert smallest_size([3, 6, 12], [0, 0, 30], [30, 0, 30]) == smallest_size(
        [3, 12], [0, 30], [30, 30]
    )


@pytest.mark.parametrize("slope", [1.5, 3.0, 6.0])
@pytest.mark.parametrize("true", [8.0, 18.0, 30.0])
def test_the_interval_has_the_true_size_as_often_as_it_says(slope: float, true: float) -> None:
    """Also where the probability rises from nothing to one between two drawn sizes."""
    rng = np.random.default_rng(0)
    sizes = np.geomspace(3, 60, 7)
    # a logistic curve, which is 90% at the true size
    rates = 1.0 / (1.0 + np.exp(-slope * np.log(sizes / true)) / 9.0)
    hits, number = 0, 60
    for _ in range(number):
        found = smallest_size(sizes.tolist(), rng.binomial(30, rates).tolist(), [30] * 7)
        hits += found.low <= true <= (np.inf if found.high is None else found.high)
    assert hits >= 0.93 * number


def test_default_sizes_follow_the_image() -> None:
    assert default_sizes((400, 900)) == pytest.approx(np.geomspace(6, 120, 7).tolist(), rel=6e-3)
    small = default_sizes((10, 10))
    assert small[0] == 2.0
    assert small == sorted(set(small))


def test_what_a_known_model_finds(good: list[Path]) -> None:
    sizes = [4.0, 8.0, 16.0, 32.0]
    # a spot of 16 pixels has at least 100 of them
    found = measure(Counter(100), good, sizes=sizes)
    (curve,) = found.curves
    assert curve.drawn == [12] * 4
    assert curve.found[:2] == [0, 0]
    assert curve.found[3] == 12
    assert curve.located == curve.found
    assert found.drawn == 48
    assert found.missed == 48 - sum(curve.found)
    assert (found.images, found.alarms, found.same_size) == (4, [], True)
    assert sum(place.drawn for place in found.places) == 48
    assert sum(place.missed for place in found.places) == found.missed
    assert curve.smallest.size is not None
    assert 8.0 < curve.smallest.size <= 32.0
    assert measure(Counter(100), good, sizes=sizes) == found
    assert measure(Counter(100), good, sizes=sizes, seed=1).examples != found.examples


def test_a_peak_elsewhere_is_found_but_not_at_its_place(good: list[Path]) -> None:
    def inspect(frames: list[NDArray[np.float32]]) -> list[Found]:
        return [
            Found(1.0, bool((np.abs(frame - GREY / 255) > 0.02).any()), (0, 0)) for frame in frames
        ]

    (curve,) = measure(inspect, good, sizes=[20.0]).curves
    assert curve.found == [12]
    assert curve.located[0] < 4


def test_more_is_missed_where_nothing_is_inspected(good: list[Path]) -> None:
    found = measure(Counter(20, column=0.5), good, sizes=[10.0, 14.0], number=300)
    worst = found.worst_places
    assert worst
    assert all(place.right <= 0.5 + 0.51 * (place.right - place.left) for place in worst)
    left = [place for place in found.places if place.right <= 0.5]
    assert all(place.missed == place.drawn for place in left)
    cells = {(place.bottom - place.top, place.right - place.left) for place in found.places}
    ((tall, wide),) = {(round(a, 6), round(b, 6)) for a, b in cells}
    assert tall * 100 == pytest.approx(wide * 160, rel=0.2)  # about square


def test_defects_lie_in_the_region(good: list[Path]) -> None:
    def region(_: Path, size: tuple[int, int]) -> NDArray[np.bool_]:
        inside = np.zeros(size, np.bool_)
        inside[:40, 100:] = True
        return inside

    seen: list[NDArray[np.bool_]] = []

    def inspect(frames: list[NDArray[np.float32]]) -> list[Found]:
        seen.extend(np.abs(frame[..., 0] - GREY / 255) > 1e-4 for frame in frames)
        return [Found(0.0, label=False, place=None) for _ in frames]

    measure_sensitivity(inspect, good, region, number=4, contrasts=[0.3], sizes=[6.0, 60.0])
    changed = np.any(seen, 0)
    assert changed.any()
    assert not changed[40:].any()
    assert not changed[:, :100].any()


def test_images_that_are_alarms_or_cannot_be_read_are_left_out(good: list[Path]) -> None:
    Image.fromarray(np.zeros((100, 160, 3), np.uint8)).save(good[0])
    good[1].write_bytes(b"no image")
    damaged: dict[Path, str] = {}
    found = measure(Counter(100), good, sizes=[20.0], damaged=damaged)
    assert found.images == 2
    assert found.alarms == [str(good[0])]
    assert list(damaged) == [good[1]]
    assert found.drawn == 12
    with pytest.raises(ValueError, match=r"good: 1 of 2 images are above .* 1 cannot be read"):
        measure(Counter(100), good[:2], damaged={})
    with pytest.raises(OSError, match="cannot"):
        measure(Counter(100), good)


def test_images_of_several_sizes(good: list[Path]) -> None:
    Image.fromarray(np.full((300, 80, 3), GREY, np.uint8)).save(good[0])
    found = measure(Counter(10), good)
    assert not found.same_size
    assert found.image_size == (100, 160)


def test_a_distortion_that_cannot_be_seen_is_not_counted(good: list[Path]) -> None:
    found = measure(Counter(10), good, kinds=["spot", "distortion"], sizes=[10.0])
    assert [curve.drawn for curve in found.curves] == [[12], [0]]
    assert "not drawn" in render_sensitivity(found, FACTS)
    assert sensitivity_as_json(found, FACTS)["curves"][1]["sizes"][0]["rate"] is None


def test_figures_and_page_say_the_same(good: list[Path]) -> None:
    found = measure(Counter(100), good, sizes=[4.0, 32.0], contrasts=[0.1, 0.3])
    facts = FACTS._replace(mm_per_pixel=0.5, notes=["Of <all> images, few."])
    figures = sensitivity_as_json(found, facts)
    for its, curve in zip(figures["curves"], found.curves, strict=True):
        size = curve.smallest.size
        assert size is not None
        assert its["smallest_size"]["pixels"]["size"] == size
        assert its["smallest_size"]["mm"]["size"] == 0.5 * size
        for row, drawn, hits in zip(its["sizes"], curve.drawn, curve.found, strict=True):
            assert (row["drawn"], row["found"]) == (drawn, hits)
            assert row["interval"] == list(interval(hits, drawn))
    assert figures["places"][-1]["bottom"] == 100
    assert figures["places"][-1]["right"] == 160
    page = render_sensitivity(found, facts)
    assert "Drawn defects are not real ones" in page
    assert "&lt;model&gt;.ckpt" in page
    assert "Of &lt;all&gt; images" in page
    assert "<script" not in page
    assert "http:" not in page
    assert "https:" not in page
    size = found.curves[-1].smallest.size
    assert f"{size:.3g} px ({0.5 * size:.3g} mm)" in page  # type: ignore[operator]
    assert "--roi" in page
    assert "--roi" not in render_sensitivity(found, facts._replace(has_region=True))


def test_the_page_of_one_tall_image(good: list[Path]) -> None:
    Image.new("RGB", (100, 400), (GREY, GREY, GREY)).save(good[0])
    page = render_sensitivity(measure(Counter(10), good[:1], sizes=[10.0]), FACTS)
    assert "in 1 good image of 400 " in page
    assert "All were drawn into 1 image: the" in page
    assert ".map{display:block;width:min(640px,160px,100%)" in page  # no higher than 640


def test_a_kind_that_is_never_found_is_not_reached(good: list[Path]) -> None:
    found = measure(Counter(10**6), good, sizes=[4.0, 32.0])
    page = render_sensitivity(found, FACTS)
    assert "not reached" in page
    assert "At no size that was drawn, up to 32 px: spot." in page
    assert sensitivity_as_json(found, FACTS)["curves"][0]["smallest_size"]["status"] == (
        "not reached"
    )


@pytest.mark.parametrize(
    ("found", "texts"),
    [
        ([40, 40], ("≤ 4 px", "95%: at most 4 px")),
        ([0, 40], ("26 px", "95%: 4 px to 32 px")),  # 4 x 8 ** 0.9
        ([0, 0], ("not reached", "95%: 32 px or more")),
        ([5, 37], ("30 px", "95%: 4 px or more")),  # 4 x 8 ** (0.775 / 0.8)
    ],
)
def test_the_smallest_size_in_words(
    good: list[Path], found: list[int], texts: tuple[str, str]
) -> None:
    curve = DetectionCurve("spot", 0.3, [4.0, 32.0], [40, 40], found, found)
    page = render_sensitivity(measure(Counter(100), good)._replace(curves=[curve]), FACTS)
    assert f"<b>{texts[0]}</b>" in page
    assert texts[1] in page


def test_a_curve_of_one_size() -> None:
    curve = DetectionCurve("spot", 0.1, [5.0], [10], [10], [10])
    assert curve.fitted.tolist() == [1.0]
    assert curve.smallest.is_bound


def setting(name: str, found: int, seconds: float, alarms: int = 1) -> SettingResult:
    return SettingResult(name, {}, seconds, drawn=400, found=found, images=50, alarms=alarms)


def test_a_setting_is_recommended_if_it_finds_significantly_more() -> None:
    now = setting("as now", 200, 0.1)
    better, best = setting("blur 2", 260, 0.1), setting("blur 8", 280, 0.12)
    slow, noisy = setting("larger", 300, 0.3), setting("noisy", 390, 0.1, alarms=9)
    said = recommend([now, setting("same", 215, 0.1), better, best, slow, noisy])
    assert said == (
        "At the same cost, take blur 8: it finds 70% of the drawn defects, 50% are found now."
        " For 3.0 times the time per image, take larger: it finds 75% of the drawn defects, 50% are"
        " found now."
    )
    said = recommend([now, setting("same", 215, 0.1), setting("worse", 90, 0.3), noisy])
    assert "keep the settings" in said
    assert "None that costs more" in said


@pytest.mark.parametrize(
    ("before", "alarms", "rate", "recommended"),
    [  # of 50 images: probabilities of so many or more by scipy.stats.binom.sf
        (0, 0, 0.01, True),
        (0, 1, 0.01, True),  # 39%
        (0, 2, 0.01, True),  # 8.9%
        (0, 3, 0.01, False),  # 1.4%
        (3, 3, 0.01, True),  # no more than now
        (0, 5, 0.05, True),  # 10.4%
        (0, 6, 0.05, False),  # 3.8%
    ],
)
def test_alarms_that_the_rate_explains_do_not_count_against_a_setting(
    before: int, alarms: int, rate: float, recommended: bool
) -> None:
    now, other = setting("as now", 200, 0.1, before), setting("blur 2", 280, 0.1, alarms)
    said = recommend([now, other], rate)
    assert ("take blur 2" in said) is recommended
    more = f"Of 50 good images {alarms} would be above its threshold, of 50 now {before}: so few"
    assert (more in said) is (recommended and alarms > before)
