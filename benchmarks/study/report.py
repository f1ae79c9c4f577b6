"""The page of a study: medians over seeds, and a plot."""

import itertools
import statistics
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common.figures import plt, save_figure
from benchmarks.common.records import METRICS, read, write_text
from benchmarks.study.variants import STUDIES, spec_of, specs_of

__all__ = ["report"]

_LONGEST = 10  # of a label below an axis


def report(name: str, folder: Path) -> None:
    """Write the tables of a study: medians over seeds, and the mean over data sets."""
    records = {
        record.key: record
        for record in read(folder / "results.json")
        if record.key in specs_of(name, record.dataset, record.split, record.seed)
    }
    places = sorted({(record.dataset, record.split or "") for record in records.values()})
    seeds = sorted({record.seed for record in records.values()})
    columns = [
        (dataset, split, metric)
        for dataset, split in places
        for metric in METRICS
        if metric != "image_F1Max"
        and (not dataset.startswith("elpv") or metric.startswith("image"))
    ]
    heading = [
        f"{dataset} {split} {metric}".replace("  ", " ") for dataset, split, metric in columns
    ]
    lines = [
        f"| {name} | " + " | ".join(heading) + " | mean |",
        "|---|" + "---|" * (len(columns) + 1),
    ]
    lines_of: list[list[float | None]] = []
    some_short = False
    for variant in STUDIES[name]:
        cells: list[float | None] = []
        text = []
        for dataset, split, metric in columns:
            found = [
                records.get(spec_of(variant, dataset, split or None, seed).key) for seed in seeds
            ]
            values = [
                value
                for record in found
                if record and (value := record.metrics[metric]) is not None
            ]
            cells.append(statistics.median(values) if values else None)
            short = bool(values) and len(values) < len(seeds)
            some_short = some_short or short
            text.append(_percent(cells[-1]) + (f" ({len(values)})" if short else ""))
        lines_of.append(cells)
        mean = (
            statistics.mean(cell for cell in cells if cell is not None)
            if None not in cells
            else None
        )
        lines.append(f"| {variant.label} | " + " | ".join([*text, _percent(mean)]) + " |")
    _plot(name, folder, columns, lines_of)
    of_seeds = (
        f"Medians of seeds {', '.join(map(str, seeds))}" if len(seeds) > 1 else f"Seed {seeds[0]}"
    )
    fewer = "; (n): of n seeds" if some_short else ""
    write_text(
        folder / "README.md",
        f"# Study: {name}\n\n`python -m benchmarks.study {name} --root DIR`\n\n{of_seeds}, in"
        f" percent{fewer}; all else as by default.\n\n"
        + "\n".join(lines)
        + f"\n\n![{name}]({name}.png)\n",
    )


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _plot(
    name: str,
    folder: Path,
    columns: list[tuple[str, str, str]],
    values: Sequence[Sequence[float | None]],
) -> None:
    """A panel for each metric, a line for each data set, over the variants."""
    lines = _lines([variant.label for variant in STUDIES[name]])
    metrics = list(dict.fromkeys(metric for *_, metric in columns))
    colours = {
        place: f"C{number}"
        for number, place in enumerate(dict.fromkeys(column[:2] for column in columns))
    }
    figure, axes = plt.subplots(
        1, len(metrics), figsize=(4 * len(metrics), 4.0), squeeze=False, layout="constrained"
    )
    for axis, metric in zip(axes[0], metrics, strict=True):
        for place, (dataset, split, of) in enumerate(columns):
            for dash, (line, points) in zip(
                itertools.cycle(("-", "--", ":")), lines.items(), strict=False
            ):
                found = [values[row][place] for row in points.values()]
                if of == metric and None not in found:
                    percent = [100 * (value or 0.0) for value in found]
                    style = {
                        "color": colours[dataset, split],
                        "label": " ".join(filter(None, (dataset, split, line))),
                    }
                    axis.plot(_ticks(list(points)), percent, f"o{dash}", lw=1.2, ms=4, **style)
        ticks = list(next(iter(lines.values())))
        axis.set(
            title=f"{metric}, %",
            xlabel=name if _ticks(ticks) == ticks else f"{name}: line of the table",
        )
        axis.tick_params("x", rotation=_rotation(_ticks(ticks)))
        axis.grid(alpha=0.3)
    # every data set has an image AUROC, the first panel; below, where it hides no point
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(colours)
    )
    save_figure(figure, folder / f"{name}.png")


def _lines(labels: Sequence[str]) -> dict[str, dict[str, int]]:
    """Rows of the table by line of the plot and label below it.

    Labels that are all pairs, such as ``"100, k 1"``, make a line of each second part; others make
    one line.
    """
    rows = {tuple(label.rsplit(", ", 1)): row for row, label in enumerate(labels)}
    firsts, seconds = (list(dict.fromkeys(label[place] for label in rows)) for place in (0, -1))
    if any((first, second) not in rows for first in firsts for second in seconds):
        return {"": {label: row for row, label in enumerate(labels)}}
    return {second: {first: rows[first, second] for first in firsts} for second in seconds}


def _ticks(labels: list[str]) -> list[str]:
    """What stands below an axis: labels that are short, or their number."""
    return (
        labels
        if max(map(len, labels)) <= _LONGEST
        else [str(number) for number in range(1, len(labels) + 1)]
    )


def _rotation(labels: Sequence[str]) -> int:
    """Degrees by which labels below an axis do not run into each other."""
    if max(map(len, labels)) <= 4:  # noqa: PLR2004
        return 0
    return 45 if len(labels) <= 8 else 90  # noqa: PLR2004
