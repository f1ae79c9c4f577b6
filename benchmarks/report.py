"""Tables and plots of benchmark records."""

import functools
import json
import statistics
from collections.abc import Callable, Container, Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.metrics import average_precision_score

from benchmarks.records import METRICS, Record, Spec, read, write_text

mpl.use("Agg")
from matplotlib import pyplot as plt

__all__ = ["NAMES", "plt", "save_figure", "table", "title", "write"]

_COLOURS = {"sgfr": "tab:red", "patchcore": "tab:blue", "padim": "tab:green", "mhpatchcore": "tab:orange"}
NAMES = {"sgfr": "Sgfr", "patchcore": "Patchcore", "padim": "Padim", "mhpatchcore": "MHPatchcore"}
_MIB = 2**20
_CURVE_POINTS = 300
_MOST_DRAWN = 4  # data sets; of more, only tables: pictures would bury them
_NOTES = """\
Medians over seeds; metrics in percent, on raw scores. `DIR` stands for the folder of the images. Patchcore runs with
`MALLOC_MMAP_THRESHOLD_=1048576`, without which its coreset selection can take many times the memory, and on large pages
(`GLIBC_TUNABLES=glibc.malloc.hugetlb=1`), which make it faster; times of its runs before are without."""


@functools.cache
def _defaults(model: str) -> dict[str, Any]:
    from benchmarks.zoo import resolve_arguments

    return resolve_arguments(model, {})


def title(spec: Spec) -> str:
    """What a run is, for people: data, model, and the arguments that are not the model's defaults."""
    return f"{_data(spec)}: {_model(spec)}"


def _data(spec: Spec) -> str:
    images = f", {spec.limit_train} training images" if spec.limit_train else ""
    defective = f", {100 * spec.contamination:g}% of them defective" if spec.contamination else ""
    return spec.dataset + (f" {spec.split}" if spec.split else "") + images + defective


def _changes(spec: Spec) -> list[str]:
    defaults = _defaults(spec.model)
    return [f"{name} {value}" for name, value in spec.arguments.items() if defaults.get(name) != value]


def _model(spec: Spec) -> str:
    changed = _changes(spec)
    return NAMES[spec.model] + (f" ({', '.join(changed)})" if changed else "")


class _Row:
    """Records that differ in their seed alone."""

    def __init__(self, records: Sequence[Record]) -> None:
        self.records = records
        self.spec = records[0]
        self.finished = [record for record in records if record.error is None]

    def median(self, value: Callable[[Record], float | None], seeds: Container[int] | None = None) -> float | None:
        of = [record for record in self.finished if seeds is None or record.seed in seeds]
        values = [found for found in map(value, of) if found is not None]
        return statistics.median(values) if values else None

    @property
    def seeds(self) -> set[int]:
        return {record.seed for record in self.finished}


def _rows(records: Iterable[Record]) -> dict[str, list[_Row]]:
    """Rows by data set; each data set's in the order of its models."""
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        same = (_data(record), record.backbone, tuple(record.image_size))
        groups.setdefault((*same, list(NAMES).index(record.model), _model(record)), []).append(record)
    rows: dict[str, list[_Row]] = {}
    for (data, backbone, size, *_), group in sorted(groups.items(), key=lambda item: str(item[0])):
        rows.setdefault(f"{data} ({backbone}, {size[0]} px)", []).append(_Row(group))
    return rows


def _metric(name: str) -> Callable[[Record], float | None]:
    return lambda record: record.metrics[name]


def _fit_ratio(record: Record) -> float | None:
    return record.fit_s / record.extract_s if record.fit_s and record.extract_s else None


_COLUMNS: tuple[tuple[str, Callable[[Record], float | None], str, int], ...] = (
    # heading, value, format, +1 if more is better, -1 if less is
    *((name, _metric(name), "percent", 1) for name in METRICS),
    ("atoms", lambda record: record.bank_atoms, ",.0f", 0),
    ("stored MiB", lambda record: None if record.bank_bytes is None else record.bank_bytes / _MIB, ".1f", -1),
    ("fit s", lambda record: record.fit_s, ".0f", -1),
    ("sampling s", lambda record: record.sampling_s, ".1f", -1),
    ("fit / bare pass", _fit_ratio, ".2f", -1),
    ("fit peak MiB", lambda record: record.fit_peak_rss_mb, ",.0f", -1),
    ("bare peak MiB", lambda record: record.extract_peak_rss_mb, ",.0f", 0),
    ("ms / image", lambda record: record.predict_ms, ".1f", -1),
)


