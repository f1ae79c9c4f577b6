"""Example pictures: which run's maps stand side by side."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmarks.common.records import Record
from benchmarks.compare import plots
from benchmarks.compare.rows import Row, rows_by_data
from tests.benchmarks.conftest import record_of

KINDS = ["good", "crack", "crack", "crack"]


def runs(boxed: int) -> tuple[list[Row], Record, list[Record], Record, Record]:
    """Rows of three models over several seeds, and the runs in them: Sgfr's other solver with the
    seed ``boxed``.
    """
    other = record_of("sgfr", boxed, solver="omp")
    sgfr = [record_of("sgfr", seed) for seed in (0, 1)]
    patchcore, padim = record_of("patchcore", 1), record_of("padim", 2)
    (rows,) = rows_by_data([other, *sgfr, patchcore, padim]).values()
    return rows, other, sgfr, patchcore, padim


def keep_maps(folder: Path, record: Record) -> None:
    images = []
    for number in range(len(KINDS)):
        images.append(str(folder / f"{number}.png"))
        Image.new("RGB", (8, 8)).save(images[-1])
    rng = np.random.default_rng(record.seed)
    to = folder / "work" / record.name
    to.mkdir(parents=True)
    maps = rng.random((len(KINDS), 8, 8)).astype(np.float16)
    np.savez(to / "maps.npz", maps=maps, scores=maps.max((1, 2)), kinds=KINDS, paths=images)


def drawn(folder: Path, rows: list[Row], monkeypatch: pytest.MonkeyPatch) -> tuple[str, list[str]]:
    figures: list[Any] = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, _: figures.append(figure))
    plots.plot_examples(folder, "examples.png", rows, "solar cells")
    (figure,) = figures
    return figure.get_suptitle(), [axis.get_title() for axis in figure.axes if axis.get_title()]


def test_the_maps_side_by_side_are_of_the_seed_that_most_models_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, boxed, sgfr, patchcore, padim = runs(boxed=1)
    for record in (boxed, sgfr[0], padim):  # more of seed 0 than of 2, which has none of Sgfr's
        keep_maps(tmp_path, record)
    heading, titles = drawn(tmp_path, rows, monkeypatch)
    assert heading.startswith("solar cells, seed 0")
    assert titles == ["image", "truth", "Sgfr"]
    for record in (sgfr[1], patchcore):
        keep_maps(tmp_path, record)
    heading, titles = drawn(tmp_path, rows, monkeypatch)
    assert "seed 1" in heading
    assert titles == ["image", "truth", "Sgfr", "Patchcore"]


def test_the_curves_are_of_the_seed_that_most_models_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, boxed, sgfr, patchcore, padim = runs(boxed=0)

    def shown() -> tuple[str, list[str]]:
        figures: list[Any] = []
        monkeypatch.setattr(plots, "save_figure", lambda figure, _: figures.append(figure))
        plots.plot_curves(tmp_path, "curves.png", rows, "solar cells")
        if not figures:
            return "", []
        return figures[0].get_suptitle(), [
            line.get_label() for line in figures[0].axes[0].get_lines()
        ]

    def keep(record: Record, folder: str) -> None:
        to = (
            tmp_path
            / folder
            / (f"{record.name}.json" if folder == "curves" else f"{record.name}/curves.json")
        )
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_text(json.dumps({"roc": [[0, 0.5, 1], [0, 1, 1]], "pro": None}), encoding="utf-8")

    keep(padim, "curves")
    assert shown() == ("", [])  # nothing to compare with Sgfr
    for record in (boxed, sgfr[0]):
        keep(record, "curves")
    assert shown() == ("solar cells, seed 0", ["Sgfr", "Sgfr (solver omp)"])
    for record in (sgfr[1], patchcore):
        keep(record, "work")
    assert shown() == ("solar cells, seed 1", ["Sgfr", "Patchcore"])
    assert (tmp_path / "curves" / f"{patchcore.name}.json").exists()
