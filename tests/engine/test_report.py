"""``Report`` and ``anomalib-sgfr report``: from a fitted model to the page."""

import csv
import json
import logging
import os
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from anomalib.data import InferenceBatch, PredictDataset
from sklearn.metrics import roc_auc_score

from anomalib_sgfr import Inspector, Report, Sgfr
from anomalib_sgfr.cli.prediction import MaskFolder, Truth, readable
from anomalib_sgfr.cli.report import main, truths_in
from anomalib_sgfr.cli.threshold import main as threshold_main
from anomalib_sgfr.post_processing.calibration import ThresholdState
from anomalib_sgfr.report.fit_record import FitRecord
from anomalib_sgfr.report.model_facts import facts_of, sha256_of
from tests.conftest import engine_in, fit, folder_datamodule, small, write_image


@pytest.fixture(scope="module")
def run(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with ``model.ckpt`` of a fit, ``report.html`` and ``test_scores.csv`` of a test."""
    folder = tmp_path_factory.mktemp("run")
    model = small()
    engine = fit(model, folder_datamodule(parts, val_split_mode="from_test"), folder)
    Path(str(engine.best_model_path)).replace(folder / "model.ckpt")
    report = Report(group=r"(good|bad)")
    tester = engine_in(folder, callbacks=[report])  # the user's comes before the model's own
    tester.test(
        small(),
        datamodule=folder_datamodule(parts),
        ckpt_path=str(folder / "model.ckpt"),
        verbose=False,
    )
    for name in ("report.html", "test_scores.csv"):
        found = list(folder.rglob(name))
        assert len(found) == 1, name
        if found[0].parent != folder:
            found[0].replace(folder / name)
    return folder


def data_of(page: Path) -> Any:
    found = re.search(r'id="data">(.*?)</script>', page.read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def loaded(path: Path) -> Sgfr:
    return Sgfr.load_from_checkpoint(path, map_location="cpu", visualizer=False, evaluator=False)


def test_a_test_writes_what_the_table_of_scores_says(run: Path) -> None:
    page, data = (run / "report.html").read_text(encoding="utf-8"), data_of(run / "report.html")
    with (run / "test_scores.csv").open(encoding="utf-8") as opened:
        rows = list(csv.DictReader(opened))
    assert [Path(name).name for name in data["path"]] == [Path(row["image"]).name for row in rows]
    assert data["score"] == pytest.approx([float(row["score"]) for row in rows], abs=1e-6)
    assert data["truth"] == [int(row["truth"]) for row in rows]
    assert data["kinds"] == ["bad", "good"]
    assert data["start"] == float(rows[0]["threshold"])
    inspector = Inspector.load(run / "model.ckpt")
    assert data["pixel"] == [[int(row["row"]), int(row["column"])] for row in rows]
    assert data["pixel"] == [list(inspector(row["image"]).place or ()) for row in rows]
    peaks = np.array(data["peak"]) * 96  # the share of the file, which the model sees whole
    assert np.floor(peaks[:, ::-1]).astype(int).tolist() == data["pixel"]
    assert len(data["media"]) == len(rows)
    assert all(
        image["maskOutline"]
        for image, row in zip(data["media"], rows, strict=True)
        if row["truth"] == "1"
    )
    area = roc_auc_score([int(row["truth"]) for row in rows], [float(row["score"]) for row in rows])
    assert f"AUROC <b>{area:.4f}</b>" in page
    assert "Per-region overlap, AUPRO <b>" in page
    assert "Groups, by (good|bad)" in page
    assert sha256_of(str(run / "model.ckpt")) in page
    assert f"threshold {run / 'model.ckpt'} --score " in page
    explanation = data["explanations"][max(data["explanations"])]
    assert explanation["rows"][0]["atoms"][0][0].startswith("data:image/webp;base64,")
    assert explanation["rows"][0]["atoms"][0][2].endswith(".png")


def test_the_checkpoint_keeps_how_the_fit_went(run: Path, parts: Path) -> None:
    record = loaded(run / "model.ckpt").fit_record
    assert record is not None
    assert record.images == 12
    assert record.folders == {str(parts / "good"): 12}
    assert 0 < record.seconds < 600
    assert record.memory > 2**26
    assert (
        record.versions["torch"] == torch.__version__.partition("+")[0]
        or record.versions["torch"] in torch.__version__
    )
    assert FitRecord.restored(record._asdict()) == record
    assert FitRecord.restored(None) is None
    assert str(parts / "good") in (run / "report.html").read_text(encoding="utf-8")


def test_the_command_that_the_page_shows_does_what_it_says(run: Path, tmp_path: Path) -> None:
    data = data_of(run / "report.html")
    scores = sorted(data["score"])
    chosen = round((scores[3] + scores[4]) / 2, 4)
    for sensitivity in (0.5, 0.7):  # the sensitivity moves what labels are given by
        model = loaded(run / "model.ckpt")
        processor = model.post_processor
        processor.image_sensitivity = sensitivity
        raws = [processor.raw_score(score) for score in data["score"]]
        processor.use(
            processor.state._replace(value=processor.raw_threshold_at(chosen)).calibrated()
        )
        called = [raw > processor.label_threshold for raw in raws]
        assert called == [score > chosen for score in data["score"]]
    out = tmp_path / "new.ckpt"
    assert threshold_main([str(run / "model.ckpt"), "--score", str(chosen), "--out", str(out)]) == 0
    page = tmp_path / "new.html"
    folders = [
        str(Path(data_folder)) for data_folder in {str(Path(name).parent) for name in _paths(run)}
    ]
    assert main([str(out), "--data", *folders, "--out", str(page)]) == 0
    again = dict(zip(map(_name, data_of(page)["path"]), data_of(page)["score"], strict=True))
    assert [again[_name(path)] > 0.5 for path in data["path"]] == [
        score > chosen for score in data["score"]
    ]


def _paths(run: Path) -> list[str]:
    with (run / "test_scores.csv").open(encoding="utf-8") as opened:
        return [row["image"] for row in csv.DictReader(opened)]


def _name(path: str) -> str:
    return "/".join(Path(path).parts[-2:])


def test_raw_scores_set_a_first_threshold(run: Path) -> None:
    processor = loaded(run / "model.ckpt").post_processor
    (normalised,) = processor(
        InferenceBatch(pred_score=torch.tensor([3.0]), anomaly_map=torch.zeros(1, 1, 2, 2))
    ).pred_score
    assert processor.raw_score(float(normalised)) == pytest.approx(3.0, rel=1e-4)
    assert processor.reported_score(3.0) == pytest.approx(float(normalised), rel=1e-6)
    processor.use(ThresholdState())
    assert processor.raw_threshold_at(3.0) == processor.reported_score(3.0) == 3.0


def test_suspected_images_are_listed_by_their_scores_as_predictions_hold_them(run: Path) -> None:
    model = loaded(run / "model.ckpt")
    suspected = facts_of(model).suspected
    raw = dict(
        zip(
            model.post_processor.calibration_scores.paths,
            model.post_processor.calibration_scores.scores,
            strict=True,
        )
    )
    for image in suspected:
        assert image.score == pytest.approx(model.post_processor.reported_score(raw[image.path]))
        assert 0.0 < image.score < 0.6


def test_the_command_reads_mvtecs_layout(
    run: Path, parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "hazel's nut"
    shutil.copytree(parts / "good_test", root / "test" / "good")
    shutil.copytree(parts / "bad", root / "test" / "a <b>dent")
    masks = root / "ground_truth" / "a <b>dent"
    masks.mkdir(parents=True)
    for path in (parts / "masks").iterdir():
        shutil.copy(path, masks / f"{path.stem}_mask.png")
    (root / "test" / "good" / "broken.png").write_bytes(b"no image")
    page = tmp_path / "new" / "report.html"
    assert (
        main([str(run / "model.ckpt"), "--data", str(root), "--out", str(page), "--pictures", "5"])
        == 1
    )
    told = capsys.readouterr()
    assert "broken.png cannot be read" in told.err
    assert f"Report: {page}" in told.out
    data = data_of(page)
    assert data["kinds"] == ["a <b>dent", "good"]
    assert len(data["score"]) == 12
    assert len(data["media"]) == 5
    assert "<b>dent" not in page.read_text(encoding="utf-8")
    assert "Per-region overlap, AUPRO <b>" in page.read_text(encoding="utf-8")


def test_masks_that_do_not_belong_to_the_images_are_told(
    run: Path, parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [str(run / "model.ckpt"), "--out", str(tmp_path / "report.html"), "--masks"]
    number, first = len(list((parts / "bad").iterdir())), min((parts / "bad").iterdir())
    bad = ["--bad", str(parts / "bad")]
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match=f"none has no mask of the {number} defective images; th"):
        main([*given, str(tmp_path / "none"), *bad])
    with pytest.raises(ValueError, match="masks has no mask as --bad names no image"):
        main([*given, str(parts / "masks"), "--good", str(parts / "good_test")])
    assert not (tmp_path / "report.html").exists()
    shutil.copytree(parts / "masks", tmp_path / "some")
    (tmp_path / "some" / first.name).unlink()
    assert main([*given, str(tmp_path / "some"), *bad]) == 0
    assert (
        f"warning: --masks: 1 of {number} defective images have no mask; that of {first} is named"
        f" {first.stem}.png or {first.stem}_mask.png" in capsys.readouterr().err
    )


def test_what_folders_say(tmp_path: Path) -> None:
    for name in (
        "flat/1.png",
        "set/good/2.png",
        "set/hole/3.png",
        "set/masks/hole/3.png",
        "own/4.png",
        "bent/5.png",
    ):
        write_image(tmp_path / name, 0, (8, 8))
    write_image(tmp_path / "marks" / "5_mask.png", 0, (8, 8))
    found = truths_in(
        [tmp_path / "flat", tmp_path / "set"],
        [tmp_path / "own"],
        [tmp_path / "bent"],
        tmp_path / "marks",
    )
    assert {str(path.relative_to(tmp_path)): truth for path, truth in found.items()} == {
        "flat/1.png": Truth(),
        "set/good/2.png": Truth(defective=False, kind="good"),
        "set/hole/3.png": Truth(
            defective=True, kind="hole", mask=tmp_path / "set" / "masks" / "hole" / "3.png"
        ),
        "own/4.png": Truth(defective=False, kind="good"),
        "bent/5.png": Truth(defective=True, kind="bent", mask=tmp_path / "marks" / "5_mask.png"),
    }
    own = truths_in([tmp_path / "set"])
    assert (
        own[tmp_path / "set" / "hole" / "3.png"].mask
        == tmp_path / "set" / "masks" / "hole" / "3.png"
    )


@pytest.mark.parametrize(
    ("masks", "paired"),
    [
        (["0.png", "0_mask.png"], "0.png"),
        (["0_mask.ppm", "0_more.png"], "0_mask.ppm"),
        (["bent/0_mask.png", "cut/0.png", "0.png"], "bent/0_mask.png"),
        (["test/bent/0.png", "bent/0.png"], "test/bent/0.png"),
        (["cut/0.png", "0_more.png", "00.png", "0.txt"], None),
        (["../test/bent/0_mask.png"], "../test/bent/0_mask.png"),
    ],
)
def test_a_mask_is_the_one_of_its_image(
    masks: list[str], paired: str | None, tmp_path: Path
) -> None:
    image, folder = tmp_path / "test" / "bent" / "0.png", tmp_path / "test"
    if not masks[0].startswith(".."):
        folder = tmp_path / "marks"
    write_image(image, 0, (8, 8))
    for name in masks:
        if name.endswith(".txt"):
            (folder / name).write_text("a note", encoding="utf-8")
        else:
            write_image(tmp_path / "marks" / name, 0, (8, 8))
    mask = None if paired is None else (tmp_path / "marks" / paired).resolve()
    found = truths_in([], [], [image.parent], folder)
    assert found[image] == Truth(defective=True, kind="bent", mask=mask)
    assert MaskFolder(folder).mask_of(image) == mask


def test_two_masks_of_an_image_are_refused(tmp_path: Path) -> None:
    for name in ("bent/0.png", "marks/0.png", "marks/0.bmp"):
        write_image(tmp_path / name, 0, (8, 8))
    with pytest.raises(ValueError, match=r"0.png has several masks: .*0.bmp, .*0.png. Keep one."):
        truths_in([], [], [tmp_path / "bent"], tmp_path / "marks")


@pytest.mark.parametrize(
    ("names", "beside"),
    [
        (
            ("good/0.png", "bad/0.png", "more/0.png", "few/good/0.png", "masks/0.png"),
            "bad, few, more",
        ),
        (("test/good/0.png", "test/hole/0.png", "train/good/0.png"), "hole"),
        (
            ("test/good/0.png", "test/hole/0.png", "test/cut/0.png", "ground_truth/hole/0.png"),
            "cut, hole",
        ),
        (("test/good/rgb/0.png", "test/good/gt/0.png"), "no others"),
        (("good/0.png", "hole/0.png", "hole/masks/0.png", "ground_truth/hole/0.png"), "hole"),
    ],
    ids=["good parts beside", "no masks", "masks of some", "masks inside", "masks inside a kind"],
)
def test_a_layout_that_is_not_certain_is_asked_for(
    names: tuple[str, ...], beside: str, tmp_path: Path
) -> None:
    for name in names:
        write_image(tmp_path / name, 0, (8, 8))
    with pytest.raises(
        ValueError, match=f"it holds good beside {beside}, and .*: name them by --good .* --bad"
    ):
        truths_in([tmp_path])


def test_one_image_by_two_paths_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_image(tmp_path / "good" / "0.png", 0, (8, 8))
    (tmp_path / "linked").symlink_to(tmp_path / "good")
    monkeypatch.chdir(tmp_path)
    found = truths_in([Path("good")], [tmp_path / "good"], [Path("linked")])
    assert found == {Path("linked/0.png"): Truth(defective=True, kind="linked")}


def words_of(page: Path) -> str:
    text = re.sub(r"<(style|script).*?</\1>", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    return " ".join(re.sub("<[^>]*>", " ", text).split())


@pytest.mark.parametrize("way", ["relative", "linked", "copied", "moved"])
def test_images_that_the_checkpoint_knows_are_told_whatever_they_are_called(
    way: str, run: Path, parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = run / "model.ckpt"
    monkeypatch.chdir(tmp_path)
    if way == "linked":
        Path("parts").symlink_to(parts, target_is_directory=True)
    elif way != "relative":
        shutil.copytree(parts, tmp_path / "parts")
    if way == "moved":  # the parent's name stays: the fit's folder is gone
        checkpoint = renamed(
            checkpoint, parts, parts.with_name("gone") / "parts", tmp_path / "moved.ckpt"
        )
    root = Path(os.path.relpath(parts)) if way == "relative" else Path("parts")
    folders = ["--good", str(root / "good"), str(root / "good_test"), "--bad", str(root / "bad")]
    assert (
        main(
            [
                str(checkpoint),
                *folders,
                "--out",
                "report.html",
                "--json",
                "figures.json",
                "--pictures",
                "0",
            ]
        )
        == 0
    )
    found = json.loads(Path("figures.json").read_text(encoding="utf-8"))
    expected = loaded(run / "model.ckpt").post_processor.state
    chose = {Path(path).parent.name + "/" + Path(path).name for path in expected.threshold_images}
    assert {_name(row["image"]) for row in found["images"] if row["trained_on"]} == {
        f"good/{number:02}.png" for number in range(12)
    }
    assert {_name(row["image"]) for row in found["images"] if row["chose_threshold"]} == chose
    assert found["new"]["false_alarms"]["images"] == 18 - len(
        chose | {f"good/{number:02}.png" for number in range(12)}
    )
    assert found["all"]["false_alarms"]["images"] == 18
    words = words_of(Path("report.html"))
    assert (
        "12 of the 24 images tested were trained on, and are left out of the rates above" in words
    )
    assert f"{len(chose)} of the 24 images tested also chose the threshold" in words
    assert ("are known only by their name and folder" in words) == (way == "moved")


def renamed(checkpoint: Path, old: Path, new: Path, target: Path) -> Path:
    """A checkpoint that knows its images by other paths."""
    stored = torch.load(checkpoint, weights_only=False)
    paths = bytes(stored["state_dict"]["model.image_paths"].tolist()).replace(
        str(old).encode(), str(new).encode()
    )
    stored["state_dict"]["model.image_paths"] = torch.tensor(list(paths), dtype=torch.uint8)
    scores = stored["anomalib_post_processor_config"]["threshold"]["scores"]
    scores["paths"] = [path.replace(str(old), str(new)) for path in scores["paths"]]
    torch.save(stored, target)
    return target


def test_a_threshold_that_was_read_from_a_report_is_told_in_the_next(
    run: Path, parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folders = ["--good", str(parts / "good_test"), "--bad", str(parts / "bad")]
    assert main([str(run / "model.ckpt"), *folders, "--out", "first.html", "--pictures", "0"]) == 0
    before, after = data_of(Path("first.html"))["command"]
    program, command, *arguments = shlex.split(f"{before}0.45{after} --out new.ckpt")
    assert (program, command) == ("anomalib-sgfr", "threshold")
    assert threshold_main(arguments) == 0
    assert main(["new.ckpt", *folders, "--out", "second.html", "--pictures", "0"]) == 0
    words = words_of(Path("second.html"))
    assert "12 of the 12 images tested also chose the threshold" in words
    assert "All images tested chose the threshold or were trained on" in words
    assert "All images, including 12 that chose the threshold or were trained on" in words
    other = ["--good", str(parts / "good"), "--out", "third.html", "--pictures", "0"]
    assert main(["new.ckpt", *other]) == 0
    assert "also chose the threshold" not in words_of(Path("third.html"))


def test_unreadable_images_are_a_line_of_the_page(
    run: Path, parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = tmp_path / "bad"
    shutil.copytree(parts / "bad", images)
    (images / "broken.png").write_bytes(b"no image")
    page = tmp_path / "report.html"
    assert (
        main([str(run / "model.ckpt"), "--bad", str(images), "--out", str(page), "--pictures", "0"])
        == 1
    )
    words = words_of(page)
    assert "1 of 7 images could not be read" in words
    assert f"{images / 'broken.png'} UnidentifiedImageError" in words
    for path in images.glob("0*.png"):
        path.unlink()
    capsys.readouterr()
    assert main([str(run / "model.ckpt"), "--bad", str(images), "--out", str(page), "--json"]) == 1
    told = capsys.readouterr()
    assert "error: none of 1 images could be read" in told.err
    assert "The image could not be read." in words_of(page)
    assert "There is no threshold" not in words_of(page)
    found = json.loads(told.out)
    assert found["threshold"] == 0.5
    assert found["unreadable"][0]["image"] == str(images / "broken.png")


def test_the_checkpoint_may_stand_anywhere(
    run: Path, parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, image, page = (
        str(run / "model.ckpt"),
        str(parts / "bad" / "00.png"),
        str(tmp_path / "page.html"),
    )
    more = ["--out", page, "--pictures", "0"]
    for given in (
        [checkpoint, "--bad", image, *more],
        ["--bad", image, checkpoint, *more],
        ["--bad", image, *more, checkpoint],
        ["--ckpt_path", checkpoint, "--bad", image, *more],
        ["--bad", image, *more, "--json", checkpoint],
    ):
        capsys.readouterr()
        assert main(given) == 0, given
        assert len(data_of(Path(page))["score"]) == 1
    told = capsys.readouterr()
    assert json.loads(told.out)["images"][0]["image"] == image  # and nothing else: no bar
    assert f"Report: {page}" in told.err
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--out", "."], ". is a folder: name a file"),
        (["--out", "file/page.html"], "file is a file, not a folder"),
        (["--out", "page.html", "--json", "file/figures.json"], "file is a file, not a folder"),
        (["--out", "page.ckpt"], "--out and --json name new files, not a checkpoint"),
        (["--out", "page.html", "--data", "parts"], None),
    ],
)
def test_what_cannot_be_written_is_refused_before_the_inspection(
    arguments: list[str],
    said: str | None,
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("", encoding="utf-8")
    write_image(tmp_path / "parts" / "0.png", 0, (8, 8))
    monkeypatch.setattr(
        "anomalib_sgfr.cli.report.load", lambda *_, **__: pytest.fail("it was inspected")
    )
    given = [*([] if said is None else [str(run / "model.ckpt")]), "--data", "parts", *arguments]
    with pytest.raises(SystemExit) as stopped:
        main(given)
    assert stopped.value.code == 2
    assert (
        said or "the checkpoint is missing: put it first, or pass --ckpt_path"
    ) in capsys.readouterr().err


def test_the_progress_bar_knows_how_many_images_there_are(parts: Path) -> None:
    paths = sorted((parts / "bad").iterdir())
    (loader,) = readable(paths, {})
    assert len(loader) == len(list(loader)) == 6


def test_training_images_that_are_gone_are_told(run: Path, parts: Path, tmp_path: Path) -> None:
    stored = torch.load(run / "model.ckpt", weights_only=False)
    paths = bytes(stored["state_dict"]["model.image_paths"].tolist()).replace(b"/good/", b"/gone/")
    stored["state_dict"]["model.image_paths"] = torch.tensor(list(paths), dtype=torch.uint8)
    del stored["sgfr_fit"]  # as of an earlier version
    torch.save(stored, tmp_path / "gone.ckpt")
    page = tmp_path / "report.html"
    assert (
        main(
            [
                str(tmp_path / "gone.ckpt"),
                "--bad",
                str(parts / "bad" / "00.png"),
                "--out",
                str(page),
            ]
        )
        == 0
    )
    data = data_of(page)
    assert data["kinds"] == ["bad"]
    assert all(
        crop[0] == "" and crop[2]
        for row in data["explanations"]["0"]["rows"]
        for crop in row["atoms"]
    )
    text = page.read_text(encoding="utf-8")
    assert text.count("not recorded") >= 3
    assert "No good image was tested" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "."], "no image in this folder"),
        (["--group", "("], r"--group '\(' is not a regular expression"),
        (["--group", "nowhere"], "--group 'nowhere' matches no image's path"),
    ],
)
def test_mistakes_are_named(
    arguments: list[str],
    message: str,
    run: Path,
    parts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    given = arguments if "--data" in arguments else ["--data", str(parts / "bad"), *arguments]
    with pytest.raises(ValueError, match=message):
        main([str(run / "model.ckpt"), *given, "--out", "report.html"])
    assert list(tmp_path.iterdir()) == []


def test_a_page_that_cannot_be_written_loses_nothing(
    run: Path, parts: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    report = Report(tmp_path / "file" / "report.html")
    engine = engine_in(tmp_path, callbacks=[report])
    with caplog.at_level(logging.WARNING):
        found = engine.predict(
            small(), dataset=PredictDataset(parts / "bad"), ckpt_path=str(run / "model.ckpt")
        )
    assert found is not None
    assert len(found) == 6
    assert list(tmp_path.rglob("scores.csv"))
    assert f"The report {tmp_path / 'file' / 'report.html'} could not be written" in caplog.text
    assert report.written is None


def test_what_is_no_argument_is_refused() -> None:
    with pytest.raises(ValueError, match="pictures must be at least 0, got -1"):
        Report(pictures=-1)
    with pytest.raises(ValueError, match=r"group '\(' is not a regular expression"):
        Report(group="(")
