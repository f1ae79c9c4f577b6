"""Do drawn defects predict which real ones a model finds?

    python -m benchmarks.sensitivity --root mtd=DIR --out DIR

A model is fitted by default, with its threshold. Defects are drawn into good test images as
``anomalib-sgfr sensitivity`` does, at four contrasts; where parts lie on a ground, in a region that
holds them, as ``--roi`` names it. The prediction for a real defect is read from
the curves of its shape, spots, dents and pieces, or scratches and threads if its mask is long and
narrow, at its own size and contrast; that for a kind of defect is the mean over its images. It is
compared with the recall of the kind at the threshold, by Spearman's rank correlation over all data
sets and kinds with masks. Beside it a prediction that knows no real defect: the rate of all drawn
ones that are found. Writes ``sensitivity.json`` and ``README.md``; an interrupted command, given
again, goes on where it stopped.
"""

import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage, stats

from anomalib_sgfr import Inspector, Sgfr
from anomalib_sgfr.console import quiet_engine
from anomalib_sgfr.images.frame_geometry import frame_transform
from anomalib_sgfr.images.pre_processor import geometric_steps
from anomalib_sgfr.images.reading import read_image
from anomalib_sgfr.post_processing.calibration import select_evenly
from anomalib_sgfr.report.sensitivity import DetectionCurve, measure_sensitivity
from benchmarks.common import data
from benchmarks.common.cases import Case, alike, run_cases, seeds, title
from benchmarks.common.records import Row, read_rows, table, write_text

__all__ = ["curves_at", "main", "measures", "region_of", "region_of_parts", "report"]

_DATA = (
    "mtd:canonical",
    "mvtec:bottle",
    "mvtec:grid",
    "kolektor",
    "mvtec_3d:tire",
    "small:cookies",
)
_CONTRASTS = (0.05, 0.1, 0.2, 0.4)
_NUMBER = 10  # drawn defects of each kind, contrast and size
_GOOD = 60  # images to draw into
_COMPACT, _NARROW = ("spot", "dent", "piece"), ("scratch", "thread")
_SHARE = 0.2  # area of a defect over its squared extent, below which it is narrow
_RING = 5  # pixels around a defect that it is compared with
_ANGLES = 36
# where the parts are that do not fill the image: top, left, bottom and right as shares of it, drawn
# by hand around the parts of some good images; round parts fill the ellipse in it
_PARTS = {
    "bottle": ((0.05, 0.05, 0.95, 0.95), True),
    "tire": ((0.15, 0.22, 0.83, 0.78), False),
    "cookies": ((0.15, 0.1, 0.85, 0.87), True),
}


def measures(image: NDArray[np.float32], mask: NDArray[np.bool_]) -> tuple[float, float, bool]:
    """Size, contrast and shape of the largest defect that a mask marks.

    Args:
        image (NDArray[np.float32]): Shape ``(H, W, 3)``, between 0 and 1.
        mask (NDArray[np.bool_]): Shape ``(H, W)``, with a pixel that is set.

    Returns:
        tuple[float, float, bool]: Largest extent in pixels; root of the mean squared difference of
        its brightness from that around it, less the variance there; whether it is narrow.
    """
    parts, _ = ndimage.label(mask, np.ones((3, 3)))
    largest = parts == np.argmax(np.bincount(parts.ravel())[1:]) + 1
    points = np.argwhere(largest)
    angles = np.arange(_ANGLES) * np.pi / _ANGLES
    along = points @ np.stack([np.sin(angles), np.cos(angles)])
    size = float(np.ptp(along, axis=0).max()) + 1.0
    grey = image.astype(float) @ np.array([0.299, 0.587, 0.114])
    ring = ndimage.binary_dilation(largest, iterations=_RING) & ~ndimage.binary_dilation(mask)
    around = grey[ring] if ring.any() else grey[~mask] if not mask.all() else grey.ravel()
    squared = float(((grey[largest] - np.median(around)) ** 2).mean() - around.var())
    return size, max(squared, 0.0) ** 0.5, bool(len(points) / size**2 < _SHARE)


def curves_at(
    curves: Sequence[DetectionCurve], kinds: Sequence[str], size: float, contrast: float
) -> float:
    """Mean probability of detection of some kinds at a size and a contrast.

    Args:
        curves (Sequence[DetectionCurve]): Of each kind and contrast.
        kinds (Sequence[str]): The kinds.
        size (float): In pixels; that of the nearest drawn one beyond the drawn sizes.
        contrast (float): So for the contrast.

    Returns:
        float: Interpolated by the logarithms of size and contrast.
    """
    found = []
    for kind in kinds:
        own = sorted((curve for curve in curves if curve.kind == kind), key=lambda c: c.contrast)
        rates = [np.interp(np.log(size), np.log(curve.sizes), curve.fitted) for curve in own]
        contrasts = np.log([curve.contrast for curve in own])
        found.append(float(np.interp(np.log(max(contrast, 1e-6)), contrasts, rates)))
    return statistics.mean(found)


def region_of_parts(split: str | None, size: tuple[int, int]) -> NDArray[np.bool_]:
    """Pixels of an image that may show a part.

    Args:
        split (str | None): Part of the data set.
        size (tuple[int, int]): Height and width.

    Returns:
        NDArray[np.bool_]: Shape ``size``; all pixels where parts fill the image.
    """
    (top, left, bottom, right), is_round = _PARTS.get(split or "", ((0.0, 0.0, 1.0, 1.0), False))
    rows, columns = ((np.arange(length) + 0.5) / length for length in size)
    down, across = (
        (2.0 * shares - first - last) / (last - first)
        for shares, first, last in ((rows[:, None], top, bottom), (columns, left, right))
    )
    inside: NDArray[np.bool_] = (
        down**2 + across**2 <= 1.0 if is_round else np.maximum(abs(down), abs(across)) <= 1.0
    )
    return inside


