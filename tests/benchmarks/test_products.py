"""Several products: shares are of the images of each, with all models and without its own."""

import json
from pathlib import Path

import pytest

from benchmarks import products

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "products"


@pytest.mark.usefixtures("small_images")
def test_one_product_is_told_and_is_unknown_without_its_model(
    parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    twice = "folder,folder:same"  # two models of the same images: either may be the answer
    arguments = ["--root", str(parts), "--data", twice, "--seeds", "0", "--out", str(tmp_path)]
    assert products.main(arguments) == 0
    rows = json.loads((tmp_path / "products.json").read_text(encoding="utf-8"))
    assert [row["split"] for row in rows] == [None, "same"]
    # the good ones are known; most of a small image is anomalous where it has a large defect
    assert rows[0]["unknown"] == rows[1]["unknown"] <= 0.5
    assert sum(row["good_right"] for row in rows) == pytest.approx(1.0)
    assert [row["own_AUROC"] for row in rows] == [row["together_AUROC"] for row in rows]
    capsys.readouterr()
    assert products.main(arguments) == 0  # nothing is measured again
    assert "| folder same |" in capsys.readouterr().out


def test_the_committed_page_is_of_the_committed_figures(tmp_path: Path) -> None:
    (tmp_path / "products.json").write_bytes((RESULTS / "products.json").read_bytes())
    products.report(tmp_path)
    assert (tmp_path / "README.md").read_bytes() == (RESULTS / "README.md").read_bytes()
