"""Pooled features of a data set, kept on disk for studies that vary the later steps."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from anomalib.data import AnomalibDataset
from numpy.typing import NDArray
from torch import Tensor

from anomalib_sgfr import Sgfr
from anomalib_sgfr.features.embedding import PatchEmbedder
from anomalib_sgfr.features.layers import Scale, build_scales, layers_of_strides
from benchmarks.common import data
from benchmarks.common.scores import label_regions

__all__ = ["Features", "load"]

_BATCH = 32


@dataclass(frozen=True)
class Features:
    """Pooled features of one split.

    Attributes:
        strides (tuple[int, ...]): Of the layers, each on the grid of its scale.
        train (list[NDArray[np.float32]]): Of the training images, for each layer ``(N, d, h, w)``.
        test (list[NDArray[np.float32]]): Of the test images, for each layer ``(T, d, h, w)``.
        kinds (NDArray[np.str_]): Kind of defect of each test image, ``"good"`` for none.
        regions (NDArray[np.int32] | None): Numbered defective regions ``(T, H, W)``; ``None``
            without masks.
        image_size (tuple[int, int]): Height and width of the images that were embedded.
    """

    strides: tuple[int, ...]
    train: list[NDArray[np.float32]]
    test: list[NDArray[np.float32]]
    kinds: NDArray[np.str_]
    regions: NDArray[np.int32] | None
    image_size: tuple[int, int]

    def scales(self, in_map: Sequence[int], in_score: Sequence[int]) -> list[Scale]:
        """Scales of a model with layers of these strides for its map and for its score."""
        flags = [(stride in in_map, float(stride in in_score)) for stride in self.strides]
        found = build_scales(self.strides, flags)
        return [scale for scale in found if scale.in_map or scale.score_weight]

    def batches(self, members: Sequence[int], seed: int) -> list[Tensor]:
        """Training patches of a scale as a fit sees them: batches of 32 images in random order."""
        order = torch.randperm(
            len(self.train[0]), generator=torch.Generator().manual_seed(seed)
        ).numpy()
        parts = [order[start : start + _BATCH] for start in range(0, len(order), _BATCH)]
        return [
            _patches(np.concatenate([self.train[member][part] for member in members], 1))
            for part in parts
        ]

    def tested(self, members: Sequence[int], images: slice) -> Tensor:
        """Embeddings of some test images at a scale, ``(B, d, h, w)``."""
        return torch.from_numpy(
            np.concatenate([self.test[member][images] for member in members], 1)
        )


def _patches(maps: NDArray[np.float32]) -> Tensor:
    return torch.from_numpy(maps).permute(0, 2, 3, 1).reshape(-1, maps.shape[1])


def load(
    dataset: str,
    root: Path | None,
    split: str | None,
    seed: int,
    limit_train: int | None,
    backbone: str,
    strides: tuple[int, ...],
    image_size: tuple[int, int],
    cache: Path,
) -> Features:
    """Embed a split, or read its embeddings; arguments as :func:`benchmarks.common.data.build`.

    Args:
        dataset (str): As for :func:`benchmarks.common.data.build`; so ``root``, ``split``,
            ``seed``, ``limit_train``.
        root (Path | None): Folder of the images.
        split (str | None): Split of ``mtd``.
        seed (int): Split of ``elpv-*`` and choice of the ``limit_train`` images.
        limit_train (int | None): Number of training images.
        backbone (str): Name of a timm model with pretrained weights at hand.
        strides (tuple[int, ...]): Strides of the stages to take.
        image_size (tuple[int, int]): Height and width.
        cache (Path): Folder for features; they take 4 bytes a value.

    Returns:
        Features: The features, layer by layer.
    """
    module = data.build(dataset, root, split, seed, limit_train, num_workers=0)
    everything = data.build(dataset, root, split, seed, num_workers=0)
    full = pd.concat([everything.train_data.samples, everything.test_data.samples])
    full = full.drop_duplicates("image_path").sort_values("image_path")
    layers = layers_of_strides(backbone, strides)
    embedder = PatchEmbedder(backbone, layers)
    stored = _embed(full, everything.test_data, embedder, image_size, cache)
    row = {path: index for index, path in enumerate(full["image_path"])}
    train, test = (
        [maps[[row[path] for path in samples["image_path"]]] for maps in stored]
        for samples in (module.train_data.samples, module.test_data.samples)
    )
    samples = module.test_data.samples
    regions = None
    if samples.attrs.get("task") == "segmentation":
        transform = cast("Any", Sgfr.configure_pre_processor(image_size, backbone).transform)
        regions = label_regions(data.masks(module.test_data, transform))
    return Features(tuple(embedder.strides), train, test, data.kinds(samples), regions, image_size)


def _embed(
    samples: pd.DataFrame,
    template: AnomalibDataset,
    embedder: PatchEmbedder,
    image_size: tuple[int, int],
    cache: Path,
) -> list[NDArray[np.float32]]:
    identity = [
        sorted(samples["image_path"]),
        embedder.backbone,
        embedder.layers,
        image_size,
    ]
    name = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
    paths = [cache / f"{name}-{layer}.npy" for layer in embedder.layers]
    if all(path.exists() for path in paths):
        return [np.load(path, mmap_mode="r") for path in paths]
    cache.mkdir(parents=True, exist_ok=True)
    embedder.load_pretrained()
    transform = cast("Any", Sgfr.configure_pre_processor(image_size, embedder.backbone).transform)
    attributes = template.samples.attrs
    template.samples = samples.reset_index(drop=True)
    template.samples.attrs.update(attributes)
    partial = [path.with_suffix(".partial.npy") for path in paths]
    stores: list[np.memmap[Any, np.dtype[np.float32]]] = []
    with torch.no_grad():
        for start in range(0, len(samples), _BATCH):
            images = data.images(
                template, range(start, min(start + _BATCH, len(samples))), transform
            )
            layers = [maps.float().numpy() for maps in embedder(images)]
            if not stores:
                shapes = [(len(samples), *maps.shape[1:]) for maps in layers]
                stores = [
                    np.lib.format.open_memmap(path, "w+", np.float32, shape)
                    for path, shape in zip(partial, shapes, strict=True)
                ]
            for store, maps in zip(stores, layers, strict=True):
                store[start : start + len(maps)] = maps
    for store in stores:
        store.flush()
    for temporary, path in zip(partial, paths, strict=True):
        temporary.replace(path)
    return [np.load(path, mmap_mode="r") for path in paths]
