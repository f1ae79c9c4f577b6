"""Tables of benchmark records, and the page that a folder of them is presented on."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from benchmarks.common.records import METRICS, Record, read, write_text
from benchmarks.compare.plots import plot_curves, plot_examples, plot_trade
from benchmarks.compare.rows import (
    Row,
    changes,
    data_title,
    keeps_aspect,
    model_title,
    rows_by_data,
)

__all__ = ["averages", "table", "write"]

_MOST_DRAWN = 4  # data sets; of more, only tables: figures would bury them
_NOTES = (
    "Medians over seeds; metrics in percent, on raw scores. `DIR` stands for the folder of the"
    " images. Rows that name a size, or each image's own aspect ratio, do not squeeze images to a"
    " square; where images are not square, Sgfr's default is such a row. Rows were run on several"
    " days: compare times by `fit / bare pass`, whose two passes are of one process."
)
_PATCHCORE = """\
Patchcore runs with `MALLOC_MMAP_THRESHOLD_=1048576`, without which its coreset selection can take
many times the memory, and on large pages (`GLIBC_TUNABLES=glibc.malloc.hugetlb=1`), which make it
faster; times of its earlier runs are without."""


# Means over the categories of a whole data set; backbones and image sizes differ from ours.
_PUBLISHED: dict[tuple[str, int], dict[str, dict[str, float]]] = {
    ("mvtec", 15): {
        "PatchCore, 1%, WideResNet-50, 224 px (arXiv 2106.08265)": {
            "image_AUROC": 0.990,
            "pixel_AUROC": 0.980,
            "AUPRO": 0.931,
        },
        "PaDiM, WideResNet-50, 224 px (arXiv 2011.08785)": {
            "image_AUROC": 0.953,
            "pixel_AUROC": 0.975,
            "AUPRO": 0.921,
        },
    },
}


def _metric(name: str) -> Callable[[Record], float | None]:
    return lambda record: record.metrics[name]


def _fit_ratio(record: Record) -> float | None:
    return record.fit_s / record.extract_s if record.fit_s and record.extract_s else None


_COLUMNS: tuple[tuple[str, Callable[[Record], float | None], str, int], ...] = (
    # heading, value, format, +1 if more is better, -1 if less is
    *((name, _metric(name), "percent", 1) for name in METRICS),
    ("atoms", lambda record: record.bank_atoms, ",.0f", 0),
    (
        "stored MiB",
        lambda record: None if record.bank_bytes is None else record.bank_bytes / 2**20,
        ".1f",
        -1,
    ),
    ("fit s", lambda record: record.fit_s, ".0f", -1),
    ("sampling s", lambda record: record.sampling_s, ".1f", -1),
    ("fit / bare pass", _fit_ratio, ".2f", -1),
    ("fit peak MiB", lambda record: record.fit_peak_rss_mb, ",.0f", -1),
    ("bare peak MiB", lambda record: record.extract_peak_rss_mb, ",.0f", 0),
    ("ms / image", lambda record: record.predict_ms, ".1f", -1),
)


def table(records: Iterable[Record]) -> str:
    """Markdown tables, one a data set: medians over seeds, the best of a column in bold."""
    parts = []
    for data, rows in rows_by_data(records).items():
        columns = [
            column for column in _COLUMNS if any(row.median(column[1]) is not None for row in rows)
        ]
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
                    text = (
                        f"**{text}**"
                        if text == _format(max(best) if better > 0 else min(best), style)
                        else text
                    )
                cells.append(text)
            errors = sorted({record.error for record in row.records if record.error is not None})
            failures = f" - failed: {'; '.join(errors)}" if errors else ""
            lines.append(
                f"| {model_title(row.spec)}{failures} | {len(row.finished)} | "
                + " | ".join(cells)
                + " |"
            )
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def averages(records: Iterable[Record]) -> str:
    """Markdown tables of means over the categories, of models that ran on all; may be empty."""
    of_model: dict[tuple[str, str], dict[str, Row]] = {}
    categories: dict[str, set[str]] = {}
    for data, rows in rows_by_data(records).items():
        for row in rows:
            name, part = row.spec.dataset, row.spec.split
            if name == "mtd" or part is None or not row.finished:
                continue
            whole = data.replace(f"{name} {part}", name, 1)
            categories.setdefault(whole, set()).add(part)
            of_model.setdefault((whole, model_title(row.spec)), {})[part] = row
    parts = []
    for whole, of in categories.items():
        complete = {
            model: rows
            for (data, model), rows in of_model.items()
            if data == whole and rows.keys() == of
        }
        if len(of) < 2 or not complete:  # noqa: PLR2004
            continue
        lines = [
            f"### {whole}, mean of {len(of)} categories",
            "",
            "| model | " + " | ".join(METRICS) + " |",
        ]
        lines.append("|---|" + "---|" * len(METRICS))
        for model, of_category in complete.items():
            means = [
                _mean([row.median(_metric(name)) for row in of_category.values()])
                for name in METRICS
            ]
            lines.append(
                f"| {model} | " + " | ".join(_format(mean, "percent") for mean in means) + " |"
            )
        for model, published in _PUBLISHED.get((whole.partition(" ")[0], len(of)), {}).items():
            cells = [_format(published.get(name), "percent") for name in METRICS]
            lines.append(f"| published: {model} | " + " | ".join(cells) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None


def _format(value: float | None, style: str) -> str:
    if value is None:
        return "-"
    return f"{100 * value:.1f}" if style == "percent" else format(value, style)


def _losses(records: Iterable[Record]) -> str:
    """Where Sgfr is not the best, by more than the tables show; over the seeds that both ran.

    With its defaults, or, where it did not run with them, with the fewest changes.
    """
    records = list(records)
    if all(record.model == "sgfr" for record in records):
        return "No other model is among these runs."
    lines = []
    for data, rows in rows_by_data(records).items():
        ours = [row for row in rows if row.spec.model == "sgfr" and row.finished]
        if not ours:
            continue
        ours.sort(key=lambda row: (len(changes(row.spec)), not keeps_aspect(row.spec)))
        other = f" of {model_title(ours[0].spec)}" if changes(ours[0].spec) else ""
        for name in METRICS:
            for row in rows:
                shared = ours[0].seeds & row.seeds
                mine, theirs = (of.median(_metric(name), shared) for of in (ours[0], row))
                if (
                    row.spec.model == "sgfr"
                    or mine is None
                    or theirs is None
                    or round(theirs - mine, 4) <= 0
                ):
                    continue
                at = (
                    ""
                    if shared == ours[0].seeds
                    else f" (seed {', '.join(map(str, sorted(shared)))})"
                )
                rival = f"{100 * theirs:.1f} of {model_title(row.spec)}{at}"
                lines.append(f"- {data}, {name}: {100 * mine:.1f}{other} against {rival}.")
    return "\n".join(lines) if lines else "Nowhere among these runs, over the seeds that both have."


def _of_kind(kind: str) -> Callable[[Record], float | None]:
    return lambda record: record.per_defect.get(kind)


def _per_defect(records: Iterable[Record]) -> str:
    parts = []
    for data, rows in rows_by_data(records).items():
        kinds = sorted(
            {kind for row in rows for record in row.finished for kind in record.per_defect}
        )
        if len(kinds) < 2:  # noqa: PLR2004
            continue
        lines = [
            f"### {data}",
            "",
            "| model | " + " | ".join(kinds) + " |",
            "|---|" + "---|" * len(kinds),
        ]
        for row in rows:
            if row.finished:
                cells = [_format(row.median(_of_kind(kind)), "percent") for kind in kinds]
                lines.append(f"| {model_title(row.spec)} | " + " | ".join(cells) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _file_name(heading: str) -> str:
    return re.sub(r"[ ,()]+", "-", heading.replace("%", "-percent")).strip("-")


def write(folder: Path) -> None:
    """Write ``README.md`` and the plots of the records in ``folder``.

    Curves and example images are drawn from the runs' own files when they are there, and left as
    they are otherwise.
    """
    records = read(folder / "results.json")
    figures = []
    groups = rows_by_data(records)
    told_apart = Counter(data_title(rows[0].spec) for rows in groups.values())
    for data, rows in groups.items() if len(groups) <= _MOST_DRAWN else ():
        finished = [row for row in rows if row.finished]
        if not finished:
            continue
        heading = data_title(rows[0].spec)
        if told_apart[heading] > 1:  # by backbone or image size
            heading = data
        name = _file_name(heading)
        plot_trade(folder / f"{name}-trade.png", finished, heading)
        plot_curves(folder, f"{name}-curves.png", finished, heading)
        plot_examples(folder, f"{name}-examples.png", finished, heading)
        figures += [
            file
            for kind in ("trade", "curves", "examples")
            if (folder / (file := f"{name}-{kind}.png")).exists()
        ]
    commands = (folder / "commands.txt").read_text(encoding="utf-8")
    defects, means = _per_defect(records), averages(records)
    parts = [
        f"# {folder.name}",
        _NOTES,
        *([_PATCHCORE] if any(record.model == "patchcore" for record in records) else []),
        f"```sh\n{commands}```",
        table(records),
        *([means] if means else []),
        f"## Where Sgfr loses\n\n{_losses(records)}",
        *([f"## Image AUROC by kind of defect\n\n{defects}"] if defects else []),
        *(f"![{figure.removesuffix('.png')}]({figure})" for figure in figures),
    ]
    write_text(folder / "README.md", "\n\n".join(parts) + "\n")
