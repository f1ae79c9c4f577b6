"""Variants evaluated by the product's own code, over embeddings that are computed once and kept."""

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from anomalib_sgfr.bank import Bank
from anomalib_sgfr.core.cover import Cover
from anomalib_sgfr.torch_model import SgfrModel
from benchmarks.common import features
from benchmarks.common.banks import covers
from benchmarks.common.records import Record, Spec
from benchmarks.common.scores import accuracy, pixel_scores

__all__ = ["evaluate"]

_CHUNK_IMAGES = 8


def evaluate(specs: Sequence[Spec], root: Path | None, cache: Path) -> Iterator[Record]:
    """Evaluate variants of one data set, split and seed; what they share is done once.

    Args:
        specs (Sequence[Spec]): The variants.
        root (Path | None): Folder of the images, if the data set needs it.
        cache (Path): Folder for embeddings.

    Yields:
        Record: Of each variant, in an order that shares the most.
    """

    def embeddings(spec: Spec) -> str:
        return json.dumps([_by("strides", "pooling")(spec), spec.image_size, spec.limit_train])

    for of_features in _groups(specs, embeddings):
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
        sizes = {spec.arguments["bank_size"] for spec in of_features}
        for of_scales in zip(*(covers(scale, sizes) for scale in found.batches(first.seed)), strict=True):
            size, learnt = of_scales[0][0], [cover for _, cover in of_scales]
            of_bank = [spec for spec in of_features if spec.arguments["bank_size"] == size]
            yield from _evaluate_banks(of_bank, learnt, found)


def _evaluate_banks(specs: Sequence[Spec], learnt: Sequence[Cover], found: features.Features) -> Iterator[Record]:
    """Evaluate variants that have their banks in common."""
    for of_residual in _groups(specs, _by("solver", "num_atoms", "regularisation")):
        first = of_residual[0].arguments
        residuals = []
        for cover, maps in zip(learnt, found.test, strict=True):
            bank = Bank(first["solver"], first["num_atoms"], first["regularisation"])
            bank.set(cover)
            starts = range(0, len(maps), _CHUNK_IMAGES)
            parts = [torch.from_numpy(maps[start : start + _CHUNK_IMAGES]) for start in starts]
            residuals.append(torch.cat([bank.residual_map(part) for part in parts]))
        for spec in of_residual:
            smoothing = SgfrModel(blur=spec.arguments["blur"])
            chunks = zip(*(part.split(_CHUNK_IMAGES) for part in residuals), strict=True)
            maps = torch.cat([smoothing.combine(chunk, found.image_size)[:, 0] for chunk in chunks]).numpy()
            pixels = None if found.regions is None else pixel_scores(maps, found.regions)
            yield Record.of(
                spec,
                n_train=len(found.train[0]),
                n_test=len(found.test[0]),
                **accuracy(maps.max((1, 2)), found.kinds, pixels),
                bank_atoms=sum(len(cover.atoms) for cover in learnt),
                bank_bytes=sum(cover.atoms.numel() * cover.atoms.element_size() for cover in learnt),
            )


def _by(*names: str) -> Callable[[Spec], str]:
    """What tells specs apart by some of their arguments."""
    return lambda spec: json.dumps([spec.arguments[name] for name in names])


def _groups(specs: Sequence[Spec], key: Callable[[Spec], str]) -> Iterator[list[Spec]]:
    for _, group in itertools.groupby(sorted(specs, key=key), key):
        yield list(group)
