"""Whether accepting false alarms spares the next ones, and what it costs in defects missed.

    python -m benchmarks.accepting --root DIR --out DIR

The threshold is one that a fifth of the good test images exceed. Twenty of these false alarms,
drawn at random, are accepted, as ``anomalib-sgfr accept`` does; beside it a fit that starts again
with them among the training images. False alarms are counted among the other good test images, with
the threshold as it was and as it is chosen anew, from training images at the rate that it had
there. Writes ``accepting.json`` and ``README.md``; an interrupted command, given again, goes on
where it stopped.
"""

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from anomalib_sgfr import Sgfr, SgfrModel
from anomalib_sgfr.data.mtd import tile_of
from anomalib_sgfr.images.pre_processor import read_prepared
from anomalib_sgfr.post_processing.calibration import nominal_scores, select_evenly
from anomalib_sgfr.post_processing.thresholds import conformal_threshold
from anomalib_sgfr.training.accept import Addition, added, novel
from benchmarks.common import data
from benchmarks.common.engine import fitted
from benchmarks.common.places import PatchIndex, median, seeds, study_places, title
from benchmarks.common.records import write_text

__all__ = ["main", "report"]

_ALARMS = 0.2
_ACCEPTED = 20
_IMAGES = 300
_DATA = ("mtd:tile", "elpv-mono")
_WAYS = {"before": "before", "accepted": "20 accepted", "refit": "fitted again with the 20"}


def _evaluate(place: PatchIndex) -> list[dict[str, Any]]:
    """False alarms and missed defects among images that were not accepted, before and after."""
    tiles = tile_of() if place.dataset == "mtd" else {}

    def part_of(path: str) -> str:
        return str(tiles.get(Path(path).name, path))

    module = data.build(place.dataset, place.root, place.split, place.seed)
    samples = module.test_data.samples
    paths, good = samples["image_path"].tolist(), data.kinds(samples) == "good"
    training = select_evenly(module.train_data.samples["image_path"].tolist(), _IMAGES, part_of)
    units = list(map(part_of, training))
    model = fitted(module, place.seed, post_processor=False)

    def nominal(other: SgfrModel) -> list[float]:
        return nominal_scores(other, model.pre_processor, training, group=part_of).scores

    def scores(other: SgfrModel) -> NDArray[np.float64]:
        return np.array(nominal_scores(other, model.pre_processor, paths, leave_out=False).scores)

    before = scores(model.model)
    threshold = float(np.quantile(before[good], 1.0 - _ALARMS))
    vouched = nominal(model.model)
    rate = min(0.9, max(0.5, sum(score > threshold for score in vouched)) / len(vouched))
    alarms = np.flatnonzero(good & (before > threshold))
    chosen = np.random.default_rng(place.seed).permutation(alarms)[
        : min(_ACCEPTED, len(alarms) // 2)
    ]
    rest = np.setdiff1d(np.flatnonzero(good), chosen)
    start = time.perf_counter()
    additions = _accept(model, [paths[index] for index in chosen], threshold)
    seconds = time.perf_counter() - start
    accepted = model.model.with_banks(added(model.model.fitted_state, additions))

    again = data.build(place.dataset, place.root, place.split, place.seed)
    start = time.perf_counter()
    data.add_training_images(again, samples.iloc[chosen])
    refit = fitted(again, place.seed, post_processor=False)
    rows = []
    for way, other, took in (
        ("before", model.model, 0.0),
        ("accepted", accepted, seconds),
        ("refit", refit.model, time.perf_counter() - start),
    ):
        found = scores(other)
        anew = conformal_threshold(nominal(other), rate, units)
        rows.append(
            {
                "way": way,
                "accepted": len(chosen),
                "good": len(rest),
                "defective": int((~good).sum()),
                "atoms": sum(addition.number for addition in additions) if way == "accepted" else 0,
                "seconds": round(took, 2),
                **{
                    f"{name}_{kind}": int(count)
                    for kind, bound in (
                        ("kept", threshold),
                        ("anew", threshold if way == "before" else anew),
                    )
                    for name, count in (
                        ("alarms", (found[rest] > bound).sum()),
                        ("missed", (found[~good] <= bound).sum()),
                        ("still", (found[chosen] > bound).sum()),
                    )
                },
            }
        )
    return rows


def _accept(model: Sgfr, paths: Sequence[str], threshold: float) -> list[Addition]:
    additions: list[Addition] = []
    own = model.model.eval()
    for path in paths:
        current = own.with_banks(added(own.fitted_state, additions))
        with torch.no_grad():
            addition = novel(
                current, read_prepared(path, model.pre_processor, own.bit_depth), path, threshold
            )
        additions += [addition] if addition else []
    return additions


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and report; returns the exit code."""
    about = (__doc__ or "").splitlines()[0]
    return study_places("accepting", about, _DATA, _evaluate, report, arguments)


def report(folder: Path) -> None:
    """Write ``README.md`` from ``accepting.json``: medians over seeds."""
    found = json.loads((folder / "accepting.json").read_text(encoding="utf-8"))
    places = list(dict.fromkeys((row["dataset"], row["split"]) for row in found))
    lines = [
        "# Accepting false alarms",
        "",
        (
            "`python -m benchmarks.accepting --root DIR`: a threshold that a fifth of the good test"
            " images exceed; up to"
        ),
        (
            f"{_ACCEPTED} of them are accepted. Counts among the other test images, with the"
            " threshold kept / chosen anew."
        ),
        f"Medians over seeds {seeds(found)}.",
        "",
        (
            "| data | | false alarms | missed defects | accepted ones that are alarms still | atoms"
            " | seconds |"
        ),
        "|---|---|---|---|---|---|---|",
    ]
    for dataset, split in places:
        for way, name in _WAYS.items():
            columns = [
                name
                for row in found[:1]
                for name in row
                if name not in {"dataset", "split", "seed", "way"}
            ]
            of = {
                column: median(found, column, dataset=dataset, split=split, way=way)
                for column in columns
            }
            cells = [
                f"{of[f'{column}_kept']:.0f} / {of[f'{column}_anew']:.0f} of {of[total]:.0f}"
                for column, total in (
                    ("alarms", "good"),
                    ("missed", "defective"),
                    ("still", "accepted"),
                )
            ]
            lines.append(
                f"| {title(dataset, split)} | {name} | {' | '.join(cells)} | {of['atoms']:.0f} |"
                f" {of['seconds']:.1f} |"
            )
    write_text(folder / "README.md", "\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.exit(main())
