"""The benchmark's data sets, by name."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from anomalib.data import (
    AnomalibDataModule,
    AnomalibDataset,
    BTech,
    Folder,
    Kolektor,
    MVTecAD,
    Visa,
)
from anomalib.data.datasets.image import btech, mvtecad, visa
from anomalib.data.utils import ValSplitMode
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms.v2 import Transform
from torchvision.tv_tensors import Mask

from anomalib_sgfr.data import ELPV, MTD
from anomalib_sgfr.data.mtd import tile_of

__all__ = [
    "DATASETS",
    "PARTS",
    "AlteredData",
    "add_training_images",
    "build",
    "images",
    "keep_training_images",
    "kinds",
    "mask",
    "masks",
    "part_of",
]

DATASETS = (
    "mtd",
    "elpv-mono",
    "elpv-poly",
    "elpv-both",
    "mvtec",
    "btech",
    "visa",
    "kolektor",
    "mvtec_3d",
    "mvtec_loco",
    "small",
    "folder",
)
# Of the data sets that have parts, each measured by itself: splits of one, categories of the
# others.
PARTS: dict[str, tuple[str, ...]] = {
    "mtd": ("canonical", "tile"),
    "mvtec": mvtecad.CATEGORIES,
    "btech": btech.CATEGORIES,
    "visa": visa.CATEGORIES,
    "mvtec_3d": ("tire",),
    "mvtec_loco": ("juice_bottle",),
    "small": ("cookies", "hazelnut"),
}
_SOURCES = {
    "mtd": "the folder of `git clone https://github.com/abin24/Magnetic-tile-defect-datasets.`",
    "mvtec": "MVTec AD in its own layout, a folder for each category",
    "btech": "BTech in its own layout, the folders 01, 02 and 03",
    "visa": "VisA in its own layout, a folder for each category and split_csv",
    "kolektor": "KolektorSDD in its own layout, a folder for each commutator",
    **dict.fromkeys(
        ("mvtec_3d", "mvtec_loco", "small"),
        "a folder for each category, in the layout of MVTec AD: train/good, test, ground_truth",
    ),
    "folder": "it holds the folders good and bad",
}


class AlteredData(AnomalibDataModule):
    """Data that are changed whenever they are set up: a trainer sets them up once more.

    Attributes:
        changes (list[Callable[[], None]]): What to do each time, one after the other.
    """

    def __init__(self, **arguments: Any) -> None:  # noqa: ANN401
        super().__init__(**arguments)
        self.changes: list[Callable[[], None]] = []

    def _setup(self, stage: str | None = None) -> None:
        # of the data set, which comes after this class
        super()._setup(stage)  # type: ignore[safe-super]
        for change in self.changes:
            change()


class _MTD(AlteredData, MTD): ...


class _ELPV(AlteredData, ELPV): ...


class _Folder(AlteredData, Folder): ...


class _MVTecAD(AlteredData, MVTecAD): ...


class _BTech(AlteredData, BTech): ...


class _Visa(AlteredData, Visa): ...


class _Kolektor(AlteredData, Kolektor): ...


def build(
    dataset: str,
    root: Path | None = None,
    split: str | None = None,
    seed: int = 0,
    limit_train: int | None = None,
    contamination: float | None = None,
    num_workers: int = 2,
) -> AlteredData:
    """Build a data set, set up and ready to use.

    Args:
        dataset (str): One of :data:`DATASETS`. ``folder`` is your own: ``good`` and ``bad`` under
            ``root``, and where they exist ``good_test`` and ``masks`` (of the names in ``bad``).
        root (Path | None): Where the images are; needed by all but ``elpv-*``.
        split (str | None): One of :data:`PARTS`. Defaults to the first.
        seed (int): Split of ``elpv-*``, ``kolektor`` and ``folder``, and choice of the
            ``limit_train`` images.
        limit_train (int | None): Number of training images to use; ``None`` for all.
        contamination (float | None): Share of the training images to be defective: so many of the
            defective test images, chosen by the seed, are trained on as if they were good, and not
            tested.
        num_workers (int): Worker processes that load images.

    Returns:
        AlteredData: After ``setup``.

    Raises:
        ValueError: If the name is unknown, ``root`` is missing, or there are fewer than
            ``limit_train`` images or fewer defective ones than ``contamination`` asks for.
        FileNotFoundError: If the data is not there; the message says where it comes from.
    """
    module = _module(dataset, root, split, seed, num_workers)
    if limit_train is not None:
        module.changes.append(lambda: _limit(module, limit_train, seed))
    if contamination:
        module.changes.append(lambda: _contaminate(module, contamination, seed))
    module.setup()
    return module


def _module(  # noqa: PLR0911  # one for each kind
    dataset: str, root: Path | None, split: str | None, seed: int, num_workers: int
) -> AlteredData:
    if dataset not in DATASETS:
        msg = f"dataset must be one of {', '.join(DATASETS)}, got '{dataset}'."
        raise ValueError(msg)
    if dataset.startswith("elpv-"):
        return _ELPV(
            root=root,
            cell_type=dataset.removeprefix("elpv-"),
            split_seed=seed,
            num_workers=num_workers,
        )
    if root is None:
        msg = f"--root is needed for {dataset}: {_SOURCES[dataset]}."
        raise ValueError(msg)
    if dataset == "folder":
        return _Folder(
            name=root.name,
            root=root,
            normal_dir="good",
            abnormal_dir="bad",
            normal_test_dir="good_test" if (root / "good_test").is_dir() else None,
            mask_dir="masks" if (root / "masks").is_dir() else None,
            val_split_mode=ValSplitMode.SAME_AS_TEST,
            num_workers=num_workers,
            seed=seed,
        )
    if dataset == "kolektor":
        module = _Kolektor(root=_there(root, dataset), num_workers=num_workers)
        module.changes.append(lambda: _by_commutator(module, seed))
        return module
    split = split or PARTS[dataset][0]
    if split not in PARTS[dataset]:
        msg = f"{dataset} has no '{split}'; it has {', '.join(PARTS[dataset])}."
        raise ValueError(msg)
    if dataset == "mtd":
        return _MTD(root=root, split=split, num_workers=num_workers)
    _there(root / split, dataset)
    if dataset == "visa":
        of_visa = _Visa(root=root, category=split, num_workers=num_workers)
        of_visa.prepare_data()  # what is there, laid out by its split
        return of_visa
    kind = {"mvtec": _MVTecAD, "btech": _BTech}.get(dataset)
    if kind is None:
        return _in_folders(root / split, num_workers, seed)
    return kind(root=root, category=split, num_workers=num_workers)


def _in_folders(root: Path, num_workers: int, seed: int) -> AlteredData:
    """Data in the layout of MVTec AD whose files anomalib's own class does not read."""
    kinds = sorted(path.name for path in (root / "test").iterdir() if path.name != "good")
    masks = [f"ground_truth/{kind}" for kind in kinds if (root / "ground_truth" / kind).is_dir()]
    module = _Folder(
        name=root.name,
        root=root,
        normal_dir="train/good",
        normal_test_dir="test/good",
        abnormal_dir=[f"test/{kind}" for kind in kinds],
        val_split_mode=ValSplitMode.SAME_AS_TEST,
        num_workers=num_workers,
        seed=seed,
    )
    if masks:  # by name: anomalib's class pairs them in order, which `1`, `10` and `1_mask` upset
        module.changes.append(lambda: _add_masks(module.test_data, root))
    return module


