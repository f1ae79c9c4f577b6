"""The comparison: what it plans, how it resumes, and one real run of it on small images."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.common.records import METRICS, Record, Spec, merge, read, write_text
from benchmarks.common.zoo import resolve_arguments
from benchmarks.compare import command as compare
from benchmarks.compare import report
from tests.benchmarks.conftest import record_of

ROOT = Path(__file__).parents[3]


def fake(spec: Spec, **changes: object) -> Record:
    values = {
        "metrics": dict.fromkeys(METRICS, 0.5),
        "fit_s": 2.0,
        "extract_s": 1.0,
        "sampling_s": 1.0,
    }
    return Record(
        **{**vars(spec), "versions": {"torch": "2"}, **values, "predict_ms": 3.0, **changes}
    )


def command(parts: Path, out: Path, *extra: str) -> list[str]:
    return ["--dataset", "folder", "--root", str(parts), "--out", str(out), *extra]


def test_an_interrupted_comparison_goes_on_where_it_stopped(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = command(parts, tmp_path / "out", "--models", "sgfr,padim", "--seeds", "0,1")
    ran: list[tuple[str, int]] = []

    def run(spec: Spec, _: object) -> Record:
        if len(ran) == 2:
            raise KeyboardInterrupt
        ran.append((spec.model, spec.seed))
        return fake(spec)

    monkeypatch.setattr(compare, "_run", run)
    assert compare.main(arguments) == 130
    assert "goes on" in capsys.readouterr().out
    assert len(read(tmp_path / "out" / "results.json")) == 2

    monkeypatch.setattr(
        compare, "_run", lambda spec, _: (ran.append((spec.model, spec.seed)), fake(spec))[1]
    )
    assert compare.main(arguments) == 0
    assert ran == [("sgfr", 0), ("padim", 0), ("sgfr", 1), ("padim", 1)]
    written = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "--seeds 0,1" in written
    assert str(parts) not in written  # no folder of this machine
    assert (tmp_path / "out" / "folder-trade.png").stat().st_size > 1000


def test_a_failed_run_is_a_row_that_says_why_and_is_tried_again_on_request(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = command(parts, tmp_path, "--models", "sgfr,padim")
    failing = {"padim"}

    def run(spec: Spec, _: object) -> Record:
        if spec.model in failing:
            return Record(**vars(spec), versions={"torch": "2"}, error="exit code 1: out of memory")
        return fake(spec)

    monkeypatch.setattr(compare, "_run", run)
    assert compare.main(arguments) == 1
    assert "Padim - failed: exit code 1: out of memory" in (tmp_path / "README.md").read_text(
        encoding="utf-8"
    )
    failing.clear()
    assert compare.main(arguments) == 1
    assert "failed:" in (tmp_path / "README.md").read_text(encoding="utf-8")
    assert compare.main([*arguments, "--retry-failed"]) == 0
    assert "failed:" not in (tmp_path / "README.md").read_text(encoding="utf-8")
    capsys.readouterr()


def test_an_untimed_run_records_no_times_and_is_run_again_for_them(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = command(parts, tmp_path, "--models", "sgfr")
    ran: list[Spec] = []
    monkeypatch.setattr(compare, "_run", lambda spec, _: (ran.append(spec), fake(spec))[1])
    for _ in range(2):
        assert compare.main([*arguments, "--untimed"]) == 0
    (record,) = read(tmp_path / "results.json")
    assert record.extract_s is record.fit_s is record.sampling_s is record.predict_ms is None
    assert record.metrics == fake(record).metrics
    assert len(ran) == 1
    assert compare.main(arguments) == 0
    (record,) = read(tmp_path / "results.json")
    assert record.fit_s == 2.0
    assert len(ran) == 2
    assert "not timed" in capsys.readouterr().out


def test_the_command_is_kept_with_what_its_memory_depends_on(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "_run", lambda spec, _: fake(spec))
    monkeypatch.delenv("MALLOC_MMAP_THRESHOLD_", raising=False)
    for value in (None, "1048576"):
        if value:
            monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", value)
        assert compare.main(command(parts, tmp_path, "--models", "sgfr")) == 0
    plain, with_setting = (tmp_path / "commands.txt").read_text(encoding="utf-8").splitlines()
    assert plain.startswith("python -m benchmarks.compare --dataset folder --root DIR --out DIR")
    assert with_setting == f"MALLOC_MMAP_THRESHOLD_=1048576 {plain}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "mtd"], "git clone"),
        (["--dataset", "mtd", "--root", "nowhere"], "git clone"),
        (["--dataset", "elpv-mono", "--models", "efficientad"], "efficientad"),
        (["--dataset", "elpv-mono", "--split", "tile"], "has none"),
        (["--dataset", "elpv-mono", "--limit-train", "100000"], "limit_train"),
        (["--dataset", "elpv-mono", "--set", "sgfr.colour=1"], "colour"),
        (["--dataset", "elpv-mono", "--set", "bank_size=1"], "MODEL.ARGUMENT=VALUE"),
    ],
)
def test_bad_arguments_are_refused_before_anything_runs(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        compare.main([*arguments, "--out", str(tmp_path / "out")])
    assert message in capsys.readouterr().err + str(stopped.value.code)
    assert not (tmp_path / "out").exists()


def test_arguments_are_recorded_in_full_and_as_json() -> None:
    for model in ("sgfr", "patchcore", "padim", "mhpatchcore"):
        resolved = resolve_arguments(model, {})
        assert json.loads(json.dumps(resolved)) == resolved
    assert resolve_arguments("sgfr", {"num_atoms": 3})["num_atoms"] == 3
    assert {"bank_size", "solver", "num_atoms", "regularisation", "blur"} <= set(
        resolve_arguments("sgfr", {})
    )


def test_a_row_is_the_median_over_seeds_and_the_best_is_bold() -> None:
    base = {
        "dataset": "elpv-mono",
        "split": None,
        "backbone": "b",
        "image_size": [256, 256],
        "limit_train": None,
    }
    scores = {"sgfr": (0.9, 0.8, 0.85), "padim": (0.7, 0.7, 0.9)}
    records = [
        fake(
            Spec(**base, model=model, arguments=resolve_arguments(model, {}), seed=seed),
            metrics={**dict.fromkeys(METRICS), "image_AUROC": score},
        )
        for model, values in scores.items()
        for seed, score in enumerate(values)
    ]
    sgfr, padim = report.table(records).splitlines()[-2:]
    assert sgfr.startswith("| Sgfr | 3 | **85.0** |")
    assert padim.startswith("| Padim | 3 | 70.0 |")


@pytest.mark.parametrize(("data_sets", "pictures"), [(4, 4), (5, 0)])
def test_pictures_are_drawn_of_a_few_data_sets(
    data_sets: int, pictures: int, tmp_path: Path
) -> None:
    base = {
        "dataset": "elpv-mono",
        "split": None,
        "backbone": "b",
        "image_size": [256, 256],
        "seed": 0,
    }
    arguments = resolve_arguments("sgfr", {})
    merge(
        tmp_path / "results.json",
        [
            fake(
                Spec(
                    **base, model="sgfr", arguments=arguments, limit_train=images, contamination=0.1
                )
            )
            for images in range(1, data_sets + 1)
        ],
    )
    write_text(tmp_path / "commands.txt", "a command\n")
    report.write(tmp_path)
    drawn = [path.name for path in tmp_path.glob("*.png")]
    assert len(drawn) == pictures
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert all(f"]({name})" in text and "%" not in name for name in drawn)
    assert text.count("### ") == data_sets


def test_each_backbone_and_image_size_of_the_same_data_has_its_own_pictures(tmp_path: Path) -> None:
    base = {"dataset": "elpv-mono", "split": None, "seed": 0, "model": "sgfr", "limit_train": None}
    settings = (("resnet18", 256), ("wide_resnet50_2", 256), ("resnet18", 320))
    merge(
        tmp_path / "results.json",
        [
            fake(
                Spec(
                    **base,
                    arguments=resolve_arguments("sgfr", {}),
                    backbone=backbone,
                    image_size=[size] * 2,
                )
            )
            for backbone, size in settings
        ],
    )
    write_text(tmp_path / "commands.txt", "a command\n")
    report.write(tmp_path)
    assert {path.name for path in tmp_path.glob("*.png")} == {
        f"elpv-mono-{backbone}-{size}-px-trade.png" for backbone, size in settings
    }


def test_a_win_is_not_claimed_where_no_other_model_ran(tmp_path: Path) -> None:
    write_text(tmp_path / "commands.txt", "a command\n")
    merge(tmp_path / "results.json", [record_of("sgfr", 0, 0.9)])
    report.write(tmp_path)
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "No other model is among these runs." in text
    assert "Patchcore" not in text
    merge(tmp_path / "results.json", [record_of("patchcore", 0, 0.8)])
    report.write(tmp_path)
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "Nowhere among these runs, over the seeds that both have." in text
    assert "Patchcore runs with `MALLOC_MMAP_THRESHOLD_" in text


def test_a_loss_is_counted_over_the_seeds_that_both_ran(tmp_path: Path) -> None:
    merge(
        tmp_path / "results.json",
        [
            record_of("sgfr", 0, 0.9),
            record_of("sgfr", 1, 0.5),
            record_of("sgfr", 2, 0.5),
            record_of("padim", 0, 0.8),
            record_of("patchcore", 0, 0.95),
        ],
    )
    write_text(tmp_path / "commands.txt", "a command\n")
    report.write(tmp_path)
    losses = (tmp_path / "README.md").read_text(encoding="utf-8").split("## Where Sgfr loses")[1]
    assert "image_AUROC: 90.0 against 95.0 of Patchcore (seed 0)." in losses
    assert "Padim" not in losses.split("!")[0]

    elsewhere = tmp_path / "no run with the defaults"
    changed = [
        record_of("sgfr", 0, 0.9, solver="omp"),
        record_of("sgfr", 0, 0.99, solver="omp", num_atoms=1),
    ]
    merge(elsewhere / "results.json", [*changed, record_of("patchcore", 0, 0.95)])
    write_text(elsewhere / "commands.txt", "a command\n")
    report.write(elsewhere)
    text = (elsewhere / "README.md").read_text(encoding="utf-8")
    assert "image_AUROC: 90.0 of Sgfr (solver omp) against 95.0 of Patchcore." in text


@pytest.mark.slow
def test_a_real_run_of_two_models_one_of_which_fails(parts: Path, tmp_path: Path) -> None:
    arguments = command(
        parts, tmp_path, "--models", "sgfr,padim", "--image-size", "64", "--limit-train", "6"
    )
    arguments += ["--set", "sgfr.bank_size=50", "--set", "padim.n_features=100000"]
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.compare", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 1, run.stderr
    sgfr, padim = sorted(read(tmp_path / "results.json"), key=lambda item: item.model != "sgfr")
    assert "n_features" in (padim.error or "")
    assert sgfr.error is None
    assert (sgfr.n_train, sgfr.n_test, sgfr.bank_atoms) == (6, 12, 174)
    paths = 6 * (len(str(parts / "good" / "00.png")) + 1)
    accounts = 174 * 40 + 4 * (
        4 + 4 + 8
    )  # of four banks: atoms' accounts and origins, unit, nominal and threshold
    assert 0 < (sgfr.bank_bytes or 0) - 2 * (50 * (24 + 40 + 112) + 24 * 192) - accounts <= paths
    assert all(value is not None and 0 <= value <= 1 for value in sgfr.metrics.values())
    assert 0 < (sgfr.sampling_s or 0) < (sgfr.fit_s or 0)
    assert (sgfr.fit_peak_rss_mb or 0) > 100
    kept = json.loads((tmp_path / "curves" / f"{sgfr.name}.json").read_text(encoding="utf-8"))
    assert [kept["roc"][axis][end] for axis in (0, 1) for end in (0, -1)] == [0.0, 1.0, 0.0, 1.0]
    assert kept["pro"][0][-1] > 0.3 * 0.9
    assert max(len(curve[0]) for curve in kept.values()) <= 300
    for picture in ("trade", "curves", "examples"):
        assert (tmp_path / f"folder-6-training-images-{picture}.png").stat().st_size > 1000


def test_categories_are_averaged_of_models_that_ran_on_all() -> None:
    def of(category: str, model: str, value: float, seed: int = 0) -> Record:
        return dataclasses.replace(record_of(model, seed, value), dataset="mvtec", split=category)

    records = [
        of("bottle", "sgfr", 0.9),
        of("bottle", "sgfr", 0.8, 1),
        of("bottle", "sgfr", 0.99, 2),
        of("grid", "sgfr", 0.7),
        of("grid", "padim", 0.6),
    ]
    (line,) = [
        line
        for line in report.averages(records).splitlines()
        if line.startswith(("| Sgfr", "| Padim"))
    ]
    assert line.startswith("| Sgfr | 80.0 | 80.0 | - |")
    assert "mvtec (b, 256 px), mean of 2 categories" in report.averages(records)
    assert "published" not in report.averages(records)  # of other categories
    whole = [of(f"category {number}", "sgfr", 0.9) for number in range(15)]
    assert (
        "| published: PatchCore, 1%, WideResNet-50, 224 px (arXiv 2106.08265) | 99.0 | - | 98.0 | -"
        " | 93.1 |" in (report.averages(whole))
    )
    assert report.averages(records[:3]) == report.averages([record_of("sgfr", 0)]) == ""
