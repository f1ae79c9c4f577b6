"""The table of scores: what stands in it, and that it is whole or not there."""

import csv
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from anomalib.data import Folder, ImageBatch, PredictDataset
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import CenterCrop, Compose, Normalize, Resize

from anomalib_sgfr import Inspector, Sgfr
from anomalib_sgfr.core.processes import gathered
from anomalib_sgfr.images.pre_processor import SgfrPreProcessor, read_prepared
from anomalib_sgfr.report.score_table import ScoreRow, ScoreTable, each_once, write_scores
from tests.conftest import engine_in, fit, small, write_image
from tests.threaded import in_threads


def outputs(scores: list[float], labels: list[bool] | None = None) -> ImageBatch:
    return ImageBatch(
        image=torch.zeros(len(scores), 3, 4, 4),
        image_path=[f"{index}.png" for index in range(len(scores))],
        anomaly_map=torch.zeros(len(scores), 1, 4, 4),
        pred_score=torch.tensor(scores),
        pred_label=None if labels is None else torch.tensor(labels),
    )


def told(
    folder: Path,
    batch: ImageBatch,
    threshold: float | None,
    table: ScoreTable,
    *,
    peak: torch.Tensor | None = None,
    warning: str | None = None,
) -> list[list[str]]:
    loader = SimpleNamespace(dataset=PredictDataset.__new__(PredictDataset))
    loader.dataset.transform = None
    stage = SimpleNamespace(stage=SimpleNamespace(dataloader_prefix="predict"))
    trainer: Any = SimpleNamespace(
        default_root_dir=folder,
        is_global_zero=True,
        callbacks=[],
        training=False,
        state=stage,
        predict_dataloaders=loader,
    )
    value = None if threshold is None else torch.tensor(threshold)
    processor = SimpleNamespace(warning=warning)
    if value is not None:
        processor.normalized_image_threshold = value
    resize = SimpleNamespace(transform=Resize((4, 4)))
    module: Any = SimpleNamespace(post_processor=processor, peak=peak, pre_processor=resize)
    table.on_predict_start(trainer, module)
    table.on_predict_batch_end(trainer, module, batch, batch, 0)
    table.on_predict_end(trainer, module)
    file = Path(table.file or folder / "scores.csv")
    with file.open(newline="", encoding="utf-8") as text:
        return list(csv.reader(text))


