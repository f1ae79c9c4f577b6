"""What is measured of rejected defects is what the product does."""

import json
from functools import partial
from itertools import pairwise
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
    gains = [f"gain {gain:g}" for gain in rejecting._GAINS]
    ways = ["before", *gains, "limit of 98%", "lower threshold", "logistic regression"]
    assert [row["examples"] for row in rows] == [1, 2]
    for row in rows:
        assert list(row["ways"]) == ways
        for shares in row["ways"].values():
            assert shares["other"] is None
            assert all(0.0 <= shares[name] <= 1.0 for name in ("same", "learned", "most"))
            assert shares["good"] <= shares["most"]
        for less, more in pairwise(["before", *gains]):  # no score is lowered
            one, two = row["ways"][less], row["ways"][more]
            assert all(one[name] <= two[name] for name in ("same", "good", "learned"))
    page = (results / "README.md").read_text(encoding="utf-8")
    assert rejecting._DEFAULT in gains
    assert f"| folder | 2 | {rejecting._DEFAULT} |" in page
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
