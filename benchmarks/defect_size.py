"""How widely to pool features and smooth the map, for defects of a known size, drawn into good images.

    python -m benchmarks.defect_size --root DIR --out DIR

The data sets with pixel masks at hand have large defects, by which alone a map would be smoothed too far. Here spots,
scratches and smudges of a given width are drawn into images the model has not seen. Writes ``defect-size.json``,
``README.md`` and a plot; an interrupted command, given again, goes on where it stopped.
"""

import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from anomalib_sgfr import Sgfr
from anomalib_sgfr.core.arguments import Pooling
from anomalib_sgfr.torch_model import SgfrModel
from benchmarks.common import data
from benchmarks.common.defects import draw_defect
from benchmarks.common.engine import fitted
from benchmarks.common.figures import plt, save_figure
from benchmarks.common.places import Place, median, seeds, study_places
from benchmarks.common.records import write_text
from benchmarks.common.scores import accuracy, label_regions, pixel_scores

__all__ = ["main", "report"]

_DATA = ("mtd:canonical", "elpv-mono", "elpv-poly")
_SIZES = (4, 8, 16, 32, 64)  # pixels across, of 256
_BLURS = (0.0, 2.0, 4.0, 6.0, 8.0, 12.0)
_TEST_IMAGES = 96
_METRICS = ("image_AUROC", "pixel_AP", "AUPRO")
_BATCH = 8


@torch.no_grad()
def _evaluate(place: Place) -> list[dict[str, Any]]:
    module = data.build(place.dataset, place.root, place.split, place.seed, num_workers=0)
    resize, normalise = cast("Any", Sgfr(visualizer=False, evaluator=False).pre_processor).transform.transforms
    rng = np.random.default_rng(place.seed)
    good = np.flatnonzero(module.test_data.samples["label_index"].to_numpy() == 0)
    chosen = rng.permutation(good)[: 2 * _TEST_IMAGES]
    images = data.images(module.test_data, chosen, resize)
    untouched, to_spoil = images[: len(images) // 2], images[len(images) // 2 :]
    spoilt = {size: [draw_defect(image, size, rng) for image in to_spoil] for size in _SIZES}
    found = []
    for pooling in get_args(Pooling):
        model = fitted(module, place.seed, pooling=pooling).model.eval()
        clean = _scores(model, [normalise(image) for image in untouched])
        for size, drawn in spoilt.items():
            spoilt_scores = _scores(model, [normalise(image) for image, _ in drawn])
            scores = [torch.cat(both) for both in zip(clean, spoilt_scores, strict=True)]
            masks = np.stack([np.zeros_like(drawn[0][1])] * len(untouched) + [mask for _, mask in drawn])
            found += [{"pooling": pooling, "size": size, **row} for row in _by_blur(scores, masks)]
    return found


def _by_blur(scores: list[Tensor], masks: NDArray[np.bool_]) -> Iterator[dict[str, float]]:
    """Metrics of residuals ``(B, 1, h, w)`` of each scale against masks ``(B, H, W)``, by each Gaussian in turn."""
    regions, kinds = label_regions(masks), np.where(masks.any((1, 2)), "drawn", "good")
    for blur in _BLURS:
        maps = SgfrModel(blur=blur).combine(scores, masks.shape[1:]).anomaly_map[:, 0].numpy()
        metrics = accuracy(maps.max((1, 2)), kinds, pixel_scores(maps, regions))["metrics"]
        yield {"blur": blur, **{name: metrics[name] for name in _METRICS}}


def _scores(model: SgfrModel, images: list[Tensor]) -> list[Tensor]:
    """Residuals ``(B, 1, h, w)`` of each scale of normalised images."""
    starts = range(0, len(images), _BATCH)
    parts = [model.residual_maps(model.embed(torch.stack(images[start : start + _BATCH]))) for start in starts]
    return [torch.cat(scale) for scale in zip(*parts, strict=True)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and report; returns the exit code."""
    about = (__doc__ or "").splitlines()[0]
    return study_places("defect_size", about, _DATA, _evaluate, report, arguments)


def report(folder: Path) -> None:
    """Write ``README.md`` and the plot from ``defect-size.json``: medians over data sets and seeds."""
    found = json.loads((folder / "defect-size.json").read_text(encoding="utf-8"))
    lines = [
        "# Pooling and smoothing, by the size of the defect",
        "",
        "`python -m benchmarks.defect_size --root DIR`: spots, scratches and smudges drawn into good test images of",
        f"MTD and ELPV. Medians over data sets and seeds ({seeds(found)}), in percent; `blur`: sigma of",
        "the Gaussian in pixels; the size of the defects is in pixels of 256.",
        "",
    ]
    figure, axes = plt.subplots(1, len(_METRICS), figsize=(4 * len(_METRICS), 3.4), layout="constrained")
    for axis, metric in zip(axes, _METRICS, strict=True):
        lines += [f"| {metric} | " + " | ".join(map(str, _SIZES)) + " | mean |", "|---" * (len(_SIZES) + 2) + "|"]
        for number, blur in enumerate(_BLURS):
            for pooling, style in zip(get_args(Pooling), ("o-", "s--"), strict=True):
                cells = [100 * median(found, metric, blur=blur, pooling=pooling, size=size) for size in _SIZES]
                label = f"blur {blur:g}, {pooling}"
                lines.append(
                    f"| {label} | " + " | ".join(f"{cell:.1f}" for cell in (*cells, statistics.mean(cells))) + " |"
                )
                axis.plot(_SIZES, cells, style, color=f"C{number}", label=label, lw=1.2, ms=4)
        lines.append("")
        axis.set(title=f"{metric}, %", xlabel="size of the defect, pixels", xscale="log", xticks=_SIZES)
        axis.set_xticklabels(_SIZES)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize="x-small")
    save_figure(figure, folder / "defect-size.png")
    write_text(folder / "README.md", "\n".join([*lines, "![by the size of the defect](defect-size.png)"]) + "\n")


if __name__ == "__main__":
    sys.exit(main())