def test_a_line_for_each_image(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    head, *rows = told(tmp_path, outputs([0.25, 0.75], [False, True]), 0.5, ScoreTable())
    assert head == ["image", "score", "threshold", "label", "truth", "row", "column"]
    assert rows == [
        ["0.png", "0.25", "0.5", "0", "", "", ""],
        ["1.png", "0.75", "0.5", "1", "", "", ""],
    ]
    assert not caplog.text
    peak = torch.tensor([[3, 1], [3, 1]])
    batch = outputs([0.25, 0.75])
    batch.image_path = [str(tmp_path / "0.png"), str(tmp_path / "gone.png")]
    write_image(tmp_path / "0.png", 0, (40, 80))
    _, *rows = told(tmp_path, batch, None, ScoreTable(), peak=peak)
    assert [row[5:] for row in rows] == [["35", "30"], ["", ""]]
    assert "row and column are empty for some images: image files are not known" in caplog.text


def test_a_warning_of_the_threshold_is_the_last_column(tmp_path: Path) -> None:
    sentence = (
        "16 good images: at 95% confidence the real false-alarm rate is 17% or less; 59 images"
        " without an alarm would show 5% or less"
    )
    head, *rows = told(tmp_path, outputs([0.25, 0.75]), 0.5, ScoreTable(), warning=sentence)
    assert head[-2:] == ["column", "warning"]
    assert [row[-1] for row in rows] == [sentence, sentence]


@pytest.mark.parametrize("threshold", [None, float("nan")])
def test_without_a_threshold_there_are_no_labels(threshold: float | None, tmp_path: Path) -> None:
    _, row = told(tmp_path, outputs([0.25]), threshold, ScoreTable())
    assert row == ["0.png", "0.25", "", "", "", "", ""]


def test_a_file_of_the_users_own(tmp_path: Path) -> None:
    assert len(told(tmp_path, outputs([0.25]), 0.5, ScoreTable(tmp_path / "deep" / "own.csv"))) == 2
    assert not (tmp_path / "scores.csv").exists()


def test_a_table_is_whole_or_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "scores.csv"
    write_scores([ScoreRow("a.png", 0.5)], file)
    before = file.read_text(encoding="utf-8")

    class Full:
        def writerows(self, rows: object) -> None:
            del rows
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("anomalib_sgfr.report.score_table.csv.writer", lambda _: Full())
    with pytest.raises(OSError, match="No space left"):
        write_scores([ScoreRow("b.png", 0.5)], file)
    assert file.read_text(encoding="utf-8") == before
    assert [path.name for path in tmp_path.iterdir()] == ["scores.csv"]


def test_what_was_predicted_is_not_lost_for_a_table_that_cannot_be_written(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    table = ScoreTable(tmp_path / "file" / "scores.csv")
    table.rows = [ScoreRow("a.png", 0.5)]
    table.on_predict_end(SimpleNamespace(is_global_zero=True, callbacks=[]), None)  # type: ignore[arg-type]
    assert "The table of scores could not be written" in caplog.text


def test_several_processes_tell_of_each_image_once() -> None:
    own = [
        [ScoreRow("c.png", 0.75), ScoreRow("b.png", 0.5)],
        [],
        [ScoreRow("b.png", 0.5), ScoreRow("a.png", 0.25)],
    ]
    rows = [ScoreRow("a.png", 0.25), ScoreRow("b.png", 0.5), ScoreRow("c.png", 0.75)]

    def gather(rank: int) -> list[ScoreRow]:
        return each_once(gathered(own[rank]), lambda row: row.image)

    assert in_threads(gather) == [rows] * 3


@pytest.mark.parametrize("own", [False, True], ids=["attached", "the user's"])
def test_the_table_of_a_run_says_how_and_where_each_score_was_raised(
    own: bool, parts: Path, datamodule: Folder, tmp_path: Path
) -> None:
    model = small()
    table = ScoreTable(tmp_path / "own.csv")
    # validation, which sees the same images, has places of its own
    engine = fit(model, datamodule, tmp_path, callbacks=[table] if own else [])
    threshold = float(model.post_processor.image_threshold)
    inspector = Inspector.load(str(engine.best_model_path))

    def test() -> None:
        engine.test(model, datamodule=datamodule, verbose=False)

    def predict() -> None:
        engine.predict(model, dataset=PredictDataset(parts / "bad"), return_predictions=False)

    for run, name, number in ((test, "test_scores.csv", 12), (predict, "scores.csv", 6)):
        run()
        (file,) = tmp_path.rglob("own.csv" if own else name)
        lines = read(file)
        assert len(lines) == number
        for line in lines:
            with torch.no_grad():
                maps = model.model.score_maps(
                    read_prepared(line["image"], model.pre_processor)[None]
                )
            assert (int(line["row"]), int(line["column"])) == inspector(line["image"]).place
            assert int(line["label"]) == int(float(maps.prediction.pred_score) > threshold)
            assert float(line["score"]) == pytest.approx(
                float(model.post_processor(maps.prediction).pred_score), abs=1e-4
            )


def read(file: Path) -> list[dict[str, str]]:
    with file.open(encoding="utf-8") as opened:
        return list(csv.DictReader(opened))


SIZES = {"square": (96, 96), "wide": (80, 200), "tall": (150, 70)}
CROPPED = [Resize(80, antialias=True), CenterCrop((64, 64)), Normalize([0.5] * 3, [0.3] * 3)]


@pytest.mark.parametrize("kind", ["resize", "crop"])
def test_places_are_pixels_of_the_file_as_inspector_gives_them(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for index in range(6):
        write_image(tmp_path / "good" / f"{index}.png", index)
    for index, (name, size) in enumerate(SIZES.items()):
        write_image(tmp_path / "bad" / f"{name}.png", 50 + index, size, defect=True)
    with Image.open(tmp_path / "bad" / "wide.png") as opened:
        exif = Image.Exif()
        exif[0x0112] = 6
        opened.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "bad" / "turned.png", exif=exif)
    pre_processor: Any = {
        "resize": Sgfr.configure_pre_processor((64, 64)),
        "crop": SgfrPreProcessor(Compose(CROPPED)),
    }[kind]
    model = small(pre_processor=pre_processor)
    good = {"normal_dir": "good", "normal_test_dir": "good", "num_workers": 0}
    engine = fit(model, Folder("p", root=tmp_path, **good), tmp_path / "fit", limit_val_batches=0)
    inspector = Inspector.load(str(engine.best_model_path))
    data = PredictDataset(tmp_path / "bad")
    for batch in (1, 4):
        loader = DataLoader(data, batch_size=batch, collate_fn=data.collate_fn)
        table = ScoreTable(tmp_path / f"{batch}.csv")
        engine_in(tmp_path, callbacks=[table]).predict(
            model, dataloaders=loader, return_predictions=False
        )
        lines = read(tmp_path / f"{batch}.csv")
        assert len(lines) == 4
        if batch == 4 and kind == "crop":  # stretched to one size before they were cropped
            assert {(line["row"], line["column"]) for line in lines} == {("", "")}
            assert "use a batch size of 1" in caplog.text
            continue
        for line in lines:
            found = inspector(line["image"]).place
            assert found is not None
            away = max(abs(int(line["row"]) - found[0]), abs(int(line["column"]) - found[1]))
            # several sizes in a batch: the image that the model sees is another by the stretching
            assert away <= (0 if batch == 1 else 16), line
    if kind != "crop":
        assert "empty" not in caplog.text
