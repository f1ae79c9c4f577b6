"""Tables of the documents: committed results, the same images and seeds for every model.

    python -m benchmarks.headline

Rewrites what stands between markers in ``README.md`` and ``benchmarks/README.md`` from
``benchmarks/results``.
"""

import argparse
import statistics
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from benchmarks.common.records import Record, read, write_text
from benchmarks.common.zoo import resolve_arguments
from benchmarks.compare import rows

__all__ = ["aspect_table", "few_table", "main", "summary", "table"]

_RESULTS = Path(__file__).parent / "results"
_README = Path(__file__).parent.parent / "README.md"
_DETAILS = Path(__file__).parent / "README.md"
_PLACES = (
    ("mtd", "canonical", "magnetic tiles, published split"),
    ("mtd", "tile", "magnetic tiles, new tiles"),
    ("elpv-mono", None, "solar cells, mono"),
    ("elpv-poly", None, "solar cells, poly"),
    ("mvtec", "bottle", "MVTec AD bottle"),
    ("mvtec", "grid", "MVTec AD grid"),
    ("kolektor", None, "KolektorSDD"),
    ("mvtec_3d", "tire", "MVTec 3D-AD tire, colour"),
    ("mvtec_loco", "juice_bottle", "MVTec LOCO juice bottle, logical"),
)
_METRICS = {
    "image_AUROC": "image AUROC",
    "pixel_AUROC": "pixel AUROC",
    "pixel_AP": "pixel AP",
    "AUPRO": "AUPRO",
}
_SUMMARY_MODELS = ("sgfr", "patchcore", "padim")
_SUMMARY_METRICS = ("image_AUROC", "pixel_AP", "AUPRO")
# what Patchcore stores by default would take hours to choose; its default is also compared, on
# fewer images
_CHANGED: Mapping[str, Mapping[str, object]] = {"patchcore": {"coreset_sampling_ratio": 0.01}}
_SIDE = 256
_BACKBONE = "tf_efficientnet_lite0"
_NAMES = {
    model: name for model, name in rows.NAMES.items() if model != "anomalydino"
}  # which takes other backbones
# with few training images: data sets, how many images, metrics; Patchcore by its own default
_FEW_PLACES = tuple(
    place for place in _PLACES if place[0] in {"mtd", "mvtec", "kolektor"} and place[1] != "tile"
)
_FEW = (4, 16)
_FEW_METRICS = ("image_AUROC", "pixel_AP")
_FEW_CHANGED: Mapping[str, Mapping[str, object]] = {
    "sgfr": {"copies": "turned"},
    "patchcore": {"coreset_sampling_ratio": 0.1},
}


def summary(results: Path) -> str:
    """Markdown: a row for each data set, Sgfr beside Patchcore and Padim, the best in bold.

    Args:
        results (Path): Folder that holds a folder for each data set.

    Returns:
        str: The table, of medians over the seeds that Sgfr and Patchcore ran with, without data
        sets that Patchcore did not run on. A value whose range over the seeds overlaps with that of
        the best is a tie, and in bold too.
    """
    wanted = _wanted(_CHANGED, _SUMMARY_MODELS)
    heads = [*(f"{_METRICS[metric]}, %" for metric in _SUMMARY_METRICS), "stored, MiB"]
    lines = [
        f"| {' / '.join(_NAMES[model] for model in wanted)} | " + " | ".join(heads) + " |",
        "|---" * (len(heads) + 1) + "|",
    ]
    for label, found in _lines(results, wanted):
        runs, seeds = _runs(found, wanted)
        if runs["sgfr"] and not runs["patchcore"]:
            continue  # not compared yet
        cells = []
        for metric in _SUMMARY_METRICS:
            values = [_values(of, seeds, metric) for of in runs.values()]
            best = max(filter(None, values), key=statistics.median, default=[])
            cells.append(" / ".join(_median(its, best) for its in values) if best else "-")
        cells.append(" / ".join(_stored(of.values()) for of in runs.values()))
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def table(results: Path) -> str:
    """Markdown: a line a data set and metric, a column a model, the best of a line in bold.

    Args:
        results (Path): Folder that holds a folder for each data set.

    Returns:
        str: The table. A line takes medians over the seeds that Sgfr and Patchcore, if it has a
        result there, both ran with, and between which values they lie; a model that ran with fewer
        of them says how many, and one that ran with none has no result. What overlaps with the best
        between the seeds is a tie, and in bold too.
    """
    wanted = _wanted(_CHANGED, _NAMES)
    lines = [
        "| %, medians and ranges over seeds | " + " | ".join(_NAMES.values()) + " | seeds |",
        "|---" * (len(_NAMES) + 2) + "|",
    ]
    medians: dict[str, list[float]] = {model: [] for model in _NAMES}
    for label, found in _lines(results, wanted):
        runs, seeds = _runs(found, wanted)
        is_first = label in {its for *_, its in _PLACES}
        for metric, name in _METRICS.items():
            values = {model: _values(of, seeds, metric) for model, of in runs.items()}
            if not any(values.values()):
                continue
            best = max(filter(None, values.values()), key=statistics.median)
            cells = [_cell(its, best, len(seeds)) for its in values.values()]
            lines.append(
                f"| {label}: {name} | " + " | ".join(cells) + f" | {', '.join(map(str, seeds))} |"
            )
            if metric == "image_AUROC" and is_first:
                for model, its in values.items():
                    medians[model] += [statistics.median(its)] if its else []
        if label.startswith("magnetic tiles") and found:
            cells = [_stored(of.values()) for of in runs.values()]
            lines.append(f"| {label}: stored, MiB | " + " | ".join(cells) + " | |")
    means = [
        f"{statistics.mean(its):.1f}" if len(its) == len(_PLACES) else "-"
        for its in medians.values()
    ]
    if any(mean != "-" for mean in means):
        lines.append(f"| mean of all {len(_PLACES)}: image AUROC | " + " | ".join(means) + " | |")
    return "\n".join(lines) + "\n"


