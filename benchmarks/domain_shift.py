"""A fitted model after a domain shift: what eight good images of the new domain mend.

    python -m benchmarks.domain_shift --root mtd=DIR --root mvtec=DIR --out DIR

A model is fitted to all training images but eight. Then the light or the camera changes, drawn into
every image, and the test images are scored: by the model as it is, adapted by the eight, updated
with them, and by a fit to the eight alone. False alarms are good test images above the threshold
that one in twenty of them exceeded before the change. Writes ``domain-shift.json`` and
``README.md``; an interrupted command, given again, goes on where it stopped.
"""

import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from anomalib.data import AnomalibDataset
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional

from anomalib_sgfr import Sgfr, SgfrModel
from anomalib_sgfr.images.pre_processor import read_prepared
from anomalib_sgfr.training.adapt import project_out_shift, residual_moments
from benchmarks.common import data
from benchmarks.common.cases import Case, alike, median, run_cases, seeds, title
from benchmarks.common.engine import fitted, quiet_fit
from benchmarks.common.records import read_rows, table, write_text
from benchmarks.common.scores import accuracy, scores_of_sizes

__all__ = ["CHANGES", "main", "report"]

_DATA = ("mtd:canonical", "mvtec:bottle")
_NEW = 8  # good images after the change
_TESTED = 300  # test images at most: every second one, or third
_DIRECTIONS = 4  # as `anomalib-sgfr adapt` does by default
_ALARMS = 0.05  # of good test images, before
_FAR = 10**6  # seeds of the new images begin here, those of test images at zero
_WAYS = {
    "as it was": "the model, before the change",
    "nothing": "the model as it is",
    "adapted": "adapted by the new images",
    "update": "updated with the new images",
    "alone": "fitted to the new images alone",
}


def _darker(image: Tensor, rng: np.random.Generator) -> Tensor:
    """Seven tenths of the light."""
    del rng
    return 0.7 * image


def _blurred(image: Tensor, rng: np.random.Generator) -> Tensor:
    """Out of focus: a Gaussian of 0.6% of the shorter side."""
    del rng
    sigma = 0.006 * min(image.shape[-2:])
    return cast(
        "Tensor", functional.gaussian_blur(image, [2 * round(3 * sigma) + 1] * 2, [sigma, sigma])
    )


def _camera(image: Tensor, rng: np.random.Generator) -> Tensor:
    """Another camera: less sharp, flatter, with another gamma and noise."""
    sigma = 0.003 * min(image.shape[-2:])
    soft = functional.gaussian_blur(image, [2 * round(3 * sigma) + 1] * 2, [sigma, sigma])
    noise = torch.from_numpy(rng.normal(0.0, 0.015, soft.shape)).float()
    return cast("Tensor", (0.85 * soft + 0.08).clamp(0.0, 1.0) ** 1.15 + noise)


CHANGES: dict[str, Callable[[Tensor, np.random.Generator], Tensor]] = {
    "darker": _darker,
    "out of focus": _blurred,
    "another camera": _camera,
}


def _changed(image: Tensor, change: str | None, seed: int) -> Tensor:
    """An image between 0 and 1, in steps of 8 bits, as it looks after the change."""
    if change is not None:
        image = CHANGES[change](image, np.random.default_rng(seed))
    return image.clamp(0.0, 1.0).mul(255.0).round().div(255.0)


def _image(dataset: AnomalibDataset, row: int) -> Tensor:
    return cast("Tensor", cast("Any", dataset[row]).image)


def _evaluate(case: Case) -> list[dict[str, Any]]:
    """Accuracy and false alarms of each way, before and after each change."""
    module = data.build(case.dataset, case.root, case.split, case.seed, num_workers=0)
    everything = module.train_data.samples.copy()
    chosen = np.sort(np.random.default_rng(case.seed).permutation(len(everything))[:_NEW])
    kept = everything.drop(index=everything.index[chosen])["image_path"].tolist()
    originals = [_image(module.train_data, int(row)) for row in chosen]
    data.keep_training_images(module, kept)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = fitted(module, case.seed, post_processor=False)
        test = _Test(module.test_data, model.pre_processor)
        model.trainer.save_checkpoint(folder / "model.ckpt")
        before, as_it_was = test.scored(model.model, None)
        threshold = float(np.quantile(before[test.good], 1.0 - _ALARMS))
        rows = [_row(None, "as it was", before, test, threshold) | as_it_was]
        for change in CHANGES:
            new = _drawn(folder / change, originals, everything.iloc[chosen], change)
            for way, other in _ways(case, model, folder / "model.ckpt", new):
                scores, found = test.scored(other, change)
                rows.append(_row(change, way, scores, test, threshold) | found)
    return rows


