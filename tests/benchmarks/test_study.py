"""Choices: the first of each is the model as it is by default; the others differ from it."""

import json
from pathlib import Path

import pytest
from sklearn.metrics import roc_auc_score

from benchmarks import study
from benchmarks.common import data
from benchmarks.common.cases import Case
from benchmarks.common.engine import fitted

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "study"


@pytest.mark.usefixtures("small_images")
def test_the_first_choice_of_each_is_that_of_the_model(
    parts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[study.Choice, tuple] = {}
    scored = study._scored

    def kept(choice: study.Choice, *arguments: object) -> tuple:
        seen[choice] = scored(choice, *arguments)
        return seen[choice]

    monkeypatch.setattr(study, "_scored", kept)
    rows = study._evaluate(Case("folder", None, 0, parts))
    module = data.build("folder", parts, num_workers=0)
    model = fitted(module, 0, image_size=128, post_processor=False).eval()
    scales = model.model.embedder.scales
    assert list(study.Choice().in_score) == [scale.score_weight for scale in scales]
    assert list(study.Choice().in_map) == [float(scale.in_map) for scale in scales]
    samples = module.test_data.samples
    found = [model(path) for path in samples["image_path"]]
    maps, scores = seen[study.Choice()]
    assert scores == pytest.approx([float(each.pred_score) for each in found], rel=1e-5)
    auroc = roc_auc_score(samples["label_index"], scores)
    for group in study.CHOICES.values():
        assert next(iter(group.values())) == study.Choice()
    assert [row["image_AUROC"] for row in rows if row["choice"] == "0.25, 1, 1, 1"] == [
        pytest.approx(auroc, abs=1e-5)
    ]
    assert all(row["pixel_AP"] > 0.5 for row in rows if row["heading"] == "Blur")
    # larger banks than there are patches, or than the sampler's working size, change nothing here
    full = {"more", "half", "quarter"}
    others = [its for choice, its in seen.items() if not full & {*choice.banks} and choice.divided]
    assert len({tuple(scores) for _, scores in others}) >= len(others) - 2  # of layers of the map
    assert maps[0].shape == (128, 128)


@pytest.mark.usefixtures("small_images")
def test_a_page_has_a_table_of_each_heading(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few = {"Blur": study.CHOICES["Blur"]}
    monkeypatch.setattr(study, "CHOICES", few)
    arguments = ["--root", str(parts), "--data", "folder", "--seeds", "0", "--out", str(tmp_path)]
    assert study.main(arguments) == 0
    assert "Seeds of each\ncolumn: folder 0." in capsys.readouterr().out
    page = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert page.count("\n| ") == 1 + len(few["Blur"])
    assert "| choice | folder | mean |" in page
    monkeypatch.setattr(study, "_evaluate", None)  # it goes on where it stopped
    assert study.main(arguments) == 0
    capsys.readouterr()


def test_the_committed_page_is_of_the_committed_figures(tmp_path: Path) -> None:
    (tmp_path / "study.json").write_bytes((RESULTS / "study.json").read_bytes())
    study.report(tmp_path)
    assert (tmp_path / "README.md").read_bytes() == (RESULTS / "README.md").read_bytes()
    rows = json.loads((RESULTS / "study.json").read_text(encoding="utf-8"))
    assert {(row["heading"], row["choice"]) for row in rows} == {
        (heading, name) for heading, group in study.CHOICES.items() for name in group
    }