def table(records: Iterable[Record]) -> str:
    """Markdown tables, one for each data set: medians over seeds, the best of each column in bold."""
    parts = []
    for data, rows in _rows(records).items():
        columns = [column for column in _COLUMNS if any(row.median(column[1]) is not None for row in rows)]
        lines = [f"### {data}", ""]
        lines.append("| model | seeds | " + " | ".join(name for name, *_ in columns) + " |")
        lines.append("|---|---|" + "---|" * len(columns))
        for row in rows:
            cells = []
            for _, value, style, better in columns:
                mine = row.median(value)
                every = [other.median(value) for other in rows]
                best = [other for other in every if other is not None]
                text = _format(mine, style)
                if mine is not None and better and len(best) > 1:
                    text = f"**{text}**" if text == _format(max(best) if better > 0 else min(best), style) else text
                cells.append(text)
            errors = sorted({record.error for record in row.records if record.error is not None})
            failures = f" - failed: {'; '.join(errors)}" if errors else ""
            lines.append(f"| {_model(row.spec)}{failures} | {len(row.finished)} | " + " | ".join(cells) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _format(value: float | None, style: str) -> str:
    if value is None:
        return "-"
    return f"{100 * value:.1f}" if style == "percent" else format(value, style)


def _losses(records: Iterable[Record]) -> str:
    """Where Sgfr is not the best, by more than the tables show; over the seeds that both ran.

    With its defaults, or, where it did not run with them, with the fewest changes.
    """
    lines = []
    for data, rows in _rows(records).items():
        ours = [row for row in rows if row.spec.model == "sgfr" and row.finished]
        if not ours:
            continue
        ours.sort(key=lambda row: len(_changes(row.spec)))
        other = "" if _model(ours[0].spec) == NAMES["sgfr"] else f" of {_model(ours[0].spec)}"
        for name in METRICS:
            for row in rows:
                shared = ours[0].seeds & row.seeds
                mine, theirs = (of.median(_metric(name), shared) for of in (ours[0], row))
                if row.spec.model == "sgfr" or mine is None or theirs is None or round(theirs - mine, 4) <= 0:
                    continue
                at = "" if shared == ours[0].seeds else f" (seed {', '.join(map(str, sorted(shared)))})"
                lines.append(
                    f"- {data}, {name}: {100 * mine:.1f}{other} against {100 * theirs:.1f} of {_model(row.spec)}{at}."
                )
    return "\n".join(lines) if lines else "Nowhere among these runs."


def _of_kind(kind: str) -> Callable[[Record], float | None]:
    return lambda record: record.per_defect.get(kind)


def _per_defect(records: Iterable[Record]) -> str:
    parts = []
    for data, rows in _rows(records).items():
        kinds = sorted({kind for row in rows for record in row.finished for kind in record.per_defect})
        if len(kinds) < 2:  # noqa: PLR2004
            continue
        lines = [f"### {data}", "", "| model | " + " | ".join(kinds) + " |", "|---|" + "---|" * len(kinds)]
        for row in rows:
            if row.finished:
                cells = [_format(row.median(_of_kind(kind)), "percent") for kind in kinds]
                lines.append(f"| {_model(row.spec)} | " + " | ".join(cells) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def write(folder: Path) -> None:
    """Write ``README.md`` and the plots of the records in ``folder``; needs nothing but what is committed there.

    Curves and example pictures are drawn from the runs' own files when they are there, and left as they are otherwise.
    """
    records = read(folder / "results.json")
    pictures = []
    groups = list(_rows(records).values())
    for rows in groups if len(groups) <= _MOST_DRAWN else []:
        name = _data(rows[0].spec).replace(", ", "-").replace(" ", "-").replace("%", "-percent")
        finished = [row for row in rows if row.finished]
        if not finished:
            continue
        _plot_trade(folder / f"{name}-trade.png", finished, _data(rows[0].spec))
        _plot_curves(folder, f"{name}-curves.png", finished)
        _plot_examples(folder, f"{name}-examples.png", finished)
        pictures += [
            file for kind in ("trade", "curves", "examples") if (folder / (file := f"{name}-{kind}.png")).exists()
        ]
    commands = (folder / "commands.txt").read_text(encoding="utf-8")
    defects = _per_defect(records)
    parts = [
        f"# {folder.name}",
        _NOTES,
        f"```sh\n{commands}```",
        table(records),
        f"## Where Sgfr loses\n\n{_losses(records)}",
        *([f"## Image AUROC by kind of defect\n\n{defects}"] if defects else []),
        *(f"![{picture.removesuffix('.png')}]({picture})" for picture in pictures),
    ]
    write_text(folder / "README.md", "\n\n".join(parts) + "\n")


def save_figure(figure: Any, path: Path) -> None:  # noqa: ANN401
    """Write a figure whole or not at all, and close it."""
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, dpi=110, bbox_inches="tight", format="png")
    plt.close(figure)
    temporary.replace(path)


def _plot_trade(path: Path, rows: Sequence[_Row], heading: str) -> None:
    """Accuracy against what a model stores, and against its latency."""
    shown = [name for name in ("image_AUROC", "pixel_AP", "AUPRO") if rows[0].finished[0].metrics[name] is not None]
    axes_of: tuple[tuple[str, Callable[[Record], float | None]], ...] = (
        ("stored beside the backbone, MiB", lambda record: (record.bank_bytes or 0) / _MIB),
        ("PyTorch, ms per image", lambda record: record.predict_ms),
    )
    figure, axes = plt.subplots(len(shown), 2, figsize=(9, 2.9 * len(shown)), squeeze=False, layout="constrained")
    for line, name in zip(axes, shown, strict=True):
        for axis, (label, value) in zip(line, axes_of, strict=True):
            for row in rows:
                axis.plot(
                    [value(record) for record in row.finished],
                    [100 * (record.metrics[name] or 0) for record in row.finished],
                    "o",
                    color=_COLOURS[row.spec.model],
                    alpha=0.7,
                    fillstyle="none" if row.spec.model == "sgfr" and _changes(row.spec) else "full",
                    label=_model(row.spec),
                )
            axis.set(xscale="log", xlabel=label, ylabel=f"{name}, %")
            axis.grid(alpha=0.3)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize="small")
    figure.suptitle(heading)
    save_figure(figure, path)