def region_of(
    model: Sgfr, split: str | None
) -> Callable[[Path, tuple[int, int]], NDArray[np.bool_]]:
    """Pixels of an image that a model sees, and that may show a part."""
    steps = geometric_steps(model.pre_processor.transform)

    def inspected(_: Path, size: tuple[int, int]) -> NDArray[np.bool_]:
        transform = frame_transform(steps, size)
        region: NDArray[np.bool_] = transform.resample(np.ones(transform.input_size)) > 0.5  # noqa: PLR2004
        return region & region_of_parts(split, size)

    return inspected


@torch.no_grad()
def _evaluate(case: Case) -> list[Row]:
    """Of each kind of defect, the recall and its predictions."""
    module = data.build(case.dataset, case.root, case.split, case.seed, num_workers=0)
    torch.manual_seed(case.seed)
    model = Sgfr(seed=case.seed, evaluator=False, visualizer=False)
    with tempfile.TemporaryDirectory() as scratch:
        engine = quiet_engine(scratch, limit_val_batches=0)
        engine.fit(model=model, datamodule=module)
        checkpoint = Path(scratch) / "model.ckpt"
        engine.trainer.save_checkpoint(checkpoint)
        inspector = Inspector.load(checkpoint)
    samples = module.test_data.samples
    folders = np.array([Path(path).parent.name for path in samples["image_path"]])
    kinds = data.kinds(samples)
    kinds = np.where(kinds == "abnormal", folders, kinds)
    good = samples["image_path"][kinds == "good"].tolist()
    drawn = measure_sensitivity(
        inspector,
        [Path(path) for path in select_evenly(good, _GOOD)],
        region_of(model, case.split),
        contrasts=_CONTRASTS,
        number=_NUMBER,
        seed=case.seed,
    )
    rows: list[Row] = []
    for kind in sorted(set(kinds) - {"good"}):
        own = samples[kinds == kind]
        found, predicted, sizes, contrasts = [], [], [], []
        for path, mask_path in zip(own["image_path"], own["mask_path"], strict=True):
            found.append(bool(inspector(path).label))
            with Image.open(mask_path) as opened:
                mask = np.asarray(opened.convert("L")) > 0
            if mask.any():
                size, contrast, is_narrow = measures(read_image(path), mask)
                shapes = _NARROW if is_narrow else _COMPACT
                predicted.append(curves_at(drawn.curves, shapes, size, contrast))
                sizes.append(size)
                contrasts.append(contrast)
        rows.append(
            {
                "kind": kind,
                "images": len(found),
                "recall": statistics.mean(found),
                "predicted": statistics.mean(predicted),
                "drawn": 1.0 - drawn.missed / drawn.drawn,
                "size": statistics.median(sizes),
                "contrast": statistics.median(contrasts),
                "false_alarms": len(drawn.alarms) / (len(drawn.alarms) + drawn.images),
            }
        )
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and report; returns the exit code."""
    return run_cases("sensitivity", __doc__, _DATA, _evaluate, report, arguments)


def report(folder: Path) -> None:
    """Write ``README.md`` from ``sensitivity.json``: means over seeds, and rank correlations."""
    found = read_rows(folder / "sensitivity.json")
    names = ("dataset", "split", "kind")
    keys = dict.fromkeys(tuple(row[name] for name in names) for row in found)
    measured = ("images", "size", "contrast", "recall", "predicted", "drawn", "false_alarms")
    means = []
    for key in keys:
        its = alike(found, **dict(zip(names, key, strict=True)))
        means.append({name: statistics.mean(row[name] for row in its) for name in measured})
    lines = [
        [
            title(dataset, split),
            kind,
            f"{row['images']:.0f}",
            f"{row['size']:.0f}",
            f"{row['contrast']:.2f}",
            *(f"{100 * row[name]:.0f}" for name in measured[3:]),
        ]
        for (dataset, split, kind), row in zip(keys, means, strict=True)
    ]
    ranks = [
        [name, _rank([row[column] for row in means], means)]
        for name, column in (
            ("at the size, contrast and shape of the real defects", "predicted"),
            ("rate of all drawn defects, which knows no real one", "drawn"),
        )
    ]
    write_text(
        folder / "README.md",
        f"""\
# Drawn defects and real ones

Seeds: {seeds(found)}. Rank correlation (Spearman) with the recall, over {len(means)} kinds of
defect of {len({key[:2] for key in keys})} data sets, with the 95% interval of resampled kinds:

{table(["prediction", "rank correlation"], ranks)}

Size in pixels of the images and contrast as a share of white are medians; the other columns are
percent.

{table(["data", "kind", *measured[:6], "false alarms"], lines)}
""",
    )


def _rank(predicted: Sequence[float], means: Sequence[Row]) -> str:
    """Rank correlation with the recall, and its interval by the bootstrap."""
    pairs = np.array([predicted, [row["recall"] for row in means]])

    def correlation(values: NDArray[np.float64]) -> float:
        if (np.ptp(values, axis=1) == 0.0).any():
            return 0.0
        return float(stats.spearmanr(*values).statistic)

    rng = np.random.default_rng(0)
    drawn = [correlation(pairs[:, rng.integers(0, len(means), len(means))]) for _ in range(1000)]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return f"{correlation(pairs):.2f} ({low:.2f} to {high:.2f})"


if __name__ == "__main__":
    sys.exit(main())
