"""The table of scores: what stands in it, and that it is whole or not there."""

import csv
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from anomalib.data import Folder, ImageBatch, PredictDataset

from anomalib_sgfr.features.pre_processing import read_prepared
from anomalib_sgfr.inspection import score_table
from anomalib_sgfr.inspection.score_table import Scored, ScoreTable, write_scores
from tests.conftest import fit, small
from tests.threaded import in_threads


def outputs(scores: list[float], labels: list[bool] | None = None) -> ImageBatch:
    return ImageBatch(
        image=torch.zeros(len(scores), 3, 4, 4),
        image_path=[f"{index}.png" for index in range(len(scores))],
        pred_score=torch.tensor(scores),
        pred_label=None if labels is None else torch.tensor(labels),
    )


def told(
    folder: Path, batch: ImageBatch, threshold: float | None, table: ScoreTable, placed: bool = False
) -> list[list[str]]:
    trainer: Any = SimpleNamespace(default_root_dir=folder, is_global_zero=True, callbacks=[])
    value = None if threshold is None else torch.tensor(threshold)
    places = torch.tensor([[3, 1]] * len(batch.pred_score)) if placed else None
    module: Any = SimpleNamespace(post_processor=SimpleNamespace(normalized_image_threshold=value), places=places)
    table.on_predict_start(trainer, module)
    table.on_predict_batch_end(trainer, module, batch, batch, 0)
    table.on_predict_end(trainer, module)
    file = Path(table.file or folder / "scores.csv")
    with file.open(newline="", encoding="utf-8") as text:
        return list(csv.reader(text))


def test_a_line_for_each_image(tmp_path: Path) -> None:
    head, *rows = told(tmp_path, outputs([0.25, 0.75], [False, True]), 0.5, ScoreTable())
    assert head == ["image", "score", "threshold", "label", "truth", "row", "column"]
    assert rows == [["0.png", "0.25", "0.5", "0", "", "", ""], ["1.png", "0.75", "0.5", "1", "", "", ""]]
    _, *rows = told(tmp_path, outputs([0.25, 0.75]), None, ScoreTable(), placed=True)
    assert rows[1] == ["1.png", "0.75", "", "", "", "3", "1"]


@pytest.mark.parametrize("threshold", [None, float("nan")])
def test_without_a_threshold_there_are_no_labels(threshold: float | None, tmp_path: Path) -> None:
    _, row = told(tmp_path, outputs([0.25]), threshold, ScoreTable())
    assert row == ["0.png", "0.25", "", "", "", "", ""]


def test_a_file_of_the_users_own(tmp_path: Path) -> None:
    assert len(told(tmp_path, outputs([0.25]), 0.5, ScoreTable(tmp_path / "deep" / "own.csv"))) == 2
    assert not (tmp_path / "scores.csv").exists()


def test_a_table_is_whole_or_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "scores.csv"
    write_scores([Scored("a.png", 0.5)], file)
    before = file.read_text(encoding="utf-8")

    class Full:
        def writerows(self, rows: object) -> None:
            del rows
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("anomalib_sgfr.inspection.score_table.csv.writer", lambda _: Full())
    with pytest.raises(OSError, match="No space left"):
        write_scores([Scored("b.png", 0.5)], file)
    assert file.read_text(encoding="utf-8") == before
    assert [path.name for path in tmp_path.iterdir()] == ["scores.csv"]


def test_what_was_predicted_is_not_lost_for_a_table_that_cannot_be_written(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    table = ScoreTable(tmp_path / "file" / "scores.csv")
    table.rows = [Scored("a.png", 0.5)]
    table.on_predict_end(SimpleNamespace(is_global_zero=True, callbacks=[]), None)  # type: ignore[arg-type]
    assert "The table of scores could not be written" in caplog.text


def test_several_processes_tell_of_each_image_once() -> None:
    own = [[Scored("c.png", 0.75), Scored("b.png", 0.5)], [], [Scored("b.png", 0.5), Scored("a.png", 0.25)]]
    rows = [Scored("a.png", 0.25), Scored("b.png", 0.5), Scored("c.png", 0.75)]
    assert in_threads(lambda rank: score_table._of_all_processes(own[rank])) == [rows] * 3


@pytest.mark.parametrize("own", [False, True], ids=["attached", "the user's"])
def test_the_table_of_a_run_says_how_and_where_each_score_was_raised(
    own: bool, parts: Path, datamodule: Folder, tmp_path: Path
) -> None:
    model = small()
    table = ScoreTable(tmp_path / "own.csv")
    # validation, which sees the same images, has places of its own
    engine = fit(model, datamodule, tmp_path, callbacks=[table] if own else [])
    threshold = float(model.post_processor.image_threshold)

    def test() -> None:
        engine.test(model, datamodule=datamodule, verbose=False)

    def predict() -> None:
        engine.predict(model, dataset=PredictDataset(parts / "bad"), return_predictions=False)

    for run, name, number in ((test, "test_scores.csv", 12), (predict, "scores.csv", 6)):
        run()
        (file,) = tmp_path.rglob("own.csv" if own else name)
        with file.open(encoding="utf-8") as opened:
            lines = list(csv.DictReader(opened))
        assert len(lines) == number
        for line in lines:
            with torch.no_grad():
                heard = model.model.hear(read_prepared(line["image"], model.pre_processor)[None])
            assert [int(line["row"]), int(line["column"])] == heard.places[0].tolist()
            assert int(line["label"]) == int(float(heard.predicted.pred_score) > threshold)
            assert float(line["score"]) == pytest.approx(
                float(model.post_processor(heard.predicted).pred_score), abs=1e-4
            )
