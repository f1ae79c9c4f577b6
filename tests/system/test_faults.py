"""Faults of a plant: damaged files, killed processes, folders that cannot be written."""

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from anomalib.data import PredictDataset
from anomalib.deploy import ExportType
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DataLoader

from anomalib_sgfr import NominalPostProcessor, Report, ScoreTable, Sgfr, SgfrPostProcessor
from anomalib_sgfr.training import predict_loaders
from tests.conftest import engine_in, fit, folder_datamodule, small, write_image

ROOT = Path(__file__).parents[2]


def changed(checkpoint: Path, folder: Path, **entries: object) -> Path:
    """A copy of a checkpoint with other entries in its state."""
    content = torch.load(checkpoint, weights_only=True)
    for key, value in entries.items():
        name = "model." + key
        if value is None:
            content["state_dict"].pop(name)
        else:
            content["state_dict"][name] = value
    torch.save(content, folder / "changed.ckpt")
    return folder / "changed.ckpt"


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_checkpoint_cut_short_is_named(
    share: float, checkpoint: Path, parts: Path, tmp_path: Path
) -> None:
    cut = tmp_path / "cut.ckpt"
    cut.write_bytes(checkpoint.read_bytes()[: int(share * checkpoint.stat().st_size)])
    with pytest.raises(ValueError, match=r"cut\.ckpt' is not a whole checkpoint"):
        Sgfr.load_from_checkpoint(cut)
    with pytest.raises(Exception) as caught:  # noqa: PT011  # torch's, of several types
        engine_in(tmp_path).predict(
            small(), dataset=PredictDataset(parts / "bad"), ckpt_path=str(cut)
        )
    assert any("cut.ckpt' is not a whole checkpoint" in note for note in caught.value.__notes__)


@pytest.mark.parametrize(
    "content",
    [{"a": 1}, [1, 2], torch.zeros(3), torch.nn.Linear(2, 2)],
    ids=["mapping", "list", "tensor", "module"],
)
def test_another_file_of_pytorch_is_named(content: object, parts: Path, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "other.ckpt")
    with pytest.raises(Exception) as caught:  # noqa: PT011  # Lightning's, of several types
        engine_in(tmp_path).predict(
            small(), dataset=PredictDataset(parts / "bad"), ckpt_path=str(tmp_path / "other.ckpt")
        )
    said = "other.ckpt' is not a checkpoint that `anomalib fit --model Sgfr` saved"
    assert any(said in note for note in caught.value.__notes__)


def test_a_checkpoint_of_another_model_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    foreign = changed(checkpoint, tmp_path, **{f"banks.{scale}.stored": None for scale in range(4)})
    with pytest.raises(ValueError, match="is not Sgfr's: it holds no bank"):
        Sgfr.load_from_checkpoint(foreign, map_location="cpu")


class _Code:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.folder),)


def test_code_in_a_checkpoint_is_not_run(checkpoint: Path, parts: Path, tmp_path: Path) -> None:
    content = torch.load(checkpoint, weights_only=True)
    torch.save({**content, "extra": _Code(tmp_path / "ran")}, tmp_path / "code.ckpt")
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        Sgfr.load_from_checkpoint(tmp_path / "code.ckpt", map_location="cpu")
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        engine_in(tmp_path).predict(
            small(), dataset=PredictDataset(parts / "bad"), ckpt_path=str(tmp_path / "code.ckpt")
        )
    assert not (tmp_path / "ran").exists()


def test_a_bank_that_is_not_finite_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    bank = torch.load(checkpoint, weights_only=True)["state_dict"]["model.banks.1.stored"]
    bank[3, 7] = torch.nan
    with pytest.raises(ValueError, match="holds NaN or infinite values"):
        Sgfr.load_from_checkpoint(
            changed(checkpoint, tmp_path, **{"banks.1.stored": bank}), map_location="cpu"
        )


def test_another_blur_is_refused_by_name(checkpoint: Path, parts: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"fitted with blur '4\.0', the model has '2\.0': pass --model\.blur 4\.0"
    ):
        engine_in(tmp_path).predict(
            small(blur=2.0), dataset=PredictDataset(parts / "bad"), ckpt_path=str(checkpoint)
        )