def _add_masks(dataset: AnomalibDataset, root: Path) -> None:
    """Give the defective images of a folder in the layout of MVTec AD their masks."""
    samples = dataset.samples
    found = {
        (path.parent.name, path.stem.removesuffix("_mask")): str(path)
        for path in (root / "ground_truth").rglob("*.*")
    }
    names = ((path.parent.name, path.stem) for path in map(Path, samples["image_path"]))
    samples["mask_path"] = [found.get(name, "") for name in names]
    samples.attrs["task"] = "segmentation"
    dataset.samples = samples


def _there(folder: Path, dataset: str) -> Path:
    if not folder.is_dir():
        msg = f"there is no folder '{folder}': --root is {_SOURCES[dataset]}."
        raise FileNotFoundError(msg)
    return folder


def _by_commutator(module: AlteredData, seed: int) -> None:
    """Train on the good surfaces of half of the commutators, and test on all of the others."""
    samples = pd.concat([module.train_data.samples, module.test_data.samples]).sort_values(
        "image_path"
    )
    commutators = samples["item"].drop_duplicates()
    to_fit = samples["item"].isin(commutators.sample(frac=0.5, random_state=seed))
    for data, chosen in (
        (module.train_data, to_fit & (samples["label_index"] == 0)),
        (module.test_data, ~to_fit),
    ):
        rows = samples[chosen].reset_index(drop=True)
        rows.attrs.update(data.samples.attrs)
        data.samples = rows


