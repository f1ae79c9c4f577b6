"""``anomalib-sgfr threshold``: what a threshold is calibrated on, and changes of it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.data import Folder
from torchvision.transforms.v2 import Resize

from anomalib_sgfr import Sgfr
from anomalib_sgfr.cli.adapt import main as adapt
from anomalib_sgfr.cli.threshold import main
from anomalib_sgfr.images.pre_processor import SgfrPreProcessor
from anomalib_sgfr.post_processing.calibration import nominal_scores
from tests.conftest import fit, nominal_threshold, small, write_image


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``good`` (12 images of six parts in two lines), ``more`` (6) and a checkpoint of a fit."""
    folder = tmp_path_factory.mktemp("threshold")
    for index in range(12):
        write_image(
            folder / "good" / f"line{index % 4 // 2}_part{index // 2}_{index % 2}.png",
            index,
            (64, 64),
        )
    for index in range(6):
        write_image(folder / "more" / f"line0_part{index + 10}.png", 50 + index, (64, 64))
    model = small(pre_processor=SgfrPreProcessor(Resize((64, 64), antialias=True)))
    module = Folder("p", root=folder, normal_dir="good", normal_test_dir="more", num_workers=0)
    engine = fit(model, module, folder, limit_val_batches=0)
    Path(str(engine.best_model_path)).replace(folder / "model.ckpt")
    return folder


def loaded(path: Path) -> Sgfr:
    return Sgfr.load_from_checkpoint(path, map_location="cpu", visualizer=False, evaluator=False)


