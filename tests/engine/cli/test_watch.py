"""``anomalib-sgfr watch``: each image once, across restarts, and what an alarm does."""

import csv
import hashlib
import itertools
import json
import os
import re
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from anomalib_sgfr import Monitor, Sgfr
from anomalib_sgfr.cli import adapt, threshold, watch
from anomalib_sgfr.cli.report import main as report
from anomalib_sgfr.cli.watch import CHANGED, main
from anomalib_sgfr.images.pre_processor import read_prepared
from anomalib_sgfr.memory_bank import residual_maps
from tests.conftest import fit, folder_datamodule, small, write_image

WHOLE = (
    b"image,score,label,p_value,evidence,changed,model,error\r\n"
    b'in/broken.png,,,,,,12ab,"cut, short"\r\nin/line/0.png,0.25,0,0.5,1,0,12ab,\r\n'
)
EARLIER = WHOLE.replace(b",model", b"").replace(b",12ab", b"")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoint of a fit to 24 images."""
    root = tmp_path_factory.mktemp("watch")
    for number in range(24):
        write_image(root / "good" / f"{number:02}.png", number)
    for number in range(4):
        write_image(root / "good_test" / f"{number}.png", 200 + number)
    module = folder_datamodule(root, abnormal_dir=None, mask_dir=None)
    return Path(str(fit(small(image_size=64, seed=0), module, root / "fit").best_model_path))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder with three good images, in the working directory."""
    monkeypatch.chdir(tmp_path)
    for number in range(3):
        write_image(tmp_path / "in" / "line" / f"{number}.png", 50 + number)
    (tmp_path / "in" / "notes.txt").write_text("no image")
    return tmp_path / "in"


