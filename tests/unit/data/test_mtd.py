"""MTD over a stand-in for the upstream repository: its file names, tiny images."""

import csv
from collections import defaultdict
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
from anomalib import TaskType
from PIL import Image

from anomalib_sgfr.data import MTD, MTDDataset
from anomalib_sgfr.data.mtd import training_files


def listed() -> list[dict[str, str]]:
    with (files("anomalib_sgfr.data") / "splits" / "mtd_tile_groups.csv").open(
        encoding="utf-8"
    ) as handle:
        return list(csv.DictReader(handle))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mtd")
    image = Image.fromarray(np.zeros((10, 8), np.uint8))
    mask = Image.fromarray(np.full((10, 8), 255, np.uint8))
    for row in listed():
        path = folder / row["path"]
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
        mask.save(path.with_suffix(".png"))
    return folder


def test_canonical_split_is_the_published_one(root: Path) -> None:
    train, test = (MTDDataset(root, "canonical", split) for split in ("train", "test"))
    assert (len(train), len(test)) == (761, 191 + 392)
    assert not train.has_anomalous
    assert test.samples.label.value_counts().to_dict() == {
        "good": 191,
        "Blowhole": 115,
        "Uneven": 103,
        "Break": 85,
        "Crack": 57,
        "Fray": 32,
    }
    assert train.task == TaskType.SEGMENTATION


def test_tile_split_keeps_every_tile_on_one_side(root: Path) -> None:
    train = set(MTDDataset(root, "tile", "train").samples.image_path)
    test = set(MTDDataset(root, "tile", "test").samples.image_path)
    assert train.isdisjoint(test)
    assert len(train | test) == 1344
    sides = defaultdict(set)
    for row in listed():
        sides[row["tile_group"]].add(str(root / row["path"]) in train)
    assert all(len(side) == 1 for side in sides.values())
    assert 0.7 < len(train) / 952 < 0.85


def test_canonical_split_leaks_tiles_and_the_tile_split_is_another() -> None:
    """Why there are two."""
    assert training_files("canonical") != training_files("tile")


def test_masks_and_images_load_together(root: Path) -> None:
    datamodule = MTD(root, num_workers=0, eval_batch_size=3)
    datamodule.setup()
    assert (datamodule.name, datamodule.category) == ("MTD", "canonical")
    defects = datamodule.test_data.samples.label_index == 1
    item = datamodule.test_data[int(defects.idxmax())]
    assert item.gt_mask.shape == (10, 8)
    assert item.gt_mask.all()
    good = datamodule.test_data[int((~defects).idxmax())]
    assert not good.gt_mask.any()
    assert good.gt_label == 0


def test_a_missing_root_says_where_the_data_comes_from(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError,
        match=r"git clone https://github\.com/abin24/Magnetic-tile-defect-datasets",
    ):
        MTD(tmp_path / "nowhere").setup()


def test_an_incomplete_copy_is_noticed(root: Path, tmp_path: Path) -> None:
    for name in ("MT_Free", "MT_Blowhole", "MT_Break", "MT_Crack", "MT_Fray", "MT_Uneven"):
        (tmp_path / name).mkdir()
        if name == "MT_Free":
            (tmp_path / name / "Imgs").mkdir()
        else:
            (tmp_path / name / "Imgs").symlink_to(root / name / "Imgs")
    with pytest.raises(FileNotFoundError, match="incomplete: 0 of the 761 training images"):
        MTDDataset(tmp_path)


def test_unknown_split_is_named(root: Path, tmp_path: Path) -> None:
    for folder in (root, tmp_path / "nowhere"):  # the split first: data would not help
        with pytest.raises(
            ValueError, match="split_name must be one of canonical, tile, got 'random'"
        ):
            MTDDataset(folder, "random")