def test_it_shows_and_changes_nothing(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (root / "model.ckpt").read_bytes()
    assert main([str(root / "model.ckpt"), "--by", r"line(\d)"]) == 0
    shown = capsys.readouterr().out
    processor = loaded(root / "model.ckpt").post_processor
    assert shown.startswith(
        f"Threshold {float(processor.image_threshold):.6g} of the raw score, calibrated on 12 good "
    )
    assert (
        "(12 independent) at a false-alarm rate of 1%; at 95% confidence the real false-alarm rate"
        " is 22% or less; 299 images without an alarm would show 1% or less." in shown
    )
    for line, number in (("0", 6), ("1", 6)):
        assert f"{line}: 0 of {number} good images are alarms (0%)" in shown
    assert (root / "model.ckpt").read_bytes() == before
    assert sorted(path.name for path in root.glob("*.ckpt")) == ["model.ckpt"]


def test_another_rate(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "new.ckpt"
    assert main([str(root / "model.ckpt"), "--false_alarm_rate", "0.3", "--out", str(out)]) == 0
    before, after = loaded(root / "model.ckpt"), loaded(out)
    scores, changed = before.post_processor.calibration_scores, after.post_processor
    assert scores.peaks != scores.scores  # other layers contribute to the map
    assert float(changed.image_threshold) == pytest.approx(nominal_threshold(scores.scores, 0.3))
    assert float(changed.pixel_threshold) == pytest.approx(nominal_threshold(scores.peaks, 0.3))
    assert changed.false_alarm_rate == 0.3
    for name, value in before.model.state_dict().items():
        assert torch.equal(value, after.model.state_dict()[name])


def test_a_value_and_a_score(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = tmp_path / "first.ckpt", tmp_path / "second.ckpt"
    assert main([str(root / "model.ckpt"), "--value", "30", "--out", str(first)]) == 0
    assert main([str(first), "--score", "0.1", "--out", str(second)]) == 0
    assert "Threshold 30 before, 10 now." in capsys.readouterr().out
    processor = loaded(second).post_processor
    assert (processor.state.value, float(processor.image_threshold)) == (
        pytest.approx(10.0),
        pytest.approx(10.0),
    )
    # set by hand, it stays what it is, until a rate is asked for
    assert main([str(second), "--false_alarm_rate", "0.01", "--out", str(second)]) == 0
    assert float(loaded(second).post_processor.image_threshold) == pytest.approx(
        float(loaded(root / "model.ckpt").post_processor.image_threshold)
    )


def test_other_images_and_other_groups(root: Path, tmp_path: Path) -> None:
    model = loaded(root / "model.ckpt")
    out = tmp_path / "new.ckpt"
    held_out = ["--held_out", str(root / "more"), "--out", str(out)]
    assert main([str(root / "model.ckpt"), *held_out]) == 0
    paths = sorted(str(path) for path in (root / "more").iterdir())
    scores = nominal_scores(model.model, model.pre_processor, paths).scores
    assert float(loaded(out).post_processor.image_threshold) == pytest.approx(
        nominal_threshold(scores, 0.01)
    )
    assert main([str(root / "model.ckpt"), "--group", r"part(\d+)", "--out", str(out)]) == 0
    scored, group = loaded(out).post_processor.calibration_scores, r"part(\d+)"
    grouped = nominal_scores(model.model, model.pre_processor, scored.paths, group=group).scores
    assert scored.scores == pytest.approx(grouped)
    assert len(set(scored.groups(group))) == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--value", "-1"], "--value must be a finite number above 0, got -1.0"),
        (["--score", "1"], "--score must lie between 0 and 1, got 1.0"),
        (
            ["--false_alarm_rate", "3"],
            "false_alarm_rate must lie between 0 and 1, and not below 1e-06, got 3",
        ),
        (["--value", "3", "--score", "0.4"], "--value and --score are ways to say one thing"),
        (
            ["--value", "0"],
            "--value must be a finite number above 0, got 0.0: at 0 every image is an alarm",
        ),
        (["--group", "("], r"--group '\(' is not a regular expression"),
        (["--group", "unit"], "--group 'unit' matches no image's path: one is"),
        (["--by", "unit"], "--by 'unit' matches no image's path: one is"),
        (
            ["--false_alarm_rate", "0.1", "--read_from", "."],
            "--read_from goes with --value or --score",
        ),
        (["--held_out", "."], "no image in this folder"),
        (["--value", "3", "--force"], "--force goes with --held_out"),
        (["--by", "part", "--json"], "--by shows its lines as text: pass it without --json"),
    ],
)
def test_mistakes_are_named_and_nothing_is_written(
    arguments: list[str], message: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        main([str(root / "model.ckpt"), *arguments])
    assert [path.name for path in root.glob("*.ckpt")] == ["model.ckpt"]


def test_training_images_that_are_gone_are_named(root: Path, tmp_path: Path) -> None:
    stored = torch.load(root / "model.ckpt", weights_only=False)
    scores = stored["anomalib_post_processor_config"]["threshold"]["scores"]
    scores["paths"] = [path.replace("/good/", "/gone/") for path in scores["paths"]]
    torch.save(stored, tmp_path / "gone.ckpt")
    assert main([str(tmp_path / "gone.ckpt"), "--false_alarm_rate", "0.2"]) == 0
    with pytest.raises(
        ValueError, match=r"scored anew, .* and 12 of 12 are gone: .*/gone/.*Pass --held_out"
    ):
        main([str(tmp_path / "gone.ckpt"), "--group", r"(part\d+)"])


@pytest.fixture(scope="module")
def validated(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that knows two images as defective."""
    folder = tmp_path_factory.mktemp("validated")
    for index in range(2):
        write_image(folder / "bad" / f"{index}.png", 90 + index, (64, 64), defect=True)
    model = small(pre_processor=SgfrPreProcessor(Resize((64, 64), antialias=True)))
    module = Folder(
        "p",
        root=root,
        normal_dir="good",
        abnormal_dir=folder / "bad",
        normal_test_dir="more",
        num_workers=0,
        val_split_mode="same_as_test",
    )
    Path(str(fit(model, module, folder).best_model_path)).replace(folder / "model.ckpt")
    return folder


@pytest.mark.parametrize("command", ["threshold", "adapt"])
def test_what_is_not_known_to_be_good_does_not_calibrate(
    command: str, validated: Path, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Known defects, masks and training images are refused; the file keeps ``--force``."""
    run = {"threshold": main, "adapt": adapt}[command]
    out, checkpoint = tmp_path / "new.ckpt", str(validated / "model.ckpt")
    for folder, reason in (
        (
            validated / "bad",
            "2 of the images cannot .*the checkpoint knows it as defective.*--force takes them",
        ),
        (validated / "masks", "2 of the images cannot .*it is black and white, as a mask is"),
        (root / "good", "12 of the images cannot .*it was trained on"),
    ):
        given = ["--held_out", str(folder)] if command == "threshold" else [str(folder)]
        with pytest.raises(ValueError, match=reason):
            run([checkpoint, *given, "--out", str(out)])
        assert not out.exists()
    given = ["--held_out", str(root / "good")] if command == "threshold" else [str(root / "good")]
    assert run([checkpoint, *given, "--force", "--out", str(out)]) == 0
    state = loaded(out).post_processor.state
    assert sorted(state.forced) == sorted(str(path) for path in (root / "good").iterdir())
    capsys.readouterr()
    assert main([str(out)]) == 0
    if command == "threshold":
        assert "12 of them were taken for good by --force" in capsys.readouterr().out


def test_a_value_by_hand_remembers_the_images_that_it_was_read_from(
    validated: Path, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new.ckpt"
    defect = str(validated / "bad" / "0.png")
    arguments = ["--score", "0.4", "--read_from", str(root / "more"), defect]
    assert main([str(validated / "model.ckpt"), *arguments, "--out", str(out), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    processor = loaded(out).post_processor
    defective = processor.calibration_scores.defective.scores
    assert facts["basis"] == "a value set by hand, read from 7 images"
    assert facts["threshold"] == processor.state.image
    assert facts["checkpoint"] == str(out)
    assert facts["good"]["images"] == 18
    assert facts["defective"] == {
        "images": 2,
        "above": 2,
        "least": min(defective),
        "median": np.median(defective),
        "most": max(defective),
    }
    assert processor.state.threshold_images == (
        *(str(path) for path in sorted((root / "more").iterdir())),
        defect,
    )


def test_few_images_are_warned_of(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(root / "model.ckpt")]) == 0
    assert (
        capsys.readouterr().err
        == "warning: 12 good images: at 95% confidence the real false-alarm rate is 22% or less;"
        " 299 images without an alarm would show 1% or less\n"
    )
