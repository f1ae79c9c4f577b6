"""The monitor of a stream: false alarms, and images until it finds changed conditions.

    python -m benchmarks.monitor --root mtd=DIR --out DIR

A model is fitted by default. The monitor's calibration scores are those that the fit keeps, of
training images without their own atoms (``training``), or of half of the good test images, so that
only the rest is in the stream (``held out``). False alarms: 1,000 streams, each all good test
images of the stream in random order. Changed conditions, drawn into good test images: a stream of
100 images as they were, then of 500 changed at once (``step``) or more and more (``ramp``), with 5%
of defective images throughout. Beside it a rule of thumb: the mean of the latest 50 scores is more
than three standard errors from that of the calibration scores. Writes ``monitor.json`` and
``README.md``; an interrupted command, given again, goes on where it stopped.
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
    model = fitted(module, case.seed, image_size=None, post_processor=False).eval()
    rng = np.random.default_rng(case.seed)

    def scored(paths: Sequence[str]) -> NDArray[np.float64]:
        found = nominal_scores(model.model, model.pre_processor, paths, leave_out=False)
        return np.array(found.scores)

    kinds, paths = data.kinds(module.test_data.samples), module.test_data.samples["image_path"]
    good_paths = rng.permutation(paths[kinds == "good"]).tolist()
    good, defective = scored(good_paths), scored(paths[kinds != "good"].tolist())
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
    by_strength: dict[str, list[NDArray[np.float64]]] = {name: [] for name in _CONDITIONS}
    for name, change in _CONDITIONS.items():
        for strength in _STRENGTHS:
            scores = []
            for path in shown:
                image = read_prepared(path, model.pre_processor, model.model.bit_depth)
                altered = _altered(image, model, change, strength)
                scores.append(float(model.model.score_maps(altered[None]).pred_score))
            by_strength[name].append(np.array(scores))
        for way in ("step", "ramp"):
            streams = [
                _stream(good, by_strength[name], defective, way, rng) for _ in range(_STREAMS)
            ]
            about = {"calibration": "training", "condition": name, "way": way}
            rows += _rows(of_training, streams, _BEFORE, about)
    return rows


def _altered(
    image: Tensor,
    model: Any,  # noqa: ANN401
    change: Callable[[Tensor, float], Tensor],
    strength: float,
) -> Tensor:
    """A pre-processed image under a condition: colours between 0 and 1, then back."""
    normalise = model.pre_processor.transform.transforms[-1]
    mean, std = (torch.tensor(values)[:, None, None] for values in (normalise.mean, normalise.std))
    return (change(image * std + mean, strength).clamp(0.0, 1.0) - mean) / std


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
    found = read_rows(folder / "monitor.json")
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
""",
    )


if __name__ == "__main__":
    sys.exit(main())
