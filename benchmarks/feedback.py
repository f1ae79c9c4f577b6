"""Whether accepting false alarms spares the next ones, and what it costs in defects missed.

    python -m benchmarks.feedback --root DIR --out DIR

The threshold is one that a fifth of the good test images exceed. Twenty of these false alarms,
drawn at random, are accepted, as ``anomalib-sgfr accept`` does; beside it a fit that starts again
with them among the training images. False alarms are counted among the other good test images, with
the threshold as it was and as it is chosen anew, from training images at the rate that it had
there. Writes ``feedback.json`` and ``README.md``; an interrupted command, given again, goes on
where it stopped.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from anomalib_sgfr import Sgfr, SgfrModel
from anomalib_sgfr.images.pre_processor import read_prepared
from anomalib_sgfr.post_processing.calibration import nominal_scores, select_evenly
from anomalib_sgfr.post_processing.thresholds import conformal_threshold
from anomalib_sgfr.training.accept import NewAtoms, add_atoms, find_new_atoms
from benchmarks.common import data
from benchmarks.common.cases import Case, alike, median, run_cases, seeds, title
from benchmarks.common.engine import fitted
from benchmarks.common.records import read_rows, table, write_text

__all__ = ["main", "report"]

_ALARMS = 0.2
_ACCEPTED = 20
_IMAGES = 300
_DATA = ("mtd:tile", "elpv-mono")
_KEYS = ("dataset", "split", "seed", "way")
_COLUMNS = ["data", "", "false alarms", "missed defects", "accepted ones that are alarms still"]
_COLUMNS += ["atoms"]
_WAYS = {"before": "before", "accepted": "20 accepted", "refit": "fitted again with the 20"}


def _evaluate(case: Case) -> list[dict[str, Any]]:
    """False alarms and missed defects among images that were not accepted, before and after."""
    part_of = data.part_of(case.dataset)
    module = data.build(case.dataset, case.root, case.split, case.seed)
    samples = module.test_data.samples
    paths, good = samples["image_path"].tolist(), data.kinds(samples) == "good"
    training = select_evenly(module.train_data.samples["image_path"].tolist(), _IMAGES, part_of)
    units = list(map(part_of, training))
    model = fitted(module, case.seed, post_processor=False)

    def nominal(other: SgfrModel) -> list[float]:
        return nominal_scores(other, model.pre_processor, training, group=part_of).scores

    def scores(other: SgfrModel) -> NDArray[np.float64]:
        return np.array(nominal_scores(other, model.pre_processor, paths, leave_out=False).scores)

    before = scores(model.model)
    threshold = float(np.quantile(before[good], 1.0 - _ALARMS))
    known = nominal(model.model)
    rate = min(0.9, max(0.5, sum(score > threshold for score in known)) / len(known))
    alarms = np.flatnonzero(good & (before > threshold))
    chosen = np.random.default_rng(case.seed).permutation(alarms)[
        : min(_ACCEPTED, len(alarms) // 2)
    ]
    rest = np.setdiff1d(np.flatnonzero(good), chosen)
    additions = _accept(model, [paths[index] for index in chosen], threshold)
    accepted = model.model.with_banks(add_atoms(model.model.fitted_state, additions))

    again = data.build(case.dataset, case.root, case.split, case.seed)
    data.add_training_images(again, samples.iloc[chosen])
    refit = fitted(again, case.seed, post_processor=False)
    rows = []
    for way, other in (
        ("before", model.model),
        ("accepted", accepted),
        ("refit", refit.model),
    ):
        found = scores(other)
        anew = conformal_threshold(nominal(other), rate, units)
        row = {
            "way": way,
            "accepted": len(chosen),
            "good": len(rest),
            "defective": int((~good).sum()),
            "atoms": sum(addition.number for addition in additions) if way == "accepted" else 0,
        }
        for kind, bound in (("kept", threshold), ("anew", threshold if way == "before" else anew)):
            row[f"alarms_{kind}"] = int((found[rest] > bound).sum())
            row[f"missed_{kind}"] = int((found[~good] <= bound).sum())
            row[f"still_{kind}"] = int((found[chosen] > bound).sum())
        rows.append(row)
    return rows


def _accept(model: Sgfr, paths: Sequence[str], threshold: float) -> list[NewAtoms]:
    additions: list[NewAtoms] = []
    own = model.model.eval()
    for path in paths:
        current = own.with_banks(add_atoms(own.fitted_state, additions))
        with torch.no_grad():
            addition = find_new_atoms(
                current, read_prepared(path, model.pre_processor, own.bit_depth), path, threshold
            )
        additions += [addition] if addition else []
    return additions


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and report; returns the exit code."""
    return run_cases("feedback", __doc__, _DATA, _evaluate, report, arguments)


def report(folder: Path) -> None:
    """Write ``README.md`` from ``feedback.json``: medians over seeds."""
    found = read_rows(folder / "feedback.json")
    counts = (("alarms", "good"), ("missed", "defective"), ("still", "accepted"))
    rows = []
    for dataset, split in dict.fromkeys((row["dataset"], row["split"]) for row in found):
        for way, name in _WAYS.items():
            own = alike(found, dataset=dataset, split=split, way=way)
            of = {column: median(own, column) for column in own[0] if column not in _KEYS}
            cells = [
                f"{of[f'{column}_kept']:.0f} / {of[f'{column}_anew']:.0f} of {of[total]:.0f}"
                for column, total in counts
            ]
            rows.append([title(dataset, split), name, *cells, f"{of['atoms']:.0f}"])
    write_text(
        folder / "README.md",
        f"""\
# Accepting false alarms

`python -m benchmarks.feedback --root DIR`: a threshold that a fifth of the good test images
exceed; up to {_ACCEPTED} of them are accepted. Counts among the other test images, with the
threshold kept / chosen anew. Medians over seeds {seeds(found)}.

{table(_COLUMNS, rows)}
""",
    )


if __name__ == "__main__":
    sys.exit(main())
