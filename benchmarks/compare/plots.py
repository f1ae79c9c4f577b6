"""Figures of benchmark records."""

import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.ticker import LogFormatter
from numpy.typing import NDArray
from PIL import Image
from sklearn.metrics import average_precision_score

from benchmarks.common.figures import plt, save_figure
from benchmarks.common.records import Record, write_text
from benchmarks.compare.rows import NAMES, Row, changes, model_title

__all__ = ["plot_curves", "plot_examples", "plot_trade"]

_COLOURS = {
    "sgfr": "tab:red",
    "patchcore": "tab:blue",
    "padim": "tab:green",
    "mhpatchcore": "tab:orange",
}
_CURVE_POINTS = 300
_SHOWN = ("sgfr", "patchcore", "padim")  # whose maps stand beside the image and the truth


def plot_trade(path: Path, rows: Sequence[Row], heading: str) -> None:
    """Accuracy against what a model stores, and against its latency."""
    shown = [
        name
        for name in ("image_AUROC", "pixel_AP", "AUPRO")
        if rows[0].finished[0].metrics[name] is not None
    ]
    axes_of: tuple[tuple[str, Callable[[Record], float | None]], ...] = (
        ("stored beside the backbone, MiB", lambda record: (record.bank_bytes or 0) / 2**20),
        ("PyTorch, ms per image", lambda record: record.predict_ms),
    )
    others = itertools.cycle(
        "s^Dv<>"
    )  # of a model that is there more than once, all but the one with fewest changes
    nearest = {row.spec.model: row for row in sorted(rows, key=lambda row: -len(changes(row.spec)))}
    markers = ["o" if row is nearest[row.spec.model] else next(others) for row in rows]
    figure, axes = plt.subplots(
        len(shown), 2, figsize=(9, 2.9 * len(shown)), squeeze=False, layout="constrained"
    )
    for line, name in zip(axes, shown, strict=True):
        for axis, (label, value) in zip(line, axes_of, strict=True):
            for row, marker in zip(rows, markers, strict=True):
                axis.plot(
                    [value(record) for record in row.finished],
                    [100 * (record.metrics[name] or 0) for record in row.finished],
                    marker,
                    color=_COLOURS[row.spec.model],
                    alpha=0.7,
                    fillstyle="full" if marker == "o" else "none",
                    label=model_title(row.spec),
                )
            axis.set(xscale="log", xlabel=label, ylabel=f"{name}, %")
            for ticks in (axis.xaxis.set_major_formatter, axis.xaxis.set_minor_formatter):
                ticks(LogFormatter(minor_thresholds=(1.5, 0.4)))  # 30, not 3 x 10^1
            axis.grid(alpha=0.3)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize="small")
    figure.suptitle(heading)
    save_figure(figure, path)


def _curves_of_one_seed(folder: Path, rows: Sequence[Row]) -> tuple[int, list[Record]]:
    """The first seed with the most models' curves, and its runs, fewest changes first."""
    found: dict[int, list[Record]] = {}
    for row in sorted(rows, key=lambda row: len(changes(row.spec))):
        for record in row.finished:
            if any(path.exists() for path in _curve_files(folder, record.name)):
                found.setdefault(record.seed, []).append(record)

    def worth(seed: int) -> tuple[bool, int, int, int]:
        models = {record.model for record in found[seed]}
        return "sgfr" in models, len(models), len(found[seed]), -seed

    seed = max(found, key=worth, default=0)
    return seed, found.get(seed, [])


def _curve_files(folder: Path, run: str) -> tuple[Path, Path]:
    """Where the curves of a run are kept, and where the run wrote them."""
    return folder / "curves" / f"{run}.json", folder / "work" / run / "curves.json"


def _curves(folder: Path, run: str) -> dict[str, Any]:
    """Curves of a run: small enough to be kept with the results, unlike its maps."""
    kept, made = _curve_files(folder, run)
    if made.exists():
        whole = json.loads(made.read_text(encoding="utf-8"))
        prune = {kind: None if curve is None else _thinned(*curve) for kind, curve in whole.items()}
        write_text(kept, json.dumps(prune) + "\n")
    found: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
    return found


def _thinned(x: Sequence[float], y: Sequence[float]) -> list[list[float]]:
    """At most some hundreds of the points of a curve, its ends among them."""
    places = np.unique(np.linspace(0, len(x) - 1, _CURVE_POINTS).round().astype(int))
    return [[round(values[place], 4) for place in places] for values in (x, y)]


