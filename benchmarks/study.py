"""What each choice in Sgfr does to its accuracy, over data sets and seeds.

    python -m benchmarks.study --root mtd=DIR --root mvtec=DIR --out DIR

The product's own fits and searches, each made once for all choices that share it. Writes
``study.json`` and ``README.md``; an interrupted command, given again, goes on where it stopped.
"""

import statistics
import sys
from collections.abc import Sequence
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.tv_tensors import Mask

from anomalib_sgfr import Sgfr
from anomalib_sgfr.anomaly_map import AnomalyMapGenerator
from anomalib_sgfr.memory_bank import MemoryBank, residual_maps
from benchmarks.common import data
from benchmarks.common.cases import DATA, Case, alike, median, run_cases, seeds, title
from benchmarks.common.engine import fitted
from benchmarks.common.records import Row, read_rows, table, write_text
from benchmarks.common.scores import accuracy, scores_of_sizes

__all__ = ["CHOICES", "Choice", "main", "report"]

_DATA = (*DATA, "mvtec_3d:tire", "mvtec_loco:juice_bottle", "small:cookies", "small:hazelnut")
_METRICS = ("image_AUROC", "pixel_AP", "AUPRO")
_FITS: dict[str, list[int] | None] = {
    "default": None,
    "quarter": [250, 250, 1250, 750],
    "half": [500, 500, 2500, 1500],
    "more": [2000, 2000, 10_000, 5000],
}
# solvers on the memory banks of the default fit: name, size of the support, ridge penalty
_SOLVERS: dict[str, tuple[str, int, float]] = {
    "k 1": ("affine", 1, 1e-3),
    "k 3": ("affine", 3, 1e-3),
    "k 10": ("affine", 10, 1e-3),
    "omp": ("omp", 5, 1e-3),
    "ridge": ("ridge", 5, 1e-2),
}


class Choice(NamedTuple):
    """What differs from the defaults; scales are of strides 4, 8, 16 and 32.

    Attributes:
        banks (tuple[str, ...]): Fit or solver of each scale.
        in_map (tuple[float, ...]): Weight of each scale in the anomaly map.
        in_score (tuple[float, ...]): Weight of each scale in the image score.
        blur (float): Standard deviation of the Gaussian in pixels.
        divided (bool): Whether residuals are divided by the bank's residual scale.
    """

    banks: tuple[str, ...] = ("default",) * 4
    in_map: tuple[float, ...] = (1.0, 1.0, 1.0, 0.0)
    in_score: tuple[float, ...] = (0.25, 1.0, 1.0, 1.0)
    blur: float = 4.0
    divided: bool = True


def _of_score(*weights: float) -> Choice:
    return Choice(in_score=weights)


# by heading; the first of each is the default
CHOICES: dict[str, dict[str, Choice]] = {
    "Weights of scales in the image score": {
        "0.25, 1, 1, 1": Choice(),
        "0, 1, 1, 1": _of_score(0.0, 1.0, 1.0, 1.0),
        "0.5, 1, 1, 1": _of_score(0.5, 1.0, 1.0, 1.0),
        "1, 1, 1, 1": _of_score(1.0, 1.0, 1.0, 1.0),
        "0.25, 1, 1, 0.5": _of_score(0.25, 1.0, 1.0, 0.5),
        "1, 1, 1, 0": _of_score(1.0, 1.0, 1.0, 0.0),
        "0, 0, 1, 1": _of_score(0.0, 0.0, 1.0, 1.0),
        "stride 4 alone": _of_score(1.0, 0.0, 0.0, 0.0),
        "stride 8 alone": _of_score(0.0, 1.0, 0.0, 0.0),
        "stride 16 alone": _of_score(0.0, 0.0, 1.0, 0.0),
        "stride 32 alone": _of_score(0.0, 0.0, 0.0, 1.0),
    },
    "Layers of the anomaly map": {
        "strides 4, 8, 16": Choice(),
        "8, 16": Choice(in_map=(0.0, 1.0, 1.0, 0.0)),
        "4, 8, 16, 32": Choice(in_map=(1.0, 1.0, 1.0, 1.0)),
        "4, 8, 16, residuals not divided by their scale": Choice(divided=False),
    },
    "Memory bank size": {
        "1,000, 1,000, 5,000, 3,000": Choice(),
        "a quarter": Choice(("quarter",) * 4),
        "half": Choice(("half",) * 4),
        "2,000, 2,000, 5,000, 3,000": Choice(("more", "more", "default", "default")),
        "1,000, 1,000, 10,000, 3,000": Choice(("default", "default", "more", "default")),
        "1,000, 1,000, 5,000, 5,000": Choice(("default", "default", "default", "more")),
        "2,000, 2,000, 10,000, 5,000": Choice(("more",) * 4),
    },
    "Support and solver": {
        "`affine`, `num_atoms` 5": Choice(),
        "`num_atoms` 1": Choice(("k 1",) * 4),
        "`num_atoms` 3": Choice(("k 3",) * 4),
        "`num_atoms` 10": Choice(("k 10",) * 4),
        "`omp`": Choice(("omp",) * 4),
        "`ridge`, `regularisation` 0.01": Choice(("ridge",) * 4),
    },
    "Blur": {
        "4": Choice(),
        "0": Choice(blur=0.0),
        "2": Choice(blur=2.0),
        "8": Choice(blur=8.0),
    },
}


class _Image(NamedTuple):
    """Residuals of each fit and solver for a test image, of each scale ``(1, 1, h, w)``."""

    residuals: dict[str, list[Tensor]]
    size: tuple[int, int]


