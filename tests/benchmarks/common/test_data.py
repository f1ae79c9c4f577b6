"""The benchmark's data: fewer training images, or some that are defective."""

from pathlib import Path

import pytest

from benchmarks.common import data


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
    with pytest.raises(ValueError, match="contamination must leave some of the 6 defective test images"):
        data.build("folder", parts, contamination=share, num_workers=0)


def test_limit_and_contamination_together(parts: Path) -> None:
    mixed = data.build("folder", parts, limit_train=4, contamination=0.2, num_workers=0)
    assert len(mixed.train_data) == 5
