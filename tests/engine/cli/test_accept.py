"""``anomalib-sgfr accept``: new atoms of false alarms, which can be taken back exactly."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from anomalib.data import Folder
from PIL import Image

from anomalib_sgfr import Sgfr, accept
from anomalib_sgfr.cli.accept import main
from anomalib_sgfr.images.pre_processor import read_prepared
from anomalib_sgfr.training.accept import take_back
from tests.conftest import fit, small, write_image

SMALL_IMAGES = Sgfr.configure_pre_processor((64, 64))


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "thumbnails"])
def root(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a fit to twelve images, ``odd``: good ones with a mark that those lack, and
    ``bad``.
    """
    folder = tmp_path_factory.mktemp("accept")
    for index in range(12):
        write_image(folder / "good" / f"{index:02}.png", index, (64, 64))
    for index in range(3):
        write_image(folder / "bad" / f"{index}.png", 100 + index, (64, 64), defect=True)
        write_image(folder / "odd" / f"{index}.png", 200 + index, (64, 64))
        marked(folder / "odd" / f"{index}.png")
    model = small(bank_size=400, pre_processor=SMALL_IMAGES, thumbnails=request.param)
    module = Folder("p", root=folder, normal_dir="good", normal_test_dir="good", num_workers=0)
    engine = fit(model, module, folder, limit_val_batches=0)
    Path(str(engine.best_model_path)).replace(folder / "model.ckpt")
    return folder


def marked(path: Path) -> None:
    """Draw a cross in the lower left quarter."""
    pixels = np.array(Image.open(path))
    pixels[40:56, 14:17] = pixels[46:49, 8:24] = 10
    Image.fromarray(pixels).save(path)


def loaded(path: Path) -> Sgfr:
    return Sgfr.load_from_checkpoint(
        path, map_location="cpu", visualizer=False, evaluator=False
    ).eval()


def run(*arguments: str | Path) -> int:
    return main([str(argument) for argument in arguments])


def score(model: Sgfr, path: Path) -> float:
    image = read_prepared(str(path), model.pre_processor)[None]
    with torch.no_grad():
        return float(model.model(image).pred_score)


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one.nan_to_num(), other.nan_to_num()) and one.dtype == other.dtype
    return bool(one == other)