def _banks(case: Case) -> tuple[Sgfr, dict[str, Sequence[MemoryBank]]]:
    """The default model, and the memory banks of each fit and solver."""
    models = {
        name: fitted(
            data.build(case.dataset, case.root, case.split, case.seed),
            case.seed,
            post_processor=False,
            **({} if sizes is None else {"bank_size": sizes}),
        ).eval()
        for name, sizes in _FITS.items()
    }
    banks = {name: model.model.banks for name, model in models.items()}
    for name, solver in _SOLVERS.items():
        banks[name] = [MemoryBank(*solver) for _ in banks["default"]]
        for bank, of_default in zip(banks[name], banks["default"], strict=True):
            bank.set(*of_default.state)
    return models["default"], banks


def _scored(
    choice: Choice, images: Sequence[_Image], generator: AnomalyMapGenerator, units: Sequence[float]
) -> tuple[list[NDArray[np.float32]], list[float]]:
    """Anomaly map and score of each image; ``units`` are the banks' residual scales."""
    maps, scores = [], []
    for image in images:
        residuals = [
            image.residuals[bank][scale] * (1.0 if choice.divided else units[scale])
            for scale, bank in enumerate(choice.banks)
        ]
        parts = generator.upsample(residuals, image.size, torch.empty(0))
        anomaly_map, score_map = (
            reduce(torch.add, [w * part for w, part in zip(weights, parts, strict=True) if w])
            for weights in (choice.in_map, choice.in_score)
        )
        maps.append(anomaly_map[0, 0].numpy())
        scores.append(float(score_map.max()))
    return maps, scores


@torch.no_grad()
def _evaluate(case: Case) -> list[Row]:
    """Accuracy of each choice."""
    model, banks = _banks(case)
    dataset = data.build(case.dataset, case.root, case.split, case.seed).test_data
    transform = cast("Any", model.pre_processor).transform
    images, masks = [], []
    for item in (cast("Any", dataset[row]) for row in range(len(dataset))):
        image, mask = transform(item.image[None], Mask(_or_none_marked(item)[None]))
        embeddings = model.model.embed(image)
        residuals = {name: residual_maps(its, embeddings) for name, its in banks.items()}
        images.append(_Image(residuals, (image.shape[-2], image.shape[-1])))
        masks.append(mask[0].numpy() > 0)
    kinds = data.kinds(dataset.samples)
    units = [float(bank.residual_scale) for bank in banks["default"]]
    rows: dict[Choice, Row] = {}
    for choice in (choice for group in CHOICES.values() for choice in group.values()):
        if choice in rows:
            continue
        generator = AnomalyMapGenerator(model.model.embedder.scales, choice.blur)
        maps, scores = _scored(choice, images, generator, units)
        pixels = scores_of_sizes(maps, masks) if any(mask.any() for mask in masks) else None
        found = accuracy(np.array(scores), kinds, pixels)["metrics"]
        rows[choice] = {name: found[name] for name in _METRICS}
    return [
        {"heading": heading, "choice": name, **rows[choice]}
        for heading, group in CHOICES.items()
        for name, choice in group.items()
    ]


def _or_none_marked(item: Any) -> Tensor:  # noqa: ANN401
    """Mask of an image ``(H, W)``; without one, nothing is marked."""
    if item.gt_mask is None:
        return torch.zeros(item.image.shape[-2:])
    mask: Tensor = item.gt_mask
    return mask


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and report; returns the exit code."""
    return run_cases("study", __doc__, _DATA, _evaluate, report, arguments)


def report(folder: Path) -> None:
    """Write ``README.md`` from ``study.json``: medians over seeds."""
    found = read_rows(folder / "study.json")
    columns = list(dict.fromkeys((row["dataset"], row["split"]) for row in found))
    text = f"""\
# What each choice does

Image AUROC / pixel AP / AUPRO in percent, medians of seeds; all else by default. Seeds of each
column: {", ".join(f"{title(*column)} {_seeds(found, column)}" for column in columns)}. The first
line of each table is the default; what does not change the map has image AUROC alone. Strides are
4, 8, 16 and 32.
"""
    for heading, group in CHOICES.items():
        of_score = all(choice.in_map == Choice().in_map for choice in group.values())
        metrics = _METRICS[:1] if of_score and heading.startswith("Weights") else _METRICS
        rows = []
        for name in group:
            own = [
                [_value(found, metric, heading, name, column) for metric in metrics]
                for column in columns
            ]
            means = [
                statistics.mean(value for value in values if value is not None)
                for values in zip(*own, strict=True)
            ]
            rows.append([name, *map(_cell, own), _cell(means, 2)])
        heads = ["choice", *(title(*column) for column in columns), "mean"]
        text += f"\n## {heading}\n\n{table(heads, rows)}\n"
    write_text(folder / "README.md", text)


def _seeds(found: list[Row], column: tuple[str, str | None]) -> str:
    return seeds(alike(found, dataset=column[0], split=column[1])).replace(", ", "/")


def _value(
    found: list[Row], metric: str, heading: str, name: str, column: tuple[str, str | None]
) -> float | None:
    where = {"heading": heading, "choice": name, "dataset": column[0], "split": column[1]}
    measured = [row for row in alike(found, **where) if row[metric] is not None]
    return 100 * median(measured, metric) if measured else None


def _cell(values: Sequence[float | None], digits: int = 1) -> str:
    return " / ".join("-" if value is None else f"{value:.{digits}f}" for value in values)


if __name__ == "__main__":
    sys.exit(main())
