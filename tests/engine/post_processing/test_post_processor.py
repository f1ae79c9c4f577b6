"""The post-processor in fits, predictions, updates and exported files."""

import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from anomalib.data import Folder, PredictDataset
from anomalib.deploy import ExportType, TorchInferencer
from anomalib.post_processing import PostProcessor
from lightning.pytorch import Callback
from torchvision.transforms.v2 import Resize

from anomalib_sgfr import Sgfr, SgfrPostProcessor
from anomalib_sgfr.images.pre_processor import SgfrPreProcessor, read_prepared
from anomalib_sgfr.post_processing.calibration import (
    Split,
    nominal_scores,
)
from tests.conftest import engine_in, fit, folder_datamodule, nominal_threshold, small, write_image


def tiny(**arguments: Any) -> Sgfr:
    """Model of small images."""
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


def unsplit(root: Path, folder: str) -> Folder:
    """Good images of one folder, all to train on."""
    return Folder(
        folder,
        root=root,
        normal_dir=folder,
        num_workers=0,
        test_split_mode="none",
        val_split_mode="none",
    )


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
        == "16 good images (16 independent) at a false-alarm rate of 1%; at 95% confidence the"
        " real false-alarm rate is 17% or less; 299 images without an alarm would show 1% or less"
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
        "16 good images (8 independent) at a false-alarm rate of 30%; at 95% confidence the"
        " real false-alarm rate is 47% or less; 30 images without" in said[0]
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


def test_a_second_fit_finds_suspects_anew(many: Path, tmp_path: Path) -> None:
    """Its threshold is calibrated on all that it does not suspect."""
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


def test_the_images_of_a_part_are_scored_without_each_other(
    many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of copies of one image, each scores low with the others' atoms and high without."""
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
    module = unsplit(tmp_path, "good")
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
    module = unsplit(tmp_path, "new")
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
    module = unsplit(tmp_path, "old")
    model = tiny()
    fit(model, module, tmp_path, limit_val_batches=0)
    before = model.post_processor.calibration_scores
    gone = sorted((tmp_path / "old").iterdir())[:3]
    for path in gone:
        path.unlink()
    model.update = True
    new = unsplit(many, "more")
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
