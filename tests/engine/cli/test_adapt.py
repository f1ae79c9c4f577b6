"""``anomalib-sgfr adapt``: a domain shift, and what an adapted model keeps."""

import shutil
from pathlib import Path

import numpy as np
import openvino
import pytest
import torch
from PIL import Image

from anomalib_sgfr import Sgfr, adapt
from anomalib_sgfr.cli.adapt import main
from anomalib_sgfr.cli.threshold import main as threshold
from anomalib_sgfr.images.pre_processor import read_prepared
from tests.conftest import engine_in, fit, folder_datamodule, small, write_image


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images, a checkpoint of a fit to them, and under ``now`` images in a weak, slanting light."""
    folder = tmp_path_factory.mktemp("adapt")
    for index in range(12):
        write_image(folder / "good" / f"{index:02}.png", index)
        write_image(folder / "now/good" / f"{index:02}.png", 300 + index)
    for index in range(4):
        write_image(folder / "good_test" / f"{index}.png", 100 + index)
        write_image(folder / "bad" / f"{index}.png", 200 + index, defect=True)
        write_image(folder / "now/bad" / f"{index}.png", 400 + index, defect=True)
    for path in (folder / "now").rglob("*.png"):
        pixels = np.asarray(Image.open(path), np.float32)
        light = np.linspace(0.35, 0.75, pixels.shape[1])[None, :, None]
        if path.parent.name != "masks":
            Image.fromarray((pixels * light).astype(np.uint8)).save(path)
    engine = fit(small(bank_size=400), folder_datamodule(folder), folder, limit_val_batches=0)
    shutil.copy(engine.best_model_path, folder / "model.ckpt")
    return folder


@pytest.fixture(scope="module")
def adapted(root: Path) -> Path:
    """The checkpoint that four images of now made."""
    out = root / "adapted.ckpt"
    images = [str(root / "now/good" / f"{index:02}.png") for index in range(4)]
    assert main([str(root / "model.ckpt"), *images, "--out", str(out)]) == 0
    return out


def loaded(path: Path, **arguments: object) -> Sgfr:
    return Sgfr.load_from_checkpoint(
        path, map_location="cpu", visualizer=False, evaluator=False, **arguments
    ).eval()


def scores(model: Sgfr, folder: Path) -> list[float]:
    images = [
        read_prepared(str(path), model.pre_processor) for path in sorted(folder.glob("*.png"))
    ]
    with torch.no_grad():
        return model.model(torch.stack(images)).pred_score.tolist()


def test_good_images_of_the_new_domain_score_lower_and_defects_do_not(
    root: Path, adapted: Path
) -> None:
    before, after = loaded(root / "model.ckpt"), loaded(adapted)
    unseen = slice(4, None)  # images that adapting was not given
    then, now = (scores(model, root / "now/good")[unseen] for model in (before, after))
    as_it_was = scores(before, root / "good_test")
    assert np.median(then) > 2.0 * np.median(as_it_was)
    assert np.median(now) < 0.6 * np.median(then)
    assert min(scores(after, root / "now/bad")) > max(now)
    assert min(scores(after, root / "bad")) > max(
        scores(after, root / "good_test")
    )  # in the old domain too
    for bank, its in zip(after.model.banks, before.model.banks, strict=True):
        assert bank.nuisance.shape == (4, bank.atoms.shape[1])
        assert float((bank.atoms @ bank.nuisance.T).abs().max()) < 2e-3 * float(
            bank.atoms.abs().max()
        )
        assert len(bank.atoms) == len(its.atoms)
        assert float(bank.residual_scale) == float(its.residual_scale)
    assert (
        after.certificate().largest <= before.certificate().largest * 1.01
    )  # distances only shrink


def test_it_prints_changes_and_keeps_the_threshold(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.ckpt"
    capsys.readouterr()
    given = [str(root / "now/good"), "--bad", str(root / "now/bad"), "--out", str(out)]
    assert main([str(root / "model.ckpt"), *given]) == 0
    of_good, of_bad, *others = capsys.readouterr().out.splitlines()
    assert of_good.startswith("Good: 12 images, median raw score ")
    assert of_good.split("; ")[1].startswith("above the threshold of ")
    assert of_good.endswith(": 12 before, 0 now.")
    assert of_bad.endswith(": 4 before, 4 now.")
    assert others[-1] == f"Checkpoint: {out}"
    before, after = loaded(root / "model.ckpt").post_processor, loaded(out).post_processor
    assert after.basis == "a value set by hand, read from 12 images"  # those that chose it before
    assert after.state.read_from == before.state.threshold_images
    assert float(after.image_threshold) == float(before.image_threshold)
    assert float(after.pixel_threshold) == float(before.pixel_threshold)
    good = after.calibration_scores.good
    assert [Path(path).name for path in good.paths] == [f"{index:02}.png" for index in range(12)]
    # each by the model that the others adapt, not by the one that all of them adapt
    by_all = scores(loaded(out), root / "now/good")
    assert good.scores != pytest.approx(by_all, rel=1e-6)
    assert good.scores == pytest.approx(by_all, rel=0.5)
    again = str(tmp_path / "again.ckpt")
    assert threshold([str(out), "--false_alarm_rate", "0.1", "--out", again]) == 0
    assert "calibrated on 12 good images" in capsys.readouterr().out


def test_an_image_is_scored_by_the_model_that_the_others_adapt(root: Path, tmp_path: Path) -> None:
    files = [str(root / "now/good" / f"{index:02}.png") for index in range(3)]
    together, others = tmp_path / "three.ckpt", tmp_path / "two.ckpt"
    assert main([str(root / "model.ckpt"), *files, "--out", str(together)]) == 0
    assert main([str(root / "model.ckpt"), *files[1:], "--out", str(others)]) == 0
    expected = scores(loaded(others), root / "now/good")[0]
    assert loaded(together).post_processor.calibration_scores.scores[0] == pytest.approx(
        expected, rel=1e-4
    )


def test_adapting_again_projects_more_directions_out(
    root: Path, adapted: Path, tmp_path: Path
) -> None:
    out = tmp_path / "again.ckpt"
    assert main([str(adapted), str(root / "now/good"), "--directions", "2", "--out", str(out)]) == 0
    for bank, its in zip(loaded(out).model.banks, loaded(adapted).model.banks, strict=True):
        assert torch.equal(bank.nuisance[:4], its.nuisance)
        torch.testing.assert_close(
            bank.nuisance @ bank.nuisance.T, torch.eye(6), atol=1e-3, rtol=0.0
        )


def test_an_update_keeps_the_directions_and_a_new_fit_has_none(
    root: Path, adapted: Path, tmp_path: Path
) -> None:
    module = folder_datamodule(
        root, normal_dir="now/good", abnormal_dir="now/bad", normal_test_dir=None, mask_dir=None
    )
    engine = engine_in(tmp_path, limit_val_batches=0)
    model = small(bank_size=400, update=True)
    engine.fit(model, datamodule=module, ckpt_path=adapted)
    for bank, its in zip(model.model.banks, loaded(adapted).model.banks, strict=True):
        assert torch.equal(bank.nuisance, its.nuisance)
        assert float((bank.atoms @ bank.nuisance.T).abs().max()) < 2e-3 * float(
            bank.atoms.abs().max()
        )
    fresh, expected = loaded(adapted, seed=0), small(bank_size=400, seed=0)
    fresh.train()
    for one in (fresh, expected):
        engine_in(tmp_path, limit_val_batches=0).fit(one, datamodule=folder_datamodule(root))
    for bank, its in zip(fresh.model.banks, expected.model.banks, strict=True):
        assert bank.nuisance.numel() == 0
        assert torch.equal(bank.atoms, its.atoms)


def test_an_exported_file_and_the_engine_project_out_the_same(
    root: Path, adapted: Path, tmp_path: Path
) -> None:
    model = loaded(adapted)
    path = model.to_openvino(tmp_path, input_size=(128, 128))
    run = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for file in sorted((root / "now/bad").glob("*.png"))[:2]:
        raw = (
            torch.from_numpy(np.array(Image.open(file).resize((128, 128))))
            .permute(2, 0, 1)[None]
            .float()
            / 255
        )
        with torch.no_grad():
            expected = model(raw)
        found = run([raw.numpy()])
        assert float(found["pred_score"].item()) == pytest.approx(
            float(expected.pred_score), abs=1e-3
        )
        np.testing.assert_allclose(found["anomaly_map"], expected.anomaly_map.numpy(), atol=2e-3)


def test_mistakes_are_named_in_one_line(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = str(root / "now/good/00.png")
    with pytest.raises(SystemExit):
        main([str(root / "model.ckpt"), one, one])
    assert (
        "at least 2 good images are needed, better 4 to 16; there is one" in capsys.readouterr().err
    )
    with pytest.raises(
        ValueError, match="directions must lie between 1 and 12, half of the 24 values"
    ):
        main([str(root / "model.ckpt"), str(root / "now/good"), "--directions", "13"])


def test_the_function_and_the_command_adapt_alike(root: Path, adapted: Path) -> None:
    images = [str(root / "now/good" / f"{index:02}.png") for index in range(4)]
    bad = [str(path) for path in sorted((root / "now/bad").glob("*.png"))]
    model, expected = loaded(root / "model.ckpt"), loaded(adapted)
    found = adapt(model, images, bad)
    for name, value in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name].nan_to_num(), value.nan_to_num()), name
    assert tuple(found.good[1]) == expected.post_processor.calibration_scores.good.scores
    assert found.bad[0] == pytest.approx(scores(loaded(root / "model.ckpt"), root / "now/bad"))
    assert found.bad[1] == pytest.approx(scores(model, root / "now/bad"))
    with pytest.raises(ValueError, match=r"at least 2 good images are needed.*got 1"):
        adapt(model, images[:1] * 2)
    with pytest.raises(ValueError, match=r"images: 1 of the images cannot be taken.*trained on"):
        adapt(model, [*images, str(root / "good/00.png")])
    with pytest.raises(TypeError, match="images must be a list of image files, got '/tmp'"):
        adapt(model, Path("/tmp"))
    with pytest.raises(RuntimeError, match="cannot adapt an Sgfr that is not fitted"):
        adapt(small(), images)