def table(path: str = "watch.csv") -> list[dict[str, str]]:
    with Path(path).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def noise(folder: Path, number: int, first: int = 0) -> None:
    rng = np.random.default_rng(number)
    for index in range(first, first + number):
        pixels = rng.integers(0, 255, (96, 96, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"noise{index:03}.png")


def test_each_image_is_scored_once_across_restarts(checkpoint: Path, folder: Path) -> None:
    assert main([str(checkpoint), "in", "--once"]) == 0
    assert [row["image"] for row in table()] == [f"in/line/{number}.png" for number in range(3)]
    assert main([str(checkpoint), "in", "--once"]) == 0
    assert len(table()) == 3
    write_image(folder / "new.png", 60)
    (folder / "broken.png").write_bytes(b"no image")
    assert main([str(checkpoint), "in", "--once"]) == 0
    rows = table()
    assert len(rows) == 5
    (broken,) = (row for row in rows if row["error"])
    assert broken["image"] == "in/broken.png"
    assert broken["score"] == ""
    monitor = Monitor.read("watch.json")
    assert monitor.images == 4
    expected = Monitor.of_checkpoint(checkpoint)
    for row in rows:
        if row["score"]:
            reading = expected.update(float(row["score"]), row["image"])
            assert float(row["p_value"]) == pytest.approx(reading.p_value, rel=1e-3)
    assert monitor.evidence == expected.evidence


def test_what_a_killed_process_did_not_keep_is_taken_from_the_table(
    checkpoint: Path, folder: Path
) -> None:
    assert main([str(checkpoint), "in", "--once"]) == 0
    whole = Path("watch.json").read_bytes()
    Monitor.of_checkpoint(checkpoint).save("watch.json")  # as it was before the first image
    write_image(folder / "new.png", 60)
    assert main([str(checkpoint), "in", "--once"]) == 0
    again = Monitor.read("watch.json")
    assert again.images == 4
    Path("watch.json").write_bytes(whole)
    expected = Monitor.read("watch.json")
    expected.update(float(table()[-1]["score"]))
    assert again.evidence == expected.evidence


def test_an_alarm_that_a_killed_process_did_not_tell_is_told_at_the_next_start(
    checkpoint: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    noise(folder, 90)
    Monitor.of_checkpoint(checkpoint).save("watch.json")
    before = Path("watch.json").read_bytes()
    assert main([str(checkpoint), "in", "--once", "--stop"]) == CHANGED
    rows = table()
    Path("watch.json").write_bytes(before)
    script = "import sys; open('ran', 'a').write(sys.argv[1])"
    run = f'{sys.executable} -c "{script}"'
    capsys.readouterr()
    assert main([str(checkpoint), "in", "--once", "--run", run]) == CHANGED
    assert capsys.readouterr().err.count("Conditions have changed") == 1
    assert Path("ran").read_text() == rows[-1]["image"]
    assert Monitor.read("watch.json").changed_at == len(rows)


def test_changed_conditions_are_told_once_and_end_the_watch(
    checkpoint: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    noise(folder, 90)
    script = "import sys; open('ran', 'a').write(sys.argv[1])"
    run = f'{sys.executable} -c "{script}"'
    assert main([str(checkpoint), "in", "--once", "--stop", "--run", run]) == CHANGED
    rows = table()
    assert len(rows) < 93
    assert [row["changed"] for row in rows] == ["0"] * (len(rows) - 1) + ["1"]
    assert Path("ran").read_text() == rows[-1]["image"]
    told = capsys.readouterr().err
    assert told.count("Conditions have changed: scores are higher") == 1
    assert f"anomalib-sgfr adapt {checkpoint}" in told
    assert main([str(checkpoint), "in", "--once", "--run", run]) == CHANGED  # it stays changed
    assert len(table()) == 93
    assert Path("ran").read_text() == rows[-1]["image"]
    assert "Conditions" not in capsys.readouterr().err


def darkened(folder: Path, number: int) -> None:
    """An image whose right quarter has lost its light."""
    path = folder / f"{number:03}.png"
    write_image(path, 400 + number)
    with Image.open(path) as image:
        pixels = np.asarray(image).copy()
    pixels[:, 3 * pixels.shape[1] // 4 :] //= 3
    Image.fromarray(pixels).save(path)


def mean_residuals(checkpoint: Path, paths: list[str]) -> np.ndarray:
    """Mean residual of each scale of images, of training images without their own atoms."""
    model = Sgfr.load_from_checkpoint(checkpoint, map_location="cpu", visualizer=False).eval()
    found = []
    for path in paths:
        image = read_prepared(path, model.pre_processor)[None]
        own = [number for number, name in enumerate(model.model.images) if name == path]
        with torch.no_grad():
            banks = model.model.banks_without(own)
            assert banks is not None
            maps = residual_maps(banks, model.model.embed(image))
        found.append([float(part.mean()) for part in maps])
    return np.array(found)


def test_the_report_says_what_has_changed_and_where(
    checkpoint: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(20):
        write_image(folder / "a" / f"{number:03}.png", 300 + number)
    assert main([str(checkpoint), "in", "--once"]) == 0
    (folder / "b").mkdir()
    for number in range(60):
        darkened(folder / "b", number)
    (folder / "b" / "000.png").rename(folder / "b" / "no image.txt")
    assert main([str(checkpoint), "in", "--once"]) == CHANGED
    (folder / "b" / "059.png").unlink()
    files = ["--out", "page.html", "--json", "figures.json"]
    assert report([str(checkpoint), "--watched", "watch.csv", *files]) == 0
    figures = json.loads(Path("figures.json").read_text(encoding="utf-8"))
    (stream,) = figures["streams"]
    assert (stream["stream"], stream["images"], stream["direction"]) == ("", 82, "higher")
    assert stream["unchanged_before"] == 23
    assert stream["changed_at"] == Monitor.read("watch.json").changed_at
    page = Path("page.html").read_text(encoding="utf-8")
    assert re.search("The anomaly map has changed most at the (top|middle|bottom) right", page)
    assert "1 of the" in page  # the last image is gone
    assert "Mean image after" in page

    rows = table()
    after = [row["image"] for row in rows[23:]]
    chosen = [after[round(place)] for place in np.linspace(0, len(after) - 1, 32)][:-1]
    means = {
        "before": mean_residuals(checkpoint, [row["image"] for row in rows[:23]]),
        "after": mean_residuals(checkpoint, chosen),
    }
    for number, layer in enumerate(stream["layers"]):
        early, late = (means[name][:, number] for name in ("before", "after"))
        assert layer["before"] == pytest.approx(early.mean(), rel=1e-4)
        assert layer["after"] == pytest.approx(late.mean(), rel=1e-4)
        deviations = (late.mean() - early.mean()) / early.std()
        assert layer["deviations"] == pytest.approx(deviations, rel=1e-3)
        assert deviations > 1.0
    capsys.readouterr()


def test_a_stream_that_was_changed_from_the_start_is_compared_with_calibration_images(
    checkpoint: Path, folder: Path
) -> None:
    (folder / "line").rename(folder.parent / "away")
    for camera in ("cam1", "cam2"):
        (folder / camera).mkdir()
    for number in range(80):
        darkened(folder / "cam2", number)
    write_image(folder / "cam1" / "0.png", 70)
    by = ["--by", r"cam\d", "--monitor", "state.json"]
    assert main([str(checkpoint), "in", "--once", *by]) == CHANGED
    watched = ["--watched", "watch.csv", "--monitor", "state.json"]
    files = ["--out", "page.html", "--json", "figures.json"]
    assert report([str(checkpoint), *watched, *files]) == 0
    changed, steady = json.loads(Path("figures.json").read_text(encoding="utf-8"))["streams"]
    good = Sgfr.load_from_checkpoint(checkpoint, map_location="cpu").post_processor.state.scores
    expected = mean_residuals(checkpoint, good.good.paths).mean(0)
    assert [layer["before"] for layer in changed["layers"]] == pytest.approx(expected, rel=1e-4)
    assert steady["layers"] == []
    page = Path("page.html").read_text(encoding="utf-8")
    assert "32 images after the change and 28 calibration images, without their own atoms" in page
    assert page.index("<bdi>cam2</bdi>") < page.index("<bdi>cam1</bdi>")
    assert "Conditions have not changed in 1 images" in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--watched", "watch.csv", "--monitor", "in/notes.txt"], "is not a file that a Monitor"),
        (["--watched", "in/notes.txt"], "in/notes.json: no such file; name the state of the watch"),
        (["--watched", "in/notes.txt", "--monitor", "watch.json"], "notes.txt is another table"),
        (["--watched", "empty.csv", "--monitor", "watch.json"], "empty.csv: no image was scored"),
        (["--watched", "watch.csv", "--monitor", "other.json"], "the watch was of a model with"),
        (["--watched", "moved.csv", "--monitor", "watch.json"], "no image of it is there, as away"),
        (["--watched", "watch.csv", "--group", "["], "--group '[' is not a regular expression"),
    ],
)
def test_a_report_on_another_watch_is_refused(
    arguments: list[str], message: str, checkpoint: Path, folder: Path
) -> None:
    del folder
    assert main([str(checkpoint), "in", "--once"]) == 0
    Path("empty.csv").write_bytes(WHOLE.partition(b"\n")[0] + b"\n")
    state = json.loads(Path("watch.json").read_text(encoding="utf-8"))
    moved = Path("watch.csv").read_bytes().replace(b"in/", b"away/")
    Path("moved.csv").write_bytes(moved)
    Path("other.json").write_text(json.dumps({**state, "threshold": 77.0}), encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(message)):
        report([str(checkpoint), *arguments, "--out", "page.html"])
    assert not Path("page.html").exists()


def test_an_image_is_taken_when_it_is_whole_and_ctrl_c_is_the_end(
    checkpoint: Path,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    looks = itertools.count()
    source = (folder / "line" / "0.png").read_bytes()

    def camera(_: float) -> None:
        look = next(looks)
        if look < 4:  # it writes in pieces
            (folder / "late.png").write_bytes(source[: (look + 1) * len(source) // 4])
        elif look == 6:
            raise KeyboardInterrupt

    monkeypatch.setattr(watch.time, "sleep", camera)
    assert main([str(checkpoint), "in"]) == 0
    assert "4 images; table: watch.csv" in capsys.readouterr().out
    rows = table()
    assert [row["image"] for row in rows].count("in/late.png") == 1
    assert len(rows) == 4
    assert not any(row["error"] for row in rows)


@pytest.mark.usefixtures("folder")
def test_ctrl_c_before_the_end_is_an_interruption(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(watch, "_row", interrupted)
    with pytest.raises(KeyboardInterrupt):
        main([str(checkpoint), "in", "--once"])


def test_a_real_camera(checkpoint: Path, folder: Path) -> None:
    """Images that arrive while the command runs, until an alarm ends it."""
    (folder / "line").rename(folder.parent / "away")

    def shoot() -> None:
        for number in range(100):
            noise(folder, 1, number)
            time.sleep(0.01)

    camera = threading.Thread(target=shoot)
    camera.start()
    assert main([str(checkpoint), "in", "--every", "0.05", "--stop"]) == CHANGED
    camera.join()


def test_an_alarm_names_the_stream_that_has_changed(
    checkpoint: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for camera in ("new line", "cam2"):
        (folder / camera).mkdir()
    noise(folder / "cam2", 90)
    write_image(folder / "new line" / "0.png", 70)
    by = ["--by", "in/([^/]+)/"]
    assert main([str(checkpoint), "in", "--once", "--run", "touch", *by]) == CHANGED
    told = capsys.readouterr().err
    assert told.count("have changed") == 1
    assert "Conditions of the stream 'cam2' have changed: scores are higher" in told
    assert "Stream 'line', compared with all 28 calibration images: an alarm takes" in told
    assert f"anomalib-sgfr report {checkpoint} --watched watch.csv --out watch.html" in told
    monitor = Monitor.read("watch.json")
    assert {name: its.images for name, its in monitor.streams.items()} == {
        "line": 3,
        "cam2": 90,
        "new line": 1,
    }
    assert main([str(checkpoint), "in", "--once"]) == CHANGED  # by the state's expression
    assert "have changed" not in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([str(checkpoint), "in", "--once", "--by", "other"])
    assert "watch.json was made with --by 'in/([^/]+)/'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([str(checkpoint), "in", "--once", "--false_alarm_probability", "0.05"])
    said = capsys.readouterr().err
    assert "watch.json was made with --false_alarm_probability '0.01'" in said
    again = ["--out", "again.csv", "--false_alarm_probability", "0.05"]
    assert main([str(checkpoint), "in", "--once", *again]) in {0, CHANGED}
    assert Monitor.read("again.json").false_alarm_probability == 0.05


@pytest.mark.parametrize(
    ("content", "complete"),
    [
        (b"image,sco", 0),
        (b"", 0),
        (WHOLE, 2),
        (WHOLE + b"in/line/1.png,0.25", 2),
        (WHOLE + b'"in/line/1', 2),
        (WHOLE + b"in/line/1.p\0\0\0\0", 2),
        (WHOLE + b"in/line/\xd0", 2),
        (WHOLE + b"in/line/1.png,0.25,0,0.5,1,", 2),
        (WHOLE + b"in/line/1.png,0.25,0,0.5,1,0,12a", 2),
        (WHOLE + b"in/line/1.png,0.25,0,0.5,1,0,12ab,", 3),
        (WHOLE + b"in/line/1.png,0.25,0,0.5,1,0,12ab,\r", 3),
        (EARLIER, 2),
        (EARLIER + b"in/line/1.png,0.25,0,0.5,1,", 2),
        (EARLIER + b"in/line/1.png,0.25,0,0.5,1,0,\r", 3),
    ],
)
def test_a_row_that_was_cut_off_is_removed_and_its_image_scored_again(
    content: bytes,
    complete: int,
    checkpoint: Path,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_image(folder / "a,b.png", 80)
    Path("watch.csv").write_bytes(content)
    assert main([str(checkpoint), "in", "--once"]) == 0
    rows = table()
    assert len(rows) == 4 + (complete > 1)  # an image of these is gone
    assert len({row["image"] for row in rows}) == len(rows)
    assert all(row["changed"] in {"0", ""} and None not in row for row in rows)
    first = WHOLE if content.startswith(WHOLE) else WHOLE.replace(b",12ab", b",")
    assert Path("watch.csv").read_bytes().startswith(first if complete else b"image,score,")
    assert Monitor.read("watch.json").images == len(rows) - (complete > 1)
    is_cut = complete == 2 and content not in {WHOLE, EARLIER}
    assert capsys.readouterr().err.count("the last row of watch.csv was cut off") == is_cut
    assert main([str(checkpoint), "in", "--once"]) == 0
    assert table() == rows


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (b"in/a.png,0.3in/b.png,0.25,0,0.5,1,0,,\r\n", r"line 4: 9 columns in place of 8"),
        (b"in/a.png,0.25\r\nin/b.png,0.25,0,0.5,1,0,,\r\n", "line 4: 2 columns in place of 8"),
        (b'"in/a\r\nin/b.png,0.25,0,0.5,1,0,,\r\n', "line 5: 1 columns in place of 8"),
        (b"in/a.png,high,0,0.5,1,0,,\r\n", "line 4: score must be a number, got 'high'"),
        (b"in/a.png,nan,0,0.5,1,0,,\r\n", "line 4: score must be a number, got 'nan'"),
        (b"in/a.png,0.5,0,0.5,,0,,\r\n", "line 4: evidence must be a number, got ''"),
    ],
)
def test_a_damaged_row_is_named(rows: bytes, message: str, checkpoint: Path, folder: Path) -> None:
    del folder
    Path("watch.csv").write_bytes(WHOLE + rows)
    with pytest.raises(ValueError, match=f"watch.csv, {message}. Correct or remove"):
        main([str(checkpoint), "in", "--once"])
    assert Path("watch.csv").read_bytes() == WHOLE + rows


def test_each_row_names_its_model(checkpoint: Path, folder: Path) -> None:
    """The state of a checkpoint is the state of its exported files too."""
    model = Sgfr.load_from_checkpoint(checkpoint, map_location="cpu", visualizer=False)
    names = {}
    for file in (checkpoint, model.to_torch(folder.parent)):
        write_image(folder / f"{file.suffix[1:]}.png", 70)
        (folder / f"{file.suffix[1:]}_broken.png").write_bytes(b"no image")
        assert main([str(file), "in", "--once"]) == 0
        names[file] = hashlib.sha256(file.read_bytes()).hexdigest()[:12]
    first, second = names.values()
    assert [row["model"] for row in table()] == [first] * 5 + [second] * 2


def test_weights_beside_a_model_are_part_of_its_name(tmp_path: Path) -> None:
    (tmp_path / "model.xml").write_text("<net/>")
    names = set()
    for weights in (b"one", b"other"):
        (tmp_path / "model.bin").write_bytes(weights)
        names.add(watch._name_of(tmp_path / "model.xml"))
    assert len(names) == 2


def test_a_file_name_that_is_not_text(checkpoint: Path, folder: Path) -> None:
    name = os.fsdecode(b"\xff.png")
    try:
        (folder / "line" / "0.png").rename(folder / name)
    except OSError:  # a file system of text only
        pytest.skip("no such names here")
    for _ in range(2):
        assert main([str(checkpoint), "in", "--once"]) == 0
        rows, _ = watch.read_table(Path("watch.csv"))
        assert sorted(row["image"] for row in rows) == sorted(
            ["in/line/1.png", "in/line/2.png", f"in/{name}"]
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model.xml", "in", "--by", "cam("], "argument --by: 'cam(' is not a regular expression"),
        (["model.xml", "in"], "watch.json: no such file, and model.xml has no calibration scores"),
        (["model.xml", "in/notes.txt"], "in/notes.txt is a file: name the folder"),
        (
            ["model.xml", "in", "--out", "line.json"],
            "line.json cannot be both the table (--out) and",
        ),
        (["model.xml", "in", "--every", "0"], "--every must be a positive number of seconds"),
    ],
)
def test_what_cannot_be_is_refused(
    arguments: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder.parent / "model.xml").write_text("<net/>")
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_an_image_is_scored_once_by_whatever_path(checkpoint: Path, folder: Path) -> None:
    for path in ("in", str(folder), "in/line", f"../{folder.parent.name}/in"):
        assert main([str(checkpoint), path, "--once"]) == 0
        assert len(table()) == 3
    assert Monitor.read("watch.json").images == 3


def test_a_table_that_is_gone_is_told(
    checkpoint: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    del folder
    assert main([str(checkpoint), "in", "--once"]) == 0
    assert "warning" not in capsys.readouterr().err
    Path("watch.csv").unlink()
    assert main([str(checkpoint), "in", "--once"]) == 0
    said = "watch.json has taken 3 images, and watch.csv has 0 of them"
    assert said in capsys.readouterr().err


def test_the_state_of_another_checkpoint_is_refused(
    checkpoint: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also of one with the same threshold, as ``adapt`` writes."""
    assert main([str(checkpoint), "in", "--once"]) == 0
    before = Path("watch.json").read_bytes()
    images = [str(path) for path in sorted((folder / "line").iterdir())]
    assert adapt.main([str(checkpoint), *images, "--out", "adapted.ckpt"]) == 0
    calibrated = ["adapted.ckpt", "--held_out", "good", "--out", "calibrated.ckpt"]
    (folder.parent / "good").mkdir()
    for number in range(24):
        write_image(folder.parent / "good" / f"{number}.png", 500 + number)
    assert threshold.main(calibrated) == 0
    value = str(Sgfr.load_from_checkpoint(checkpoint).post_processor.state.image)
    assert threshold.main(["calibrated.ckpt", "--value", value, "--out", "new.ckpt"]) == 0
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(["new.ckpt", "in", "--once"])
    assert ended.value.code == 2
    assert "watch.json was made of another checkpoint than new.ckpt" in capsys.readouterr().err
    assert Path("watch.json").read_bytes() == before


def test_another_table_is_not_appended_to(checkpoint: Path, folder: Path) -> None:
    del folder
    Path("watch.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"watch.csv is another table"):
        main([str(checkpoint), "in", "--once"])
    assert Path("watch.csv").read_text() == "a,b\n1,2\n"


@pytest.mark.parametrize("command", ["no-such-command", "false", '"'])
def test_a_command_that_fails_does_not_end_the_watch(
    command: str, checkpoint: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    noise(folder, 60)
    assert main([str(checkpoint), "in", "--once", "--run", command]) == CHANGED
    assert "--run" in capsys.readouterr().err
    assert len(table()) == 63
