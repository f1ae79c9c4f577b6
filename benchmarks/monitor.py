"""The monitor of a stream: false alarms, images until it finds a change, and labels after it.

    python -m benchmarks.monitor --root mtd=DIR --out DIR

A model is fitted by default. The monitor's calibration scores are those that the fit keeps, of
training images without their own atoms (``training``), or of half of the good test images, so that
only the rest is in the stream (``held out``). False alarms: 1,000 streams, each all good test
images of the stream in random order. Changed conditions, drawn into good test images: a stream of
100 images as they were, then of 500 changed at once (``step``) or more and more (``ramp``), with 5%
of defective images throughout. Beside it a rule of thumb: the mean of the latest 50 scores is more
than three standard errors from that of the calibration scores. Labels: the share of good images
called anomalous, and of defective ones missed, as they were, after the change, and after 16 good
images of the new conditions have chosen another threshold, adapted the model, or both. Writes
``monitor.json`` and ``README.md``; an interrupted command, given again, goes on where it stopped.
"""

import io
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional

from anomalib_sgfr.images.pre_processor import read_prepared
from anomalib_sgfr.monitor import Monitor
from anomalib_sgfr.post_processing.calibration import nominal_scores, select_evenly
from anomalib_sgfr.post_processing.thresholds import conformal_threshold
from anomalib_sgfr.report.watched import NEW_IMAGES
from anomalib_sgfr.torch_model import SgfrModel
from anomalib_sgfr.training.adapt import project_out_shift, residual_moments
from benchmarks.common import data
from benchmarks.common.cases import Case, alike, run_cases, seeds, title
from benchmarks.common.engine import fitted
from benchmarks.common.records import Row, read_rows, table, write_text

__all__ = ["main", "report"]

_DATA = ("mtd:canonical", "elpv-mono")
_CALIBRATION = 300  # images, as the post-processor takes
_TESTED = 150  # good test images that conditions are drawn into
_ORDERS, _STREAMS = 1000, 100
_BEFORE, _AFTER, _DEFECTS = 100, 500, 0.05
_STRENGTHS = (1 / 3, 2 / 3, 1.0)
_WINDOW = 50  # of the rule of thumb
_DEFECTIVE = 60  # images of the new conditions
_RATE, _DIRECTIONS = 0.01, 4  # defaults of the threshold and of `adapt`
_LABELS = {
    "before": "as it was",
    "changed": "changed",
    "threshold": "threshold of 16 images",
    "adapted": "adapted by 16 images",
    "both": "adapted, threshold of the 16",
}
_RULES = {"monitor": "monitor", "thumb": "mean of 50, 3 standard errors"}


def _brightness(image: Tensor, strength: float) -> Tensor:
    return (1.0 - 0.3 * strength) * image


def _blur(image: Tensor, strength: float) -> Tensor:
    sigma = 0.006 * strength * min(image.shape[-2:])
    blurred: Tensor = functional.gaussian_blur(image, [2 * round(3 * sigma) + 1] * 2, [sigma] * 2)
    return blurred


def _colour(image: Tensor, strength: float) -> Tensor:
    gains = torch.tensor([1.0 + 0.1 * strength, 1.0, 1.0 - 0.1 * strength])
    return image * gains[:, None, None]


def _shift(image: Tensor, strength: float) -> Tensor:
    moved = round(0.06 * strength * image.shape[-1])
    padded: Tensor = functional.pad(image, [moved, 0, 0, 0], padding_mode="edge")
    return padded[..., : image.shape[-1]]


def _jpeg(image: Tensor, strength: float) -> Tensor:
    pixels = image.clamp(0.0, 1.0).mul(255.0).round().byte().permute(1, 2, 0).numpy()
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=round(90 - 75 * strength))
    return torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1) / 255.0


_CONDITIONS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "brightness to 0.7": _brightness,
    "blur to 0.6% of a side": _blur,
    "colour by 10%": _colour,
    "shift by 6% of a side": _shift,
    "JPEG quality to 15": _jpeg,
}


