"""Image AUROC by the weights of the scales in the image score.

    python -m benchmarks.score_weights --root mtd=DIR --root mvtec=DIR --out DIR

One fit by default for each data set and seed, of which the score maps are summed by each choice of
weights; the residuals that the weights apply to do not depend on them. Writes
``score-weights.json`` and ``README.md``; an interrupted command, given again, goes on where it
stopped.
"""

import statistics
import sys
from collections.abc import Sequence
from functools import reduce
from pathlib import Path

import numpy as np
import torch
from sklearn.metrics import roc_auc_score

from anomalib_sgfr.images.pre_processor import read_prepared
from benchmarks.common import data
from benchmarks.common.cases import DATA, Case, alike, median, run_cases, seeds, title
from benchmarks.common.engine import fitted
from benchmarks.common.records import Row, read_rows, table, write_text

__all__ = ["main", "report"]

_DATA = (*DATA, "mvtec_3d:tire", "mvtec_loco:juice_bottle", "small:cookies", "small:hazelnut")
# of strides 4, 8, 16 and 32
_WEIGHTS = {
    "0.25, 1, 1, 1 (default)": (0.25, 1.0, 1.0, 1.0),
    "0, 1, 1, 1": (0.0, 1.0, 1.0, 1.0),
    "0.5, 1, 1, 1": (0.5, 1.0, 1.0, 1.0),
    "1, 1, 1, 1": (1.0, 1.0, 1.0, 1.0),
    "0.25, 1, 1, 0.5": (0.25, 1.0, 1.0, 0.5),
    "0, 0, 1, 1": (0.0, 0.0, 1.0, 1.0),
    "stride 4 alone": (1.0, 0.0, 0.0, 0.0),
    "stride 8 alone": (0.0, 1.0, 0.0, 0.0),
    "stride 16 alone": (0.0, 0.0, 1.0, 0.0),
    "stride 32 alone": (0.0, 0.0, 0.0, 1.0),
}


@torch.no_grad()
def _evaluate(case: Case) -> list[Row]:
    """Image AUROC for each choice of weights."""
    module = data.build(case.dataset, case.root, case.split, case.seed)
    model = fitted(module, case.seed, post_processor=False).eval()
    generator, region = model.model.anomaly_map_generator, model.model.region
    scores: dict[str, list[float]] = {name: [] for name in _WEIGHTS}
    samples = module.test_data.samples
    for path in samples["image_path"]:
        image = read_prepared(path, model.pre_processor, model.model.bit_depth)[None]
        residuals = model.model.score_maps(image).residuals
        maps = generator.upsample(residuals, image.shape[-2:], region)
        for name, weights in _WEIGHTS.items():
            parts = (weight * part for weight, part in zip(weights, maps, strict=True) if weight)
            scores[name].append(float(reduce(torch.add, parts).amax()))
    labels = samples["label_index"].to_numpy()
    return [
        {"weights": name, "image_AUROC": round(float(roc_auc_score(labels, np.array(its))), 5)}
        for name, its in scores.items()
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and report; returns the exit code."""
    return run_cases("score_weights", __doc__, _DATA, _evaluate, report, arguments)


def report(folder: Path) -> None:
    """Write ``README.md`` from ``score-weights.json``: medians over seeds."""
    found = read_rows(folder / "score-weights.json")
    columns = list(dict.fromkeys((row["dataset"], row["split"]) for row in found))
    rows = []
    for name in _WEIGHTS:
        own = [
            100 * median(found, "image_AUROC", weights=name, dataset=dataset, split=split)
            for dataset, split in columns
        ]
        rows.append([name, *(f"{value:.1f}" for value in own), f"{statistics.mean(own):.2f}"])
    heads = ["weights", *(title(*column) for column in columns), "mean"]
    write_text(
        folder / "README.md",
        f"""\
# Weights of scales in the image score

Image AUROC in percent, medians of seeds {seeds(alike(found))}; images in their own aspect ratio,
all else by default. Weights are of strides 4, 8, 16 and 32.

{table(heads, rows)}
""",
    )


if __name__ == "__main__":
    sys.exit(main())
