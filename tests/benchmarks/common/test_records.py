import dataclasses
import inspect
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.common import records
from benchmarks.common.records import METRICS, Record, Spec, merge, read, write_text


def record(**changes: Any) -> Record:
    fields: dict[str, Any] = {
        "dataset": "mtd",
        "split": "tile",
        "model": "sgfr",
        "arguments": {"num_atoms": 5},
        "backbone": "tf_efficientnet_lite0",
        "image_size": [256, 256],
        "seed": 0,
        "limit_train": None,
        "versions": {"torch": "2"},
    }
    return Record(**{**fields, **changes})


def test_a_record_survives_the_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "results.json"
    full = record(
        n_train=3,
        metrics={**dict.fromkeys(METRICS), "image_AUROC": 0.5},
        per_defect={"Crack": 0.25},
        fit_s=1.5,
        bank_atoms=7,
    )
    merge(path, [full])
    assert read(path) == [full]


def test_the_file_has_the_documented_fields(tmp_path: Path) -> None:
    merge(tmp_path / "r.json", [record()])
    (row,) = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    documented = {
        line.strip().split(" (")[0]
        for text in (Spec.__doc__, Record.__doc__)
        for line in inspect.cleandoc(text or "").splitlines()
        if line.startswith("    ") and " (" in line and not line.startswith("     ")
    }
    assert set(row) == documented
    assert set(row["metrics"]) == {"image_AUROC", "image_F1Max", "pixel_AUROC", "pixel_AP", "AUPRO"}


def test_the_same_run_is_replaced_and_another_one_added(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    merge(path, [record(error="out of memory"), record(seed=1)])
    merge(path, [record(fit_s=2.0)])
    assert {(item.seed, item.fit_s, item.error) for item in read(path)} == {
        (0, 2.0, None),
        (1, None, None),
    }


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 3},
        {"arguments": {"num_atoms": 1}},
        {"limit_train": 4},
        {"split": "canonical"},
        {"image_size": [8, 8]},
    ],
)
def test_every_part_of_a_spec_tells_runs_apart(change: dict[str, Any]) -> None:
    assert record().key != record(**change).key
    assert record(fit_s=1.0).key == record(fit_s=2.0).key


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"metrics": {"image_AUROC": 0.5}}, "metrics"),
        ({"metrics": {**dict.fromkeys(METRICS), "AUPRO": 71.5}}, "AUPRO"),
        ({"per_defect": {"Crack": -0.1}}, "Crack"),
        ({"fit_s": -1.0}, "fit_s"),
        ({"fit_s": float("nan")}, "fit_s"),
    ],
)
def test_what_is_no_measurement_is_refused(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        record(**change)


@pytest.mark.parametrize("text", ["{", '[{"dataset": "mtd"}]', '[{"colour": "red"}]'])
def test_another_file_is_refused_by_name(text: str, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"results\.json"):
        read(path)


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "results.json"
    merge(path, [record()])
    before = path.read_bytes()

    def no_space(descriptor: int) -> None:
        raise OSError(28, "No space left on device", str(descriptor))

    monkeypatch.setattr(records.os, "fsync", no_space)
    with pytest.raises(OSError, match="No space"):
        write_text(path, "x")
    assert path.read_bytes() == before
    assert [item.name for item in tmp_path.iterdir()] == ["results.json"]


def test_committed_results_are_valid_records() -> None:
    files = list((Path(__file__).parents[3] / "benchmarks" / "results").rglob("results.json"))
    assert files
    for path in files:
        found = read(path)
        assert found
        assert all(dataclasses.asdict(item)["versions"] for item in found)
