"""Leave-one-group-out scores of images, and the thresholds that they give."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from anomalib_sgfr import NominalPostProcessor
from anomalib_sgfr.images.pre_processor import read_prepared
from anomalib_sgfr.post_processing.calibration import (
    nominal_scores,
)
from tests.conftest import fit, folder_datamodule, nominal_threshold, small


def test_a_folder_without_held_out_images_is_refused_before_the_fit(
    parts: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "missing", tmp_path / "empty"):
        model = small(post_processor=NominalPostProcessor(held_out=str(folder)))
        with pytest.raises(FileNotFoundError, match=folder.name):
            fit(model, folder_datamodule(parts), tmp_path)
        assert not model.model.is_fitted


def test_held_out_images_set_the_threshold(parts: Path, tmp_path: Path) -> None:
    model = small(post_processor=NominalPostProcessor(0.2, held_out=str(parts / "good_test")))
    fit(model, folder_datamodule(parts), tmp_path)
    paths = [str(path) for path in sorted((parts / "good_test").iterdir())]
    scores = nominal_scores(model.model, model.pre_processor, paths, leave_out=False).scores
    assert float(model.post_processor.image_threshold) == pytest.approx(
        nominal_threshold(scores, 0.2)
    )
    seen = [str(path) for path in sorted((parts / "good").iterdir())]
    known, unknown = (
        nominal_scores(model.model, model.pre_processor, seen, leave_out=out).scores
        for out in (False, True)
    )
    assert all(without > having for without, having in zip(unknown, known, strict=True))


def test_training_images_are_scored_without_their_own_atoms(parts: Path, tmp_path: Path) -> None:
    """Such scores set the threshold of a fit."""
    model = small(post_processor=NominalPostProcessor(0.2), bank_size=5000)
    fit(model, folder_datamodule(parts), tmp_path)
    paths = [str(path) for path in sorted((parts / "good").iterdir())]
    without, having = (
        nominal_scores(model.model, model.pre_processor, paths, leave_out=out).scores
        for out in (True, False)
    )
    assert float(model.post_processor.image_threshold) == pytest.approx(
        nominal_threshold(without, 0.2)
    )
    assert float(model.post_processor.image_threshold) != pytest.approx(
        nominal_threshold(having, 0.2)
    )


@pytest.mark.parametrize("symmetric", [False, True])
def test_an_image_without_other_atoms_scores_as_the_worst_of_its_mirror_images(
    symmetric: bool, parts: Path, tmp_path: Path
) -> None:
    """Turned by 180 degrees, a symmetric image is known; its other mirror images are not."""
    root = tmp_path / "one"
    (root / "good").mkdir(parents=True)
    path = root / "good" / "0.png"
    image = np.asarray(Image.open(parts / "good" / "00.png")) // 2
    image[10:30, 50:90] += 60
    Image.fromarray(image + image[::-1, ::-1] if symmetric else image).save(path)
    model = small(image_size=64)
    data = folder_datamodule(
        root, abnormal_dir=parts / "bad", normal_test_dir=parts / "good_test", mask_dir=None
    )
    fit(model, data, tmp_path)
    model.eval()
    prepared = read_prepared(str(path), model.pre_processor)[None]
    ways = [model.model(prepared.flip(axes)) for axes in ((-1,), (-2,), (-2, -1))]
    scores = [float(way.pred_score) for way in ways]
    assert (scores[2] < 0.5 * min(scores[:2])) == symmetric
    assert symmetric or scores[0] < 0.99 * max(scores)
    found = nominal_scores(model.model, model.pre_processor, [str(path)])
    assert found.scores == pytest.approx([max(scores)], rel=1e-5)
    assert found.peaks == pytest.approx(
        [max(float(way.anomaly_map.max()) for way in ways)], rel=1e-5
    )
