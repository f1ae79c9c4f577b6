"""Who may decide the threshold: good images at a rate of false alarms, or labelled images too.

    python -m benchmarks.threshold_rules --root DIR --out DIR

Each data set is fitted once. Kept are the scores of training images, each scored without its own
atoms, and those of images that were not trained on. Validation sets are then drawn from the latter:
a few good and a few defective images. Every rule chooses a threshold from each set. Its false
alarms and misses are counted among the other images that were not trained on. Writes
``threshold-rules.json`` (the scores), ``rules.csv`` and ``README.md``; an interrupted command,
given again, goes on where it stopped.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from anomalib_sgfr.post_processing.calibration import nominal_scores, select_evenly
from anomalib_sgfr.post_processing.thresholds import (
    combined_threshold,
    conformal_threshold,
    f1_threshold,
)
from benchmarks.common import data
from benchmarks.common.cases import Case, run_cases, seeds, title
from benchmarks.common.engine import fitted
from benchmarks.common.records import read_rows, write_text
from benchmarks.common.records import table as markdown

__all__ = ["main", "report"]

Scores: TypeAlias = NDArray[np.float32]
Rule: TypeAlias = Callable[[Scores, Scores, Scores], float]

_DATA = ("mtd:canonical", "elpv-mono")
_IMAGES = 300
_LEAST_GOOD = 100  # good images not trained on: the largest validation set has half of them
_RATE = 0.01
_DRAWS = 200
_BAD = (1, 2, 3, 5, 10, 20)
_GOOD = (2, 5, 10, 20, 50)
_SHOWN = ((3, 2), (5, 10), (10, 10), (20, 2), (20, 50))  # defective and good images

_COUNTED = ("false_alarms", "misses", "balanced", "swing")
_SUMMARIES = {  # of a rule over all sizes: column of the table, and how it is summarised
    "false alarms": ("false_alarms_median", "mean"),
    "its 90%": ("false_alarms_p90", "mean"),
    "the worst": ("false_alarms_p90", "max"),
    "misses": ("misses_median", "mean"),
    "90% of them": ("misses_p90", "mean"),
    "balanced error": ("balanced_median", "mean"),
    "one image less": ("swing_p99", "max"),
}


def _evaluate(case: Case) -> list[dict[str, Any]]:
    """Raw scores, of a fit that leaves enough good images over."""
    module = data.build(case.dataset, case.root, case.split, case.seed)
    samples = module.test_data.samples
    is_good = data.kinds(samples) == "good"
    training = (
        np.random.default_rng(case.seed)
        .permutation(module.train_data.samples["image_path"])
        .tolist()
    )
    left_over = training[: min(max(0, _LEAST_GOOD - int(is_good.sum())), len(training) // 2)]
    if left_over:
        training = training[len(left_over) :]
        data.keep_training_images(module, training)
    model = fitted(module, case.seed, post_processor=False)

    def scores(paths: Sequence[str], *, leave_out: bool) -> list[float]:
        found = nominal_scores(model.model, model.pre_processor, paths, leave_out=leave_out).scores
        return [float(f"{score:.6g}") for score in found]

    paths = samples["image_path"]
    return [
        {
            "calibration": scores(select_evenly(training, _IMAGES), leave_out=True),
            "good": scores([*paths[is_good], *left_over], leave_out=False),
            "bad": scores(paths[~is_good].tolist(), leave_out=False),
        }
    ]


def _conformal(good: Scores, bad: Scores, training: Scores) -> float:
    del bad
    return conformal_threshold(_pooled(good, training), _RATE)


def _f1(good: Scores, bad: Scores, training: Scores) -> float:
    del training
    return f1_threshold(_listed(good), _listed(bad))


def _ten_of_each(good: Scores, bad: Scores, training: Scores) -> float:
    return (_f1 if min(len(good), len(bad)) >= 10 else _conformal)(good, bad, training)  # noqa: PLR2004


def _combined(cost: float) -> Rule:
    def rule(good: Scores, bad: Scores, training: Scores) -> float:
        nominal = _pooled(good, training)
        return combined_threshold(
            good=_listed(good), bad=_listed(bad), calibration=nominal, rate=_RATE, alarm_cost=cost
        ).threshold

    return rule


_RULES: dict[str, Rule] = {
    "largest F1": _f1,
    "good images alone": _conformal,
    "F1 from ten of each on": _ten_of_each,
    "bounds and good validation images, cost 1": _combined(1.0),
    "the same, cost 2 (in use)": _combined(2.0),
    "the same, cost 4": _combined(4.0),
}


def _listed(scores: Scores) -> list[float]:
    return scores.tolist()


def _pooled(good: Scores, training: Scores) -> list[float]:
    return _listed(np.concatenate((training, good)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and report; returns the exit code."""
    return run_cases("threshold_rules", __doc__, _DATA, _evaluate, report, arguments)