def test_other_layers_are_refused_by_name(checkpoint: Path, parts: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r'fitted with layers .*: pass --model.layers "\[blocks.1, blocks.2, b'
    ):
        engine_in(tmp_path).predict(
            small(layers=["blocks.2"]),
            dataset=PredictDataset(parts / "bad"),
            ckpt_path=str(checkpoint),
        )
    with pytest.raises(
        ValueError,
        match=r'--model.score_layers "\{blocks.1: 0.25, blocks.2: 1, blocks.4: 1, blocks.5: 1\}"',
    ):
        engine_in(tmp_path).predict(
            small(layers=["blocks.1", "blocks.2", "blocks.4"]),
            dataset=PredictDataset(parts / "bad"),
            ckpt_path=str(checkpoint),
        )
    # the default, spelt out
    same = small(
        layers=["blocks.4", "blocks.2", "blocks.1"],
        score_layers={"blocks.1": 0.25, "blocks.5": 1.0, "blocks.4": 1.0, "blocks.2": 1.0},
    )
    engine_in(tmp_path).predict(
        same, dataset=PredictDataset(parts / "bad"), ckpt_path=str(checkpoint)
    )


def test_a_checkpoint_of_one_bank_for_all_scales_is_refused(
    checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(
        ValueError, match="is of an earlier Sgfr, which had one bank for all scales: fit again"
    ):
        Sgfr.load_from_checkpoint(
            changed(checkpoint, tmp_path, bank=torch.randn(5, 152)), map_location="cpu"
        )


def test_another_backbone_is_refused_by_name(checkpoint: Path, parts: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError,
        match="was fitted with backbone 'tf_efficientnet_lite0', the model has 'resnet18'",
    ):
        engine_in(tmp_path).predict(
            small(backbone="resnet18", pre_trained=False),
            dataset=PredictDataset(parts / "bad"),
            ckpt_path=str(checkpoint),
        )


def test_another_image_size_is_scored(checkpoint: Path, parts: Path, tmp_path: Path) -> None:
    processor = Sgfr.configure_pre_processor((128, 192))
    model = Sgfr.load_from_checkpoint(
        checkpoint, map_location="cpu", visualizer=False, evaluator=False
    )
    model.pre_processor.transform = processor.transform
    batch, *_ = engine_in(tmp_path).predict(model, dataset=PredictDataset(parts / "bad"))
    assert batch.anomaly_map.shape[-2:] == (128, 192)


@pytest.mark.parametrize("batch", [None, 2], ids=["one by one", "batches of a worker"])
def test_images_that_cannot_be_read_are_named_and_all_others_predicted(
    batch: int | None, checkpoint: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "images"
    for index in range(6):
        write_image(folder / f"{index}.png", index)
    whole = (folder / "1.png").read_bytes()
    (folder / "1.png").write_bytes(whole[: len(whole) // 2])
    for name in "23":
        (folder / f"{name}.png").write_bytes(b"no image")
    images = PredictDataset(folder)
    data: dict[str, Any] = {"dataset": images}
    if batch:
        loader = DataLoader(images, batch, num_workers=1, collate_fn=images.collate_fn)
        data = {"dataloaders": loader}
    model = Sgfr.load_from_checkpoint(checkpoint, map_location="cpu", visualizer=False)
    table, report = ScoreTable(tmp_path / "scores.csv"), Report(tmp_path / "page.html")
    with pytest.raises(OSError, match=r"1\.png cannot be read: ") as caught:
        engine_in(tmp_path, callbacks=[table, report]).predict(model, **data)
    said = str(caught.value)
    assert all(f"{folder / name}.png cannot be read: " in said for name in "123")
    assert said.count("cannot be read") == 3
    assert said.endswith(". 3 of 6 images were predicted.")
    with (tmp_path / "scores.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [Path(row["image"]).stem for row in rows] == ["0", "4", "5"]
    assert report.contents is not None
    assert [Path(path).stem for path, _ in report.contents.unreadable] == ["1", "2", "3"]
    whole_folder = tmp_path / "whole"
    for name in "045":
        (whole_folder / f"{name}.png").parent.mkdir(exist_ok=True)
        (folder / f"{name}.png").rename(whole_folder / f"{name}.png")
    batches = engine_in(tmp_path).predict(model, dataset=PredictDataset(whole_folder))
    expected = [float(each) for part in batches for each in part.pred_score]
    assert [float(row["score"]) for row in rows] == pytest.approx(expected, rel=1e-5)


def test_of_many_images_that_cannot_be_read_the_log_names_the_rest(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for index in range(12):
        (tmp_path / f"{index:02}.png").write_bytes(b"no image")
    model = Sgfr.load_from_checkpoint(checkpoint, map_location="cpu", visualizer=False)
    with pytest.raises(OSError, match=r"2 more, see the log\. 0 of 12 images were predicted"):
        engine_in(tmp_path).predict(model, dataset=PredictDataset(tmp_path))
    logged = [record.message for record in caplog.records if "cannot be read" in record.message]
    assert [Path(line.split(" cannot")[0]).stem for line in logged] == ["10", "11"]


def test_another_error_of_a_data_set_ends_a_prediction(checkpoint: Path, tmp_path: Path) -> None:
    write_image(tmp_path / "0.png", 0)

    def broken(image: object) -> object:
        msg = f"not an image's fault: {type(image)}"
        raise ValueError(msg)

    model = Sgfr.load_from_checkpoint(checkpoint, map_location="cpu", visualizer=False)
    data = PredictDataset(tmp_path / "0.png", transform=broken)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="not an image's fault"):
        engine_in(tmp_path).predict(model, dataset=data)


def test_an_image_that_memory_lacks_for_is_not_left_out(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_image(tmp_path / "0.png", 0)

    def exhausted(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr("anomalib.data.datasets.base.image.read_image", exhausted)
    monkeypatch.setattr("anomalib.data.predict.read_image", exhausted)
    monkeypatch.setattr(predict_loaders, "read_image", exhausted)
    model = Sgfr.load_from_checkpoint(checkpoint, map_location="cpu", visualizer=False)
    with pytest.raises(MemoryError):
        engine_in(tmp_path).predict(model, dataset=PredictDataset(tmp_path / "0.png"))


def test_no_image_is_looked_for_when_something_else_failed(
    checkpoint: Path, parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Sgfr.load_from_checkpoint(checkpoint, map_location="cpu", visualizer=False)

    def broken(*_: object) -> None:
        msg = "not an image's fault"
        raise ValueError(msg)

    monkeypatch.setattr(model, "validation_step", broken)
    monkeypatch.setattr(model, "predict_step", broken)
    monkeypatch.setattr("anomalib_sgfr.training.errors.time", None)  # looking takes the time
    with pytest.raises(ValueError, match="not an image's fault"):
        engine_in(tmp_path).predict(model, dataset=PredictDataset(parts / "bad"))


@pytest.mark.usefixtures("traced_once")
@pytest.mark.parametrize("export_type", [ExportType.TORCH, ExportType.OPENVINO])
def test_a_failed_export_leaves_the_earlier_one(
    export_type: ExportType, parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small(backbone="test_resnet", layers=["layer1"], pre_trained=False, image_size=64)
    fit(model, folder_datamodule(parts), tmp_path)
    path = engine_in(tmp_path).export(model, export_type, export_root=tmp_path)
    assert path is not None
    files = {file.name: file.read_bytes() for file in path.parent.iterdir()}

    def full(*args: object, **kwargs: object) -> None:
        target = Path(str(kwargs.get("f") or args[1]))
        target.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("torch.save", full)
    monkeypatch.setattr("openvino.save_model", full)
    with pytest.raises(OSError, match="No space left"):
        engine_in(tmp_path).export(model, export_type, export_root=tmp_path)
    assert {file.name: file.read_bytes() for file in path.parent.iterdir()} == files
    assert not list(tmp_path.glob(".export-*"))


def test_a_folder_that_cannot_be_written_is_named(checkpoint: Path, tmp_path: Path) -> None:
    model = Sgfr.load_from_checkpoint(checkpoint, map_location="cpu", visualizer=False)
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    if os.access(locked, os.W_OK):
        pytest.skip("permissions do not bind this user")
    with pytest.raises(PermissionError, match="locked"):
        engine_in(tmp_path).export(model, ExportType.TORCH, export_root=locked)


_KILLED = """
import os, sys, torch
from anomalib.deploy import ExportType
from torch.utils.data import DataLoader
from anomalib.engine import Engine
from anomalib_sgfr import Sgfr
save = torch.save
def slow(obj, f, *args, **kwargs):
    open(f, "wb").write(b"half") if not hasattr(f, "write") else None
    print("writing", flush=True)
    import time; time.sleep(60)
torch.save = slow
model = Sgfr.load_from_checkpoint(sys.argv[1], map_location="cpu", visualizer=False)
engine = Engine(default_root_dir=sys.argv[2], logger=False)
engine.export(model, ExportType.TORCH, export_root=sys.argv[2])
"""


def test_a_killed_export_leaves_the_earlier_one(checkpoint: Path, tmp_path: Path) -> None:
    model = Sgfr.load_from_checkpoint(checkpoint, map_location="cpu", visualizer=False)
    path = engine_in(tmp_path).export(model, ExportType.TORCH, export_root=tmp_path)
    assert path is not None
    before = path.read_bytes()
    process = subprocess.Popen(
        [sys.executable, "-c", _KILLED, str(checkpoint), str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if "writing" in line:
            break
    time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert path.read_bytes() == before
    again = engine_in(tmp_path).export(
        model, ExportType.TORCH, export_root=tmp_path
    )  # the next run works
    assert again == path


def test_a_calibrated_threshold_survives_every_way_back(parts: Path, tmp_path: Path) -> None:
    model = small(post_processor=NominalPostProcessor(0.2))
    engine = engine_in(tmp_path)
    engine.fit(model, datamodule=folder_datamodule(parts))
    threshold = float(model.post_processor.image_threshold)
    restored = Sgfr.load_from_checkpoint(engine.best_model_path, map_location="cpu")
    assert isinstance(restored.post_processor, SgfrPostProcessor)
    assert float(restored.post_processor.image_threshold) == threshold
    assert restored.post_processor.false_alarm_rate == 0.2
    fresh = small()  # as the command line makes it, without naming the post-processor again
    batch, *_ = engine_in(tmp_path).predict(
        fresh, dataset=PredictDataset(parts / "bad"), ckpt_path=engine.best_model_path
    )
    expected, *_ = engine_in(tmp_path).predict(model, dataset=PredictDataset(parts / "bad"))
    torch.testing.assert_close(batch.pred_score, expected.pred_score)
    assert 0.5 < float(batch.pred_score) < 1.0


@pytest.mark.slow
def test_odd_and_damaged_files_are_scored_or_named(
    checkpoint: Path, warm: Path, tmp_path: Path
) -> None:
    script = Path(__file__).with_name("fuzz_predict.py")
    command = [script, checkpoint, tmp_path / "fuzz", "--files", "40", "--refusals", "1"]
    thrown = subprocess.run(
        [warm / "script", *command],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert thrown.returncode == 0, thrown.stdout + thrown.stderr
    assert "0 neither\nanomalib predict on the" in thrown.stdout
    assert thrown.stdout.rstrip().endswith("on 1 of those refused: 1 named")


def test_another_model_of_the_same_trainer_gets_its_loaders_as_they_are() -> None:
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    source = trainer.predict_loop._data_source
    source.instance = [1]
    predict_loaders.prepare(trainer)
    assert isinstance(source.dataloader(), CombinedLoader)
    trainer.strategy._lightning_module = LightningModule()
    assert source.dataloader() is source.instance
    predict_loaders.prepare(trainer)
    assert isinstance(source.dataloader(), CombinedLoader)
