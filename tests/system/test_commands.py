"""Sgfr's own commands, and anomalib's through them: what a user sees when something is wrong."""

import csv
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning_utilities.core import rank_zero
from PIL import Image

from anomalib_sgfr import Inspector
from anomalib_sgfr.cli.explain import main as explain
from anomalib_sgfr.cli.main import main
from tests.conftest import small, write_image

ROOT = Path(__file__).parents[2]


def command(
    *arguments: object, warm: Path, cwd: Path, **environment: str
) -> tuple[int, str, list[str]]:
    """Exit code, output and lines of errors of ``anomalib-sgfr``."""
    done = subprocess.run(
        [warm / "anomalib-sgfr", *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr.splitlines()


def test_a_damaged_picture_does_not_keep_the_others_from_being_explained(
    checkpoint: Path, warm: Path, tmp_path: Path
) -> None:
    images = tmp_path / "images"
    for index in range(3):
        write_image(images / f"{index}.png", index, defect=True)
    shutil.rmtree(tmp_path / "masks")
    (images / "0.png").write_bytes((images / "0.png").read_bytes()[:200])
    code, output, errors = command(
        "explain",
        images,
        "--ckpt_path",
        checkpoint,
        "--out",
        tmp_path / "out",
        warm=warm,
        cwd=tmp_path,
    )
    assert code == 1, errors
    assert sorted(path.name for path in tmp_path.glob("out/**/*.png")) == ["1.png", "2.png"]
    assert f"Figures: {tmp_path / 'out'}" in output
    assert len(errors) == 1, errors
    assert errors[0].startswith(f"error: {images / '0.png'} cannot be read: ")
    assert "will not be loaded" not in output


Command = Callable[..., tuple[object, str, list[str]]]


@pytest.fixture
def in_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Command]:
    """As ``command``, in this process; log handlers and filters are restored."""
    loggers = [logging.getLogger(), rank_zero.log]
    before = [(each, each.level, list(each.handlers), list(each.filters)) for each in loggers]
    handlers = [(each, list(each.filters)) for each in logging.getLogger().handlers]
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> tuple[object, str, list[str]]:
        capsys.readouterr()
        try:
            code: object = main([*map(str, arguments)])
        except SystemExit as stopped:
            code = stopped.code
        output, errors = capsys.readouterr()
        return code, output, errors.splitlines()

    yield run
    for logger, level, its_handlers, filters in before:
        logger.setLevel(level)
        logger.handlers, logger.filters = its_handlers, filters
    for handler, filters in handlers:
        handler.filters = filters


def one_line(arguments: list[object], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main(["explain", *map(str, arguments)]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1, said
    return said


def test_what_is_not_a_checkpoint_of_sgfr_is_refused_in_one_line(
    checkpoint: Path, parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.ckpt"
    text.write_text("hello", encoding="utf-8")
    assert "text.ckpt' is not a whole checkpoint" in one_line(
        [parts / "bad", "--ckpt_path", text], capsys
    )
    torch.save({"epoch": 3}, tmp_path / "other.ckpt")
    assert "is not" in one_line([parts / "bad", "--ckpt_path", tmp_path / "other.ckpt"], capsys)
    torch.save(small(), tmp_path / "model.pt")  # as exports are
    said = one_line([parts / "bad", "--ckpt_path", tmp_path / "model.pt"], capsys)
    exported = (
        "' is not a checkpoint that `anomalib fit --model Sgfr` saved: it is an exported file. Pass"
        " the checkpoint (.ckpt) that it was made from."
    )
    assert f"model.pt{exported}" in said
    content = torch.load(checkpoint, weights_only=True)
    for key in [key for key in content["state_dict"] if "banks" in key]:
        content["state_dict"].pop(key)
    torch.save(content, tmp_path / "foreign.ckpt")
    assert "is not Sgfr's" in one_line(
        [parts / "bad", "--ckpt_path", tmp_path / "foreign.ckpt"], capsys
    )


def test_images_that_are_not_there_are_refused_in_one_line(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    assert "no image in this folder" in one_line(
        [tmp_path / "empty", "--ckpt_path", checkpoint], capsys
    )
    (tmp_path / "text.txt").write_text("hello", encoding="utf-8")
    assert "text.txt: not an image" in one_line(
        [tmp_path / "text.txt", "--ckpt_path", checkpoint], capsys
    )
    with pytest.raises(SystemExit) as stopped:
        explain([str(tmp_path / "gone"), "--ckpt_path", str(checkpoint)])
    assert stopped.value.code == 2
    assert "gone: no such file or folder" in capsys.readouterr().err


def test_images_that_are_all_damaged(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(b"no")
    assert "a.png cannot be read" in one_line(
        [tmp_path / "images", "--ckpt_path", checkpoint, "--out", tmp_path / "out"], capsys
    )
    assert not (tmp_path / "out").exists()


def test_a_mistake_in_a_command_of_anomalib_ends_in_one_line(
    parts: Path, warm: Path, tmp_path: Path
) -> None:
    arguments = ("predict", "--model", "Sgfr", "--data", parts / "bad", "--ckpt_path", "gone.ckpt")
    code, _, errors = command(*arguments, warm=warm, cwd=tmp_path)
    assert code == 1
    assert errors[-1].startswith("error: ")
    assert "gone.ckpt" in errors[-1]
    assert not any("Traceback" in line for line in errors), errors
    code, output, errors = command(*arguments, warm=warm, cwd=tmp_path, ANOMALIB_SGFR_TRACEBACK="1")
    assert code == 1
    assert any("Traceback" in line for line in [*errors, *output.splitlines()])
    assert "gone.ckpt" in errors[-1]


TRAIN = ("train", "--model", "Sgfr")
EXPORT = ("export", "--model", "Sgfr", "--ckpt_path", "CKPT")
MISTAKES = [
    (TRAIN, 1, "there are no images to train on: pass --data"),
    ((*TRAIN, "--model.trim", "0.7"), 1, "trim must lie between 0 and 0.5, got 0.7."),
    (
        (*TRAIN, "--model.seed", "99999999999999999999"),
        1,
        "seed must be a whole number of 64 bits, got 9",
    ),
    (
        (*TRAIN, "--model.bank_sise", "9"),
        2,
        "there is no --model.bank_sise: did you mean bank_size",
    ),
    (
        (*TRAIN, "--model.bank_size", "x"),
        2,
        "--model.bank_size must be a list or a whole number, got 'x'",
    ),
    (
        (*TRAIN, "--model.solver", "lasso"),
        2,
        "--model.solver must be one of affine, omp, ridge, got 'lasso'",
    ),
    (
        (*TRAIN, "--trainer.precision", "8"),
        2,
        "--trainer.precision must be one of 64, 32, 16, transformer-engine,",
    ),
    ((*TRAIN, "--trainer.precision", "transformer-engine"), 1, "Requirement 'transformer_engine"),
    (
        (*TRAIN, "--data", "Fodler"),
        2,
        "--data: there is no 'Fodler': did you mean Folder or Folder3D?",
    ),
    (("train", "--model", "Sgrf"), 2, "--model: there is no 'Sgrf': did you mean Sgfr?"),
    (("predict", "--model", "Sgfr"), 2, "--data is missing"),
    (
        (*TRAIN, "--data", "MTD", "--data.split", "tiles"),
        1,
        "split_name must be one of canonical, tile, got 'tiles'.",
    ),
    ((*TRAIN, "--data", "MTD"), 1, "no MTD data at root 'datasets/MTD'"),
    ((*TRAIN, "--data", "ELPV", "--data.root", "."), 1, "no ELPV data at root '.'"),
    (EXPORT, 2, "--export_type is missing"),
    (
        (*EXPORT, "--export_type", "tflite"),
        1,
        "'tflite' is not a valid ExportType: it must be one of ",
    ),
    (
        (*EXPORT, "--export_type", "torch", "--export_root", "file"),
        1,
        "'file' is a file, or lies under one: a folder",
    ),
    (
        (*EXPORT, "--export_type", "onnx", "--input_size", "[0, 9]"),
        1,
        "input_size must be a height and a width of at",
    ),
    (
        ("test", "--model", "Sgfr", "--ckpt_path", "CKPT"),
        1,
        "there are no images to test with: pass --data",
    ),
    (("explain", "file", "--ckpt_path", "CKPT"), 1, "file: not an image"),
    (("threshold", "."), 1, "is a folder: a file is needed there"),
    (
        ("threshold", "CKPT", "--false_alarm_rate", "0.1", "--out", "file/x.ckpt"),
        2,
        "is a file, not a folder",
    ),
    (("accept", "CKPT", "--undo"), 1, "no image was accepted: there is nothing to take back."),
    (("reject", "CKPT", "--undo"), 1, "no image was rejected: there is nothing to take back."),
]


@pytest.mark.parametrize(
    ("arguments", "code", "said"), MISTAKES, ids=[" ".join(item[0])[:60] for item in MISTAKES]
)
def test_every_mistake_ends_in_one_line(
    arguments: tuple[str, ...],
    code: int,
    said: str,
    checkpoint: Path,
    in_process: Command,
    tmp_path: Path,
) -> None:
    (tmp_path / "file").write_text("hello", encoding="utf-8")
    given = [checkpoint if part == "CKPT" else part for part in arguments]
    found, output, errors = in_process(*given)
    assert found == code, errors
    assert errors[-1].startswith("error: ")
    assert said in errors[-1], errors
    assert not any("Traceback" in line for line in [*errors, *output.splitlines()]), errors
    assert sum(line.startswith("error: ") for line in errors) == 1


def test_a_machine_that_runs_these_tests_will_do(warm: Path, tmp_path: Path) -> None:
    code, output, errors = command("doctor", "--json", warm=warm, cwd=tmp_path)
    told = json.loads(output)
    found = {each["what"]: each for each in told["findings"]}
    assert (code, told["faults"], errors) == (0, 0, []), output
    assert {"Python", "torch", "plugin", "weights", "free memory", "threads"} <= set(found)
    assert found["fit and predict"]["mark"] == found["export"]["mark"] == "ok"
    assert "scores differ by" in found["export"]["value"]
    assert not list(tmp_path.iterdir())  # nothing is left


def test_predictions_go_where_out_says(
    checkpoint: Path, parts: Path, warm: Path, tmp_path: Path
) -> None:
    for line in ("l1", "l2"):
        shutil.copytree(parts / "bad", tmp_path / "line" / line)
    write_image(tmp_path / "line" / "l1" / "wide.png", 7, (48, 96))
    out = tmp_path / "out"
    arguments = (
        "--model",
        "Sgfr",
        "--data",
        tmp_path / "line",
        "--ckpt_path",
        checkpoint,
        f"--out={out}",
    )
    code, output, errors = command("predict", *arguments, warm=warm, cwd=tmp_path)
    assert code == 0, errors + output.splitlines()
    assert f"Scores: {out / 'scores.csv'}" in "\n".join(errors)
    with (out / "scores.csv").open(encoding="utf-8") as text:
        rows = {row["image"]: row for row in csv.DictReader(text)}
    assert len(rows) == len(list((out / "images").rglob("*.png"))) == 13
    inspector = Inspector.load(checkpoint)
    for path, row in rows.items():
        name = Path(path).relative_to(tmp_path / "line").with_suffix("")
        found = np.load(out / "arrays" / f"{name}.npz")
        expected = inspector(path)
        assert found["anomaly_map"].shape == found["pred_mask"].shape == expected.map.shape
        np.testing.assert_allclose(found["anomaly_map"], expected.map, atol=1e-3)
        assert float(found["score"]) == pytest.approx(float(row["score"]))
        assert (str(found["image"]), int(found["label"])) == (path, int(row["label"]))
        mask, shown = (
            np.asarray(Image.open(out / kind / f"{name}.png")) for kind in ("masks", "maps")
        )
        assert ((mask > 0) == found["pred_mask"]).all()
        np.testing.assert_allclose(shown / 255.0, found["anomaly_map"], atol=0.01)


def test_out_needs_a_folder(warm: Path, tmp_path: Path) -> None:
    code, _, errors = command("predict", "--model", "Sgfr", "--out", warm=warm, cwd=tmp_path)
    assert (code, errors[-1]) == (2, "error: --out: name the folder for the predictions")


def test_a_latest_that_did_not_end_is_passed_over(
    checkpoint: Path, parts: Path, warm: Path, tmp_path: Path
) -> None:
    runs = tmp_path / "results" / "Sgfr" / "parts"
    whole = runs / "v0" / "weights" / "lightning" / "model.ckpt"
    whole.parent.mkdir(parents=True)
    shutil.copy(checkpoint, whole)
    (runs / "v1").mkdir()
    (runs / "latest").symlink_to(runs / "v1")
    latest = Path("results/Sgfr/parts/latest/weights/lightning/model.ckpt")
    for arguments in (
        ("threshold", latest),
        ("predict", "--model", "Sgfr", "--data", parts / "bad", "--ckpt_path", latest),
    ):
        code, _, errors = command(*arguments, warm=warm, cwd=tmp_path)
        assert code == 0, errors
        assert any(
            line.startswith(f"note: {latest} is missing, as that run has not ended: ")
            for line in errors
        )


FIT = ("fit", "--model", "Sgfr", "--model.backbone", "test_resnet", "--model.layers", "[layer1]")
FIT += ("--model.pre_trained", "false", "--model.image_size", "64", "--trainer.accelerator", "cpu")
FOLDER = ("--data", "Folder", "--data.root", "parts", "--data.num_workers", "0")
MASKS = ("--data.abnormal_dir", "two", "--data.mask_dir")
SAMPLES = [
    ((*FIT, *FOLDER, "--data.normal_dir", "good"), 2, "--data.name is missing"),
    (
        (*FIT, *FOLDER, "--data.name", "a", "--data.normal_dir", "two"),
        1,
        "too few good images: anomalib splits",
    ),
    *(
        (
            (*FIT, *FOLDER, "--data.name", "a", "--data.normal_dir", "good", *MASKS, masks),
            1,
            "--data.mask_dir must hold one mask for each image of --data.abnormal_dir, named as",
        )
        for masks in ("good", "masks")
    ),
    ((*FIT, *FOLDER, "--data.name", "a", "--data.normal_dir", "mac"), 1, "-name '._*' -delete)"),
    (
        (*FIT, *FOLDER, "--data.name", "a", "--data.normal_dir", "零件"),
        1,
        "anomalib takes paths of ASCII characters only, and ",
    ),
    (
        ("predict", "--model", "Sgfr", "--data", "parts/零件"),
        1,
        "anomalib takes paths of ASCII characters only, and 'parts/零件' has others",
    ),
    (
        ("fit", "--model", "Sgfr", "--model.seed", "a"),
        2,
        "--model.seed must be a whole number, got 'a'",
    ),
    (
        (*FIT, *FOLDER, "--data.name", "old", "--data.normal_dir", "good"),
        1,
        "and anomalib makes a link of that name",
    ),
    (
        ("threshold", "CKPT", "--score", "0.6", "--out", "parts"),
        2,
        "argument --out: parts is a folder: name a file",
    ),
    (
        ("report", "CKPT", "--good", "parts/good", "--out", "parts"),
        2,
        "argument --out: parts is a folder: name a file",
    ),
    *(
        ((name, "damaged.ckpt", *rest), 1, "'damaged.ckpt' is damaged: the checksum of ")
        for name, *rest in (("threshold",), ("accept", "parts/good"), ("adapt", "parts/good"))
    ),
    (("reject", "CKPT", "parts/good"), 1, "calibrated on it as a good image"),
    (("reject", "CKPT", "parts/good", "--region", "1,2"), 2, "must be four integers X,Y,W,H"),
    (("threshold", "empty.ckpt"), 1, "'empty.ckpt' is not a checkpoint that"),
    *(
        (
            (*command, "--ckpt_path", "model.xml"),
            1,
            "it is an exported file. Pass the checkpoint (.ckpt) that",
        )
        for command in (
            ("explain", "parts/good"),
            ("report", "--good", "parts/good", "--out", "page.html"),
            ("predict", "--model", "Sgfr", "--data", "parts/good"),
        )
    ),
    *(
        ((name, "model.xml", *rest), 1, "it is an exported file. Pass the checkpoint (.ckpt) that")
        for name, *rest in (
            ("accept", "parts/good"),
            ("adapt", "parts/good"),
            ("reject", "parts/good"),
            ("threshold",),
            ("report", "--good", "parts/good", "--out", "page.html"),
            ("sensitivity", "--good", "parts/good", "--out", "page.html"),
        )
    ),
    (("explain", "model.xml", "parts/good"), 2, "'model.xml' is not a checkpoint that"),
    (
        ("predict", "--model", "Sgfr", "--data", "parts/good", "--ckpt_path", "damaged.ckpt"),
        1,
        "is damaged: the checksum",
    ),
]


@pytest.mark.parametrize(
    ("arguments", "code", "said"), SAMPLES, ids=[" ".join(item[0])[-50:] for item in SAMPLES]
)
def test_every_mistake_in_files_ends_in_one_line(
    arguments: tuple[str, ...],
    code: int,
    said: str,
    checkpoint: Path,
    in_process: Command,
    tmp_path: Path,
) -> None:
    for name, number in (("good", 5), ("two", 2), ("mac", 5), ("零件", 5)):
        for index in range(number):
            write_image(tmp_path / "parts" / name / f"{index}.png", index)
    for name in "ab":
        write_image(tmp_path / "parts" / "masks" / f"{name}.png", 0)
    (tmp_path / "parts" / "mac" / "._0.png").write_bytes(b"\0\5\26\7")
    (tmp_path / "results" / "Sgfr" / "old" / "latest").mkdir(parents=True)
    whole = bytearray(checkpoint.read_bytes())
    middle = len(whole) // 2
    whole[middle : middle + 100] = bytes(100)
    (tmp_path / "damaged.ckpt").write_bytes(whole)
    torch.save({"state_dict": {}, "hyper_parameters": {}}, tmp_path / "empty.ckpt")
    (tmp_path / "model.xml").write_text("<net/>", encoding="utf-8")
    found, output, errors = in_process(
        *(checkpoint if part == "CKPT" else part for part in arguments)
    )
    assert found == code, errors
    assert errors[-1].startswith("error: ")
    assert said in errors[-1], errors
    assert not any("Traceback" in line for line in [*errors, *output.splitlines()]), errors


def test_a_damaged_picture_does_not_keep_the_others_from_being_predicted(
    checkpoint: Path, in_process: Command, tmp_path: Path
) -> None:
    for index in range(3):
        write_image(tmp_path / "parts" / f"{index}.png", index)
    (tmp_path / "parts" / "1.png").write_bytes(b"no image")
    given = ("--data", "parts", "--ckpt_path", checkpoint, "--model.visualizer", "false")
    code, _, errors = in_process("predict", "--model", "Sgfr", *given, "--out", "found")
    assert code == 1
    images = tmp_path.resolve() / "parts"
    assert errors[-1].startswith(f"error: {images / '1.png'} cannot be read: UnidentifiedImageErr")
    assert errors[-1].endswith(". 2 of 3 images were predicted.")
    assert not any("Traceback" in line for line in errors)
    maps = sorted(path.name for path in tmp_path.glob("found/maps/**/*.png"))
    assert maps == ["0.png", "2.png"]
    table = (tmp_path / "found" / "scores.csv").read_text(encoding="utf-8")
    read = [Path(line.partition(",")[0]) for line in table.splitlines()[1:]]
    assert read == [images / "0.png", images / "2.png"]


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize("when", ["import", "run"])
def test_an_interruption_is_one_line(
    when: str, checkpoint: Path, parts: Path, tmp_path: Path
) -> None:
    code = (
        "import os, signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "stop = lambda *_: os.kill(os.getpid(), signal.SIGINT)\n"
        "from anomalib_sgfr.cli.main import main\n"
    )
    if when == "import":
        code += (
            "class Stop:\n"
            "    def find_spec(self, name, *_):\n"
            "        if name == 'torch.nn': stop()\n"
            "sys.meta_path.insert(0, Stop())\n"
        )
    else:
        code += "from anomalib_sgfr import Sgfr\nSgfr.predict_step = stop\n"
    arguments = [
        "predict",
        "--model",
        "Sgfr",
        "--data",
        str(parts / "bad"),
        "--ckpt_path",
        str(checkpoint),
    ]
    done = subprocess.run(
        [sys.executable, "-c", f"{code}sys.exit(main({arguments!r}))"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 130, done.stderr
    assert done.stderr.splitlines()[-1] == "error: interrupted"
    assert "Traceback" not in done.stderr
    assert "KeyboardInterrupt" not in done.stdout + done.stderr
