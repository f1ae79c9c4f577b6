"""What a model learns from a few images of a missed defect, and what that costs.

    python -m benchmarks.rejecting --root mtd=DIR --root mvtec=DIR --root kolektor=DIR --out DIR

A model is fitted by default, with its threshold at a false-alarm rate of 1%. For each kind of
defect 1, 2 or 5 of its images are rejected, missed ones first, each with its mask; five choices of
them. Recall is that of the other images of the kind, and of the other kinds; false alarms are those
of the good test images, none of which the threshold or a limit has seen. Ways: ``reject`` with
several gains, of which one is the default; with the limit that 98% of the calibration images stay
below, and the threshold calibrated again; beside it the threshold moved down to find the same
images; and logistic regression from the same patches against the atoms, which alarms besides where
a patch exceeds all of the calibration images. Writes ``rejecting.json``, means over the choices,
and ``README.md``; an interrupted command, given again, goes on where it stopped. With
``--latency``, an exported model with and without defect banks is timed instead, and
``latency.json`` written.
"""

import math
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from anomalib_sgfr import Sgfr
from anomalib_sgfr.core.patch_grid import to_patches
from anomalib_sgfr.defect_bank import GAIN, defect_index, nearest_distance, raised, resemblance
from anomalib_sgfr.images.pre_processor import read_prepared
from anomalib_sgfr.images.roi import mask_at_input, read_defect_mask
from anomalib_sgfr.post_processing.calibration import leave_one_out
from anomalib_sgfr.post_processing.thresholds import conformal_threshold
from anomalib_sgfr.training.reject import MARGIN, Defect, add_defects, find_defect, worst_region
from benchmarks.common import data
from benchmarks.common.cases import Case, alike, run_cases, seeds, show_page, title
from benchmarks.common.engine import fitted
from benchmarks.common.records import Row, read_rows, table, write_rows, write_text

__all__ = ["main", "report"]

_DATA = ("mtd:canonical", "mvtec:bottle", "mvtec:grid", "kolektor", "mvtec_3d:tire")
_NUMBERS = (1, 2, 5)
_CHOICES = 5
_FEWEST = 3  # images of a kind beside the rejected ones
_RATE = 0.01
_QUANTILE, _QUANTILE_GAIN = 0.98, 2.0
_PATCHES, _TIMES = (0, 125, 500), 100
_OUT = Path("benchmarks/results/rejecting")
_GAINS = (1.0, 2.0, 3.0, 4.0)
_BEFORE, _DEFAULT = "before", f"gain {GAIN:g}"
_SHARES = ("same", "other", "good", "learned")


class _Image(NamedTuple):
    """Patches of each scale, ``float16``, their residuals, the size of the image and its score."""

    patches: list[Tensor]
    residuals: list[Tensor]
    size: Sequence[int]
    score: float


class _Scorer:
    """Scores of images with defects, from what they have in common."""

    def __init__(self, model: Sgfr) -> None:
        self.model = model.model
        self.scales = [float(bank.residual_scale) for bank in self.model.banks]

    def images(self, embeddings: Sequence[Tensor], size: Sequence[int], banks: Any) -> list[_Image]:  # noqa: ANN401
        """Images of a batch."""
        found = self.model.score_embeddings(embeddings, size, banks)
        return [
            _Image(
                [to_patches(part[i : i + 1]).half() for part in embeddings],
                [part[i : i + 1] for part in found.residuals],
                size,
                float(found.pred_score[i]),
            )
            for i in range(len(found.pred_score))
        ]

    def distances(self, image: _Image, defects: Sequence[Tensor]) -> list[Tensor]:
        """Distance maps of the defects, over the residual scales; infinite without one."""
        return [
            (nearest_distance(patches.float(), defect_index(atoms)) / scale).reshape(residual.shape)
            if len(atoms)
            else torch.full_like(residual, torch.inf)
            for patches, atoms, scale, residual in zip(
                image.patches, defects, self.scales, image.residuals, strict=True
            )
        ]

    def score(
        self, image: _Image, distances: list[Tensor], limits: Sequence[float], gain: float
    ) -> float:
        """Score of an image whose residuals are raised."""
        new = [
            raised(part, math.exp(limit) * distance, gain)
            for part, distance, limit in zip(image.residuals, distances, limits, strict=True)
        ]
        if all(torch.equal(part, old) for part, old in zip(new, image.residuals, strict=True)):
            return image.score
        maps = self.model.anomaly_map_generator(new, image.size, self.model.region)
        return float(maps.pred_score)


