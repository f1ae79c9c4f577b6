"""Patch embeddings of a data set, computed once and kept on disk, for studies that vary what comes after them."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from anomalib.data import AnomalibDataset
from numpy.typing import NDArray
from torch import Tensor
from torchvision.tv_tensors import Mask

from anomalib_sgfr import Sgfr
from anomalib_sgfr.arguments import Pooling
from anomalib_sgfr.embedding import PatchEmbedder
from benchmarks import data
from benchmarks.scores import label_regions

__all__ = ["Features", "load"]

_BATCH = 32


@dataclass(frozen=True)
class Features:
    """Embeddings of one split.

    Attributes:
        train (NDArray[np.float32]): Of the training images, ``(N, d, h, w)``.
        test (NDArray[np.float32]): Of the test images, ``(T, d, h, w)``.
        kinds (NDArray[np.str_]): Kind of defect of each test image, ``"good"`` for none.
        regions (NDArray[np.int32] | None): Numbered defective regions ``(T, H, W)``; ``None`` without masks.
        image_size (tuple[int, int]): Height and width of the images that were embedded.
    """

    train: NDArray[np.float32]
    test: NDArray[np.float32]
    kinds: NDArray[np.str_]
    regions: NDArray[np.int32] | None
    image_size: tuple[int, int]

    def batches(self, seed: int) -> list[Tensor]:
        """The training patches as a fit sees them: batches of 32 images in random order, each ``(n, d)``."""
        order = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(seed)).numpy()
        return [_patches(self.train[order[start : start + _BATCH]]) for start in range(0, len(order), _BATCH)]


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
    pooling: Pooling = "binomial",
) -> Features:
    """Embed a split, or read what was embedded before; arguments as for :func:`benchmarks.data.build`.

    Args:
        dataset (str): See :func:`benchmarks.data.build`; so for ``root``, ``split``, ``seed`` and ``limit_train``.
        root (Path | None): Folder of the images.
        split (str | None): Split of ``mtd``.
        seed (int): Split of ``elpv-*`` and choice of the ``limit_train`` images.
        limit_train (int | None): Number of training images.
        backbone (str): Name of a timm model with pretrained weights at hand.
        strides (tuple[int, ...]): Strides of the stages to take.
        image_size (tuple[int, int]): Height and width.
        cache (Path): Folder for embeddings; they take 4 bytes a value.
        pooling (Pooling): How features are averaged with their neighbours.

    Returns:
        Features: The embeddings.
    """
    module = data.build(dataset, root, split, seed, limit_train, num_workers=0)
    everything = data.build(dataset, root, split, seed, num_workers=0)
    full = pd.concat([everything.train_data.samples, everything.test_data.samples])
    full = full.drop_duplicates("image_path").sort_values("image_path")
    stored = _embed(full, everything.test_data, backbone, strides, image_size, cache, pooling)
    row = {path: index for index, path in enumerate(full["image_path"])}
    train, test = (
        stored[[row[path] for path in samples["image_path"]]]
        for samples in (module.train_data.samples, module.test_data.samples)
    )
    samples = module.test_data.samples
    regions = None
    if samples.attrs.get("task") == "segmentation":
        transform = cast("Any", Sgfr.configure_pre_processor(image_size, backbone).transform)
        items = (cast("Any", module.test_data[index]) for index in range(len(samples)))
        masks = [_resized(transform, item).reshape(image_size) for item in items]
        regions = label_regions(np.stack(masks))
    return Features(train, test, data.kinds(samples), regions, image_size)


def _resized(transform: Any, item: Any) -> NDArray[np.bool_]:  # noqa: ANN401
    """The mask of one image at the size the model sees, as a batch's masks are resized: nearest pixel."""
    _, mask = transform(item.image[None], Mask(item.gt_mask[None]))
    return mask.numpy() > 0


def _embed(
    samples: pd.DataFrame,
    template: AnomalibDataset,
    backbone: str,
    strides: tuple[int, ...],
    image_size: tuple[int, int],
    cache: Path,
    pooling: Pooling,
) -> NDArray[np.float32]:
    identity = json.dumps([sorted(samples["image_path"]), backbone, strides, image_size, pooling])
    path = cache / f"{hashlib.sha256(identity.encode()).hexdigest()[:16]}.npy"
    if path.exists():
        return np.load(path, mmap_mode="r")
    cache.mkdir(parents=True, exist_ok=True)
    from benchmarks.zoo import strided_layers

    embedder = PatchEmbedder(backbone, strided_layers(backbone, strides), pooling)
    embedder.load_pretrained()
    transform = cast("Any", Sgfr.configure_pre_processor(image_size, backbone).transform)
    attributes = template.samples.attrs
    template.samples = samples.reset_index(drop=True)
    template.samples.attrs.update(attributes)
    temporary = path.with_suffix(".partial.npy")
    out: np.memmap[Any, np.dtype[np.float32]] | None = None
    with torch.no_grad():
        for start in range(0, len(samples), _BATCH):
            rows = range(start, min(start + _BATCH, len(samples)))
            images = torch.cat([transform(cast("Any", template[index]).image[None]) for index in rows])
            maps = embedder(images).float().numpy()
            if out is None:
                out = np.lib.format.open_memmap(temporary, "w+", np.float32, (len(samples), *maps.shape[1:]))
            out[start : start + len(maps)] = maps
    if out is not None:
        out.flush()
    temporary.replace(path)
    return np.load(path, mmap_mode="r")
