"""Rules for a threshold: compared on images that none of them saw."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anomalib_sgfr.post_processing.thresholds import combined_threshold
from benchmarks import threshold_rules

HEADER = "| data | rule |"


@pytest.fixture(autouse=True)
def few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threshold_rules, "_DRAWS", 8)


def drawn_scores(good_mean: float) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {
        "dataset": "made",
        "split": None,
        "seed": 0,
        "calibration": rng.normal(5.0, 0.5, 100).tolist(),
        "good": rng.normal(good_mean, 0.5, 60).tolist(),
        "bad": rng.normal(7.5, 1.0, 40).tolist(),
    }


@pytest.mark.usefixtures("small_images")
def test_measures_a_folder_of_ones_own(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--root", str(parts), "--data", "folder", "--seeds", "0", "--out", str(tmp_path)]
    assert threshold_rules.main(arguments) == 0
    (scores,) = json.loads((tmp_path / "threshold-rules.json").read_text(encoding="utf-8"))
    # half of the training images are held out of the fit: there are too few good test images
    assert {name: len(scores[name]) for name in ("calibration", "good", "bad")} == {
        "calibration": 6,
        "good": 12,
        "bad": 6,
    }
    assert max(scores["good"]) < min(scores["bad"])
    with (tmp_path / "rules.csv").open(encoding="utf-8") as lines:
        rows = list(csv.DictReader(lines))
    assert {row["rule"] for row in rows} == set(threshold_rules._RULES)
    assert {(int(row["defective"]), int(row["good"])) for row in rows} == {
        (bad, good) for bad in (1, 2, 3, 5) for good in (2, 5, 10)
    }
    readme = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert readme.count(HEADER) == 2
    monkeypatch.setattr(threshold_rules, "_evaluate", None)  # nothing is done twice
    assert threshold_rules.main(arguments) == 0
    assert (tmp_path / "README.md").read_text(
        encoding="utf-8"
    ) == readme  # and the draws are the same


def test_what_is_counted_is_what_a_rule_comes_to_on_the_rest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[tuple[int, int, int]] = []

    def rule(
        good: threshold_rules.Scores, bad: threshold_rules.Scores, training: threshold_rules.Scores
    ) -> float:
        seen.append((len(good), len(bad), len(training)))
        return 6.0

    monkeypatch.setattr(threshold_rules, "_RULES", {"six": rule})
    monkeypatch.setattr(threshold_rules, "_BAD", (2,))
    monkeypatch.setattr(threshold_rules, "_GOOD", (59,))
    monkeypatch.setattr(threshold_rules, "_DRAWS", 400)
    scores = drawn_scores(5.0)
    (row,) = threshold_rules._drawn(scores)
    assert set(seen) == {(59, 2, 100), (58, 2, 100), (59, 1, 100)}
    assert row["false_alarms_p99"] in {0.0, 100.0}  # of the one good image that is left
    missed = np.mean(np.array(scores["bad"]) <= 6.0) * 100
    assert row["misses_median"] == pytest.approx(missed, abs=3.0)
    assert row["swing_p99"] == 0.0


def test_rules_are_what_their_names_say() -> None:
    good, bad, training = (
        np.float32(values) for values in ([1.0, 2.0, 3.0], [4.5, 5.0, 6.0], [1.0] * 97)
    )
    rules = threshold_rules._RULES
    assert rules["largest F1"](good, bad, training) == 3.75
    assert rules["good images alone"](good, bad, training) == 3.0
    assert rules["F1 from ten of each on"](good, bad, training) == 3.0
    many = np.tile(good, 4), np.tile(bad, 4)
    assert rules["F1 from ten of each on"](*many, training) == 3.75
    nominal = [*training.tolist(), *good.tolist()]
    for name, cost in (("the same, cost 2 (in use)", 2.0), ("the same, cost 4", 4.0)):
        expected = combined_threshold(
            good=good.tolist(), bad=bad.tolist(), calibration=nominal, rate=0.01, alarm_cost=cost
        )
        assert rules[name](good, bad, training) == expected.threshold


def test_the_committed_tables_are_of_the_committed_scores() -> None:
    folder = Path(threshold_rules.__file__).parent / "results" / "threshold-rules"
    scores = json.loads((folder / "threshold-rules.json").read_text(encoding="utf-8"))
    readme = (folder / "README.md").read_text(encoding="utf-8")
    with (folder / "rules.csv").open(encoding="utf-8") as lines:
        rows = list(csv.DictReader(lines))
    data = [threshold_rules.title(each["dataset"], each["split"]) for each in scores]
    assert list(dict.fromkeys(row["data"] for row in rows)) == data
    assert readme.count("\n| ") == 2 * (1 + len(data) * len(threshold_rules._RULES))
