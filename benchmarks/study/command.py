"""What each choice in Sgfr does to its accuracy, over data sets and seeds.

    python -m benchmarks.study k --root DIR

Embeddings are computed once and kept; everything after them is the product's own code, but for the few ideas that the
product does not have (:mod:`benchmarks.study.prototype`). Results are records as in
:mod:`benchmarks.common.records`, with what was varied in ``arguments``; an interrupted study goes on where it stopped.
"""

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from anomalib_sgfr.torch_model import SgfrModel
from benchmarks.common import features
from benchmarks.common.figures import plt, save_figure
from benchmarks.common.records import METRICS, Record, Spec, merge, read, write_text
from benchmarks.common.scores import image_metrics, per_defect, pixel_scores
from benchmarks.study.prototype import Nominal, PrototypeBank, channel_scaling, combined, image_scores
from benchmarks.study.variants import STUDIES, spec_of

__all__ = ["main", "report"]

_DATA = ("mtd:canonical", "mtd:tile", "elpv-mono", "elpv-poly")
_NOMINAL_SAMPLE = 20_000
_CHUNK_IMAGES = 8


def _evaluate(specs: list[Spec], root: Path | None, cache: Path) -> Iterator[Record]:
    """Evaluate variants of one data set, split and seed; what they share is done once."""

    def embeddings(spec: Spec) -> str:
        return json.dumps([_by("strides", "pooling")(spec), spec.image_size, spec.limit_train])

    for _, of_features in _groups(specs, embeddings):
        first = of_features[0]
        found = features.load(
            first.dataset,
            root,
            first.split,
            first.seed,
            first.limit_train,
            first.backbone,
            tuple(first.arguments["strides"]),
            (first.image_size[0], first.image_size[1]),
            cache,
            first.arguments["pooling"],
        )
        for scales, of_scales in _groups(of_features, _by("scales")):
            taken = found.joined() if json.loads(scales) == ["joint"] else found
            for _, of_scaling in _groups(of_scales, _by("channel_scaling")):
                batches = taken.batches(first.seed)
                rule = of_scaling[0].arguments["channel_scaling"]
                factors = [channel_scaling(part[0], rule) for part in batches]
                nominal = [
                    Nominal([batch * factor for batch in part], first.seed)
                    for part, factor in zip(batches, factors, strict=True)
                ]
                for _, of_bank in _groups(of_scaling, _by("sampler", "bank_size")):
                    yield from _evaluate_bank(of_bank, nominal, taken, factors)


def _evaluate_bank(
    specs: list[Spec], nominal: list[Nominal], found: features.Features, factors: list[torch.Tensor]
) -> Iterator[Record]:
    """Evaluate variants that have their banks in common."""
    atoms = [part.bank(specs[0].arguments) for part in nominal]
    samples = [_sample(part.batches) for part in nominal]
    steps = ("solver", "num_atoms", "regularisation", "residual_scaling", "local_normalisation")
    for _, of_residual in _groups(specs, _by(*steps)):
        banks = [PrototypeBank(of_residual[0].arguments).eval() for _ in atoms]
        for bank, its_atoms, sample in zip(banks, atoms, samples, strict=True):
            bank.set(its_atoms)
            bank.learn(sample)
        residuals = [
            torch.cat(
                [
                    bank.residual_map(torch.from_numpy(maps[start : start + _CHUNK_IMAGES]) * factor[:, None, None])
                    for start in range(0, len(maps), _CHUNK_IMAGES)
                ]
            )
            for bank, maps, factor in zip(banks, found.test, factors, strict=True)
        ]
        means = [float(bank.residuals(sample).mean()) for bank, sample in zip(banks, samples, strict=True)]
        for _, of_maps in _groups(of_residual, _by("blur", "combination")):
            smoothing = SgfrModel(blur=of_maps[0].arguments["blur"])
            parts = combined(residuals, means, of_maps[0].arguments["combination"])
            chunks = zip(*(part.split(_CHUNK_IMAGES) for part in parts), strict=True)
            maps = torch.cat([smoothing.combine(chunk, found.image_size)[:, 0] for chunk in chunks]).numpy()
            pixel = None if found.regions is None else pixel_scores(maps, found.regions)
            for spec in of_maps:
                scores = image_scores(maps, spec.arguments["image_score"])
                metrics: dict[str, float | None] = dict.fromkeys(METRICS)
                image = image_metrics(scores, found.kinds != "good")
                metrics.update({name: round(image[name], 5) for name in METRICS if name in image})
                if pixel is not None:
                    metrics["pixel_AUROC"] = round(pixel.auroc, 5)
                    metrics["pixel_AP"] = round(pixel.average_precision, 5)
                    metrics["AUPRO"] = round(pixel.aupro, 5)
                yield Record.of(
                    spec,
                    n_train=len(found.train[0]),
                    n_test=len(found.test[0]),
                    metrics=metrics,
                    per_defect={kind: round(value, 5) for kind, value in per_defect(scores, found.kinds).items()},
                    bank_atoms=sum(map(len, atoms)),
                    bank_bytes=sum(part.numel() * part.element_size() for part in atoms),
                )