def _drawn(scores: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What each rule comes to: a row for each number of defective and of good images."""
    training, good, bad = (
        np.array(scores[name], np.float32) for name in ("calibration", "good", "bad")
    )
    for defects in _BAD:
        for nominal in _GOOD:
            if defects >= len(bad) or nominal >= len(good):
                continue
            rng = np.random.default_rng((scores["seed"], defects, nominal))
            found: dict[str, list[tuple[float, ...]]] = {name: [] for name in _RULES}
            for _ in range(_DRAWS):
                chosen_good, good_rest = np.split(rng.permutation(good), [nominal])
                chosen_bad, bad_rest = np.split(rng.permutation(bad), [defects])
                fewer = (
                    (chosen_good[1:], chosen_bad)
                    if rng.random() < 0.5  # noqa: PLR2004
                    else (chosen_good, chosen_bad[1:])
                )
                for name, rule in _RULES.items():
                    threshold = rule(chosen_good, chosen_bad, training)
                    without = rule(*fewer, training) if min(map(len, fewer)) else threshold
                    alarms, missed = (
                        float((good_rest > threshold).mean()),
                        float((bad_rest <= threshold).mean()),
                    )
                    swing = abs(float((good_rest > without).mean()) - alarms)
                    found[name].append((alarms, missed, (alarms + missed) / 2.0, swing))
            for name, rows in found.items():
                columns = dict(zip(_COUNTED, np.transpose(rows), strict=True))
                yield {
                    "data": title(scores["dataset"], scores["split"]),
                    "seed": scores["seed"],
                    "rule": name,
                    "defective": defects,
                    "good": nominal,
                    **{
                        f"{column}_{suffix}": round(100.0 * float(np.quantile(values, share)), 2)
                        for column, values in columns.items()
                        for suffix, share in (("median", 0.5), ("p90", 0.9), ("p99", 0.99))
                    },
                }


def report(folder: Path) -> None:
    """Write ``rules.csv`` and ``README.md``, by the same draws every time."""
    found = read_rows(folder / "threshold-rules.json")
    table = pd.DataFrame([row for scores in found for row in _drawn(scores)])
    write_text(folder / "rules.csv", table.to_csv(index=False, lineterminator="\n"))
    all_sizes: list[list[str]] = []
    some_sizes: list[list[str]] = []
    for (name, rule), rows in table.groupby(["data", "rule"], sort=False):
        cells = [rows[column].agg(how) for column, how in _SUMMARIES.values()]
        all_sizes.append([str(name), str(rule), *(f"{cell:.1f}" for cell in cells)])
        of: Any = rows.groupby(["defective", "good"]).mean(numeric_only=True).to_dict("index")
        some_sizes.append([str(name), str(rule), *(_sizes(of, size) for size in _SHOWN)])
    shown = [f"{bad} defective, {good} good" for bad, good in _SHOWN]
    write_text(
        folder / "README.md",
        f"""\
# Who may decide the threshold

`python -m benchmarks.threshold_rules --root DIR`: {_DRAWS} validation sets of
{", ".join(map(str, _BAD))} defective and {", ".join(map(str, _GOOD))} good images each, drawn from
images that were not trained on. False alarms and misses are counted among the others, in percent;
the balanced error is their mean. Good images decide at a rate of {100 * _RATE:g}%: at most
{_IMAGES} training images, each scored without its own atoms, and the good validation images. Seeds
{seeds(found)}.

## All sizes of validation sets

Mean over the sizes of the median, and of the 90th percentile; the largest 90th percentile; and how
far one labelled image less moves the rate of false alarms, in points: the 99th percentile, at the
worst size.

{markdown(["data", "rule", *_SUMMARIES], all_sizes)}

## Some sizes

Median (90th percentile) of false alarms / of misses.

{markdown(["data", "rule", *shown], some_sizes)}
""",
    )


def _sizes(of: dict[tuple[int, int], dict[str, float]], size: tuple[int, int]) -> str:
    """Errors at one size of validation sets, if there were enough images for it."""
    if size not in of:
        return "-"
    at = of[size]
    return (
        f"{at['false_alarms_median']:.1f} ({at['false_alarms_p90']:.1f}) / "
        f"{at['misses_median']:.1f} ({at['misses_p90']:.1f})"
    )


if __name__ == "__main__":
    sys.exit(main())
