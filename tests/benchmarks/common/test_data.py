"""The benchmark's data: fewer training images, or some that are defective."""

from pathlib import Path

import pytest
from PIL import Image

from benchmarks.common import data
from tests.conftest import write_image


def test_defective_images_move_from_the_test_to_the_training(parts: Path) -> None:
    plain = data.build("folder", parts, num_workers=0)
    mixed = data.build("folder", parts, contamination=0.2, num_workers=0)
    mixed.setup()  # as a trainer does once more
    assert len(mixed.train_data) == len(plain.train_data) + 3
    assert len(mixed.test_data) == len(plain.test_data) - 3
    paths = mixed.train_data.samples.image_path.astype(str)
    assert paths.str.contains("bad").sum() == 3
    assert not set(paths) & set(mixed.test_data.samples.image_path.astype(str))
    assert (mixed.train_data.samples.label_index == 0).all()
    assert mixed.train_data[len(mixed.train_data) - 1].image.shape[0] == 3
    other = data.build("folder", parts, seed=1, contamination=0.2, num_workers=0)
    assert set(other.train_data.samples.image_path) != set(mixed.train_data.samples.image_path)


@pytest.mark.parametrize("share", [0.6, 1.0, -0.1, 0.01])
def test_a_share_that_cannot_be_is_refused(share: float, parts: Path) -> None:
    with pytest.raises(
        ValueError, match="contamination must leave some of the 6 defective test images"
    ):
        data.build("folder", parts, contamination=share, num_workers=0)


def test_limit_and_contamination_together(parts: Path) -> None:
    mixed = data.build("folder", parts, limit_train=4, contamination=0.2, num_workers=0)
    assert len(mixed.train_data) == 5


def laid_out(root: Path, good: str, good_test: str, bad: str, mask: str) -> None:
    """Write pictures under names that a number completes."""
    for index in range(4):
        for number, place in enumerate((good, good_test, bad)):
            write_image(root / place.format(index), 10 * index + number, (32, 32))
        (root / mask.format(index)).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (32, 32), 255).save(root / mask.format(index))


def test_categories_of_public_data_sets_are_read_in_their_own_layouts(tmp_path: Path) -> None:
    places = {
        "mvtec": (
            "train/good/{}.png",
            "test/good/{}.png",
            "test/hole/{}.png",
            "ground_truth/hole/{}_mask.png",
        ),
        "btech": ("train/ok/{}.png", "test/ok/{}.png", "test/ko/{}.png", "ground_truth/ko/{}.png"),
    }
    for dataset, layout in places.items():
        category = data.PARTS[dataset][1]
        laid_out(tmp_path / dataset / category, *layout)
        module = data.build(dataset, tmp_path / dataset, category, num_workers=0)
        assert (len(module.train_data), len(module.test_data)) == (4, 8)
        assert module.test_data.samples.label_index.sum() == 4
        assert module.test_data.samples.attrs["task"] == "segmentation"
        with pytest.raises(
            FileNotFoundError, match=r"there is no folder .*: --root is .* in its own layout"
        ):
            data.build(dataset, tmp_path / dataset, data.PARTS[dataset][0], num_workers=0)
        with pytest.raises(ValueError, match=f"{dataset} has no 'cup'; it has .*{category}"):
            data.build(dataset, tmp_path / dataset, "cup", num_workers=0)
    root = tmp_path / "visa"
    laid_out(root / "candle", "a{}.png", "b{}.png", "c{}.png", "masks/c{}.png")
    rows = [f"candle,train,normal,candle/a{index}.png," for index in range(4)]
    rows += [f"candle,test,normal,candle/b{index}.png," for index in range(4)]
    rows += [
        f"candle,test,anomaly,candle/c{index}.png,candle/masks/c{index}.png" for index in range(4)
    ]
    (root / "split_csv").mkdir()
    (root / "split_csv" / "1cls.csv").write_text(
        "\n".join(["object,split,label,image,mask", *rows]), encoding="utf-8"
    )
    module = data.build("visa", root, num_workers=0)
    assert (len(module.train_data), len(module.test_data)) == (4, 8)


def test_surfaces_of_one_commutator_are_on_one_side(tmp_path: Path) -> None:
    for item in range(6):
        for part in range(3):
            path = tmp_path / f"kos{item:02}" / f"Part{part}.jpg"
            write_image(path, 3 * item + part, (32, 32))
            label = Image.new("L", (32, 32), 255 if part == 1 else 0)
            label.save(path.with_name(f"Part{part}_label.bmp"))
    sides = []
    for seed in range(3):
        module = data.build("kolektor", tmp_path, seed=seed, num_workers=0)
        module.setup()  # as a trainer does once more
        train, test = module.train_data.samples, module.test_data.samples
        assert (len(train), len(test)) == (6, 9)
        assert not set(train["item"]) & set(test["item"])
        assert (train.label_index.sum(), test.label_index.sum()) == (0, 3)
        sides.append(tuple(sorted(set(train["item"]))))
    assert len(set(sides)) > 1


def test_masks_of_folders_are_paired_by_name(tmp_path: Path) -> None:
    """In order they would not be: `1_mask` comes after `10_mask`, and `1` before `10`."""
    root = tmp_path / "cookies"
    for name in ("train/good/0", "test/good/0", "test/broken/1", "test/broken/10"):
        write_image(root / f"{name}.png", 0)
    for name in ("1", "10"):
        write_image(root / f"ground_truth/broken/{name}_mask.png", 1)
    module = data.build("small", tmp_path, "cookies", num_workers=0)
    module.setup()  # as a trainer does once more
    samples = module.test_data.samples
    masks = {Path(row.image_path).stem: Path(row.mask_path).name for row in samples.itertuples()}
    assert masks == {"0": "", "1": "1_mask.png", "10": "10_mask.png"}
    assert samples.attrs["task"] == "segmentation"
