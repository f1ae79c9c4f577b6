"""Which run ``latest`` names, and where results go: no run and no checkpoint costs another's."""

import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from anomalib.data import Folder, PredictDataset
from anomalib.engine import Engine
from lightning.pytorch import Callback

from anomalib_sgfr import Sgfr
from anomalib_sgfr.run_folder import RunFolder
from anomalib_sgfr.run_paths import (
    complete_checkpoint,
    make_results_folder,
    names_of,
    newest_complete_run,
    results_base,
)
from tests.conftest import engine_in, folder_datamodule, write_image

CKPT = Path("weights/lightning/model.ckpt")
ROOT = Path(__file__).parents[2]


def tiny(**arguments: object) -> Sgfr:
    size = {
        "backbone": "test_resnet",
        "layers": ["layer1"],
        "pre_trained": False,
        "image_size": 64,
        "bank_size": 20,
    }
    return Sgfr(**{**size, "evaluator": False, **arguments})  # type: ignore[arg-type]


def fitted(folder: Path, data: Folder, **arguments: object) -> Path:
    """Checkpoint of a run in a folder."""
    engine = engine_in(folder, **arguments)
    engine.fit(tiny(visualizer=False), datamodule=data)
    return Path(engine.best_model_path)


class Failing(Callback):
    """Ends a fit early."""

    def on_train_batch_end(self, *_: object) -> None:
        msg = "no more"
        raise RuntimeError(msg)


class Asking(Callback):
    """Looks at what ``latest`` names while a fit runs."""

    def __init__(self, link: Path) -> None:
        self.link = link
        self.found = Path()

    def on_train_batch_end(self, *_: object) -> None:
        self.found = self.link.resolve()


