"""What each choice in Sgfr does to its accuracy, over data sets and seeds.

    python -m benchmarks.study k --root DIR

Embeddings are computed once and kept; everything after them is the product's own code, but for the few ideas under
study that the product does not have, which are here (:class:`Prototype`). Results are records as in
:mod:`benchmarks.records`, with what was varied in ``arguments``; an interrupted study goes on where it stopped.
"""

import argparse
import dataclasses
import inspect
import itertools
import json
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from anomalib_sgfr import Sgfr, self_expression
from anomalib_sgfr.sampling import SubspaceSampler
from anomalib_sgfr.selection import farthest_first
from anomalib_sgfr.torch_model import SgfrModel
from benchmarks import features
from benchmarks.features import Features
from benchmarks.records import METRICS, Record, Spec, merge, read, write_text
from benchmarks.run import versions
from benchmarks.scores import image_metrics, per_defect, pixel_scores

__all__ = ["STUDIES", "main"]

_PRODUCT = {"bank_size", "solver", "num_atoms", "regularisation", "blur"}
DEFAULTS: dict[str, Any] = {
    **{name: item.default for name, item in inspect.signature(Sgfr).parameters.items() if name in _PRODUCT},
    # not arguments of Sgfr: ideas under study, and what it does
    "strides": [8, 16],
    "channel_scaling": "none",
    "residual_scaling": "none",
    "local_normalisation": False,
    "image_score": "max",
    "sampler": "stream",
}


class Variant(NamedTuple):
    """A point of a study: what differs from the defaults."""

    label: str
    changes: dict[str, Any] | None = None
    image_size: int = 256
    limit_train: int | None = None


def _over(name: str, values: Sequence[Any], **fixed: Any) -> list[Variant]:  # noqa: ANN401
    return [Variant(str(value), {**fixed, name: value}) for value in values]


STUDIES: dict[str, list[Variant]] = {
    "k": _over("num_atoms", (1, 2, 3, 5, 8, 12, 20, 50)),
    "bank": [
        Variant(f"{size}, k {k}", {"bank_size": size, "num_atoms": k})
        for size in (100, 250, 1000, 4000, 16000)
        for k in (1, 5)
    ],
    "solver": [
        *_over("solver", ("affine", "omp")),
        *(Variant(f"ridge {strength}", {"solver": "ridge", "regularisation": strength}) for strength in (1e-4, 1e-2)),
    ],
    "regularisation": _over("regularisation", (0.0, 1e-3, 1e-2, 1e-1)),
    "layers": [
        Variant("8, 16"),
        Variant("4, 8, 16", {"strides": [4, 8, 16]}),
        Variant("8", {"strides": [8]}),
        Variant("16", {"strides": [16]}),
        Variant("8, 16, 32", {"strides": [8, 16, 32]}),
    ],
    "channels": _over("channel_scaling", ("none", "spread", "layer")),
    "residual": [
        Variant("plain"),
        Variant("spread", {"residual_scaling": "spread"}),
        Variant("local", {"local_normalisation": True}),
        Variant("spread and local", {"residual_scaling": "spread", "local_normalisation": True}),
    ],
    "blur": _over("blur", (0.0, 2.0, 4.0, 6.0, 8.0, 12.0)),
    "image-score": _over("image_score", ("max", "top 0.1%", "top 1%", "top 5%", "patch max", "patch top 1%")),
    "image-size": [Variant("256"), Variant("320", image_size=320)],
    "few-shot": [
        Variant(f"{images} images, k {k}", {"num_atoms": k}, limit_train=images)
        for images in (4, 16, 64)
        for k in (1, 5)
    ],
}
_DATA = ("mtd:canonical", "mtd:tile", "elpv-mono", "elpv-poly")
_NOMINAL_SAMPLE = 20_000
_CHUNK_IMAGES = 8