def _largest(image: _Image, distances: list[Tensor]) -> list[float]:
    return [
        float(resemblance(part, distance).amax())
        for part, distance in zip(image.residuals, distances, strict=True)
    ]


@torch.no_grad()
def _evaluate(case: Case) -> list[Row]:
    module = data.build(case.dataset, case.root, case.split, case.seed, num_workers=0)
    model = fitted(module, case.seed).eval()
    processor: Any = model.post_processor
    threshold = processor.label_threshold
    good = processor.calibration_scores.good
    scorer, calibration = _Scorer(model), list[_Image]()

    def measure(embeddings: list[Tensor], size: Sequence[int], banks: Any) -> Tensor:  # noqa: ANN401
        calibration.extend(scorer.images(embeddings, size, banks))
        return torch.zeros(1, len(embeddings[0]))

    leave_one_out(model.model, model.pre_processor, good.paths, measure)
    samples = module.test_data.samples
    kinds = _kinds(case, samples)
    tested, defects = list[_Image](), list[Defect]()
    masks = samples["mask_path"] if "mask_path" in samples else [""] * len(samples)
    for path, mask, kind in zip(samples["image_path"], masks, kinds, strict=True):
        image = read_prepared(path, model.pre_processor, model.model.bit_depth)
        size = image.shape[-2:]
        tested += scorer.images(model.model.embed(image[None]), size, None)
        if kind == "good":
            defects.append(Defect(path, [], []))
            continue
        region = _region(mask, model)
        if region is None:
            region = worst_region(model.model.score_maps(image[None]).score_map[0, 0])
        defects.append(find_defect(model.model, image, path, region))
    rng = np.random.default_rng(case.seed)
    rows: list[Row] = []
    scores = np.array([image.score for image in tested])
    for kind in sorted(set(kinds) - {"good"}):
        own = np.flatnonzero(kinds == kind)
        for number in _NUMBERS:
            if len(own) < number + _FEWEST:
                continue
            shares = [
                _shares(scorer, calibration, tested, defects, (kinds, kind), examples, threshold)
                for examples in _choices(own, number, scores, threshold, rng)
            ]
            rows.append({"kind": kind, "examples": number, "ways": _means(shares)})
        print(kind, flush=True)
    return rows


def _choices(
    own: NDArray[np.int64],
    number: int,
    scores: NDArray[np.float64],
    threshold: float,
    rng: np.random.Generator,
) -> Iterator[NDArray[np.int64]]:
    """Images of a kind to reject, those that were missed first."""
    for _ in range(_CHOICES):
        order = rng.permutation(own)
        yield order[np.argsort(scores[order] > threshold, kind="stable")][:number]


def _shares(
    scorer: _Scorer,
    calibration: Sequence[_Image],
    tested: Sequence[_Image],
    defects: Sequence[Defect],
    of: tuple[NDArray[np.str_], str],
    examples: NDArray[np.int64],
    threshold: float,
) -> dict[str, Row]:
    """Of each way, the shares of images with an alarm after some of a kind were rejected."""
    kinds, kind = of
    asked = {
        "same": np.setdiff1d(np.flatnonzero(kinds == kind), examples),
        "other": np.flatnonzero((kinds != kind) & (kinds != "good")),
        "good": np.flatnonzero(kinds == "good"),
        "learned": examples,
    }
    chosen = [defects[index] for index in examples]
    alarms = _alarms(scorer, calibration, tested, chosen, threshold, examples)
    return {
        way: {
            name: float(found[index].mean()) if len(index) else None
            for name, index in asked.items()
        }
        for way, found in alarms.items()
    }


def _means(shares: Sequence[dict[str, Row]]) -> dict[str, Row]:
    """Means over choices, and the most false alarms of one."""
    return {
        way: {
            **{
                name: None
                if any(of[way][name] is None for of in shares)
                else round(statistics.mean(of[way][name] for of in shares), 4)
                for name in _SHARES
            },
            "most": round(max(of[way]["good"] for of in shares), 4),
        }
        for way in shares[0]
    }


def _kinds(case: Case, samples: pd.DataFrame) -> NDArray[np.str_]:
    """Kinds of defect; of data whose class knows none, by the folders of the images."""
    kinds = data.kinds(samples)
    if case.dataset in {"mvtec", "mvtec_3d", "small"}:
        names = [Path(path).parent.name for path in samples["image_path"]]
        kinds = np.where(kinds == "good", kinds, names)
    return kinds