def test_latest_names_the_last_run_that_ended(
    datamodule: Folder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    latest = tmp_path / "Sgfr" / "parts" / "latest"
    first = fitted(tmp_path, datamodule)
    assert latest.resolve() == first.parents[2]
    asking = Asking(latest)
    with pytest.raises(RuntimeError, match="no more"):
        fitted(tmp_path, datamodule, callbacks=[asking, Failing()])
    assert (
        asking.found == latest.resolve() == first.parents[2]
    )  # a killed process would leave it so too
    assert "The run has not ended: latest names" in caplog.text
    third = fitted(tmp_path, datamodule, callbacks=[asking])
    assert asking.found == first.parents[2]
    assert latest.resolve() == third.parents[2] != first.parents[2]


def test_latest_stays_when_the_data_cannot_be_prepared(datamodule: Folder, tmp_path: Path) -> None:
    first = fitted(tmp_path, datamodule)
    with pytest.raises(Exception, match="gone"):
        fitted(tmp_path, folder_datamodule(tmp_path / "gone"))
    assert (tmp_path / "Sgfr" / "parts" / "latest").resolve() == first.parents[2]


def test_latest_stays_when_a_run_keeps_no_checkpoint(datamodule: Folder, tmp_path: Path) -> None:
    first = fitted(tmp_path, datamodule)
    engine = engine_in(tmp_path, barebones=True, logger=None)
    engine.fit(tiny(visualizer=False), datamodule=datamodule)
    assert (tmp_path / "Sgfr" / "parts" / "latest").resolve() == first.parents[2]


def test_the_first_run_that_fails_leaves_latest_to_it(datamodule: Folder, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="no more"):
        fitted(tmp_path, datamodule, callbacks=[Failing()])
    assert (tmp_path / "Sgfr" / "parts" / "latest").resolve().name == "v0"


def test_a_command_takes_the_newest_whole_run_for_a_latest_that_did_not_end(tmp_path: Path) -> None:
    runs = tmp_path / "Sgfr" / "parts"
    for name in ("v0", "v9", "v10"):
        (runs / name / CKPT).parent.mkdir(parents=True)
        (runs / name / CKPT).touch()
    (runs / "v11").mkdir()
    (runs / "latest").symlink_to(runs / "v11")
    assert newest_complete_run(runs) == runs / "v10"
    assert complete_checkpoint(runs / "latest" / CKPT) == runs / "v10" / CKPT
    assert complete_checkpoint(runs / "v11" / CKPT) is None
    assert complete_checkpoint(runs / "latest" / "other.ckpt") is None


def test_results_never_go_to_a_folder_latest(tmp_path: Path) -> None:
    run = tmp_path / "Sgfr" / "parts" / "v3"
    assert results_base(tmp_path / "Sgfr" / "latest", run / CKPT) == run
    assert results_base(tmp_path / "Sgfr" / "latest", tmp_path / "loose.ckpt") == tmp_path / "Sgfr"
    elsewhere = tmp_path / "mine" / "Sgfr" / "latest"  # a root of the user's own
    assert results_base(elsewhere, run / CKPT) == elsewhere.parent
    assert results_base(run, None) == run


def test_results_of_other_input_get_a_folder_of_their_own(tmp_path: Path) -> None:
    first = make_results_folder(tmp_path / "bad", {"model": "a"})
    assert make_results_folder(tmp_path / "bad", {"model": "a"}) == first == tmp_path / "bad"
    assert make_results_folder(tmp_path / "bad", {"model": "b"}) == tmp_path / "bad-2"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").touch()
    assert make_results_folder(tmp_path / "mine", {"model": "a"}) == tmp_path / "mine-2"
    (tmp_path / "file").touch()
    assert make_results_folder(tmp_path / "file", {}) == tmp_path / "file-2"


def test_every_image_has_a_name_of_its_own() -> None:
    found = names_of(
        ["/x/a/good/00.png", "/x/b/good/00.png", "/x/b/good/01.png", "/x/b/good/01.jpg"]
    )
    assert [str(name) for name in found.values()] == [
        "a/good/00",
        "b/good/00",
        "b/good/01.png",
        "b/good/01.jpg",
    ]


def test_predictions_of_two_checkpoints_are_both_kept(
    parts: Path, datamodule: Folder, tmp_path: Path
) -> None:
    checkpoints = [fitted(tmp_path, datamodule), fitted(tmp_path, datamodule)]
    loose = tmp_path / "loose.ckpt"
    loose.write_bytes(checkpoints[0].read_bytes())
    for folder in (parts / "bad", parts / "good"):
        for checkpoint in (*checkpoints, loose):
            engine_in(tmp_path).predict(
                tiny(), dataset=PredictDataset(folder), ckpt_path=checkpoint
            )
    found = sorted(
        str(table.relative_to(tmp_path / "Sgfr")) for table in tmp_path.rglob("scores.csv")
    )
    assert found == [
        *(
            f"parts/v{run}/predictions/{name}/scores.csv"
            for run in (0, 1)
            for name in ("bad", "good")
        ),
        "predictions/loose-bad/scores.csv",
        "predictions/loose-good/scores.csv",
    ]
    for table in tmp_path.rglob("scores.csv"):
        number = len(list((parts / table.parent.name.split("-")[-1]).iterdir()))
        assert len(list(table.parent.glob("images/**/*.png"))) == number
        assert json.loads((table.parent / "about.json").read_text(encoding="utf-8"))["checkpoint"]
    assert not (tmp_path / "Sgfr" / "latest").exists()  # where anomalib's next run puts a link


def test_a_test_of_another_checkpoint_leaves_the_runs_own(
    datamodule: Folder, tmp_path: Path
) -> None:
    first = fitted(tmp_path, datamodule)
    engine_in(tmp_path).test(tiny(), datamodule=datamodule, ckpt_path=first, verbose=False)
    second = fitted(tmp_path, datamodule)
    before = (first.parents[2] / "test_scores.csv").stat().st_mtime_ns
    loose = tmp_path / "loose.ckpt"
    loose.write_bytes(first.read_bytes())
    for checkpoint in (first, loose):
        engine_in(tmp_path).test(tiny(), datamodule=datamodule, ckpt_path=checkpoint, verbose=False)
    tables = sorted(
        str(table.relative_to(tmp_path / "Sgfr" / "parts"))
        for table in tmp_path.rglob("test_scores.csv")
    )
    assert tables == [
        "v0/test_scores.csv",
        "v0/tests/parts/test_scores.csv",
        "v1/tests/loose-parts/test_scores.csv",
    ]
    assert (first.parents[2] / "test_scores.csv").stat().st_mtime_ns == before
    assert second.parents[2].name == "v1"


def test_pictures_of_equal_names_keep_their_folders(datamodule: Folder, tmp_path: Path) -> None:
    checkpoint = fitted(tmp_path, datamodule)
    for line in ("l1", "l2"):
        for index in range(2):
            write_image(tmp_path / "line" / line / "good" / f"{index:02}.png", index)
    engine_in(tmp_path).predict(
        tiny(), dataset=PredictDataset(tmp_path / "line"), ckpt_path=checkpoint
    )
    pictures = checkpoint.parents[2] / "predictions" / "line" / "images"
    assert sorted(str(path.relative_to(pictures)) for path in pictures.rglob("*.png")) == [
        f"{line}/good/{index:02}.png" for line in ("l1", "l2") for index in range(2)
    ]


def test_a_second_run_draws_into_its_own_folder(
    parts: Path, datamodule: Folder, tmp_path: Path
) -> None:
    model = tiny()
    engine_in(tmp_path / "one").fit(model, datamodule=datamodule)
    for name in ("one", "two"):
        engine_in(tmp_path / name).predict(model, dataset=PredictDataset(parts / "bad"))
    assert [len(list((tmp_path / name).rglob("*.png"))) for name in ("one", "two")] == [6, 6]


def test_a_folder_of_the_users_own(parts: Path, datamodule: Folder, tmp_path: Path) -> None:
    checkpoint = fitted(tmp_path, datamodule)
    own = RunFolder(tmp_path / "own")
    engine_in(tmp_path, callbacks=[own]).predict(
        tiny(), dataset=PredictDataset(parts / "bad"), ckpt_path=checkpoint
    )
    assert (tmp_path / "own" / "scores.csv").is_file()
    assert len(list((tmp_path / "own" / "images").rglob("*.png"))) == 6


@pytest.mark.parametrize("update", [False, True])
def test_going_on_without_update_is_told(
    update: bool, datamodule: Folder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = fitted(tmp_path, datamodule)
    with caplog.at_level(logging.WARNING):
        engine_in(tmp_path).fit(
            tiny(update=update, visualizer=False), datamodule=datamodule, ckpt_path=checkpoint
        )
    assert (
        "nothing is learnt from these images. Pass --model.update true" in caplog.text
    ) is not update


_KILLED = """
import os, signal, sys
from pathlib import Path
from anomalib.engine import Engine
from anomalib.engine import Engine
from lightning.pytorch import Callback
from tests.conftest import folder_datamodule
from tests.engine.test_run_folder import tiny
class Kill(Callback):
    def on_train_batch_end(self, *_):
        os.kill(os.getpid(), signal.SIGKILL)
Engine(default_root_dir=sys.argv[2], logger=False, callbacks=[Kill()]).fit(
    tiny(visualizer=False), datamodule=folder_datamodule(Path(sys.argv[1])))
"""


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_a_killed_run_leaves_latest(parts: Path, datamodule: Folder, tmp_path: Path) -> None:
    first = fitted(tmp_path, datamodule)
    done = subprocess.run(
        [sys.executable, "-c", _KILLED, parts, tmp_path],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert (tmp_path / "Sgfr" / "parts" / "latest").resolve() == first.parents[2]


def test_exports_of_two_checkpoints_are_both_kept(
    datamodule: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint = fitted(tmp_path, datamodule)
    loose = tmp_path / "loose.ckpt"
    loose.write_bytes(checkpoint.read_bytes())
    made = [
        Engine(logger=False).export(tiny(), "torch", ckpt_path=path, **root)
        for path in (checkpoint, loose)
        for root in ({}, {"export_root": Path("asked")})
    ]
    usual = Path("weights/torch/model.pt")
    expected = [
        checkpoint.parents[2] / usual,
        "asked" / usual,
        tmp_path / "loose_export" / usual,
        "asked" / usual,
    ]
    assert made == expected
    assert not (tmp_path / "results").exists()