def kinds(samples: pd.DataFrame, paths: Sequence[str] | None = None) -> NDArray[np.str_]:
    """Kind of defect of each sample, ``"good"`` for none; in the order of ``paths`` if given."""
    names = (
        "good" if not row.label_index else getattr(row.label, "value", row.label)
        for row in samples.itertuples()
    )
    kind_of = dict(zip(samples["image_path"], map(str, names), strict=True))
    return np.array([kind_of[path] for path in (samples["image_path"] if paths is None else paths)])


def part_of(dataset: str) -> Callable[[str], str]:
    """From an image to the part it shows: of ``mtd`` the tile, otherwise the image itself."""
    tiles = tile_of() if dataset == "mtd" else {}
    return lambda path: str(tiles.get(Path(path).name, path))


def images(dataset: AnomalibDataset, rows: Iterable[int], transform: Transform) -> Tensor:
    """Some images of a data set as a model sees them, shape ``(N, 3, H, W)``."""
    return torch.cat([transform(cast("Any", dataset[int(row)]).image[None]) for row in rows])


def masks(dataset: AnomalibDataset, transform: Transform) -> NDArray[np.bool_]:
    """Masks at the size a model sees, by the nearest pixel; shape ``(N, H, W)``."""
    return np.stack([mask(dataset, row, transform) for row in range(len(dataset))])


def mask(dataset: AnomalibDataset, row: int, transform: Transform) -> NDArray[np.bool_]:
    """One of :func:`masks`, shape ``(H, W)``."""
    item = cast("Any", dataset[row])
    resized: Tensor = transform(item.image[None], Mask(item.gt_mask[None]))[1]
    return resized[0].numpy() > 0


def add_training_images(module: AlteredData, rows: pd.DataFrame) -> None:
    """Train on some test images too, as if they were good.

    Args:
        module (AlteredData): As :func:`build` gives it.
        rows (pd.DataFrame): Of the test samples.
    """

    def add() -> None:
        samples = module.train_data.samples
        more = pd.concat([samples, rows.assign(label_index=0, split="train")], ignore_index=True)
        more.attrs.update(samples.attrs)
        module.train_data.samples = more

    module.changes.append(add)
    add()


def keep_training_images(module: AlteredData, paths: Sequence[str]) -> None:
    """Train on some of the images only, also after a trainer has set the data up once more.

    Args:
        module (AlteredData): As :func:`build` gives it.
        paths (Sequence[str]): The training images to keep.
    """

    def keep() -> None:
        samples = module.train_data.samples
        kept = samples[samples["image_path"].isin(paths)].reset_index(drop=True)
        kept.attrs.update(samples.attrs)
        module.train_data.samples = kept

    module.changes.append(keep)
    keep()


def _limit(module: AnomalibDataModule, number: int, seed: int) -> None:
    """Keep ``number`` training images."""
    samples = module.train_data.samples
    if not 1 <= number <= len(samples):
        msg = (
            f"limit_train must lie between 1 and the {len(samples)} training images, got {number}."
        )
        raise ValueError(msg)
    chosen = samples.sample(n=number, random_state=seed).sort_index().reset_index(drop=True)
    chosen.attrs.update(samples.attrs)
    module.train_data.samples = chosen


def _contaminate(module: AnomalibDataModule, share: float, seed: int) -> None:
    """Train on defective test images as if they were good."""
    train, test = module.train_data.samples, module.test_data.samples
    defective = test[test.label_index == 1]
    number = round(len(train) * share / (1.0 - share)) if 0.0 < share < 1.0 else -1
    if not 1 <= number < len(defective):
        msg = (
            f"contamination must leave some of the {len(defective)} defective test images to test,"
            f" got {share}."
        )
        raise ValueError(msg)
    moved = defective.sample(n=number, random_state=seed)
    left = test.drop(moved.index).reset_index(drop=True)
    mixed = pd.concat([train, moved.assign(label_index=0, split="train")], ignore_index=True)
    for samples, original in ((left, test), (mixed, train)):
        samples.attrs.update(original.attrs)
    module.train_data.samples, module.test_data.samples = mixed, left
