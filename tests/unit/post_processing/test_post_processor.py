"""The post-processor alone: normalised scores, labels, arguments and configuration."""

import pickle
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
from anomalib.data import ImageBatch, InferenceBatch
from anomalib.post_processing import PostProcessor

from anomalib_sgfr import NominalPostProcessor, SgfrPostProcessor
from anomalib_sgfr.post_processing.calibration import CalibrationScores, Split, ThresholdState


def calibrated(scores: Iterable[float], rate: float | None = None) -> ThresholdState:
    values = list(scores)
    paths = map(str, range(len(values)))
    held_out = CalibrationScores.of(values, Split.HELD_OUT, paths)
    return ThresholdState(held_out, false_alarm_rate=rate).calibrated()


def test_scores_stay_in_order_however_far_outside() -> None:
    processor = NominalPostProcessor(0.05)
    processor.use(calibrated(np.linspace(1.0, 2.0, 200), 0.05))
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
def test_larger_scores_stay_larger_up_to_where_32_bits_end(
    more: float, times: int, threshold: float
) -> None:
    processor = NominalPostProcessor(0.05)
    processor.use(ThresholdState(value=threshold).calibrated())
    assert float(processor.image_threshold) == pytest.approx(threshold)

    def normalised(raw: torch.Tensor) -> torch.Tensor:
        score = (threshold * raw).float()
        return processor(
            InferenceBatch(pred_score=score, anomaly_map=score.reshape(-1, 1, 1, 1))
        ).pred_score

    steps = int(np.log(times / 0.01) / np.log(more))
    raw = 0.01 * more ** torch.arange(steps + 1, dtype=torch.float64)
    assert (normalised(raw).diff() > 0).all()
    # beyond, a larger one is never normalised to less, and in the end all are one
    beyond = normalised(times * torch.logspace(0, 25, 20_000, dtype=torch.float64))
    assert (beyond.diff() >= 0).all()
    assert (normalised(torch.tensor([6e3, 1e4, 1e8])) == 1.0).all()


def test_a_threshold_of_zero_still_orders_scores() -> None:
    processor = NominalPostProcessor(0.2)
    processor.use(calibrated([0.0] * 9, 0.2))
    found = processor(InferenceBatch(pred_score=torch.tensor([0.0, 1e-3, 2.0])))
    assert torch.isfinite(found.pred_score).all()
    assert found.pred_label.tolist() == [False, True, True]


def test_anomalibs_own_scale_is_kept_where_a_checkpoint_has_it() -> None:
    theirs = PostProcessor()
    values = {"_image_threshold": 4.0, "_pixel_threshold": 3.0, "image_min": 1.0, "image_max": 9.0}
    for name, value in {**values, "pixel_min": 0.0, "pixel_max": 9.0}.items():
        getattr(theirs, name).fill_(value)
    ours = SgfrPostProcessor()
    ours.load_checkpoint_config(theirs.checkpoint_config())
    ours.load_state_dict(theirs.state_dict())
    raw = InferenceBatch(
        pred_score=torch.tensor([1.0, 4.5, 9.5]), anomaly_map=torch.rand(3, 1, 4, 4) * 9
    )
    for mine, its in zip(ours(raw), theirs(raw), strict=True):
        torch.testing.assert_close(mine, its)
    assert ours.basis == "scores that are not kept"


@pytest.mark.parametrize("sensitivity", [0.0, 0.2, 0.5, 1.0])
def test_labels_are_the_same_whether_scores_are_scaled_or_not(sensitivity: float) -> None:
    raw = InferenceBatch(
        pred_score=torch.linspace(0.1, 9.0, 50), anomaly_map=torch.rand(50, 1, 4, 4) * 9
    )
    found = []
    for scaled in (True, False):
        processor = SgfrPostProcessor(
            enable_normalization=scaled,
            image_sensitivity=sensitivity,
            pixel_sensitivity=sensitivity,
        )
        processor.use(calibrated([2.0, 3.0]))
        found.append(processor(raw))
    assert found[0].pred_label.tolist() == found[1].pred_label.tolist()
    assert found[0].pred_mask.tolist() == found[1].pred_mask.tolist()
    assert torch.equal(found[1].pred_score, raw.pred_score)


def test_without_a_threshold_there_are_no_labels(caplog: pytest.LogCaptureFixture) -> None:
    processor = SgfrPostProcessor()
    raw = InferenceBatch(pred_score=torch.tensor([3.0]), anomaly_map=torch.full((1, 1, 2, 2), 3.0))
    for _ in range(2):
        found = processor(raw)
        assert found.pred_label is None
        assert found.pred_mask is None
        assert float(found.pred_score) == 3.0
    assert [record.message[:22] for record in caplog.records] == ["There is no threshold,"]
    assert processor.basis == "nothing: there is none"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"false_alarm_rate": 0.0},
            "false_alarm_rate must lie between 0 and 1, and not below 1e-06, got 0",
        ),
        ({"images": 0}, "images must be at least 1"),
        ({"image_sensitivity": 1.5}, "image_sensitivity must lie between 0 and 1, got 1.5"),
    ],
)
@pytest.mark.parametrize("kind", [SgfrPostProcessor, NominalPostProcessor])
def test_arguments_out_of_range_are_refused(
    kind: type, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**arguments)


def test_memory_of_a_validation_with_masks_does_not_grow_with_its_images() -> None:
    processor = SgfrPostProcessor()
    maps = torch.rand(4, 1, 64, 64)
    labels = torch.tensor([False, False, True, True])
    batch = ImageBatch(
        image=torch.zeros(4, 3, 64, 64),
        anomaly_map=maps,
        gt_mask=(maps.squeeze(1) > 0.9) & labels[:, None, None],
        pred_score=maps.amax((1, 2, 3)),
        gt_label=labels,
    )
    sizes = []
    for _ in range(10):
        processor.on_validation_batch_end(None, None, batch)  # type: ignore[arg-type]
        sizes.append(len(pickle.dumps(processor)))
    assert sizes[-1] - sizes[0] < maps.numel()  # nine batches of maps have 36 times as many bytes
    assert 0.9 * (1 - 1e-4) <= float(processor._pixels.compute() or 0.0) <= 0.9 * (1 + 1e-3)


def test_a_checkpoint_keeps_threshold_and_configuration() -> None:
    processor = NominalPostProcessor(0.05, images=7)
    processor.use(calibrated([1.0, 2.0, 3.0], 0.05))
    restored = NominalPostProcessor()
    restored.load_checkpoint_config(processor.checkpoint_config())
    restored.load_state_dict(processor.state_dict())
    assert (restored.false_alarm_rate, restored.images) == (0.05, 7)
    assert restored.image_threshold == processor.image_threshold
