"""Weights of scales: of one fit, those of the default score as the model does."""

import json
from pathlib import Path

import pytest
from sklearn.metrics import roc_auc_score

from benchmarks import score_weights
from benchmarks.common import data
from benchmarks.common.cases import Case
from benchmarks.common.engine import fitted


@pytest.mark.usefixtures("small_images")
def test_the_default_is_that_of_the_model(parts: Path, tmp_path: Path) -> None:
    arguments = ["--root", str(parts), "--data", "folder", "--seeds", "0", "--out", str(tmp_path)]
    assert score_weights.main(arguments) == 0
    rows = json.loads((tmp_path / "score-weights.json").read_text(encoding="utf-8"))
    by_weights = {row["weights"]: row["image_AUROC"] for row in rows}
    module = data.build("folder", parts, num_workers=0)
    model = fitted(module, 0, image_size=None).eval()
    weights = [scale.score_weight for scale in model.model.embedder.scales]
    name = next(iter(score_weights._WEIGHTS))
    assert list(score_weights._WEIGHTS[name]) == weights
    samples = module.test_data.samples
    scores = [float(model(path).pred_score) for path in samples["image_path"]]
    assert by_weights[name] == pytest.approx(roc_auc_score(samples["label_index"], scores))
    assert "| 0.25, 1, 1, 1 (default) | 100.0 | 100.00 |" in (tmp_path / "README.md").read_text()


@pytest.mark.usefixtures("small_images")
def test_weights_make_a_difference(parts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(score_weights, "roc_auc_score", lambda _, its: seen.append(its) or 0.5)
    score_weights._evaluate(Case("folder", None, 0, parts))
    assert len(seen) == len({tuple(its) for its in seen}) == len(score_weights._WEIGHTS)
    by_name = dict(zip(score_weights._WEIGHTS, seen, strict=True))
    assert (by_name["1, 1, 1, 1"] >= by_name["0, 1, 1, 1"]).all()
