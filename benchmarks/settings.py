"""What settings chosen by drawn defects are worth, beside those chosen by real ones.

    python -m benchmarks.settings --root mvtec=DIR --out DIR

``anomalib-sgfr sensitivity --suggest`` fits settings to at most 100 training images and recommends
one by the same drawn defects. Here each of its fits also scores all test images: the gain is of the
recommended setting over the present one, the regret is of it against the setting that is the best
by the real defects, at the same cost and at any. Writes ``settings.json`` and ``README.md``; an
interrupted command, given again, goes on where it stopped.
"""

import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from anomalib_sgfr import Inspector, Sgfr
from anomalib_sgfr.cli.settings import compare_settings
from anomalib_sgfr.post_processing.calibration import select_evenly
from anomalib_sgfr.report.sensitivity import (
    Sensitivity,
    SettingResult,
    better_settings,
    measure_sensitivity,
)
from benchmarks.common import data
from benchmarks.common.cases import Case, alike, run_cases, seeds, title
from benchmarks.common.engine import quiet_fit
from benchmarks.common.records import Row, read_rows, table, write_text
from benchmarks.common.scores import accuracy
from benchmarks.sensitivity import region_of

__all__ = ["main", "report"]

_DATA = (
    "mtd:canonical",
    "mvtec:bottle",
    "mvtec:grid",
    "kolektor",
    "mvtec_3d:tire",
    "small:cookies",
    "small:hazelnut",
    "elpv-mono",
)
_NUMBER = 10  # drawn defects of each kind, contrast and size, as the command draws
_GOOD = 60  # images to draw into
_METRICS = ("image_AUROC", "recall")
_SAME_COST = 1.25  # ratio of times, as the command counts


def _evaluate(case: Case) -> list[Row]:
    """Of each setting, what it finds of drawn and of real defects."""
    module = data.build(case.dataset, case.root, case.split, case.seed, num_workers=0)
    torch.manual_seed(case.seed)
    model = Sgfr(seed=case.seed, evaluator=False, visualizer=False)
    quiet_fit(model, module)
    samples = module.test_data.samples
    paths, kinds = samples["image_path"].tolist(), data.kinds(samples)
    good = [path for path, kind in zip(paths, kinds, strict=True) if kind == "good"]
    drawn_into = [Path(path) for path in select_evenly(good, _GOOD)]
    real: list[Row] = []

    def measure(inspector: Inspector, fitted: Sgfr) -> Sensitivity:
        found = list(inspector(iter(paths)))
        scores = np.array([each.score for each in found])
        labels = np.array([each.label for each in found])
        real.append(
            {
                "image_AUROC": accuracy(scores, kinds, None)["metrics"]["image_AUROC"],
                "recall": labels[kinds != "good"].mean(),
                "false_alarms": labels[kinds == "good"].mean(),
            }
        )
        region = region_of(fitted, case.split)
        return measure_sensitivity(inspector, drawn_into, region, number=_NUMBER, seed=case.seed)

    settings = compare_settings(model, measure, drawn_into[0])
    return [
        {**setting._asdict(), **{name: float(value) for name, value in row.items()}}
        for setting, row in zip(settings, real, strict=True)
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and report; returns the exit code."""
    return run_cases("settings", __doc__, _DATA, _evaluate, report, arguments)


def report(folder: Path) -> None:
    """Write ``README.md`` from ``settings.json``."""
    found = read_rows(folder / "settings.json")
    cases = dict.fromkeys((row["dataset"], row["split"], row["seed"]) for row in found)
    gains: dict[str, list[dict[str, float]]] = {"the same cost": [], "any cost": []}
    lines = []
    for dataset, split, seed in cases:
        rows = alike(found, dataset=dataset, split=split, seed=seed)
        settings = [
            SettingResult(**{name: row[name] for name in SettingResult._fields}) for row in rows
        ]
        same, costlier = better_settings(settings)
        limits = (_SAME_COST * settings[0].seconds, float("inf"))
        for own, limit, better in zip(
            gains.values(), limits, (same, sorted([*same, *costlier], key=_rate)), strict=True
        ):
            chosen = rows[settings.index(better[0])] if better else rows[0]
            allowed = [row for row in rows if row["seconds"] <= limit]
            own.append(_compared(chosen, rows[0], allowed))
        lines += [
            [
                f"{title(dataset, split)}, seed {seed}",
                row["name"],
                f"{row['seconds'] / rows[0]['seconds']:.2f}",
                *(
                    f"{100 * value:.1f}"
                    for value in (
                        setting.rate,
                        row["recall"],
                        row["image_AUROC"],
                        setting.alarms / setting.images,
                        row["false_alarms"],
                    )
                ),
                "yes" if setting in (*same[:1], *costlier[:1]) else "",
            ]
            for setting, row in zip(settings, rows, strict=True)
        ]
    summary = [
        [
            f"{name.replace('_', ' ')}, {cost}",
            *(
                f"{statistics.mean(100 * row[f'{name} {what}'] for row in own):+.1f}"
                f" ({min(100 * row[f'{name} {what}'] for row in own):+.1f} to"
                f" {max(100 * row[f'{name} {what}'] for row in own):+.1f})"
                for what in ("gain", "regret", "of any")
            ),
        ]
        for name in _METRICS
        for cost, own in gains.items()
    ]
    write_text(
        folder / "README.md",
        f"""\
# Settings chosen by drawn defects

`python -m benchmarks.settings`, seeds {seeds(found)}. Percentage points, means over the data sets
and their range. Gain: of the recommended setting, or the present one where none is recommended,
over the present one. Regret: what the best setting by the real defects has more than the
recommended one; its choice knows the test images, so that it is above 0 by chance alone. Mean of
all: the gain of a setting taken by chance. At the same cost only settings that take at most a
quarter more time count; times that were taken beside other work are rough. That alarms count
against a setting only where a false-alarm rate of 1% does not explain them was decided with all
data sets but solar cells in view: before, tires had no recommendation, for one alarm of 25 images.

{table(["real defects", "gain", "regret", "mean of all"], summary)}

Time is relative to the present settings; all else percent. Recall is at each model's own threshold.

{
            table(
                [
                    "data",
                    "setting",
                    "time",
                    "drawn defects found",
                    "real recall",
                    "image AUROC",
                    "alarms, drawn into",
                    "alarms, all good",
                    "recommended",
                ],
                lines,
            )
        }
""",
    )


def _rate(setting: SettingResult) -> float:
    return -setting.rate


def _compared(chosen: Row, now: Row, allowed: Sequence[Row]) -> dict[str, float]:
    """Gain, regret and the mean gain of the allowed settings, by each metric."""
    return {
        f"{name} {what}": value
        for name in _METRICS
        for what, value in (
            ("gain", chosen[name] - now[name]),
            ("regret", max(row[name] for row in allowed) - chosen[name]),
            ("of any", statistics.mean(row[name] for row in allowed) - now[name]),
        )
    }


if __name__ == "__main__":
    sys.exit(main())