def _sample(batches: list[torch.Tensor]) -> torch.Tensor:
    step = max(1, sum(map(len, batches)) // _NOMINAL_SAMPLE)
    return torch.cat([batch[::step] for batch in batches])


def _by(*names: str) -> Callable[[Spec], str]:
    """What tells specs apart by some of their arguments."""
    return lambda spec: json.dumps([spec.arguments[name] for name in names])


def _groups(specs: Sequence[Spec], key: Callable[[Spec], str]) -> Iterator[tuple[str, list[Spec]]]:
    for name, group in itertools.groupby(sorted(specs, key=key), key):
        yield name, list(group)


def _places(text: str) -> list[tuple[str, str | None]]:
    """Data sets and their splits, from ``mtd:tile,elpv-mono``."""
    return [(dataset, split or None) for dataset, _, split in (item.partition(":") for item in text.split(","))]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run studies; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study", description=__doc__.splitlines()[0])
    parser.add_argument("studies", nargs="+", choices=[*STUDIES, "all"])
    parser.add_argument("--root", type=Path, help="folder of the MTD images")
    parser.add_argument("--data", default=",".join(_DATA), help=f"data sets; default {','.join(_DATA)}")
    parser.add_argument("--seeds", type=lambda text: [int(seed) for seed in text.split(",")], default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/studies"))
    parser.add_argument("--cache", type=Path, default=Path("runs/embeddings"))
    options = parser.parse_args(arguments)
    names = list(STUDIES) if "all" in options.studies else options.studies
    places = _places(options.data)
    if options.root is None and any(dataset == "mtd" for dataset, _ in places):
        parser.error("--root is needed for mtd; or leave it out with --data elpv-mono,elpv-poly")
    files = {name: options.out / name / "results.json" for name in names}
    for seed, (dataset, split) in itertools.product(options.seeds, places):
        left = {name: _left(name, files[name], dataset, split, seed) for name in names}
        # one spec for what several studies share, such as the default
        specs = list({key: spec for of_study in left.values() for key, spec in of_study.items()}.values())
        if not specs:
            continue
        start = time.monotonic()
        root = None if dataset.startswith("elpv") else options.root
        for done, record in enumerate(_evaluate(specs, root, options.cache), 1):
            for name in names:
                if record.key in left[name]:
                    merge(files[name], [record])
            spent = time.monotonic() - start
            print(f"{dataset} {split or ''} seed {seed}: {done} of {len(specs)}, {spent:.0f} s", flush=True)
    for name in names:
        report(name, options.out / name)
        print((options.out / name / "README.md").read_text(encoding="utf-8"))
    return 0


def _left(name: str, results: Path, dataset: str, split: str | None, seed: int) -> dict[str, Spec]:
    """What a study has yet to run on one data set, split and seed, by its key."""
    done = {record.key for record in read(results)}
    return {key: spec for key, spec in _specs(name, dataset, split, seed).items() if key not in done}


def _specs(name: str, dataset: str, split: str | None, seed: int) -> dict[str, Spec]:
    specs = (spec_of(variant, dataset, split, seed) for variant in STUDIES[name])
    return {spec.key: spec for spec in specs}


def report(name: str, folder: Path) -> None:
    """Write the tables of a study: medians over seeds, and the mean over data sets."""
    records = {
        record.key: record
        for record in read(folder / "results.json")
        if record.key in _specs(name, record.dataset, record.split, record.seed)
    }
    places = sorted({(record.dataset, record.split or "") for record in records.values()})
    seeds = sorted({record.seed for record in records.values()})
    columns = [
        (dataset, split, metric)
        for dataset, split in places
        for metric in METRICS
        if metric != "image_F1Max" and (dataset == "mtd" or metric.startswith("image"))
    ]
    heading = [f"{dataset} {split} {metric}".replace("  ", " ") for dataset, split, metric in columns]
    lines = [f"| {name} | " + " | ".join(heading) + " | mean |", "|---|" + "---|" * (len(columns) + 1)]
    lines_of: list[list[float | None]] = []
    some_short = False
    for variant in STUDIES[name]:
        cells: list[float | None] = []
        text = []
        for dataset, split, metric in columns:
            found = [records.get(spec_of(variant, dataset, split or None, seed).key) for seed in seeds]
            values = [value for record in found if record and (value := record.metrics[metric]) is not None]
            cells.append(statistics.median(values) if values else None)
            short = bool(values) and len(values) < len(seeds)
            some_short = some_short or short
            text.append(_percent(cells[-1]) + (f" ({len(values)})" if short else ""))
        lines_of.append(cells)
        mean = statistics.mean(cell for cell in cells if cell is not None) if None not in cells else None
        lines.append(f"| {variant.label} | " + " | ".join([*text, _percent(mean)]) + " |")
    _plot(name, folder, columns, lines_of)
    of_seeds = f"Medians of seeds {', '.join(map(str, seeds))}" if len(seeds) > 1 else f"Seed {seeds[0]}"
    fewer = "; (n): of n seeds" if some_short else ""
    write_text(
        folder / "README.md",
        f"# Study: {name}\n\n`python -m benchmarks.study {name} --root DIR`\n\n{of_seeds}, in percent{fewer}; all else "
        "as by default.\n\n" + "\n".join(lines) + f"\n\n![{name}]({name}.png)\n",
    )


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _plot(
    name: str, folder: Path, columns: list[tuple[str, str, str]], values: Sequence[Sequence[float | None]]
) -> None:
    """A panel for each metric, a line for each data set, over the variants."""
    lines = _lines([variant.label for variant in STUDIES[name]])
    metrics = list(dict.fromkeys(metric for *_, metric in columns))
    colours = {place: f"C{number}" for number, place in enumerate(dict.fromkeys(column[:2] for column in columns))}
    figure, axes = plt.subplots(1, len(metrics), figsize=(4 * len(metrics), 4.0), squeeze=False, layout="constrained")
    for axis, metric in zip(axes[0], metrics, strict=True):
        for place, (dataset, split, of) in enumerate(columns):
            for dash, (line, points) in zip(itertools.cycle(("-", "--", ":")), lines.items(), strict=False):
                found = [values[row][place] for row in points.values()]
                if of == metric and None not in found:
                    percent = [100 * (value or 0.0) for value in found]
                    style = {"color": colours[dataset, split], "label": " ".join(filter(None, (dataset, split, line)))}
                    axis.plot(list(points), percent, f"o{dash}", lw=1.2, ms=4, **style)
        axis.set(title=f"{metric}, %", xlabel=name)
        axis.tick_params("x", rotation=_rotation(list(next(iter(lines.values())))))
        axis.grid(alpha=0.3)
    # every data set has an image AUROC, the first panel; below, where it hides no point
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(colours))
    save_figure(figure, folder / f"{name}.png")


def _lines(labels: Sequence[str]) -> dict[str, dict[str, int]]:
    """Rows of the table by line of the plot and label below it.

    Labels that are all pairs, such as ``"100, k 1"``, make a line of each second part; others make one line.
    """
    rows = {tuple(label.rsplit(", ", 1)): row for row, label in enumerate(labels)}
    firsts, seconds = (list(dict.fromkeys(label[place] for label in rows)) for place in (0, -1))
    if any((first, second) not in rows for first in firsts for second in seconds):
        return {"": {label: row for row, label in enumerate(labels)}}
    return {second: {first: rows[first, second] for first in firsts} for second in seconds}


def _rotation(labels: Sequence[str]) -> int:
    """Degrees by which labels below an axis do not run into each other."""
    if max(map(len, labels)) <= 4:  # noqa: PLR2004
        return 0
    return 45 if len(labels) <= 8 else 90  # noqa: PLR2004
