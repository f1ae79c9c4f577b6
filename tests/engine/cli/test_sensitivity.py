"""``anomalib-sgfr sensitivity``: drawn defects, scored by a checkpoint at its threshold."""

import json
from pathlib import Path

import numpy as np
import pytest
from anomalib.post_processing import PostProcessor
from PIL import Image

from anomalib_sgfr import Inspector, Sgfr, SgfrPostProcessor
from anomalib_sgfr.cli import sensitivity, settings
from anomalib_sgfr.cli.sensitivity import main
from anomalib_sgfr.cli.settings import settings_to_try
from anomalib_sgfr.cli.threshold import main as threshold
from anomalib_sgfr.images.drawn_defects import KINDS
from tests.conftest import fit, folder_datamodule, small, write_image

FEW = ["--number", "4", "--sizes", "4", "24", "--contrasts", "0.4", "--kinds", "spot", "scratch"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with good images, and the checkpoint of a fit to 24 of them."""
    root = tmp_path_factory.mktemp("sensitivity")
    for number in range(24):
        write_image(root / "good" / f"{number:02}.png", number)
    for number in range(4):
        write_image(root / "new" / f"{number}.png", 200 + number)
    for number in range(2):
        write_image(root / "good_test" / f"{number}.png", 300 + number)
    module = folder_datamodule(root, abnormal_dir=None, mask_dir=None)
    found = fit(small(image_size=64, seed=0), module, root / "fit").best_model_path
    Path(str(found)).rename(root / "model.ckpt")
    return root


@pytest.fixture(autouse=True)
def _in_folder(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("new", "good", "model.ckpt"):
        (tmp_path / name).symlink_to(root / name)
    monkeypatch.chdir(tmp_path)


def figures(path: str = "out.json") -> dict:
    found: dict = json.loads(Path(path).read_text(encoding="utf-8"))
    return found


def test_the_page_and_its_figures(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["model.ckpt", "--good", "new", "--out", "out.html", "--mm_per_pixel", "0.1"]
    assert main([*arguments, *FEW]) == 0
    told = capsys.readouterr().out
    assert told == "Page: out.html\nFigures: out.json\n"
    found = figures()
    assert [(curve["kind"], curve["contrast"]) for curve in found["curves"]] == [
        ("spot", 0.4),
        ("scratch", 0.4),
    ]
    spot = found["curves"][0]["sizes"]
    assert [(row["pixels"], row["drawn"]) for row in spot] == [(4.0, 4), (24.0, 4)]
    assert spot[1]["mm"] == pytest.approx(2.4)
    assert spot[1]["found"] == 4
    assert spot[0]["found"] < 4
    assert found["drawn"] == 16
    assert found["image_size"] == [96, 96]
    assert found["images"] + len(found["alarms"]) == 4
    page = Path("out.html").read_text(encoding="utf-8")
    assert "24 px (2.4 mm)" in page
    first = Path("out.json").read_bytes()
    assert main([*arguments, *FEW]) == 0  # the same again, but for the time
    assert {**figures(), "made": ""} == {**json.loads(first), "made": ""}


def test_found_is_what_the_checkpoint_labels_at_its_threshold() -> None:
    """A threshold that all images exceed but one: the images that are alarms are left out."""
    inspector = Inspector.load("model.ckpt")
    scores = {str(path): inspector(path).score for path in Path("new").glob("*.png")}
    low, *others = sorted(scores.values())
    middle = str((low + others[0]) / 2)
    assert threshold(["model.ckpt", "--score", middle, "--out", "low.ckpt"]) == 0
    assert main(["low.ckpt", "--good", "new", "--out", "out.json", *FEW]) == 0
    found = figures()
    assert found["images"] == 1
    assert set(found["alarms"]) == {path for path, score in scores.items() if score > low}
    assert not Path("out.html").exists()
    assert any("3 of 4 good images are above" in note for note in found["notes"])


def test_images_that_were_trained_on_are_told() -> None:
    assert main(["model.ckpt", "--good", "good", "new", "--out", "out.json", *FEW]) == 0
    known = [note for note in figures()["notes"] if "were trained on" in note]
    assert known == [note for note in known if note.startswith("24 of 28 good images")]
    assert known


def test_defects_are_drawn_in_the_mask_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = np.zeros((96, 96), np.uint8)
    mask[:, :40] = 255
    Image.fromarray(mask).save("mask.png")
    seen = []
    inspect = Inspector.__call__

    def watched(self: Inspector, frames: object) -> object:
        seen.extend(np.asarray(frame) for frame in frames)  # type: ignore[attr-defined]
        return inspect(self, frames)

    monkeypatch.setattr(Inspector, "__call__", watched)
    arguments = ["--good", "new/0.png", "--out", "out.json", "--roi", "mask.png"]
    assert main(["model.ckpt", *arguments, *FEW]) == 0
    good, *drawn = seen
    assert len(drawn) == 16
    changed = np.any([frame != good for frame in drawn], (0, 3))
    assert changed[:, :40].any()
    assert not changed[:, 40:].any()
    assert figures()["region"]


def test_the_region_of_the_checkpoint_is_kept(root: Path) -> None:
    mask = np.zeros((96, 96), np.uint8)
    mask[:48] = 255
    Image.fromarray(mask).save("mask.png")
    module = folder_datamodule(root, abnormal_dir=None, mask_dir=None)
    model = small(image_size=64, seed=0, roi="mask.png")
    fit(model, module, Path("fit"))
    region_of = sensitivity._region_of(model, None)
    region = region_of(Path("x.png"), (96, 96))
    assert region[:44].all()
    assert not region[48:].any()


def test_an_image_that_cannot_be_read_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    Path("more").mkdir()
    Path("more/broken.png").write_bytes(b"no image")
    assert main(["model.ckpt", "--good", "new", "more", "--out", "out.json", *FEW]) == 1
    assert "error: more/broken.png cannot be read" in capsys.readouterr().err
    assert figures()["images"] == 4 - len(figures()["alarms"])


def test_an_interrupted_command_leaves_the_earlier_results(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Path("out.html").write_text("earlier")
    Path("out.json").write_text("{}")

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("anomalib_sgfr.report.sensitivity._curve", interrupted)
    with pytest.raises(KeyboardInterrupt):
        main(["model.ckpt", "--good", "new", "--out", "out.html", *FEW])
    assert Path("out.html").read_text() == "earlier"
    assert Path("out.json").read_text() == "{}"
    assert sorted(path.name for path in Path().glob("*out*")) == ["out.html", "out.json"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "out.txt"], "--out must end in .html or .json, got out.txt"),
        (["--out", "new"], "argument --out: new is a folder: name a file"),
        (["--out", "model.ckpt/a.html"], "argument --out: model.ckpt/a.html cannot be written"),
        (["--mm_per_pixel", "0"], "argument --mm_per_pixel: must be a positive number, got '0'"),
        (["--mm_per_pixel", "nan"], "argument --mm_per_pixel: must be a positive number"),
        (["--contrasts", "1.5"], "argument --contrasts: must be a number above 0, at most 1"),
        (["--sizes", "-3"], "argument --sizes"),
        (["--kinds", "hole"], "argument --kinds: invalid choice: 'hole'"),
        (["--number", "0"], "argument --number: must be an integer of at least 1"),
        (["--good", "nowhere"], "argument --good: nowhere: no such file or folder"),
    ],
)
def test_wrong_arguments_end_in_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["model.ckpt", "--good", "new", "--out", "out.json", *arguments]
    with pytest.raises(SystemExit) as ended:
        main(given)
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("content", ['{"calibration": [0.1]}', "no JSON", "[]"])
def test_a_file_of_another_command_is_not_replaced(
    content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("line.json").write_text(content)
    with pytest.raises(SystemExit) as ended:
        main(["model.ckpt", "--good", "new", "--out", "line.html", *FEW])
    assert ended.value.code == 2
    assert "--out: line.json has something else than the figures" in capsys.readouterr().err
    assert Path("line.json").read_text() == content


def test_input_that_cannot_be_used_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", "out.json", *FEW]
    Path("empty").mkdir()
    with pytest.raises(ValueError, match="empty: no image in this folder"):
        main(["model.ckpt", "--good", "empty", *out])
    rng = np.random.default_rng(0)
    Path("noise").mkdir()
    Image.fromarray(rng.integers(0, 255, (96, 96, 3), np.uint8)).save("noise/0.png")
    with pytest.raises(ValueError, match="--good: 1 of 1 images are above the threshold"):
        main(["model.ckpt", "--good", "noise", *out])
    Path("broken.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"--good: 0 of 1 images .* 1 cannot be read"):
        main(["model.ckpt", "--good", "broken.png", *out])
    assert "broken.png cannot be read" in capsys.readouterr().err
    Image.new("L", (50, 50), 255).save("mask.png")
    with pytest.raises(ValueError, match="is of 96 x 96 pixels, the mask of --roi of 50 x 50"):
        main(["model.ckpt", "--good", "new", "--roi", "mask.png", *out])
    for size in ("0.5", "97"):
        with pytest.raises(ValueError, match=f"--sizes: they must be of 1 to 96 pixels.*{size}"):
            main(["model.ckpt", "--good", "new", *out, "--sizes", "8", size])
    assert not Path("out.json").exists()


def test_a_checkpoint_without_a_threshold_is_refused(root: Path) -> None:
    module = folder_datamodule(root, abnormal_dir=None, mask_dir=None)
    for processor, message in (
        (False, "without a post-processor"),
        (PostProcessor(enable_thresholding=False), "has no threshold, so nothing is found"),
        (SgfrPostProcessor(enable_thresholding=False), "has no threshold, so nothing is found"),
    ):
        found = fit(small(image_size=64, seed=0, post_processor=processor), module, Path("fit"))
        with pytest.raises(ValueError, match=message):
            main([str(found.best_model_path), "--good", "new", "--out", "out.json"])


def test_the_command_knows_every_kind() -> None:
    assert tuple(KINDS) == sensitivity._KINDS


def test_settings_are_compared_on_the_training_images(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def two(model: Sgfr) -> dict:
        tried = settings_to_try(model)
        assert [next(iter(change), "") for change in tried.values()] == [
            "",
            "blur",
            "blur",
            "score_layers",
            "image_size",
            "image_size",
        ]
        assert tried["blur 2"] == {"blur": 2.0}
        assert tried["image size 128 x 128"] == {"image_size": (128, 128)}
        return {name: tried[name] for name in ("as now", "image size 128 x 128")}

    monkeypatch.setattr(settings, "settings_to_try", two)
    arguments = ["model.ckpt", "--good", "new", "--out", "out.html", "--suggest"]
    assert main([*arguments, *FEW, "--number", "9"]) == 0
    found = figures()
    now, larger = found["settings"]
    assert (now["name"], now["arguments"], now["drawn"]) == ("as now", {}, 12)
    assert now["images"] == larger["images"] == 4
    assert larger["arguments"] == {"image_size": [128, 128]}
    assert now["seconds"] > 0.0
    assert found["recommended"] in Path("out.html").read_text(encoding="utf-8")
    assert not list(Path().glob("*lightning*"))
    assert capsys.readouterr().out == "Page: out.html\nFigures: out.json\n"


def test_a_setting_is_fitted_to_the_training_images_by_their_own_paths() -> None:
    model = Sgfr.load_from_checkpoint("model.ckpt", visualizer=False, evaluator=False)
    paths = settings.training_images(model)
    assert len(paths) == 24
    with settings._fitted(model, paths, {"blur": 2.0}) as (inspector, fitted):
        assert sorted(fitted.model.images) == sorted(paths)
        assert fitted.hparams["blur"] == 2.0
        assert fitted.hparams["image_size"] == model.hparams["image_size"]
        scores = fitted.post_processor.state.scores  # type: ignore[union-attr]
        assert sorted(scores.paths) == sorted(paths)
        assert inspector.threshold == 0.5


def test_no_training_images_no_comparison(root: Path, tmp_path: Path) -> None:
    (root / "good").rename(root / "away")
    try:
        with pytest.raises(ValueError, match=r"--suggest fits to the training images again, but 0"):
            main(["model.ckpt", "--good", "new", "--out", "out.json", "--suggest"])
    finally:
        (root / "away").rename(root / "good")
    assert not (tmp_path / "out.json").exists()