def _lines(
    results: Path, wanted: Mapping[str, Mapping[str, object]]
) -> Iterator[tuple[str, list[Record]]]:
    """Runs of each line: Sgfr by default and the others on squeezed images, as anomalib has them.

    Where images are not square, a second line has the others in the aspect ratio that Sgfr has.
    """
    for dataset, split, label in _PLACES:
        file = results / dataset / "results.json"
        yield label, _of_defaults(file, (dataset, split), wanted)
        found = _of_defaults(file, (dataset, split), wanted, same_aspect=True)
        if any(record.model != "sgfr" for record in found):
            yield "{}, all at {} x {} px".format(label, *found[0].image_size), found


def aspect_table(results: Path) -> str:
    """Markdown: a line for each data set that is not square, Sgfr on squeezed images and not.

    Args:
        results (Path): Folder that holds a folder for each data set.

    Returns:
        str: The table, of medians and ranges over the seeds that both ran with; the larger in bold.
    """
    wanted = _wanted({}, ["sgfr"])
    heads = [_METRICS[metric] for metric in _SUMMARY_METRICS]
    lines = [
        "| %, squeezed / own aspect ratio | size | " + " | ".join(heads) + " |",
        "|---" * (len(heads) + 2) + "|",
    ]
    for dataset, split, label in _PLACES:
        file = results / dataset / "results.json"
        kept = _of_defaults(file, (dataset, split), wanted)
        squeezed = _of_defaults(file, (dataset, split), wanted, squeezed=True)
        if not kept or not squeezed or not rows.keeps_aspect(kept[0]):
            continue
        runs = [{record.seed: record for record in of} for of in (squeezed, kept)]
        seeds = sorted(set.intersection(*map(set, runs)))
        cells = []
        for metric in _SUMMARY_METRICS:
            values = [_values(of, seeds, metric) for of in runs]
            best = max(filter(None, values), key=statistics.median, default=[])
            cells.append(" / ".join(_cell(its, best, len(seeds)) for its in values))
        size = "each its own" if kept[0].own_aspect else "{} x {}".format(*kept[0].image_size)
        lines.append(f"| {label} | {size} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def few_table(results: Path) -> str:
    """Markdown: a line for each data set, Sgfr beside Patchcore with few training images.

    Args:
        results (Path): Folder that holds ``few-shot``.

    Returns:
        str: The table, of medians over the seeds that both ran with; the larger in bold.
    """
    wanted = _wanted(_FEW_CHANGED, _FEW_CHANGED)
    columns = [(metric, images) for metric in _FEW_METRICS for images in _FEW]
    heads = [f"{_METRICS[metric]}, {images} images" for metric, images in columns]
    lines = ["| %, Sgfr / Patchcore | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for dataset, split, label in _FEW_PLACES:
        cells = []
        for metric, images in columns:
            found = _of_defaults(
                results / "few-shot" / "results.json", (dataset, split), wanted, images
            )
            runs = [
                {record.seed: record for record in found if record.model == model}
                for model in wanted
            ]
            values = [
                _values(its, sorted(set.intersection(*map(set, runs))), metric) for its in runs
            ]
            medians = [round(statistics.median(its), 1) for its in values if its]
            cells.append(
                " / ".join(f"**{it}**" if it == max(medians) else f"{it}" for it in medians) or "-"
            )
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _wanted(
    changed: Mapping[str, Mapping[str, object]], models: Iterable[str]
) -> dict[str, Mapping[str, object]]:
    """Arguments of the models whose results are shown."""
    return {model: resolve_arguments(model, dict(changed.get(model, {}))) for model in models}


def _runs(
    found: Sequence[Record], models: Iterable[str]
) -> tuple[dict[str, dict[int, Record]], list[int]]:
    """Runs of each model by seed, and the seeds that Sgfr and Patchcore share."""
    runs = {
        model: {record.seed: record for record in found if record.model == model}
        for model in models
    }
    compared = [set(runs[model]) for model in ("sgfr", "patchcore") if runs[model]]
    return runs, sorted(set.intersection(*compared)) if compared else []


def _of_defaults(
    file: Path,
    place: tuple[str, str | None],
    wanted: Mapping[str, Mapping[str, object]],
    images: int | None = None,
    *,
    same_aspect: bool = False,
    squeezed: bool = False,
) -> list[Record]:
    """Runs on one data set and so many training images, of models with the arguments wanted.

    Sgfr's are those that keep the aspect ratio, if there are any and ``squeezed`` is not given; the
    others' those that do not, or with ``same_aspect`` those that do.
    """
    found = [
        record
        for record in read(file)
        if (record.dataset, record.split) == place
        and record.error is None
        and record.limit_train == images
        and record.contamination is None
        and record.backbone == _BACKBONE
        and rows.side(record) == _SIDE
        and record.arguments == wanted.get(record.model)
    ]
    kept = not squeezed and any(
        rows.keeps_aspect(record) for record in found if record.model == "sgfr"
    )
    return [
        record
        for record in found
        if rows.keeps_aspect(record) == (kept if record.model == "sgfr" else same_aspect)
    ]


def _values(runs: Mapping[int, Record], seeds: Sequence[int], metric: str) -> list[float]:
    """Values of a metric in percent, rounded as they are shown."""
    values = [runs[seed].metrics[metric] for seed in seeds if seed in runs]
    return [round(100 * value, 1) for value in values if value is not None]


def _stored(runs: Iterable[Record]) -> str:
    """Median size of what a model stores, in MiB."""
    sizes = [record.bank_bytes for record in runs if record.bank_bytes]
    return f"{statistics.median(sizes) / 2**20:.1f}" if sizes else "-"


def _median(values: Sequence[float], best: Sequence[float]) -> str:
    """Median, in bold if it is the best or its range overlaps with the best's."""
    if not values:
        return "-"
    text = f"{statistics.median(values):.1f}"
    return f"**{text}**" if max(values) >= min(best) else text


def _cell(values: Sequence[float], best: Sequence[float], seeds: int) -> str:
    """Median and range over the seeds."""
    text = _median(values, best)
    if len(values) > 1:
        text += f" ({min(values):.1f} to {max(values):.1f})"
    return text if len(values) in {0, seeds} else f"{text} ({len(values)} of {seeds})"


def main() -> int:
    """Rewrite the tables in the documents; returns the exit code."""
    argparse.ArgumentParser(
        prog="python -m benchmarks.headline", description=__doc__.splitlines()[0]
    ).parse_args()
    for file, name, made in (
        (_README, "results", summary(_RESULTS)),
        (_DETAILS, "full results", table(_RESULTS)),
        (_DETAILS, "aspect results", aspect_table(_RESULTS)),
        (_DETAILS, "few results", few_table(_RESULTS)),
    ):
        text = file.read_text(encoding="utf-8")
        before, start, rest = text.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition(f"<!-- end of {name} -->")
        if not end:
            sys.exit(f"'{file}' lacks the lines <!-- {name} --> and <!-- end of {name} -->.")
        write_text(file, before + start + made + end + after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