def test_new_atoms_are_added_and_taken_back(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = loaded(root / "model.ckpt")
    threshold = float(before.post_processor.image_threshold)
    odd = sorted((root / "odd").iterdir())
    assert all(score(before, path) > threshold for path in odd)
    first, second = tmp_path / "first.ckpt", tmp_path / "second.ckpt"
    assert run(root / "model.ckpt", odd[0], "--bad", root / "bad", "--out", first) == 0
    told = capsys.readouterr().out
    assert f"{odd[0]}: " in told
    assert "new atoms, raw score" in told

    after = loaded(first)
    assert all(score(after, path) < score(before, path) for path in odd[:1])
    assert score(after, odd[0]) <= float(after.post_processor.image_threshold)
    assert score(after, root / "bad" / "0.png") > float(after.post_processor.image_threshold)
    for bank, old in zip(
        after.model.banks, before.model.banks, strict=True
    ):  # only new atoms, after those there were
        number = len(old.atoms)
        assert number < len(bank.atoms) < number + 64
        for part, earlier in zip(bank.clusters[:5], old.clusters[:5], strict=True):
            torch.testing.assert_close(part[:number], earlier, rtol=1e-6, atol=0)
        assert {after.model.images[image] for image in bank.origin[number:, 0].tolist()} == {
            str(odd[0])
        }
        assert len(bank.thumbnails) in {0, len(bank.atoms)}
        if len(bank.thumbnails):
            assert bank.thumbnails[number:].float().std() > 0
    # accepted once, it is no alarm
    assert run(first, odd[0], "--out", tmp_path / "none.ckpt") == 0
    assert "is no alarm" in capsys.readouterr().out
    assert not (tmp_path / "none.ckpt").exists()

    assert run(first, *odd[1:], "--out", second) == 0
    capsys.readouterr()
    assert run(second) == 0
    record = capsys.readouterr().out
    assert record.startswith("1. ")
    assert str(odd[0]) in record
    for path, expected in ((second, loaded(first)), (second, before)):
        assert run(path, "--undo", "--out", path) == 0
        back = loaded(path)
        for name, value in expected.state_dict().items():
            assert same(back.state_dict()[name], value), name
        assert (
            back.post_processor.checkpoint_config() == expected.post_processor.checkpoint_config()
        )
    with pytest.raises(ValueError, match="there is nothing to take back"):
        run(second, "--undo")


def test_a_known_defect_is_refused(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(root / "bad" / "1.png", tmp_path / "looks_good.png")
    out = tmp_path / "new.ckpt"
    given = [tmp_path / "looks_good.png", root / "odd" / "0.png"]
    assert run(root / "model.ckpt", *given, "--bad", root / "bad", "--out", out) == 1
    said = capsys.readouterr()
    assert (
        "looks_good.png is refused: with it 1 of 3 known defects would be called good:" in said.err
    )
    assert f"{root / 'bad' / '1.png'}" in said.err
    model = loaded(out)  # the other was accepted
    assert all(
        score(model, path) > model.post_processor.label_threshold
        for path in (root / "bad").iterdir()
    )
    none = tmp_path / "no.ckpt"
    assert run(root / "model.ckpt", given[0], "--bad", root / "bad", "--out", none) == 1
    assert not none.exists()


def test_the_threshold_is_calibrated_on_the_same_images(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "new.ckpt"
    run(root / "model.ckpt", root / "odd", "--out", out)
    before, after = loaded(root / "model.ckpt").post_processor, loaded(out).post_processor
    assert set(after.calibration_scores.paths) == set(before.calibration_scores.paths)
    assert float(after.image_threshold) == pytest.approx(float(before.image_threshold), rel=0.2)
    # another fit forgets the history
    model = small(bank_size=400, pre_processor=SMALL_IMAGES)
    module = Folder("p", root=root, normal_dir="good", normal_test_dir="good", num_workers=0)
    model.accepted = loaded(out).accepted
    fit(model, module, tmp_path, limit_val_batches=0)
    assert model.accepted is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--undo"], "there is nothing to take back"),
        (["README"], "no such file or folder"),
        (["--force"], "--force goes with images, and there are none"),
        (["--out", "new.ckpt"], "--out goes with images"),
    ],
)
def test_mistakes_are_named(
    arguments: list[str], message: str, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises((ValueError, SystemExit)) as raised:
        run(root / "model.ckpt", *arguments)
    assert message in str(raised.value) + capsys.readouterr().err


@pytest.fixture(scope="module")
def validated(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that knows the images of ``bad`` as defective."""
    model = small(bank_size=400, pre_processor=SMALL_IMAGES)
    module = Folder(
        "p",
        root=root,
        normal_dir="good",
        abnormal_dir="bad",
        num_workers=0,
        val_split_mode="same_as_test",
    )
    return Path(fit(model, module, tmp_path_factory.mktemp("validated")).best_model_path)


def test_what_the_checkpoint_knows_as_defective_is_refused(
    validated: Path, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By any path, as a copy, and in a folder of defects; the history shows ``--force``."""
    out = tmp_path / "new.ckpt"
    shutil.copy(root / "bad" / "0.png", tmp_path / "renamed.png")
    (tmp_path / "link").symlink_to(root / "bad")
    write_image(root / "bad" / "later.png", 77, (64, 64), defect=True)
    given = [tmp_path / "link" / "0.png", tmp_path / "renamed.png", root / "bad" / "later.png"]
    reasons = (
        "knows it as defective",
        "knows it as defective",
        "all that the checkpoint knows of its folder is defective",
    )
    try:
        for image, reason in zip(given, reasons, strict=True):
            assert run(validated, image, "--out", out) == 1
            said = capsys.readouterr()
            assert reason in said.err
            assert "Nothing was added." in said.out
        assert not out.exists()
        assert run(validated, given[2], "--force", "--out", out) == 0
        capsys.readouterr()
        assert run(out) == 0
        assert "atoms, by --force" in capsys.readouterr().out
    finally:
        (root / "bad" / "later.png").unlink()


def test_a_defect_that_the_checkpoint_knows_counts_once(
    validated: Path, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By whatever path ``--bad`` names it."""
    (tmp_path / "link").symlink_to(root / "bad")
    pixels = np.array(Image.open(root / "bad" / "1.png"))
    pixels[0, 0] ^= 1  # no copy
    Image.fromarray(pixels).save(tmp_path / "looks_good.png")
    out = tmp_path / "new.ckpt"
    assert run(validated, tmp_path / "looks_good.png", "--bad", tmp_path / "link", "--out", out)
    said = f"with it 1 of 3 known defects would be called good: {tmp_path / 'link' / '1.png'}\n"
    assert said in capsys.readouterr().err


def test_its_messages_are_about_what_is_written(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new.ckpt"
    assert run(root / "model.ckpt", root / "odd", "--out", out) == 0
    said = capsys.readouterr().out
    model = loaded(out)
    lines = [line for line in said.splitlines() if " new atoms, raw score " in line]
    assert lines
    for line in lines:
        path, now = line.partition(": ")[0], line.partition(" before, ")[2].split(" now")[0]
        assert float(now) == pytest.approx(score(model, Path(path)), rel=1e-3)
        assert ("still an alarm" in line) == (
            score(model, Path(path)) > model.post_processor.label_threshold
        )
    assert f"{model.post_processor.state.image:.6g} now" in said


def test_the_function_tells_what_became_of_each_image(root: Path, tmp_path: Path) -> None:
    """And changes nothing where no image is accepted."""
    model = loaded(root / "model.ckpt")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    good, odd = str(root / "good" / "00.png"), [str(root / "odd" / f"{i}.png") for i in range(2)]
    copy = tmp_path / "looks_good.png"
    shutil.copy(root / "bad" / "1.png", copy)
    bad = [str(path) for path in sorted((root / "bad").iterdir())]
    found = accept(model, [good, str(copy)], bad)
    assert found.images == []
    assert found.no_alarms == {good: pytest.approx(score(model, Path(good)))}
    assert list(found.refused) == [str(copy)]
    assert found.thresholds[0] == found.thresholds[1]
    assert all(same(model.state_dict()[name], value) for name, value in before.items())
    assert model.accepted is None

    found = accept(model, odd, bad)
    assert [image.image for image in found.images] == odd
    for image in found.images:
        assert image.atoms > 0
        assert image.now == pytest.approx(score(model, Path(image.image)), rel=1e-3)
        assert image.now < image.before
    assert found.thresholds[1] == model.post_processor.state.image
    step = take_back(model)
    assert [part.image for part in step.additions] == odd
    assert all(same(model.state_dict()[name], value) for name, value in before.items())
    with pytest.raises(ValueError, match="nothing was called anomalous"):
        accept(small(), odd)
    with pytest.raises(TypeError, match="bad must be a list of image files"):
        accept(model, odd, odd[0])