def _region(mask: str, model: Sgfr) -> Tensor | None:
    """A defect's mask at the model's input; ``None`` if there is none, or nothing in it."""
    try:
        return mask_at_input(read_defect_mask(mask), model.pre_processor) if mask else None
    except ValueError:
        return None


def _alarms(
    scorer: _Scorer,
    calibration: Sequence[_Image],
    tested: Sequence[_Image],
    chosen: Sequence[Defect],
    threshold: float,
    examples: NDArray[np.int64],
) -> dict[str, NDArray[np.bool_]]:
    """Alarms of the tested images by each way."""
    atoms = [
        torch.cat([defect.atoms[scale] for defect in chosen]) for scale in range(len(scorer.scales))
    ]
    near = [scorer.distances(image, atoms) for image in calibration]
    largest = np.array([_largest(*pair) for pair in zip(calibration, near, strict=True)])
    distances = [scorer.distances(image, atoms) for image in tested]
    scores = np.array([image.score for image in tested])
    found = {_BEFORE: scores > threshold}
    limits = (largest.max(0) + MARGIN).tolist()
    for gain in _GAINS:
        raised_scores = [
            scorer.score(image, parts, limits, gain)
            for image, parts in zip(tested, distances, strict=True)
        ]
        found[f"gain {gain:g}"] = np.array(raised_scores) > threshold
    limits = np.quantile(largest, _QUANTILE, axis=0).tolist()
    again, now = (
        [
            scorer.score(image, parts, limits, _QUANTILE_GAIN)
            for image, parts in zip(images, of_images, strict=True)
        ]
        for images, of_images in ((calibration, near), (tested, distances))
    )
    before = conformal_threshold([image.score for image in calibration], _RATE)
    moved = threshold * conformal_threshold(again, _RATE) / before
    found[f"gain {_QUANTILE_GAIN:g}, limit of 98%"] = np.array(now) > moved
    found["lower threshold"] = scores > min(threshold, np.nextafter(scores[examples].min(), 0.0))
    found["logistic regression"] = found[_BEFORE] | _by_regression(
        scorer, calibration, tested, atoms
    )
    return found


def _by_regression(
    scorer: _Scorer,
    calibration: Sequence[_Image],
    tested: Sequence[_Image],
    atoms: Sequence[Tensor],
) -> NDArray[np.bool_]:
    """Alarms where a patch of some scale is more of a defect than any of the calibration images."""
    alarms = np.zeros(len(tested), dtype=bool)
    for scale, positive in enumerate(atoms):
        if not len(positive):
            continue
        negative = scorer.model.banks[scale].atoms
        of = make_pipeline(
            StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=300)
        ).fit(
            torch.cat((negative, positive)).numpy(),
            [0] * len(negative) + [1] * len(positive),
        )
        mean, spread = of[0].mean_, of[0].scale_
        weight = torch.tensor(of[1].coef_[0] / spread).float()
        offset = float(of[1].intercept_[0] - (of[1].coef_[0] / spread) @ mean)

        def most(
            image: _Image, scale: int = scale, by: Tensor = weight, at: float = offset
        ) -> float:
            return float((image.patches[scale].float() @ by).amax()) + at

        limit = max(map(most, calibration))
        alarms |= np.array([most(image) > limit for image in tested])
    return alarms


def _timed() -> list[Row]:
    """Milliseconds of an image, by OpenVINO on one thread, of files with defect banks of a size."""
    import openvino

    model = fitted(data.build("elpv-mono", num_workers=0), 0, image_size=(256, 256))
    own, core, requests = model.model, openvino.Core(), []
    for number in _PATCHES:
        generator = torch.Generator().manual_seed(0)
        atoms = [
            bank.atoms[torch.randint(bank.size, (number,), generator=generator)]
            for bank in own.banks
        ]
        places = torch.zeros(number, 4, dtype=torch.int32)
        defects = [Defect("2026-01-01 drawn.png", atoms, [places] * len(atoms))] if number else []
        plain = own.fitted_state.without_defects()
        own.load_defects(add_defects(plain, defects, [0.0] * len(atoms)))
        with tempfile.TemporaryDirectory() as folder:
            file = model.to_openvino(folder, input_size=(256, 256))
            options = {"INFERENCE_NUM_THREADS": 1, "PERFORMANCE_HINT": "LATENCY"}
            requests.append(core.compile_model(file, "CPU", options).create_infer_request())
    image = np.random.default_rng(0).random((1, 3, 256, 256), dtype=np.float32)
    seconds: list[list[float]] = [[] for _ in requests]
    for _ in range(_TIMES):
        for request, found in zip(requests, seconds, strict=True):
            start = time.perf_counter()
            request.infer([image])
            found.append(time.perf_counter() - start)
    return [
        {"patches": number, "milliseconds": 1000.0 * statistics.median(found)}
        for number, found in zip(_PATCHES, seconds, strict=True)
    ]