def plot_curves(folder: Path, name: str, rows: Sequence[Row], heading: str) -> None:
    """ROC and per-region-overlap curves of one seed, of the runs whose curves were kept."""
    seed, records = _curves_of_one_seed(folder, rows)
    found = [(record, _curves(folder, record.name)) for record in records]
    if all(record.model != "sgfr" for record in records):
        return
    kinds = [("roc", "false-positive rate (images)", "recall")]
    if found[0][1]["pro"] is not None:
        kinds.append(("pro", "false-positive rate (pixels)", "per-region overlap"))
    figure, axes = plt.subplots(
        1, len(kinds), figsize=(4.8 * len(kinds), 4), squeeze=False, layout="constrained"
    )
    for axis, (kind, x_label, y_label) in zip(axes[0], kinds, strict=True):
        styles: dict[str, int] = {}
        for record, curves in found:
            style = ("-", "--", ":", "-.")[styles.setdefault(record.model, 0) % 4]
            styles[record.model] += 1
            axis.plot(
                *curves[kind],
                style,
                color=_COLOURS[record.model],
                label=model_title(record),
                lw=1.4,
            )
        axis.set(xlabel=x_label, ylabel=y_label)
        axis.grid(alpha=0.3)
    axes[0, 0].legend(fontsize="x-small")
    figure.suptitle(f"{heading}, seed {seed}")
    save_figure(figure, folder / name)


def plot_examples(folder: Path, name: str, rows: Sequence[Row], heading: str) -> None:
    """Image, truth and maps of Sgfr's best, median and worst defect, by pixel AP or by score."""
    seed, paths = _maps_of_one_seed(folder, rows)
    loaded: dict[str, Any] = {
        model: np.load(path, allow_pickle=False) for model, path in paths.items()
    }
    models = [model for model in _SHOWN if model in loaded]
    if "sgfr" not in models:
        return
    ours = loaded["sgfr"] = dict(loaded["sgfr"])  # read the arrays once
    defective = np.flatnonzero(ours["kinds"] != "good")
    masks = ours.get("masks")
    if masks is not None:  # some defects are known but not marked
        defective = defective[masks[defective].any((1, 2))]
    merit = np.array([_merit(ours, int(case)) for case in defective])
    cases = defective[np.argsort(merit)][[-1, len(defective) // 2, 0]]
    columns = 2 + len(models)
    figure, axes = plt.subplots(3, columns, figsize=(2.1 * columns, 6.6), layout="constrained")
    for line, case, label in zip(axes, cases, ("best", "median", "worst"), strict=True):
        size = ours["maps"].shape[:0:-1]
        line[0].imshow(Image.open(str(ours["paths"][case])).convert("RGB").resize(size))
        line[0].set_ylabel(f"{label}: {ours['kinds'][case]}", fontsize="small")
        if masks is not None:
            line[1].imshow(masks[case], cmap="gray")
        else:
            line[1].text(0.5, 0.5, "no mask", ha="center", va="center", transform=line[1].transAxes)
        for axis, model in zip(line[2:], models, strict=True):
            scores = loaded[model] = dict(loaded[model])
            index = int(np.flatnonzero(scores["paths"] == ours["paths"][case])[0])
            low, high = _display_range(scores["maps"], scores["kinds"])
            axis.imshow(scores["maps"][index].astype(np.float32), cmap="turbo", vmin=low, vmax=high)
        for axis in line:
            axis.set_xticks([])
            axis.set_yticks([])
    for axis, label in zip(
        axes[0], ("image", "truth", *(NAMES[model] for model in models)), strict=True
    ):
        axis.set_title(label, fontsize="small")
    by = "score" if masks is None else "pixel AP"
    figure.suptitle(
        f"{heading}, seed {seed}: by Sgfr's {by}; one colour scale for each model", fontsize="small"
    )
    save_figure(figure, folder / name)


def _maps_of_one_seed(folder: Path, rows: Sequence[Row]) -> tuple[int, dict[str, Path]]:
    """The first seed with the most models' maps, and the maps' files by model."""
    found: dict[int, dict[str, Path]] = {}
    for row in sorted(rows, key=lambda row: len(changes(row.spec))):
        for record in row.finished:
            path = folder / "work" / record.name / "maps.npz"
            if record.model in _SHOWN and path.exists():
                found.setdefault(record.seed, {}).setdefault(record.model, path)
    return max(
        found.items(), key=lambda item: ("sgfr" in item[1], len(item[1]), -item[0]), default=(0, {})
    )


def _merit(runs: Any, case: int) -> float:  # noqa: ANN401
    """Average precision over a defect's pixels, or the image's score where there is no mask."""
    if "masks" not in runs:
        return float(runs["scores"][case])
    return float(average_precision_score(runs["masks"][case].ravel(), runs["maps"][case].ravel()))


def _display_range(maps: NDArray[np.float16], kinds: NDArray[np.str_]) -> tuple[float, float]:
    """Colours from a good image's median to a defective one's high scores."""
    step = max(1, len(maps) // 60)
    good, bad = maps[kinds == "good"][::step], maps[kinds != "good"][::step]
    return float(np.median(good)), float(np.percentile(bad.astype(np.float32), 99.5))
