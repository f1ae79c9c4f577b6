"""The threshold that is always there: with defects at hand or without, and what it says it rests
on.
"""

import logging
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from anomalib.data import Folder, ImageBatch, InferenceBatch, PredictDataset
from anomalib.deploy import ExportType, TorchInferencer
from anomalib.post_processing import PostProcessor
from lightning.pytorch import Callback
from torchvision.transforms.v2 import Resize

from anomalib_sgfr import NominalPostProcessor, Sgfr, SgfrPostProcessor
from anomalib_sgfr.images.pre_processor import SgfrPreProcessor, read_prepared
from anomalib_sgfr.post_processing.calibration import (
    CalibrationScores,
    Split,
    group_of,
    nominal_scores,
    require_group,
)
from anomalib_sgfr.post_processing.threshold_state import ThresholdState
from tests.conftest import engine_in, fit, folder_datamodule, nominal_threshold, small, write_image


def calibrated(scores: CalibrationScores, **asked: Any) -> ThresholdState:
    return ThresholdState(scores, **asked).calibrated()


def tiny(**arguments: Any) -> Sgfr:
    """Of small pictures."""
    return small(pre_processor=SgfrPreProcessor(Resize((64, 64), antialias=True)), **arguments)


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``good`` (16), ``more`` (20) and ``bad`` (4)."""
    root = tmp_path_factory.mktemp("many")
    for index in range(36):
        write_image(
            root / ("good" if index < 16 else "more") / f"part{index // 2:02}_{index % 2}.png",
            index,
            (64, 64),
        )
    for index in range(4):
        write_image(root / "bad" / f"{index}.png", 100 + index, (64, 64), defect=True)
    return root


def predicted(
    model: Sgfr, folder: Path, scratch: Path, **arguments: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Scores and labels."""
    batches = engine_in(scratch).predict(model, dataset=PredictDataset(folder), **arguments)
    scores = np.concatenate([batch.pred_score.numpy() for batch in batches])
    return scores, np.concatenate([batch.pred_label.numpy() for batch in batches])


@pytest.fixture(scope="module")
def without_defects(many: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Sgfr, Path]:
    """Fitted to good images alone, without validation, and its checkpoint."""
    module = Folder(
        "good", root=many, normal_dir="good", normal_test_dir=many / "more", num_workers=0
    )
    model = tiny()
    engine = fit(model, module, tmp_path_factory.mktemp("without"), limit_val_batches=0)
    return model, Path(engine.best_model_path)