def _latency(folder: Path) -> list[str]:
    """Lines of the page on the time of an exported model."""
    rows = read_rows(folder / "latency.json")
    if not rows:
        return []
    least = rows[0]["milliseconds"]
    lines = [
        [str(row["patches"]), f"{row['milliseconds']:.1f}", f"{row['milliseconds'] / least:.3f}"]
        for row in rows
    ]
    head = ["patches of each scale", "ms", "times as long"]
    about = "An image of 256 x 256 pixels by OpenVINO on one thread, medians, the files in turns."
    return ["## Latency", "", about, "", table(head, lines), ""]


_INTRODUCTION = f"""# Learning from missed defects

Recall and false alarms in percent, at the threshold of a false-alarm rate of 1%, before and after
images of one kind of defect are rejected: means over kinds and choices of images. *Kind* are the
other images of that kind, *others* those of the other kinds, *learned* the share of the rejected
images that is found then. The default of `reject` is a gain of {GAIN:g}.
"""
_ALL = """
## In all

*Median* and *mean* recall of the kind over the columns, which are data and numbers of images; false
alarms of the worst column, and of the worst single choice.
"""
_KINDS = """
## By kind

Recall before and after five images are rejected, by default.
"""


def report(folder: Path) -> None:
    """Write the page of the results in a folder."""
    rows = read_rows(folder / "rejecting.json")
    ways, lines = list(rows[0]["ways"]), []
    columns: dict[str, list[list[float | None]]] = {way: [] for way in ways}
    for dataset, split in dict.fromkeys((row["dataset"], row["split"]) for row in rows):
        for number in _NUMBERS:
            found = alike(rows, dataset=dataset, split=split, examples=number)
            for way in ways if found else []:
                means = [_mean(found, way, name) for name in _SHARES]
                columns[way].append(means)
                lines.append([title(dataset, split), str(number), way, *map(_percent, means)])
    head = ["data", "images", "way", "kind", "others", "false alarms", "learned"]
    parts = [
        _INTRODUCTION,
        table(head, lines),
        _ALL,
        table(["way", "median", "mean", "worst column", "worst choice"], _in_all(rows, columns)),
        _KINDS,
        table(["data", "kind", "before", "after", "others before", "after"], _by_kind(rows)),
        "",
        *_latency(folder),
        f"Seeds {seeds(rows)}; made by `python -m benchmarks.rejecting`.",
        "",
    ]
    write_text(folder / "README.md", "\n".join(parts))


def _in_all(rows: Sequence[Row], columns: dict[str, list[list[float | None]]]) -> list[list[str]]:
    """Rows of the table over all data: of each way, recall and false alarms."""
    lines = []
    for way, means in columns.items():
        recall, alarms = ([each[of] or 0.0 for each in means] for of in (0, 2))
        worst = max(row["ways"][way]["most"] for row in rows)
        values = (statistics.median(recall), statistics.mean(recall), max(alarms), worst)
        lines.append([way, *map(_percent, values)])
    return lines


def _by_kind(rows: Sequence[Row]) -> list[list[str]]:
    """Rows of the table by kind of defect."""
    lines = []
    for dataset, split, kind in dict.fromkeys(
        (row["dataset"], row["split"], row["kind"]) for row in rows
    ):
        found = alike(rows, dataset=dataset, split=split, kind=kind, examples=_NUMBERS[-1])
        if found:
            ways = (_BEFORE, _DEFAULT)
            means = [_mean(found, way, name) for name in ("same", "other") for way in ways]
            lines.append([title(dataset, split), kind, *map(_percent, means)])
    return lines


def _mean(rows: Sequence[Row], way: str, name: str) -> float | None:
    """Mean of a way over rows; ``None`` where there is nothing to count."""
    values = [row["ways"][way][name] for row in rows]
    known = [value for value in values if value is not None]
    return statistics.mean(known) if known else None


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    if "--latency" in given:
        out = Path(given[given.index("--out") + 1]) if "--out" in given else _OUT
        write_rows(out / "latency.json", _timed())
        return show_page(report, out)
    return run_cases("rejecting", __doc__, _DATA, _evaluate, report, arguments)


if __name__ == "__main__":
    sys.exit(main())