def _drawn(
    folder: Path, originals: Sequence[Tensor], samples: pd.DataFrame, change: str
) -> pd.DataFrame:
    """The eight as they look now, in files, as samples."""
    folder.mkdir()
    paths = []
    for number, image in enumerate(originals):
        now = _changed(image, change, _FAR + number)
        paths.append(str(folder / f"{number}.png"))
        Image.fromarray(now.mul(255.0).round().byte().permute(1, 2, 0).numpy()).save(paths[-1])
    return samples.assign(image_path=paths)


def _ways(
    case: Case, model: Sgfr, checkpoint: Path, new: pd.DataFrame
) -> Iterator[tuple[str, SgfrModel]]:
    """Each way's name and its model."""
    yield "nothing", model.model

    images = (read_prepared(path, model.pre_processor) for path in new["image_path"])
    other = model.model.eval().with_banks(
        project_out_shift(model.model, residual_moments(model.model, images), _DIRECTIONS)
    )
    yield "adapted", other

    alone = data.build(case.dataset, case.root, case.split, case.seed, num_workers=0)
    data.add_training_images(alone, new)
    data.keep_training_images(alone, new["image_path"].tolist())
    updated = Sgfr.load_from_checkpoint(checkpoint, update=True, evaluator=False, visualizer=False)
    quiet_fit(updated, alone)
    yield "update", updated.model
    yield "alone", fitted(alone, case.seed, post_processor=False).model


class _Test:
    """Test images, scored several times."""

    def __init__(self, dataset: AnomalibDataset, pre_processor: Any) -> None:  # noqa: ANN401
        self.dataset = dataset
        self.transform = pre_processor.transform
        self.rows = range(0, len(dataset), -(-len(dataset) // _TESTED))
        self.kinds = data.kinds(dataset.samples)[list(self.rows)]
        self.good = self.kinds == "good"
        has_masks = dataset.samples.attrs.get("task") == "segmentation"
        rows = self.rows if has_masks else ()
        self.masks = [data.mask(dataset, row, self.transform) for row in rows]

    @torch.no_grad()
    def scored(
        self, model: SgfrModel, change: str | None
    ) -> tuple[NDArray[np.float64], dict[str, Any]]:
        """Scores of all images after a change, and accuracy."""
        model.eval()
        scores, maps = [], []
        for row in self.rows:
            image = _changed(_image(self.dataset, row), change, row)
            found: Any = model(self.transform(image[None]))
            scores.append(float(found.pred_score))
            maps.append(found.anomaly_map[0, 0].numpy())
        pixels = scores_of_sizes(maps, self.masks) if self.masks else None
        score = np.array(scores)
        return score, {"metrics": accuracy(score, self.kinds, pixels)["metrics"]}


def _row(
    change: str | None,
    way: str,
    scores: NDArray[np.float64],
    test: _Test,
    threshold: float,
) -> dict[str, Any]:
    return {
        "change": change,
        "way": way,
        "false_alarms": round(float((scores[test.good] > threshold).mean()), 5),
        "missed": round(float((scores[~test.good] <= threshold).mean()), 5),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and report; returns the exit code."""
    return run_cases("domain_shift", __doc__, _DATA, _evaluate, report, arguments)


def report(folder: Path) -> None:
    """Write ``README.md`` from ``domain-shift.json``: medians over seeds."""
    found = [row | row["metrics"] for row in read_rows(folder / "domain-shift.json")]
    names = [
        name
        for name, value in found[0]["metrics"].items()
        if name != "image_F1Max" and value is not None
    ]
    rows = []
    keys = ("dataset", "split", "change", "way")
    for dataset, split, change, way in dict.fromkeys(
        tuple(row[key] for key in keys) for row in found
    ):
        own = alike(found, dataset=dataset, split=split, change=change, way=way)
        cells = [f"{100 * median(own, name):.1f}" for name in (*names, "false_alarms", "missed")]
        rows.append([title(dataset, split), change or "-", _WAYS[way], *cells])
    write_text(
        folder / "README.md",
        f"""\
# Domain shift

`python -m benchmarks.domain_shift --root mtd=DIR --root mvtec=DIR`: {_NEW} good images are taken
from the training images, the model is fitted to the others, and then every image changes. False
alarms and missed defects at the threshold that {100 * _ALARMS:g}% of good test images exceeded
before. At most {_TESTED} test images. Medians over seeds {seeds(found)}, in percent.

{table(["data", "change", "", *names, "false alarms", "missed"], rows)}
""",
    )


if __name__ == "__main__":
    sys.exit(main())