def test_good_images_alone_make_a_threshold(
    without_defects: tuple[Sgfr, Path], many: Path, tmp_path: Path
) -> None:
    model, path = without_defects
    scores, labels = predicted(model, many / "more", tmp_path)
    assert ((scores > 0) & (scores < 1)).all()
    assert labels.mean() <= 0.1
    assert predicted(model, many / "bad", tmp_path)[1].all()
    # the same from the checkpoint and from an exported file
    restored = Sgfr.load_from_checkpoint(
        path, map_location="cpu", visualizer=False, evaluator=False
    )
    np.testing.assert_allclose(predicted(restored, many / "more", tmp_path)[0], scores, rtol=1e-5)
    exported = engine_in(tmp_path).export(model, ExportType.TORCH, export_root=tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRUST_REMOTE_CODE", "1")
        inferencer = TorchInferencer(exported, device="cpu")
    for folder, label in (("more", False), ("bad", True)):
        found = inferencer.predict(min((many / folder).iterdir()))
        assert bool(found.pred_label) == label
    assert restored.post_processor.basis == model.post_processor.basis
    assert (
        model.post_processor.basis
        == "16 good images (16 independent) at a false-alarm rate of 1%; the true rate may be up to"
        " 17% at 95% confidence, 1% needs 299"
    )


def test_it_says_what_the_threshold_is_calibrated_on(
    many: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny(post_processor=SgfrPostProcessor(0.3, group=r"part(\d+)"))
    with caplog.at_level(logging.INFO, "anomalib_sgfr"):
        fit(model, folder_datamodule(many, normal_test_dir="more"), tmp_path)
    said = [record.message for record in caplog.records if "is calibrated on" in record.message]
    assert len(said) == 1
    assert (
        "16 good images (8 independent) at a false-alarm rate of 30%; the true rate may be up"
        " to 31%" in said[0]
    )


def test_a_folder_of_good_images_alone_makes_a_threshold(many: Path, tmp_path: Path) -> None:
    """anomalib keeps some of them for validation, in which there is no defect then."""
    model = tiny()
    fit(model, Folder("good", root=many, normal_dir="good", num_workers=0, seed=0), tmp_path)
    assert predicted(model, many / "more", tmp_path)[1].mean() <= 0.1
    assert predicted(model, many / "bad", tmp_path)[1].all()
    kinds = model.post_processor.calibration_scores.kinds
    assert {Split.TRAINING, Split.HELD_OUT} == set(kinds)
    assert len(kinds) == len(set(model.post_processor.calibration_scores.paths)) > 12


class WithoutLabels(Callback):
    """Takes the labels of what is validated."""

    def on_validation_batch_start(
        self, trainer: object, pl_module: object, batch: Any, *_: object
    ) -> None:
        del trainer, pl_module
        batch.gt_label = None


def test_validation_without_labels_leaves_a_threshold(many: Path, tmp_path: Path) -> None:
    model = tiny()
    fit(
        model,
        folder_datamodule(many, normal_test_dir="more"),
        tmp_path,
        callbacks=[WithoutLabels()],
    )
    assert set(model.post_processor.calibration_scores.kinds) == {Split.TRAINING}
    assert predicted(model, many / "bad", tmp_path)[1].all()


def test_a_second_fit_suspects_anew(many: Path, tmp_path: Path) -> None:
    """And its threshold rests on all that it does not suspect, however many an earlier fit did."""
    module = Folder(
        "good", root=many, normal_dir="good", normal_test_dir=many / "more", num_workers=0
    )
    model = tiny(trim=0.25)
    for _ in range(2):
        fit(model, module, tmp_path)
        training = [
            path
            for path in model.post_processor.calibration_scores.paths
            if Path(path).parent.name == "good"
        ]
        assert set(training).isdisjoint(dict(model.suspects))
        assert (len(training), len(model.suspects)) == (12, 4)


@pytest.mark.parametrize("number", [1, 4])
def test_few_defective_images_do_not_choose_the_threshold(
    number: int, many: Path, tmp_path: Path
) -> None:
    """What lies between good images and a handful of obvious defects is not known to be good."""
    bad = tmp_path / "few"
    bad.mkdir()
    for path in sorted((many / "bad").iterdir())[:number]:
        (bad / path.name).write_bytes(path.read_bytes())
    model = small(pre_processor=SgfrPreProcessor(Resize((64, 64), antialias=True)), evaluator=True)
    module = folder_datamodule(many, abnormal_dir=bad, normal_test_dir="more", mask_dir=None)
    engine = fit(model, module, tmp_path)
    (figures,) = engine.test(model, datamodule=module)
    assert figures["image_AUROC"] == 1.0
    state = model.post_processor.state
    assert (len(state.scores.good.scores), len(state.scores.defective.scores)) == (36, number)
    assert state.by == "good"
    assert state.image == nominal_threshold(state.scores.good.scores, 0.01)
    assert state.image < 0.75 * min(state.scores.defective.scores)


def test_labels_choose_the_threshold_where_they_show_that_a_lower_one_is_better() -> None:
    """Thirty defects lie below the two odd images that good ones alone would heed; one proves
    nothing.
    """
    scores = [*np.linspace(1.0, 3.0, 58), 9.0, 9.5]
    training = CalibrationScores.of(
        scores, Split.TRAINING, [f"t{index}" for index in range(60)], [2 * each for each in scores]
    )
    good = CalibrationScores.of(
        np.linspace(1.0, 3.0, 20), Split.HELD_OUT, [f"g{index}" for index in range(20)], [4.0] * 20
    )
    bad = CalibrationScores.of(
        np.linspace(5.0, 7.0, 30), Split.DEFECTIVE, [f"b{index}" for index in range(30)], [9.0] * 30
    )
    state = calibrated(training.joined(good).joined(bad), masks=3.25)
    assert (state.by, state.image, state.pixel) == ("labels", 4.0, 3.25)
    assert state.peak == pytest.approx(8.0)  # the same share of what good images give
    assert state.basis == "80 good and 30 defective images"
    assert state.warning is None
    fewer = calibrated(state.scores.exclude(f"b{index}" for index in range(29)), masks=3.25)
    assert fewer.by == "good"
    assert fewer.image == nominal_threshold(fewer.scores.good.scores, 0.01) > 9.0
    assert fewer.pixel == fewer.peak
    asked = calibrated(state.scores, false_alarm_rate=0.01)
    assert (asked.by, asked.image) == ("good", fewer.image)


def test_another_rate_takes_effect_on_a_checkpoint(
    without_defects: tuple[Sgfr, Path], many: Path, tmp_path: Path
) -> None:
    model, path = without_defects
    fresh = tiny(post_processor=SgfrPostProcessor(0.3))
    scores, labels = predicted(fresh, many / "more", tmp_path, ckpt_path=path)
    expected = nominal_threshold(model.post_processor.calibration_scores.scores, 0.3)
    assert float(fresh.post_processor.image_threshold) == pytest.approx(expected)
    assert (labels == (scores > 0.5)).all()
    raw = nominal_scores(
        fresh.model, fresh.pre_processor, [str(file) for file in sorted((many / "more").iterdir())]
    ).scores
    np.testing.assert_allclose(scores, np.square(raw) / (np.square(raw) + expected**2), rtol=1e-4)
    # the same rate, or none, leaves the threshold as it was; a value set by hand stays too
    same = tiny(post_processor=SgfrPostProcessor(image_sensitivity=0.7))
    np.testing.assert_allclose(
        predicted(same, many / "more", tmp_path, ckpt_path=path)[0],
        predicted(model, many / "more", tmp_path)[0],
    )
    assert same.post_processor.image_sensitivity == 0.7
    assert (
        predicted(same, many / "bad", tmp_path)[1]
        == (predicted(same, many / "bad", tmp_path)[0] > 0.3)
    ).all()


def test_a_sensitivity_of_anomalibs_own_takes_effect_too(
    without_defects: tuple[Sgfr, Path], many: Path, tmp_path: Path
) -> None:
    _, path = without_defects
    labels = {}
    for asked in (0.5, 0.99):
        fresh = tiny(post_processor=PostProcessor(image_sensitivity=asked))
        labels[asked] = predicted(fresh, many / "more", tmp_path, ckpt_path=path)[1].mean()
        assert fresh.post_processor.image_sensitivity == asked
    assert labels[0.5] < 0.2
    assert labels[0.99] == 1.0


def test_what_needs_new_scores_is_refused(
    without_defects: tuple[Sgfr, Path], many: Path, tmp_path: Path
) -> None:
    _, path = without_defects
    for arguments, message in (
        (
            {"group": "part"},
            "group 'part' cannot take effect on a checkpoint, which was made with 'None'",
        ),
        ({"held_out": str(many / "more")}, "held_out .* cannot take effect"),
        ({"images": 7}, "images '7' cannot take effect on a checkpoint, which was made with '300'"),
    ):
        with pytest.raises(ValueError, match=message):
            predicted(
                tiny(post_processor=SgfrPostProcessor(**arguments)),
                many / "more",
                tmp_path,
                ckpt_path=path,
            )
    stored = torch.load(path, weights_only=False)
    del stored["anomalib_post_processor_config"]["threshold"]  # of an earlier version
    torch.save(stored, tmp_path / "old.ckpt")
    model = tiny(post_processor=SgfrPostProcessor(0.3))
    with pytest.raises(ValueError, match="keeps no scores of good images"):
        predicted(model, many / "more", tmp_path, ckpt_path=tmp_path / "old.ckpt")


def test_the_pictures_of_a_part_do_not_vouch_for_each_other(
    many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copies of one picture: each knows all of its siblings, and the part is unknown without them."""
    # batch by batch: of copies sampled together, each would give some of the atoms, and lack them
    monkeypatch.setattr("anomalib_sgfr.core.sampler._TOGETHER", 1)
    for part in range(4):
        for copy in range(3):
            target = tmp_path / "good" / f"part{part}_{copy}.png"
            target.parent.mkdir(exist_ok=True)
            target.write_bytes((many / "good" / f"part{part:02}_0.png").read_bytes())
    model = tiny(bank_size=2000)
    fit(
        model,
        folder_datamodule(
            tmp_path, abnormal_dir=many / "bad", normal_test_dir=many / "more", mask_dir=None
        ),
        tmp_path,
    )
    paths = sorted(str(path) for path in (tmp_path / "good").iterdir())
    alone = nominal_scores(model.model, model.pre_processor, paths).scores
    grouped = nominal_scores(model.model, model.pre_processor, paths, group=r"part(\d)_").scores
    assert np.median(alone) < 0.2 * min(grouped)
    # scored one by one, without the atoms of the part
    for path, score in zip(paths, grouped, strict=True):
        numbers = [
            n
            for n, image in enumerate(model.model.images)
            if Path(image).name[:5] == Path(path).name[:5]
        ]
        prepared = read_prepared(path, model.pre_processor)[None]
        model.eval()
        found = model.model.score_embeddings(
            model.model.embed(prepared), (64, 64), model.model.banks_without(numbers)
        )
        assert float(found.pred_score) == pytest.approx(score, rel=1e-4)


def test_a_single_image_makes_a_threshold_too(many: Path, tmp_path: Path) -> None:
    (tmp_path / "good").mkdir()
    (tmp_path / "good" / "one.png").write_bytes((many / "good" / "part00_0.png").read_bytes())
    module = Folder(
        "one",
        root=tmp_path,
        normal_dir="good",
        num_workers=0,
        test_split_mode="none",
        val_split_mode="none",
    )
    model = tiny()
    fit(model, module, tmp_path, limit_val_batches=0)
    assert 0.0 < predicted(model, tmp_path / "good", tmp_path)[0][0] < 0.5
    assert predicted(model, many / "bad", tmp_path)[1].all()


def test_an_update_keeps_what_was_known(
    without_defects: tuple[Sgfr, Path], many: Path, tmp_path: Path
) -> None:
    model, path = without_defects
    updated = tiny(update=True)
    (tmp_path / "new").mkdir()
    one = min((many / "more").iterdir())
    (tmp_path / "new" / one.name).write_bytes(one.read_bytes())
    module = Folder(
        "new",
        root=tmp_path,
        normal_dir="new",
        num_workers=0,
        test_split_mode="none",
        val_split_mode="none",
    )
    engine_in(tmp_path, limit_val_batches=0).fit(updated, datamodule=module, ckpt_path=path)
    calibration_scores = updated.post_processor.calibration_scores
    assert calibration_scores.paths == (
        *model.post_processor.calibration_scores.paths,
        str(tmp_path / "new" / one.name),
    )
    # by the banks as they are now, not as they were
    again = nominal_scores(
        updated.model, updated.pre_processor, list(calibration_scores.paths)
    ).scores
    assert calibration_scores.scores == pytest.approx(again, rel=1e-5)
    assert all(calibration_scores.current)


def test_an_update_marks_the_scores_of_images_that_are_gone(many: Path, tmp_path: Path) -> None:
    shutil.copytree(many / "good", tmp_path / "old")
    module = Folder(
        "old",
        root=tmp_path,
        normal_dir="old",
        num_workers=0,
        test_split_mode="none",
        val_split_mode="none",
    )
    model = tiny()
    fit(model, module, tmp_path, limit_val_batches=0)
    before = model.post_processor.calibration_scores
    gone = sorted((tmp_path / "old").iterdir())[:3]
    for path in gone:
        path.unlink()
    model.update = True
    new = Folder(
        "new",
        root=many,
        normal_dir="more",
        num_workers=0,
        test_split_mode="none",
        val_split_mode="none",
    )
    fit(model, new, tmp_path, limit_val_batches=0)
    calibration_scores = model.post_processor.calibration_scores
    assert [
        path
        for path, current in zip(calibration_scores.paths, calibration_scores.current, strict=True)
        if not current
    ] == [str(path) for path in gone]
    assert calibration_scores.scores[:3] == before.scores[:3]
    assert calibration_scores.scores[3:16] != before.scores[3:16]
    assert model.post_processor.basis.endswith(
        "3 of them could not be scored again after the banks changed"
    )


@pytest.mark.parametrize("validated", [False, True])
def test_a_fresh_fit_knows_nothing_of_the_images_of_an_earlier_one(
    validated: bool, without_defects: tuple[Sgfr, Path], many: Path, tmp_path: Path
) -> None:
    for index in range(5):
        write_image(tmp_path / "others" / f"{index}.png", 50 + index, (64, 64))
    module = Folder(
        "others",
        root=tmp_path,
        normal_dir="others",
        normal_test_dir=many / "more",
        num_workers=0,
        seed=0,
    )
    model = tiny()
    model.load_state_dict(without_defects[0].state_dict())
    model.post_processor.use(without_defects[0].post_processor.state)
    once = tiny()
    for fitted in (model, once):
        torch.manual_seed(0)
        fit(fitted, module, tmp_path, limit_val_batches=1.0 if validated else 0)
    calibration_scores, expected = (
        fitted.post_processor.calibration_scores for fitted in (model, once)
    )
    assert sorted(calibration_scores.paths) == sorted(expected.paths)
    assert {Path(path).parent.name for path in calibration_scores.paths} <= {"others", "more"}
    assert model.post_processor.image_threshold == once.post_processor.image_threshold


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
        processor.use(calibrated(CalibrationScores.of([2.0, 3.0], Split.HELD_OUT, ["a", "b"])))
        found.append(processor(raw))
    assert found[0].pred_label.tolist() == found[1].pred_label.tolist()
    assert found[0].pred_mask.tolist() == found[1].pred_mask.tolist()
    assert torch.equal(found[1].pred_score, raw.pred_score)


def test_units_are_named_by_a_regular_expression() -> None:
    assert group_of("a/part1_2.png", None) == "a/part1_2.png"
    assert group_of("a\\part1_2.png", "a/part") == "a/part"
    assert group_of("line3/part1_2.png", r"(line\d)/part(\d)") == group_of(
        "line3/part1_9.png", r"(line\d)/part(\d)"
    )
    assert group_of("other.png", r"part(\d)") == "other.png"
    with pytest.raises(ValueError, match=r"group '\(' is not a regular expression"):
        SgfrPostProcessor(group="(")
    with pytest.raises(
        ValueError, match=r"group 'unit' matches no image's path: one is 'a/part1.png'"
    ):
        require_group("unit", ["a/part1.png"])


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


def test_pixels_are_measured_by_the_peaks_of_maps() -> None:
    """The map may hear other scales than the score: neither threshold is of use to the other."""
    good = CalibrationScores.of(
        [1.0, 2.0, 3.0], Split.HELD_OUT, ["a", "b", "c"], [10.0, 30.0, 20.0]
    )
    by_rate = SgfrPostProcessor(0.3)
    by_rate.use(calibrated(good, false_alarm_rate=0.3))
    assert float(by_rate.image_threshold) == nominal_threshold(good.scores, 0.3)
    assert float(by_rate.pixel_threshold) == nominal_threshold(good.peaks, 0.3)
    assert by_rate.mask_threshold == by_rate.peak_threshold == float(by_rate.pixel_threshold)
    by_rate.use(
        by_rate.state._replace(value=2 * by_rate.state.image).calibrated()
    )  # by hand: both alike
    assert float(by_rate.pixel_threshold) == pytest.approx(2 * nominal_threshold(good.peaks, 0.3))
    # with masks of enough labelled images the pixels' threshold is theirs; peaks are still those of
    # before
    many_good = CalibrationScores.of(
        np.linspace(1.0, 3.0, 6), Split.HELD_OUT, [f"g{index}" for index in range(6)], [10.0] * 6
    )
    bad = CalibrationScores.of(
        np.linspace(6.0, 7.0, 6), Split.DEFECTIVE, [f"b{index}" for index in range(6)], [90.0] * 6
    )
    masked = SgfrPostProcessor(pixel_sensitivity=0.8)
    masked.use(calibrated(many_good.joined(bad), masks=5.0))
    assert masked.state.by == "good"
    assert float(masked.pixel_threshold) == 5.0
    assert masked.mask_threshold == pytest.approx(2.5)  # half: 0.2 is reported there
    assert masked.peak_threshold == pytest.approx(5.005)
    asked = SgfrPostProcessor(0.3)
    asked.use(calibrated(many_good.joined(bad), masks=5.0, false_alarm_rate=0.3))
    assert (
        float(asked.pixel_threshold)
        == nominal_threshold(many_good.peaks, 0.3)
        == pytest.approx(10.01)
    )


def test_evidence_of_before_has_the_scores_for_peaks() -> None:
    stored = CalibrationScores.of([1.0, 2.0], Split.HELD_OUT, ["a", "b"], [3.0, 4.0]).to_dict()
    assert CalibrationScores.from_dict(stored).peaks == (3.0, 4.0)
    del stored["peaks"]
    assert CalibrationScores.from_dict(stored).peaks == (1.0, 2.0)
    both = CalibrationScores.from_dict(stored).joined(
        CalibrationScores.of([5.0], Split.HELD_OUT, ["b"], [6.0])
    )
    assert (both.scores, both.peaks) == ((1.0, 5.0), (1.0, 6.0))


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