class Prototype(SgfrModel):
    """The product's model, with ideas under study that it does not have.

    Args:
        arguments (dict[str, Any]): As in :data:`DEFAULTS`.
    """

    def __init__(self, arguments: dict[str, Any]) -> None:
        super().__init__(**{name: arguments[name] for name in _PRODUCT if name != "bank_size"})
        self.arguments = arguments
        self.weight: Tensor | None = None  # (d,), scales residuals
        self.nominal: Tensor | None = None  # (M,), mean nominal residual length around each atom

    @torch.no_grad()
    def learn(self, nominal: Tensor) -> None:
        """Learn what the ideas need from nominal patches ``(n, d)``."""
        if self.arguments["residual_scaling"] == "spread":
            spread = self._residual(nominal).std(0)
            self.weight = spread.mean() / spread.clamp_min(1e-6 * spread.mean())
        if self.arguments["local_normalisation"]:
            expression = self_expression.affine(nominal, self.bank, self.num_atoms, self.regularisation)
            length = self._length(expression.residual)
            prior, weight = length.mean(), 5.0  # atoms that few patches use take the overall mean
            total = torch.full((len(self.bank),), float(prior) * weight)
            count = torch.full((len(self.bank),), weight)
            flat = expression.support.reshape(-1)
            total.index_add_(0, flat, length.repeat_interleave(expression.support.shape[1]))
            count.index_add_(0, flat, torch.ones(len(flat)))
            self.nominal = total / count / prior

    def _length(self, residual: Tensor) -> Tensor:
        return (residual if self.weight is None else residual * self.weight).norm(dim=1)

    @torch.no_grad()
    def distance(self, embedding: Tensor) -> Tensor:
        """Patch scores ``(B, 1, h, w)`` of embeddings ``(B, d, h, w)``."""
        batch, width, rows, columns = embedding.shape
        patches = embedding.permute(0, 2, 3, 1).reshape(-1, width)
        if self.nominal is None:
            return self._length(self._residual(patches)).reshape(batch, 1, rows, columns)
        scores = []
        for chunk in patches.split(1024):
            expression = self_expression.affine(chunk, self.bank, self.num_atoms, self.regularisation)
            scores.append(self._length(expression.residual) / self.nominal[expression.support].mean(1))
        return torch.cat(scores).reshape(batch, 1, rows, columns)

    @torch.no_grad()
    def maps(self, distance: Tensor, size: tuple[int, int]) -> Tensor:
        """Anomaly maps ``(B, H, W)`` of patch scores."""
        upsampled = functional.interpolate(distance, size=size, mode="bilinear", align_corners=False)
        return self.blur(upsampled)[:, 0]


def _image_scores(maps: NDArray[np.float32], distance: NDArray[np.float32], rule: str) -> NDArray[np.float64]:
    """Image scores by a rule over the map, or, if it begins with ``patch``, over the patch scores before smoothing."""
    flat = (distance if rule.startswith("patch ") else maps).reshape(len(maps), -1)
    rule = rule.removeprefix("patch ")
    if rule == "max":
        return flat.max(1).astype(np.float64)
    number = max(1, round(flat.shape[1] * float(rule.removeprefix("top ").removesuffix("%")) / 100))
    return np.partition(flat, -number, 1)[:, -number:].mean(1, dtype=np.float64)


