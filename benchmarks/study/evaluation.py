"""Variants evaluated by the product's own code, over features that are computed once and kept."""

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from anomalib_sgfr.anomaly_map import AnomalyMapGenerator
from anomalib_sgfr.features.layers import Scale
from anomalib_sgfr.memory_bank import MemoryBank, residual_maps
from anomalib_sgfr.training.fit import bank_sizes
from benchmarks.common import features
from benchmarks.common.banks import scale_clusters
from benchmarks.common.records import Record, Spec
from benchmarks.common.scores import accuracy, pixel_scores

__all__ = ["evaluate"]

_CHUNK_IMAGES = 8


class _Part(NamedTuple):
    """What a bank leaves of the test images, and the bank."""

    residuals: Tensor  # (T, 1, h, w), lengths over ``nominal``
    nominal: float
    atoms: int
    values: int


def evaluate(specs: Sequence[Spec], root: Path | None, cache: Path) -> Iterator[Record]:
    """Evaluate variants of one data set, split and seed; what they share is done once.

    Args:
        specs (Sequence[Spec]): The variants.
        root (Path | None): Folder of the images, if the data set needs it.
        cache (Path): Folder for features.

    Yields:
        Record: Of each variant, in an order that shares the most.
    """

    def embeddings(spec: Spec) -> str:
        return json.dumps([spec.image_size, spec.limit_train])

    for of_features in _groups(specs, embeddings):
        first = of_features[0]
        strides = {stride for spec in of_features for stride in _strides(spec)}
        found = features.load(
            first.dataset,
            root,
            first.split,
            first.seed,
            first.limit_train,
            first.backbone,
            tuple(sorted(strides)),
            (first.image_size[0], first.image_size[1]),
            cache,
        )
        parts = _parts(of_features, found)
        for spec in of_features:
            yield _evaluated(spec, found, parts)


def _strides(spec: Spec) -> list[int]:
    return [*spec.arguments["strides"], *spec.arguments["score_strides"]]


def _scales(spec: Spec, found: features.Features) -> list[tuple[Scale, str]]:
    """What a variant is made of, and the key of each part."""
    arguments = spec.arguments
    scales = found.scales(arguments["strides"], arguments["score_strides"])
    sizes = bank_sizes(scales, arguments["bank_size"])
    names = ("solver", "num_atoms", "regularisation")
    solved = [arguments[name] for name in names]
    return [
        (scale, json.dumps([scale.layer_indices, size, *solved]))
        for scale, size in zip(scales, sizes, strict=True)
    ]


def _parts(specs: Sequence[Spec], found: features.Features) -> dict[str, _Part]:
    """Parts that the variants are made of; those of one scale and size share a bank."""
    keys = dict.fromkeys(key for spec in specs for _, key in _scales(spec, found))
    parts = {}
    for members, of_members in itertools.groupby(sorted(map(json.loads, keys)), lambda key: key[0]):
        wanted = list(of_members)
        batches = found.batches(members, specs[0].seed)
        for size, clusters in scale_clusters(batches, {key[1] for key in wanted}):
            for key in wanted:
                if key[1] != size:
                    continue
                bank = MemoryBank(*key[2:])
                bank.set(clusters)
                starts = range(0, len(found.kinds), _CHUNK_IMAGES)
                tested = (
                    found.tested(members, slice(start, start + _CHUNK_IMAGES)) for start in starts
                )
                residuals = torch.cat([residual_maps([bank], [part])[0] for part in tested])
                values = clusters.atoms.numel() * bank.stored.element_size()
                parts[json.dumps(key)] = _Part(
                    residuals, float(bank.residual_scale), len(clusters.atoms), values
                )
    return parts


def _evaluated(spec: Spec, found: features.Features, parts: dict[str, _Part]) -> Record:
    """One variant, of its parts."""
    scales, its_parts = zip(
        *((scale, parts[key]) for scale, key in _scales(spec, found)), strict=True
    )
    weights = [part.nominal if spec.arguments["weights"] == "sum" else 1.0 for part in its_parts]
    # of these the own maximum is added to that of the others
    alone = [spec.arguments["deep"] == "maximum" and not scale.in_map for scale in scales]
    in_map = [scale.in_map for scale in scales]
    together = [
        scale.score_weight > 0.0 and not its for scale, its in zip(scales, alone, strict=True)
    ]
    generator, no_region = AnomalyMapGenerator(scales, spec.arguments["blur"]), torch.empty(0)
    maps, scores = [], []
    for start in range(0, len(found.kinds), _CHUNK_IMAGES):
        chunk = slice(start, start + _CHUNK_IMAGES)
        residuals = [
            weight * part.residuals[chunk] for weight, part in zip(weights, its_parts, strict=True)
        ]
        smoothed = [
            part[:, 0] for part in generator.upsample(residuals, found.image_size, no_region)
        ]
        maps.append(_sum(smoothed, in_map))
        score = _sum(smoothed, together).amax((1, 2))
        scores.append(_sum([score, *(part.amax((1, 2, 3)) for part in residuals)], [True, *alone]))
    anomaly_maps = torch.cat(maps).numpy()
    pixels = None if found.regions is None else pixel_scores(anomaly_maps, found.regions)
    return Record.of(
        spec,
        n_train=len(found.train[0]),
        n_test=len(found.test[0]),
        **accuracy(torch.cat(scores).numpy(), found.kinds, pixels),
        bank_atoms=sum(part.atoms for part in its_parts),
        bank_bytes=sum(part.values for part in its_parts),
    )


def _sum(parts: Sequence[Tensor], chosen: Sequence[bool]) -> Tensor:
    return reduce(torch.add, itertools.compress(parts, chosen))


def _groups(specs: Sequence[Spec], key: Callable[[Spec], Any]) -> Iterator[list[Spec]]:
    for _, group in itertools.groupby(sorted(specs, key=key), key):
        yield list(group)
