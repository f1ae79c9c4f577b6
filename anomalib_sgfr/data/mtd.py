"""MTD: photographs of magnetic tiles with five kinds of defect and pixel masks.

952 good and 392 defective grey images of varying size. Huang, Qiu & Yuan, "Surface defect saliency
of magnetic tile" (The Visual Computer, 2020);
https://github.com/abin24/Magnetic-tile-defect-datasets. (the dot belongs to the name).
"""

import csv
import random
from importlib.resources import files
from pathlib import Path
from typing import Any

import pandas as pd
from anomalib.data import AnomalibDataset
from anomalib.data.utils import LabelName, Split
from torchvision.transforms.v2 import Transform

from anomalib_sgfr.data.datamodule import SplitDataModule

__all__ = ["MTD", "MTDDataset"]

SPLITS = ("canonical", "tile")
DEFECTS = ("Blowhole", "Break", "Crack", "Fray", "Uneven")
_GOOD = "MT_Free"
_SOURCE = "git clone https://github.com/abin24/Magnetic-tile-defect-datasets."
_TRAIN_PART = 0.8  # of the tile groups without a defect
_TILE_SEED = 0


class MTDDataset(AnomalibDataset):
    """One split of MTD.

    Args:
        root (Path | str): A clone of the upstream repository: ``MT_<Class>/Imgs`` with images and
            masks.
        split_name (str): ``"canonical"`` or ``"tile"``; see :class:`MTD`.
        split (str | Split | None): ``"train"``, ``"test"``, or ``None`` for both.
        augmentations (Transform | None): Augmentations to apply to the images.

    Raises:
        ValueError: If ``split_name`` is unknown.
        FileNotFoundError: If there is no data at ``root``.
    """

    def __init__(
        self,
        root: Path | str,
        split_name: str = "canonical",
        split: str | Split | None = None,
        augmentations: Transform | None = None,
    ) -> None:
        super().__init__(augmentations=augmentations)
        self.category = split_name
        self.split = split
        self.samples = make_mtd_samples(root, split_name, split)


def training_files(split_name: str) -> set[str]:
    """Names of the good images to train on.

    Args:
        split_name (str): ``"canonical"`` or ``"tile"``; see :class:`MTD`.

    Returns:
        set[str]: File names within ``MT_Free/Imgs``.

    Raises:
        ValueError: If ``split_name`` is unknown.
    """
    if split_name not in SPLITS:
        msg = f"split_name must be one of {', '.join(SPLITS)}, got '{split_name}'."
        raise ValueError(msg)
    folder = files("anomalib_sgfr.data") / "splits"
    if split_name == "canonical":
        return set((folder / "mtd_canonical_train.txt").read_text(encoding="utf-8").split())
    groups = _tile_groups()
    good = sorted(
        group for group, rows in groups.items() if all(row["class"] == _GOOD for row in rows)
    )
    random.Random(_TILE_SEED).shuffle(good)  # noqa: S311  # a split, not a secret
    return {
        Path(row["path"]).name
        for group in good[: round(_TRAIN_PART * len(good))]
        for row in groups[group]
    }


def tile_of() -> dict[str, int]:
    """Which tile an image shows.

    Returns:
        dict[str, int]: From the name of its file to a number that all photographs of the tile
            share.
    """
    return {Path(row["path"]).name: group for group, rows in _tile_groups().items() for row in rows}


def _tile_groups() -> dict[int, list[dict[str, str]]]:
    groups: dict[int, list[dict[str, str]]] = {}
    with (files("anomalib_sgfr.data") / "splits" / "mtd_tile_groups.csv").open(
        encoding="utf-8"
    ) as handle:
        for row in csv.DictReader(handle):
            groups.setdefault(int(row["tile_group"]), []).append(row)
    return groups


def make_mtd_samples(
    root: Path | str, split_name: str, split: str | Split | None = None
) -> pd.DataFrame:
    """List the images of a split with labels and masks; arguments as for :class:`MTDDataset`.

    Returns:
        pd.DataFrame: Columns ``image_path``, ``label`` (``"good"`` or the kind of defect),
        ``label_index``, ``mask_path`` and ``split``.
    """
    root = Path(root)
    train = training_files(split_name)  # refuses an unknown split, wherever the data is
    missing = [
        name
        for name in (_GOOD, *(f"MT_{defect}" for defect in DEFECTS))
        if not (root / name / "Imgs").is_dir()
    ]
    if missing:
        msg = (
            f"no MTD data at root '{root}' ({missing[0]}/Imgs is missing). Get it: `{_SOURCE}`;"
            " root is its folder."
        )
        raise FileNotFoundError(msg)
    rows = []
    for name in (_GOOD, *(f"MT_{defect}" for defect in DEFECTS)):
        for image in sorted((root / name / "Imgs").glob("*.jpg")):
            good = name == _GOOD
            rows.append(
                {
                    "image_path": str(image),
                    "label": "good" if good else name.removeprefix("MT_"),
                    "label_index": int(LabelName.NORMAL if good else LabelName.ABNORMAL),
                    "mask_path": "" if good else str(image.with_suffix(".png")),
                    "split": (Split.TRAIN if good and image.name in train else Split.TEST).value,
                }
            )
    samples = pd.DataFrame(rows)
    found = int((samples["split"] == Split.TRAIN.value).sum())
    if found != len(train):
        msg = (
            f"root '{root}' is incomplete: {found} of the {len(train)} training images of split"
            f" '{split_name}' found."
        )
        raise FileNotFoundError(msg)
    if split is not None:
        samples = samples[samples["split"] == Split(split).value].reset_index(drop=True)
    samples.attrs["task"] = "segmentation"
    return samples


class MTD(SplitDataModule):
    """Magnetic tile defects: five kinds of defect on magnetic tiles, with pixel masks.

    Two splits, whose lists come with this package. ``"canonical"`` is the one published with
    DifferNet and CS-Flow (761 training images): use it to compare with published figures. Each tile
    was photographed at up to six exposures, and most of its good test images show a tile that is
    also in training; ``"tile"`` keeps every tile on one side.

    Args:
        root (Path | str): A clone of the upstream repository. Defaults to ``"./datasets/MTD"``.
        split (str): ``"canonical"`` or ``"tile"``. Defaults to ``"canonical"``.
        **arguments (Any): As for :class:`~anomalib_sgfr.data.datamodule.SplitDataModule`.
    """

    def __init__(
        self,
        root: Path | str = "./datasets/MTD",
        split: str = "canonical",
        **arguments: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(**arguments)
        self.root = Path(root)
        self.split = split
        self.category = split

    def part(self, split: Split) -> MTDDataset:
        """The tiles for training, or those for testing."""
        return MTDDataset(self.root, self.split, split)
