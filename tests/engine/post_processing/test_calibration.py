"""Thresholds from nominal images: the rate of false alarms is what was asked for."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.data import InferenceBatch
from PIL import Image

from anomalib_sgfr import NominalPostProcessor
from anomalib_sgfr.images.pre_processor import read_prepared
from anomalib_sgfr.post_processing.calibration import (
    CalibrationScores,
    Split,
    nominal_scores,
    select_evenly,
)
from anomalib_sgfr.post_processing.threshold_state import ThresholdState
from tests.conftest import fit, folder_datamodule, nominal_threshold, small


def calibrated(rate: float, scores: Sequence[float]) -> ThresholdState:
    return ThresholdState(
        CalibrationScores.of(scores, Split.TRAINING, [""] * len(scores)), false_alarm_rate=rate
    ).calibrated()


def test_scores_stay_in_order_however_far_outside() -> None:
    processor = NominalPostProcessor(0.05)
    processor.use(calibrated(0.05, np.linspace(1.0, 2.0, 200).tolist()))
    raw = torch.tensor([0.0, 1.0, 1.9, 2.1, 10.0, 100.0, 1000.0])
    found = processor(InferenceBatch(pred_score=raw, anomaly_map=raw.reshape(-1, 1, 1, 1)))
    assert (found.pred_score.diff() > 0).all()
    assert (found.pred_score < 1).all()
    threshold = float(processor.image_threshold)
    assert found.pred_label.tolist() == (raw > threshold).tolist()
    assert found.pred_mask.flatten().tolist() == (raw > threshold).tolist()
    assert float(processor(InferenceBatch(pred_score=torch.tensor([threshold]))).pred_score) == 0.5


@pytest.mark.parametrize(("more", "times"), [(1.05, 1000), (1.01, 500), (1.001, 150)])
@pytest.mark.parametrize("threshold", [1e-3, 8.0, 1e6])
def test_larger_scores_are_reported_larger_up_to_where_32_bits_end(
    more: float, times: int, threshold: float
) -> None:
    processor = NominalPostProcessor(0.05)
    processor.use(ThresholdState(value=threshold).calibrated())
    assert float(processor.image_threshold) == pytest.approx(threshold)

    def reported(raw: torch.Tensor) -> torch.Tensor:
        score = (threshold * raw).float()
        return processor(
            InferenceBatch(pred_score=score, anomaly_map=score.reshape(-1, 1, 1, 1))
        ).pred_score

    steps = int(np.log(times / 0.01) / np.log(more))
    raw = 0.01 * more ** torch.arange(steps + 1, dtype=torch.float64)
    assert (reported(raw).diff() > 0).all()
    # beyond, a larger one is never reported the smaller, and in the end all are one
    beyond = reported(times * torch.logspace(0, 25, 20_000, dtype=torch.float64))
    assert (beyond.diff() >= 0).all()
    assert (reported(torch.tensor([6e3, 1e4, 1e8])) == 1.0).all()


def test_a_checkpoint_keeps_threshold_and_configuration() -> None:
    processor = NominalPostProcessor(0.05, images=7)
    processor.use(calibrated(0.05, [1.0, 2.0, 3.0]))
    restored = NominalPostProcessor()
    restored.load_checkpoint_config(processor.checkpoint_config())
    restored.load_state_dict(processor.state_dict())
    assert (restored.false_alarm_rate, restored.images) == (0.05, 7)
    assert restored.image_threshold == processor.image_threshold


def test_a_threshold_of_zero_still_orders_scores() -> None:
    processor = NominalPostProcessor(0.2)
    processor.use(calibrated(0.2, [0.0] * 9))
    found = processor(InferenceBatch(pred_score=torch.tensor([0.0, 1e-3, 2.0])))
    assert torch.isfinite(found.pred_score).all()
    assert found.pred_label.tolist() == [False, True, True]


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
    """The threshold of a fit is that of such scores, not of those that know the images."""
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


@pytest.mark.parametrize("most", [1, 7, 50, 68, 69, 300])
def test_as_many_training_images_are_scored_as_was_asked_for(most: int) -> None:
    """Spread evenly over them, each once."""
    for number in (1, 2, 69, 100, 299, 300, 301, 1000):
        chosen = [int(path) for path in select_evenly(list(map(str, range(number))), most)]
        assert len(chosen) == len(set(chosen)) == min(most, number)
        steps = {after - before for before, after in itertools.pairwise([*chosen, number])}
        assert max(steps) - min(steps) <= 1


@pytest.mark.parametrize("symmetric", [False, True])
def test_an_image_without_other_atoms_scores_as_the_worst_of_its_mirror_images(
    symmetric: bool, parts: Path, tmp_path: Path
) -> None:
    """Turned by half a circle, one that looks the same so is known, and the other two ways are not."""
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
