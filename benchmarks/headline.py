"""The README's tables: committed results at a glance, the same images and seeds for every model.

    python -m benchmarks.headline

Rewrites what stands between markers in ``README.md`` from ``benchmarks/results``.
"""

import argparse
import re
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.common.records import Record, read, write_text
from benchmarks.common.zoo import resolve_arguments
from benchmarks.compare import rows

__all__ = ["few_table", "main", "table"]

_RESULTS = Path(__file__).parent / "results"
_README = Path(__file__).parent.parent / "README.md"
_PLACES = (
    ("mtd", "canonical", "magnetic tiles, published split"),
    ("mtd", "tile", "magnetic tiles, new tiles"),
    ("elpv-mono", None, "solar cells, mono"),
    ("elpv-poly", None, "solar cells, poly"),
    ("mvtec", "bottle", "MVTec AD bottle"),
    ("mvtec", "grid", "MVTec AD grid"),
    ("kolektor", None, "KolektorSDD"),
)
_METRICS = {
    "image_AUROC": "image AUROC",
    "pixel_AUROC": "pixel AUROC",
    "pixel_AP": "pixel AP",
    "AUPRO": "AUPRO",
}
# what Patchcore stores by default would take hours to choose; its default is also compared, on
# fewer images
_CHANGED: Mapping[str, Mapping[str, object]] = {"patchcore": {"coreset_sampling_ratio": 0.01}}
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
    wanted = {model: resolve_arguments(model, dict(_CHANGED.get(model, {}))) for model in _NAMES}
    lines = [
        "| %, medians and ranges over seeds | " + " | ".join(_NAMES.values()) + " | seeds |",
        "|---" * (len(_NAMES) + 2) + "|",
    ]
    medians: dict[str, list[float]] = {model: [] for model in _NAMES}
    for dataset, split, label in _PLACES:
        found = _of_defaults(results / dataset / "results.json", (dataset, split), wanted)
        runs = {
            model: {record.seed: record for record in found if record.model == model}
            for model in _NAMES
        }
        compared = [set(runs[model]) for model in ("sgfr", "patchcore") if runs[model]]
        seeds = sorted(set.intersection(*compared)) if compared else []
        for metric, name in _METRICS.items():
            values = {model: _values(of, seeds, metric) for model, of in runs.items()}
            if not any(values.values()):
                continue
            best = max((its for its in values.values() if its), key=statistics.median)
            cells = [_cell(its, best, len(seeds)) for its in values.values()]
            lines.append(
                f"| {label}: {name} | " + " | ".join(cells) + f" | {', '.join(map(str, seeds))} |"
            )
            if metric == "image_AUROC":
                for model, its in values.items():
                    medians[model] += [statistics.median(its)] if its else []
        if dataset == "mtd" and found:
            stored = [
                [record.bank_bytes for record in of.values() if record.bank_bytes]
                for of in runs.values()
            ]
            cells = [
                f"{statistics.median(sizes) / 2**20:.1f}" if sizes else "-" for sizes in stored
            ]
            lines.append(f"| {label}: stored, MiB | " + " | ".join(cells) + " | |")
    means = [
        f"{statistics.mean(its):.1f}" if len(its) == len(_PLACES) else "-"
        for its in medians.values()
    ]
    if any(mean != "-" for mean in means):
        lines.append(f"| mean of all {len(_PLACES)}: image AUROC | " + " | ".join(means) + " | |")
    return "\n".join(lines) + "\n"


def few_table(results: Path) -> str:
    """Markdown: a line for each data set, Sgfr beside Patchcore with few training images.

    Args:
        results (Path): Folder that holds ``few-shot``.

    Returns:
        str: The table, of medians over the seeds that both ran with; the larger in bold.
    """
    wanted = {
        model: resolve_arguments(model, dict(changed)) for model, changed in _FEW_CHANGED.items()
    }
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


def _of_defaults(
    file: Path,
    place: tuple[str, str | None],
    wanted: Mapping[str, Mapping[str, object]],
    images: int | None = None,
) -> list[Record]:
    """Runs on one data set and so many training images, of models with the arguments wanted."""
    return [
        record
        for record in read(file)
        if (record.dataset, record.split) == place
        and record.error is None
        and record.limit_train == images
        and record.contamination is None
        and record.backbone == _BACKBONE
        and record.image_size == [256, 256]
        and record.arguments == wanted.get(record.model)
    ]


def _values(runs: Mapping[int, Record], seeds: Sequence[int], metric: str) -> list[float]:
    """Of a model, rounded as they are shown."""
    values = [runs[seed].metrics[metric] for seed in seeds if seed in runs]
    return [round(100 * value, 1) for value in values if value is not None]


def _cell(values: Sequence[float], best: Sequence[float], seeds: int) -> str:
    """Median and range, in bold if it is the best or overlaps with it."""
    if not values:
        return "-"
    text = f"{statistics.median(values):.1f}"
    if max(values) >= min(best):
        text = f"**{text}**"
    if len(values) > 1:
        text += f" ({min(values):.1f} to {max(values):.1f})"
    return text if len(values) == seeds else f"{text} ({len(values)} of {seeds})"


def main() -> int:
    """Rewrite the tables in the README; returns the exit code."""
    argparse.ArgumentParser(
        prog="python -m benchmarks.headline", description=__doc__.splitlines()[0]
    ).parse_args()
    text = _README.read_text(encoding="utf-8")
    for name, made in (("results", table(_RESULTS)), ("few results", few_table(_RESULTS))):
        block = re.compile(rf"(?<=<!-- {name} -->\n).*?(?=<!-- end of {name} -->)", re.DOTALL)
        if not block.search(text):
            sys.exit(
                f"'{_README.name}' lacks the lines <!-- {name} --> and <!-- end of {name} -->."
            )
        text = block.sub(lambda _, made=made: made, text)  # type: ignore[misc]  # of this turn
    write_text(_README, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
