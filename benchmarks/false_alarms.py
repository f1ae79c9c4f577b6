"""Thresholds without defects: chosen and realised rates of false alarms.

    python -m benchmarks.false_alarms --root DIR --out DIR

The threshold comes from the training images, each scored without its own atoms or without those of
its part (of MTD all photographs of a tile; of ELPV nothing but the cell is known), or from a fifth
of the parts, held out of the fit. How many good test images exceed it (none seen in the fit) is
the realised rate. Writes ``false-alarms.json``, ``README.md`` and a plot; an interrupted command,
given again, goes on where it stopped.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anomalib_sgfr.post_processing.calibration import nominal_scores, select_evenly
from anomalib_sgfr.post_processing.thresholds import conformal_threshold
from benchmarks.common import data
from benchmarks.common.cases import Case, alike, median, run_cases, seeds, title
from benchmarks.common.engine import fitted
from benchmarks.common.figures import plt, save_figure
from benchmarks.common.records import read_rows, table, write_text

__all__ = ["main", "report"]

_DATA = ("mtd:tile", "elpv-mono")
_RATES = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2)
_SHOWN = (0.01, 0.05)
_HELD_OUT = 0.2
_IMAGES = 300
_SOURCES = {
    "leave-one-out": "training images, without their own atoms",
    "leave-part-out": "training images, without their part's atoms",
    "held-out": "a fifth of the parts, not trained on",
}


def _evaluate(case: Case) -> list[dict[str, Any]]:
    """Realised rates of false alarms and detection, for each source and each chosen rate."""
    part_of = data.part_of(case.dataset)
    rows: list[dict[str, Any]] = []
    for apart in (False, True):
        module = data.build(case.dataset, case.root, case.split, case.seed)
        order = (
            np.random.default_rng(case.seed)
            .permutation(module.train_data.samples["image_path"])
            .tolist()
        )
        if apart:
            held_out = _part_by_part(order, part_of)
            data.keep_training_images(module, [path for path in order if path not in held_out])
            order = sorted(held_out)
        model = fitted(module, case.seed, post_processor=False)
        samples = module.test_data.samples
        tested = nominal_scores(
            model.model, model.pre_processor, samples["image_path"].tolist(), leave_out=False
        ).scores
        good = data.kinds(samples) == "good"
        for source in ["held-out"] if apart else ["leave-one-out", "leave-part-out"]:
            group = None if source == "leave-one-out" else part_of
            chosen = select_evenly(order, _IMAGES, group)
            nominal = nominal_scores(model.model, model.pre_processor, chosen, group=group).scores
            units = [part_of(path) if group else path for path in chosen]
            rows += [_row(source, rate, nominal, units, np.array(tested), good) for rate in _RATES]
    return rows


def _part_by_part(paths: Sequence[str], part_of: Callable[[str], str]) -> set[str]:
    """A fifth of the images, and all others of the same parts, so that none is trained on."""
    parts: dict[str, list[str]] = {}
    for path in paths:
        parts.setdefault(part_of(path), []).append(path)
    chosen: set[str] = set()
    for images in parts.values():
        if len(chosen) < round(_HELD_OUT * len(paths)):
            chosen.update(images)
    return chosen


def _row(
    source: str,
    rate: float,
    nominal: list[float],
    units: list[str],
    scores: NDArray[np.float64],
    good: NDArray[np.bool_],
) -> dict[str, Any]:
    threshold = conformal_threshold(nominal, rate, units)
    return {
        "source": source,
        "rate": rate,
        "nominal_images": len(nominal),
        "nominal_parts": len(set(units)),
        "good_images": int(good.sum()),
        "threshold": round(threshold, 5),
        "false_alarms": round(float((scores[good] > threshold).mean()), 5),
        "detected": round(float((scores[~good] > threshold).mean()), 5),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and report; returns the exit code."""
    return run_cases("false_alarms", __doc__, _DATA, _evaluate, report, arguments)


def report(folder: Path) -> None:
    """Write ``README.md`` and the plot from ``false-alarms.json``: medians over seeds."""
    found = read_rows(folder / "false-alarms.json")
    figure, axes = plt.subplots(
        1, len(_SOURCES), figsize=(13, 4), sharey=True, layout="constrained"
    )
    rows = []
    for axis, (source, words) in zip(axes, _SOURCES.items(), strict=True):
        for dataset, split in dict.fromkeys((row["dataset"], row["split"]) for row in found):
            own = alike(found, dataset=dataset, split=split, source=source)
            cells = [
                f"{100 * median(own, column, rate=rate):.1f}"
                for rate in _SHOWN
                for column in ("false_alarms", "detected")
            ]
            name = title(dataset, split)
            rows.append([name, words, f"{median(own, 'good_images'):,.0f}", *cells])
            realised = [100 * median(own, "false_alarms", rate=rate) for rate in _RATES]
            axis.plot([100 * rate for rate in _RATES], realised, "o-", label=name, lw=1.2, ms=4)
        axis.axline((0, 0), slope=1, color="0.6", lw=1, ls="--")
        axis.set(title=f"threshold from {words}", xlabel="chosen rate, %")
        axis.title.set_size("small")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("realised rate on good test images, %")
    axes[0].legend(fontsize="x-small")
    save_figure(figure, folder / "false-alarms.png")
    columns = ["data", "threshold from", "good test images"]
    for rate in _SHOWN:
        columns += [f"false alarms at {100 * rate:g}", f"detected at {100 * rate:g}"]
    write_text(
        folder / "README.md",
        f"""\
# Chosen and realised rates of false alarms

`python -m benchmarks.false_alarms --root DIR`: the threshold is set from at most {_IMAGES} nominal
images; false alarms are among good test images, which no part of the model has seen. Medians over
seeds {seeds(found)}, in percent.

{table(columns, rows)}

![chosen and realised rates](false-alarms.png)
""",
    )


if __name__ == "__main__":
    sys.exit(main())