def _curves(folder: Path, run: str) -> dict[str, Any] | None:
    """Curves of a run: small enough to be kept with the results, unlike its maps."""
    kept, made = folder / "curves" / f"{run}.json", folder / "work" / run / "curves.json"
    if made.exists():
        whole = json.loads(made.read_text(encoding="utf-8"))
        thin = {kind: None if curve is None else _thinned(*curve) for kind, curve in whole.items()}
        write_text(kept, json.dumps(thin) + "\n")
    return json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else None


def _thinned(x: Sequence[float], y: Sequence[float]) -> list[list[float]]:
    """At most some hundreds of the points of a curve, its ends among them."""
    places = np.unique(np.linspace(0, len(x) - 1, _CURVE_POINTS).round().astype(int))
    return [[round(values[place], 4) for place in places] for values in (x, y)]


def _plot_curves(folder: Path, name: str, rows: Sequence[_Row]) -> None:
    """ROC and per-region-overlap curves of the first seed, of the runs whose curves were kept."""
    found = []
    for row in rows:
        curves = _curves(folder, row.finished[0].name)
        if curves is not None:
            found.append((row, curves))
    if all(row.spec.model != "sgfr" for row, _ in found):
        return
    kinds = [("roc", "false-positive rate (images)", "recall")]
    if found[0][1]["pro"] is not None:
        kinds.append(("pro", "false-positive rate (pixels)", "per-region overlap"))
    figure, axes = plt.subplots(1, len(kinds), figsize=(4.8 * len(kinds), 4), squeeze=False, layout="constrained")
    for axis, (kind, x_label, y_label) in zip(axes[0], kinds, strict=True):
        styles: dict[str, int] = {}
        for row, curves in found:
            style = ("-", "--", ":", "-.")[styles.setdefault(row.spec.model, 0) % 4]
            styles[row.spec.model] += 1
            axis.plot(*curves[kind], style, color=_COLOURS[row.spec.model], label=_model(row.spec), lw=1.4)
        axis.set(xlabel=x_label, ylabel=y_label)
        axis.grid(alpha=0.3)
    axes[0, 0].legend(fontsize="x-small")
    figure.suptitle(f"{_data(rows[0].spec)}, seed {rows[0].finished[0].seed}")
    save_figure(figure, folder / name)


def _plot_examples(folder: Path, name: str, rows: Sequence[_Row]) -> None:
    """Image, truth and maps of Sgfr's best, median and worst defect: by pixel AP, or by score without masks."""
    loaded = {}
    for row in rows:
        path = folder / "work" / row.finished[0].name / "maps.npz"
        if path.exists() and row.spec.model not in loaded:
            loaded[row.spec.model] = np.load(path, allow_pickle=False)
    models = [model for model in ("sgfr", "patchcore", "padim") if model in loaded]
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
    for axis, label in zip(axes[0], ("image", "truth", *(NAMES[model] for model in models)), strict=True):
        axis.set_title(label, fontsize="small")
    by = "score" if masks is None else "pixel AP"
    figure.suptitle(f"{_data(rows[0].spec)}: by Sgfr's {by}; one colour scale for each model", fontsize="small")
    save_figure(figure, folder / name)


def _merit(runs: Any, case: int) -> float:  # noqa: ANN401
    """How well a defect is found: average precision over its pixels, or the image's score where there is no mask."""
    if "masks" not in runs:
        return float(runs["scores"][case])
    return float(average_precision_score(runs["masks"][case].ravel(), runs["maps"][case].ravel()))


def _display_range(maps: NDArray[np.float16], kinds: NDArray[np.str_]) -> tuple[float, float]:
    """Colours from a good image's median to a defective one's high scores."""
    step = max(1, len(maps) // 60)
    good, bad = maps[kinds == "good"][::step], maps[kinds != "good"][::step]
    return float(np.median(good)), float(np.percentile(bad.astype(np.float32), 99.5))