def _scaling(found: Features, rule: str, strides: Sequence[int]) -> NDArray[np.float32]:
    """Factor for each channel, from the training patches."""
    width = found.train.shape[1]
    if rule == "none":
        return np.ones(width, np.float32)
    sample = found.train[:: max(1, len(found.train) // 64)]
    spread = sample.std((0, 2, 3))
    if rule == "spread":
        return (1.0 / np.maximum(spread, 1e-6 * spread.mean())).astype(np.float32)
    from anomalib_sgfr.embedding import backbone_stages

    levels = [stage.channels for stage in backbone_stages("tf_efficientnet_lite0") if stage.stride in strides]
    energy = [np.sqrt(np.square(part).sum()) for part in np.split(spread, np.cumsum(levels)[:-1])]
    return np.concatenate([np.full(size, 1.0 / total) for size, total in zip(levels, energy, strict=True)]).astype(
        np.float32
    )


def _bank(batches: list[Tensor], sampler: str, size: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if sampler == "stream":
        stream = SubspaceSampler(size)
        for batch in batches:
            stream.observe(batch)
        return stream.bank()
    every = torch.cat(batches)
    if sampler == "random":
        return every[torch.randperm(len(every), generator=generator)[:size]]
    return every[farthest_first(every, size)[0]]  # "whole": k-center of all patches


def _evaluate(specs: list[Spec], root: Path | None, cache: Path) -> Iterator[Record]:
    """Evaluate variants of one data set, split and seed; what they share is done once."""

    def shared(*names: str) -> Any:  # noqa: ANN401
        return lambda spec: json.dumps([spec.arguments[name] for name in names])

    by_features = shared("strides")

    def embeddings(spec: Spec) -> str:
        return json.dumps([by_features(spec), spec.image_size, spec.limit_train])

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
        )
        for _, of_bank in _groups(of_features, shared("channel_scaling", "sampler", "bank_size")):
            arguments = of_bank[0].arguments
            factor = _scaling(found, arguments["channel_scaling"], arguments["strides"])
            batches = [batch * torch.from_numpy(factor) for batch in found.batches(first.seed)]
            bank = _bank(batches, arguments["sampler"], arguments["bank_size"], first.seed)
            every = sum(map(len, batches))
            step = max(1, every // _NOMINAL_SAMPLE)
            nominal = torch.cat([batch[::step] for batch in batches])
            del batches
            steps = ("solver", "num_atoms", "regularisation", "residual_scaling", "local_normalisation")
            for _, of_residual in _groups(of_bank, shared(*steps)):
                model = Prototype(of_residual[0].arguments).eval()
                model.set_bank(bank)
                model.learn(nominal)
                distance = torch.cat(
                    [
                        model.distance(
                            torch.from_numpy(found.test[start : start + _CHUNK_IMAGES] * factor[:, None, None])
                        )
                        for start in range(0, len(found.test), _CHUNK_IMAGES)
                    ]
                )
                for _, of_maps in _groups(of_residual, shared("blur")):
                    smoothing = Prototype(of_maps[0].arguments)
                    parts = [smoothing.maps(chunk, found.image_size) for chunk in distance.split(_CHUNK_IMAGES)]
                    maps = torch.cat(parts).numpy()
                    pixel = None if found.regions is None else pixel_scores(maps, found.regions)
                    for spec in of_maps:
                        scores = _image_scores(maps, distance.numpy(), spec.arguments["image_score"])
                        metrics: dict[str, float | None] = dict.fromkeys(METRICS)
                        image = image_metrics(scores, found.kinds != "good")
                        metrics.update({name: round(image[name], 5) for name in METRICS if name in image})
                        if pixel is not None:
                            metrics["pixel_AUROC"] = round(pixel.auroc, 5)
                            metrics["pixel_AP"] = round(pixel.average_precision, 5)
                            metrics["AUPRO"] = round(pixel.aupro, 5)
                        yield Record(
                            **dataclasses.asdict(spec),
                            versions=versions(),
                            n_train=len(found.train),
                            n_test=len(found.test),
                            metrics=metrics,
                            per_defect={
                                kind: round(value, 5) for kind, value in per_defect(scores, found.kinds).items()
                            },
                            bank_atoms=len(bank),
                            bank_bytes=bank.numel() * bank.element_size(),
                        )


def _groups(specs: Sequence[Spec], key: Any) -> Iterator[tuple[str, list[Spec]]]:  # noqa: ANN401
    for name, group in itertools.groupby(sorted(specs, key=key), key):
        yield name, list(group)


def _spec(variant: Variant, dataset: str, split: str | None, seed: int) -> Spec:
    return Spec(
        dataset=dataset,
        split=split,
        model="sgfr",
        arguments={**DEFAULTS, **(variant.changes or {})},
        backbone="tf_efficientnet_lite0",
        image_size=[variant.image_size] * 2,
        seed=seed,
        limit_train=variant.limit_train,
    )


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
    for name in names:
        results = options.out / name / "results.json"
        for seed, (dataset, split) in itertools.product(options.seeds, places):
            done = {record.key for record in read(results)}
            specs = [_spec(variant, dataset, split, seed) for variant in STUDIES[name]]
            specs = [spec for spec in specs if spec.key not in done]
            if not specs:
                continue
            start = time.monotonic()
            for record in _evaluate(specs, None if dataset.startswith("elpv") else options.root, options.cache):
                merge(results, [record])
            print(f"{name}: {dataset} {split or ''} seed {seed}, {time.monotonic() - start:.0f} s", flush=True)
        report(name, options.out / name)
        print((options.out / name / "README.md").read_text(encoding="utf-8"))
    return 0


def report(name: str, folder: Path) -> None:
    """Write the tables of a study: medians over seeds, and the mean over data sets."""
    records = {record.key: record for record in read(folder / "results.json")}
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
    for variant in STUDIES[name]:
        cells: list[float | None] = []
        for dataset, split, metric in columns:
            found = [records.get(_spec(variant, dataset, split or None, seed).key) for seed in seeds]
            values = [record.metrics[metric] for record in found if record is not None]
            cells.append(statistics.median(value for value in values if value is not None) if values else None)
        mean = statistics.mean(cell for cell in cells if cell is not None) if None not in cells else None
        text = ["-" if cell is None else f"{100 * cell:.1f}" for cell in (*cells, mean)]
        lines.append(f"| {variant.label} | " + " | ".join(text) + " |")
    write_text(
        folder / "README.md",
        f"# Study: {name}\n\n`python -m benchmarks.study {name} --root DIR`\n\nMedians of seeds "
        f"{', '.join(map(str, seeds))}, in percent; all else as by default.\n\n" + "\n".join(lines) + "\n",
    )


if __name__ == "__main__":
    sys.exit(main())