@torch.no_grad()
def _evaluate(case: Case) -> list[Row]:
    """Alarms of both rules, for each condition and way of change."""
    module = data.build(case.dataset, case.root, case.split, case.seed, num_workers=0)
    model = fitted(module, case.seed, post_processor=False).eval()
    rng = np.random.default_rng(case.seed)

    def scored(paths: Sequence[str]) -> NDArray[np.float64]:
        found = nominal_scores(model.model, model.pre_processor, paths, leave_out=False)
        return np.array(found.scores)

    kinds, paths = data.kinds(module.test_data.samples), module.test_data.samples["image_path"]
    good_paths = rng.permutation(paths[kinds == "good"]).tolist()
    bad_paths = paths[kinds != "good"].tolist()
    good, defective = scored(good_paths), scored(bad_paths)
    chosen = select_evenly(module.train_data.samples["image_path"].tolist(), _CALIBRATION)
    of_training = np.array(nominal_scores(model.model, model.pre_processor, chosen).scores)
    half = len(good) // 2
    rows: list[Row] = []
    for source, calibration, stream in (
        ("training", of_training, good),
        ("held out", good[:half], good[half:]),
    ):
        orders = (rng.permutation(stream) for _ in range(_ORDERS))
        rows += _rows(calibration, orders, 0, {"calibration": source, "condition": "none"})
    shown = good_paths[:_TESTED]
    tested = slice(len(good) - NEW_IMAGES)  # of those shown, without the new images
    chosen_bad = slice(None, None, -(-len(bad_paths) // _DEFECTIVE))
    threshold = conformal_threshold(of_training.tolist(), _RATE)
    as_it_was = _label_row("before", good[:_TESTED][tested], defective[chosen_bad], threshold)
    rows.append({"condition": "none", **as_it_was})
    by_strength: dict[str, list[NDArray[np.float64]]] = {name: [] for name in _CONDITIONS}
    for name, change in _CONDITIONS.items():
        for strength in _STRENGTHS:
            images = _images(model, shown, change, strength)
            by_strength[name].append(_scores(model.model, images))
        labels = _label_rows(
            model,
            threshold,
            _images(model, good_paths[-NEW_IMAGES:], change),
            _images(model, shown[tested], change),
            _images(model, bad_paths[chosen_bad], change),
        )
        rows += [{"condition": name, **row} for row in labels]
        for way in ("step", "ramp"):
            streams = [
                _stream(good, by_strength[name], defective, way, rng) for _ in range(_STREAMS)
            ]
            about = {"calibration": "training", "condition": name, "way": way}
            rows += _rows(of_training, streams, _BEFORE, about)
    return rows


def _images(
    model: Any,  # noqa: ANN401
    paths: Sequence[str],
    change: Callable[[Tensor, float], Tensor],
    strength: float = 1.0,
) -> list[Tensor]:
    """Pre-processed images under a condition: colours between 0 and 1, then back."""
    normalise = model.pre_processor.transform.transforms[-1]
    mean, std = (torch.tensor(values)[:, None, None] for values in (normalise.mean, normalise.std))
    images = (read_prepared(path, model.pre_processor, model.model.bit_depth) for path in paths)
    return [(change(image * std + mean, strength).clamp(0.0, 1.0) - mean) / std for image in images]


def _scores(model: SgfrModel, images: Sequence[Tensor]) -> NDArray[np.float64]:
    return np.array([float(model.score_maps(image[None]).pred_score) for image in images])


def _label_rows(
    model: Any,  # noqa: ANN401
    threshold: float,
    new: Sequence[Tensor],
    good: Sequence[Tensor],
    bad: Sequence[Tensor],
) -> list[Row]:
    """Mistakes after a change: of the model as it is, and with what new good images give."""
    own = model.model
    moments = [residual_moments(own, [image]) for image in new]
    total = [torch.stack(scale).sum(0) for scale in zip(*moments, strict=True)]

    def adapted(of: Sequence[Tensor]) -> SgfrModel:
        found: SgfrModel = own.with_banks(project_out_shift(own, of, _DIRECTIONS))
        return found

    without_own = [
        _scores(adapted([every - one for every, one in zip(total, its, strict=True)]), [image])[0]
        for image, its in zip(new, moments, strict=True)
    ]
    again = conformal_threshold(_scores(own, new).tolist(), _RATE)
    both = conformal_threshold(without_own, _RATE)
    rows = []
    for each, thresholds in (
        (own, {"changed": threshold, "threshold": again}),
        (adapted(total), {"adapted": threshold, "both": both}),
    ):
        good_scores, bad_scores = _scores(each, good), _scores(each, bad)
        rows += [
            _label_row(name, good_scores, bad_scores, value) for name, value in thresholds.items()
        ]
    return rows


def _label_row(
    name: str, good: NDArray[np.float64], bad: NDArray[np.float64], threshold: float
) -> Row:
    return {
        "calibration": "training",
        "way": "labels",
        "rule": name,
        "false_alarms": float((good > threshold).mean()),
        "missed": float((bad <= threshold).mean()),
    }


def _stream(
    good: NDArray[np.float64],
    changed: list[NDArray[np.float64]],
    defective: NDArray[np.float64],
    way: str,
    rng: np.random.Generator,
) -> NDArray[np.float64]:
    """Scores of good images, before and after a change, some of defective ones among them."""
    levels = np.full(_AFTER, len(changed) - 1)
    if way == "ramp":
        levels = np.arange(_AFTER) * len(changed) // _AFTER
    after = [float(rng.choice(changed[level])) for level in levels]
    scores = np.concatenate([rng.choice(good, _BEFORE), after])
    are_defective = rng.random(len(scores)) < _DEFECTS
    return np.where(are_defective, rng.choice(defective, len(scores)), scores)


def _rows(
    calibration: NDArray[np.float64],
    streams: Any,  # noqa: ANN401
    before: int,
    about: dict[str, Any],
) -> list[Row]:
    """Of each rule, the share of streams with an alarm too early and in time, and the delay."""
    alarms: dict[str, list[int | None]] = {name: [] for name in _RULES}
    for stream in streams:
        alarms["monitor"].append(_monitor_alarm(calibration, stream))
        alarms["thumb"].append(_thumb_alarm(calibration, stream))
    rows = []
    for name, its in alarms.items():
        found = [at - before for at in its if at is not None and at > before]
        rows.append(
            {
                "way": "",
                **about,
                "rule": name,
                "streams": len(its),
                "early": sum(at is not None and at <= before for at in its) / len(its),
                "found": len(found) / len(its),
                "delay": statistics.median(found) if found else None,
            }
        )
    return rows


def _monitor_alarm(calibration: NDArray[np.float64], stream: NDArray[np.float64]) -> int | None:
    monitor = Monitor(calibration.tolist())
    for score in stream:
        if monitor.update(float(score)).changed:
            return monitor.changed_at
    return None


def _thumb_alarm(calibration: NDArray[np.float64], stream: NDArray[np.float64]) -> int | None:
    means = np.convolve(stream, np.full(_WINDOW, 1.0 / _WINDOW), "valid")
    error = calibration.std() / _WINDOW**0.5
    alarms = np.flatnonzero(np.abs(means - calibration.mean()) > 3.0 * error)
    return int(alarms[0]) + _WINDOW if len(alarms) else None


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and report; returns the exit code."""
    return run_cases("monitor", __doc__, _DATA, _evaluate, report, arguments)


def report(folder: Path) -> None:
    """Write ``README.md`` from ``monitor.json``: means over seeds, and medians of delays."""
    every = read_rows(folder / "monitor.json")
    found = [row for row in every if row["way"] != "labels"]
    labels = alike(every, way="labels")
    keys = dict.fromkeys(
        (row["dataset"], row["split"], row["calibration"], row["condition"], row["way"])
        for row in found
    )
    names = ("dataset", "split", "calibration", "condition", "way")
    still, changing = [], []
    for key in keys:
        own = alike(found, **dict(zip(names, key, strict=True)))
        dataset, split, calibration, condition, way = key
        cells = [title(dataset, split)]
        for rule in _RULES:
            its = alike(own, rule=rule)
            early, late = (statistics.mean(row[name] for row in its) for name in ("early", "found"))
            if condition == "none":
                cells.append(f"{100 * late:.1f}")
                continue
            delays = [row["delay"] for row in its if row["delay"] is not None]
            delay = f"{statistics.median(delays):.0f}" if delays else "-"
            cells.append(f"{100 * early:.0f} / {100 * late:.0f} / {delay}")
        if condition == "none":
            still.append([cells[0], calibration, *cells[1:]])
        else:
            changing.append([cells[0], condition, way, *cells[1:]])
    write_text(
        folder / "README.md",
        f"""\
# Monitor of a stream

Seeds {seeds(found)}. Streams of good images in random order, of which none should raise an alarm;
percent with one:

{table(["data", "calibration scores", *_RULES.values()], still)}

Conditions that change after {_BEFORE} of {_BEFORE + _AFTER} images, with {100 * _DEFECTS:.0f}%
of defective images throughout: percent of streams with an alarm before the change / with one after
it / median number of images until then.

{table(["data", "condition", "change", *_RULES.values()], changing)}

Labels, of seeds {seeds(labels)}, at the threshold for {100 * _RATE:g}% of good images: percent of
good images called anomalous / of defective images missed, under each condition in full.

{table(["data", "condition", *_LABELS.values()], _label_cells(labels))}
""",
    )


def _label_cells(rows: Sequence[Row]) -> list[list[str]]:
    """A line for each data set and condition; means over seeds."""
    cells = []
    for dataset, split, condition in dict.fromkeys(
        (row["dataset"], row["split"], row["condition"]) for row in rows
    ):
        if condition == "none":
            continue
        line = [title(dataset, split), condition]
        for rule in _LABELS:
            own = alike(rows, dataset=dataset, split=split, rule=rule)
            its = own if rule == "before" else alike(own, condition=condition)
            shares = [statistics.mean(row[n] for row in its) for n in ("false_alarms", "missed")]
            line.append(" / ".join(f"{100 * share:.0f}" for share in shares))
        cells.append(line)
    return cells


if __name__ == "__main__":
    sys.exit(main())
