"""What is measured of rejected defects is what the product does."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch

from anomalib_sgfr.images.pre_processor import read_prepared
from anomalib_sgfr.training.reject import MARGIN, add_defects, find_defect, find_limits
from benchmarks import rejecting
from benchmarks.common import data
from benchmarks.common.engine import fitted

SMALL = partial(fitted, bank_size=200)


def small_fit(module: object, seed: int, **_: object) -> object:
    return SMALL(module, seed, image_size=(64, 64))


@pytest.fixture
def results(parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(rejecting, "_NUMBERS", (1, 2))
    monkeypatch.setattr(rejecting, "_CHOICES", 2)
    monkeypatch.setattr(rejecting, "fitted", small_fit)
    arguments = ["--root", str(parts), "--data", "folder", "--seeds", "0", "--out", str(tmp_path)]
    assert rejecting.main(arguments) == 0
    return tmp_path


def test_every_way_is_counted(results: Path) -> None:
    rows = json.loads((results / "rejecting.json").read_text(encoding="utf-8"))
    ways = ["before", *rejecting._GAINS, "limit of 98%", "lower threshold", "logistic regression"]
    assert len(rows) == 2 * 2 * len(ways)
    assert {row["way"] for row in rows} == set(ways)
    for row in rows:
        assert row["images"] == {"same": 6 - row["examples"], "other": 0, "good": 6}
        assert row["other"] is None
        assert 0.0 <= row["same"] <= 1.0
    before, after = ([row for row in rows if row["way"] == way] for way in ("before", "reject"))
    assert all(one["same"] <= two["same"] for one, two in zip(before, after, strict=True))
    assert all(one["found"] <= two["found"] for one, two in zip(before, after, strict=True))
    page = (results / "README.md").read_text(encoding="utf-8")
    assert "| folder | 2 | reject |" in page
    assert "Seeds 0" in page


def test_scores_are_those_of_a_model_with_the_defects(parts: Path) -> None:
    module = data.build("folder", parts, num_workers=0)
    model = SMALL(module, 0, image_size=(64, 64)).eval()
    own, prepare = model.model, model.pre_processor
    paths = [
        str(path) for name in ("bad", "good_test") for path in sorted((parts / name).iterdir())
    ]
    prepared = [read_prepared(path, prepare) for path in paths]
    region = torch.ones(64, 64, dtype=torch.bool)
    defects = [find_defect(own, image, "2026-01-01 a.png", region) for image in prepared[:2]]
    good = model.post_processor.calibration_scores.good.paths
    limits = find_limits(own, prepare, good, defects).values
    taught = own.with_banks(add_defects(own.fitted_state, defects, limits))
    scorer = rejecting._Scorer(model)
    atoms = [torch.cat(parts) for parts in zip(*(defect.atoms for defect in defects), strict=True)]
    scores = []
    for image in prepared:
        with torch.no_grad():
            (cached,) = scorer.images(own.embed(image[None]), (64, 64), None)
            found = scorer.score(cached, scorer.distances(cached, atoms), limits, rejecting.GAIN)
            expected = float(taught.score_maps(image[None]).pred_score)
        scores.append((cached.score, found))
        assert found == pytest.approx(expected, rel=2e-3)  # patches are kept in 16 bits
    assert any(now > 1.5 * before for before, now in scores)
    assert MARGIN > 0.0
