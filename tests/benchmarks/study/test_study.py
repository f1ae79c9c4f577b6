"""A study's default is the product: the same figures as through anomalib's Engine."""

import json
from pathlib import Path

import pytest

from benchmarks.common.records import Spec, read
from benchmarks.common.zoo import resolve_arguments
from benchmarks.compare import run as benchmark_run
from benchmarks.study import command, report
from benchmarks.study.evaluation import evaluate
from benchmarks.study.variants import STUDIES, Variant, spec_of

STUDIED = Path(__file__).parents[3] / "benchmarks" / "results" / "studies"


def test_the_default_variant_is_what_the_engine_gives(parts: Path, tmp_path: Path) -> None:
    # a bank of every patch does not depend on the order in which the images were seen
    changes = {"bank_size": 2000}  # of every scale
    variant = Variant("default", changes, image_size=64)
    spec = spec_of(variant, "folder", None, 0)
    (from_study,) = evaluate([spec], parts, tmp_path / "cache")

    layers = ["blocks.2", "blocks.4", "blocks.5"]  # strides 8, 16 and 32, each of weight 1
    arguments = resolve_arguments("sgfr", {**changes, "score_layers": layers})
    engine_spec = Spec(**{**vars(spec), "arguments": arguments})
    benchmark_run.main(json.dumps({**vars(engine_spec), "root": str(parts)}), str(tmp_path))
    from_engine = json.loads((tmp_path / "record.json").read_text(encoding="utf-8"))
    assert from_study.bank_atoms == from_engine["bank_atoms"]
    assert from_study.metrics == pytest.approx(from_engine["metrics"], abs=2e-4)
    assert from_study.per_defect == pytest.approx(from_engine["per_defect"], abs=2e-4)


def test_every_variant_is_told_apart_and_every_study_holds_the_default() -> None:
    for name, variants in STUDIES.items():
        keys = {spec_of(variant, "mtd", "tile", 0).key for variant in variants}
        assert len(keys) == len(variants), name
        default = spec_of(Variant("default"), "mtd", "tile", 0).key
        assert default in keys, name


def test_a_study_goes_on_where_it_stopped(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(
        STUDIES,
        "k",
        [Variant(str(k), {"num_atoms": k, "bank_size": 60}, image_size=64) for k in (1, 3)],
    )
    where = [
        "--root",
        str(parts),
        "--data",
        "folder",
        "--out",
        str(tmp_path),
        "--cache",
        str(tmp_path / "cache"),
    ]
    arguments = ["k", *where, "--seeds", "0"]
    assert command.main(arguments) == 0
    table = (tmp_path / "k" / "README.md").read_text(encoding="utf-8")
    assert table.count("\n| ") == 3
    assert (tmp_path / "k" / "k.png").stat().st_size > 1000
    monkeypatch.setattr(command, "evaluate", None)
    assert command.main(arguments) == 0
    capsys.readouterr()


def test_what_studies_share_runs_once_and_a_median_of_fewer_seeds_says_so(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = {"bank_size": 60}
    shared = Variant("5", small, image_size=64)
    monkeypatch.setitem(
        STUDIES, "k", [shared, Variant("1", {**small, "num_atoms": 1}, image_size=64)]
    )
    monkeypatch.setitem(
        STUDIES, "blur", [shared, Variant("0", {**small, "blur": 0.0}, image_size=64)]
    )
    where = [
        "--root",
        str(parts),
        "--data",
        "folder",
        "--out",
        str(tmp_path),
        "--cache",
        str(tmp_path / "cache"),
    ]
    assert command.main(["k", "blur", *where, "--seeds", "0"]) == 0
    assert "3 of 3" in capsys.readouterr().out
    assert (
        len(read(tmp_path / "k" / "results.json"))
        == len(read(tmp_path / "blur" / "results.json"))
        == 2
    )
    assert "Seed 0, in percent; all else" in (tmp_path / "k" / "README.md").read_text(
        encoding="utf-8"
    )

    monkeypatch.setitem(STUDIES, "k", [shared])
    assert command.main(["k", *where, "--seeds", "1"]) == 0
    monkeypatch.setitem(
        STUDIES, "k", [shared, Variant("1", {**small, "num_atoms": 1}, image_size=64)]
    )
    report.report("k", tmp_path / "k")
    table = (tmp_path / "k" / "README.md").read_text(encoding="utf-8")
    assert "Medians of seeds 0, 1, in percent; (n): of n seeds" in table
    rows = [line.startswith("| 1 |") for line in table.splitlines() if " (1) " in line]
    assert rows == [True]
    capsys.readouterr()


def test_a_plot_has_a_line_for_each_second_part_of_its_labels() -> None:
    pairs = ["100, k 1", "100, k 5", "250, k 1", "250, k 5"]
    assert report._lines(pairs) == {"k 1": {"100": 0, "250": 2}, "k 5": {"100": 1, "250": 3}}
    for labels in (["1", "2"], ["8, 16", "8"], pairs[:3]):
        assert report._lines(labels) == {"": {label: row for row, label in enumerate(labels)}}


def test_long_labels_are_numbers_below_a_plot() -> None:
    assert report._ticks(["1", "affine"]) == ["1", "affine"]
    assert report._ticks(["4, 8, 16 and 8, 16, 32", "1"]) == ["1", "2"]


@pytest.mark.parametrize("name", STUDIES)
def test_committed_records_are_those_of_the_study(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "results.json").write_bytes((STUDIED / name / "results.json").read_bytes())
    monkeypatch.setattr(report, "_plot", lambda *_: None)
    report.report(name, tmp_path)
    assert (tmp_path / "README.md").read_bytes() == (STUDIED / name / "README.md").read_bytes()


def test_there_is_no_page_of_a_study_that_is_gone() -> None:
    assert {page.parent.name for page in STUDIED.glob("*/README.md")} == set(STUDIES)
