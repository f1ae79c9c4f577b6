from collections.abc import Mapping
from pathlib import Path

from benchmarks import headline
from benchmarks.common.records import METRICS, Record, merge
from benchmarks.common.zoo import resolve_arguments

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def run(model: str, seed: int, auroc: float, **changes: object) -> Record:
    fields: Mapping[str, object] = {
        "dataset": "elpv-mono",
        "split": None,
        "model": model,
        "arguments": resolve_arguments(
            model, {"coreset_sampling_ratio": 0.01} if model == "patchcore" else {}
        ),
        "backbone": "tf_efficientnet_lite0",
        "image_size": [256, 256],
        "seed": seed,
        "limit_train": None,
        "versions": {},
        "metrics": {**dict.fromkeys(METRICS), "image_AUROC": auroc},
    }
    return Record(**{**fields, **changes})  # type: ignore[arg-type]


def test_a_line_takes_the_seeds_of_sgfr_and_patchcore_and_marks_who_ran_with_fewer(
    tmp_path: Path,
) -> None:
    merge(
        tmp_path / "elpv-mono" / "results.json",
        [
            *(run("sgfr", seed, auroc) for seed, auroc in enumerate((0.9, 0.8, 0.7))),
            *(run("padim", seed, auroc) for seed, auroc in enumerate((0.5, 0.95))),
            run("sgfr", 0, 0.1, limit_train=5),
            run("sgfr", 2, 0.1, backbone="resnet18"),
            run("padim", 0, 0.1, backbone="resnet18"),
            run("sgfr", 1, 0.1, arguments=resolve_arguments("sgfr", {"num_atoms": 1})),
            run("padim", 0, 0.1, contamination=0.1),
        ],
    )
    (line,) = headline.table(tmp_path).splitlines()[2:]
    assert (
        line == "| solar cells, mono: image AUROC | **80.0** (70.0 to 90.0) | - "
        "| **72.5** (50.0 to 95.0) (2 of 3) | - | 0, 1, 2 |"
    )

    merge(
        tmp_path / "elpv-mono" / "results.json",
        [
            *(run("patchcore", seed, auroc) for seed, auroc in ((2, 0.75), (1, 0.85), (3, 0.99))),
            run("mhpatchcore", 2, 0.3),
        ],
    )
    (line,) = headline.table(tmp_path).splitlines()[2:]
    assert (
        line
        == "| solar cells, mono: image AUROC | 75.0 (70.0 to 80.0) | 80.0 (75.0 to 85.0) | **95.0**"
        " (1 of 2) | 30.0 (1 of 2) | 1, 2 |"
    )


def test_a_mean_is_of_models_that_have_all_data_sets(tmp_path: Path) -> None:
    for dataset, split, _ in headline._PLACES:
        file = tmp_path / dataset / "results.json"
        merge(file, [run("sgfr", seed, 0.9, dataset=dataset, split=split) for seed in (0, 1)])
        if dataset != "kolektor":
            merge(file, [run("padim", seed, 0.8, dataset=dataset, split=split) for seed in (0, 1)])
    assert (
        headline.table(tmp_path).splitlines()[-1]
        == "| mean of all 9: image AUROC | 90.0 | - | - | - | |"
    )


def test_of_few_images_seeds_that_both_ran_with_count_and_the_larger_median_is_bold(
    tmp_path: Path,
) -> None:
    found = []
    for model, changed, other, aurocs in (
        ("sgfr", {"copies": "turned"}, {"copies": "mirrored"}, (0.8, 0.9, 0.1)),
        (
            "patchcore",
            {"coreset_sampling_ratio": 0.1},
            {"coreset_sampling_ratio": 0.01},
            (0.85, 0.85),
        ),
    ):
        few = {
            "dataset": "kolektor",
            "limit_train": 4,
            "arguments": resolve_arguments(model, changed),
        }
        found += [run(model, seed, auroc, **few) for seed, auroc in enumerate(aurocs)]
        found.append(run(model, 1, 0.99, **{**few, "limit_train": 5}))
        found.append(run(model, 1, 0.99, **{**few, "arguments": resolve_arguments(model, other)}))
    merge(tmp_path / "few-shot" / "results.json", found)
    *others, line = headline.few_table(tmp_path).splitlines()[2:]
    assert line == "| KolektorSDD | **85.0** / **85.0** | - | - | - |"
    assert all(other.endswith(" | - | - | - | - |") for other in others)


def test_the_summary_has_a_row_for_each_data_set_and_marks_ties(tmp_path: Path) -> None:
    merge(
        tmp_path / "elpv-mono" / "results.json",
        [
            *(run("sgfr", seed, auroc) for seed, auroc in enumerate((0.9, 0.8))),
            *(run("patchcore", seed, 0.84, bank_bytes=2**20) for seed in (0, 1, 2)),
            *(run("padim", seed, 0.7) for seed in (0, 1)),
        ],
    )
    rows = headline.summary(tmp_path).splitlines()[2:]
    assert len(rows) == 9
    assert rows[2] == "| solar cells, mono | **85.0** / **84.0** / 70.0 | - | - | - / 1.0 / - |"


def test_images_that_are_not_square_have_a_second_line_at_one_aspect_ratio(tmp_path: Path) -> None:
    at = {"dataset": "kolektor", "image_size": [416, 160]}
    merge(
        tmp_path / "kolektor" / "results.json",
        [
            run("sgfr", 0, 0.8, dataset="kolektor"),
            run("sgfr", 0, 0.9, **at),
            run("patchcore", 0, 0.7, dataset="kolektor"),
            run("patchcore", 0, 0.85, **at),
            run("padim", 0, 0.6, dataset="kolektor"),
        ],
    )
    lines = [line for line in headline.summary(tmp_path).splitlines() if "KolektorSDD" in line]
    assert [line.split(" | ")[:2] for line in lines] == [
        ["| KolektorSDD", "**90.0** / 70.0 / 60.0"],
        ["| KolektorSDD, all at 416 x 160 px", "**90.0** / 85.0 / -"],
    ]
    (line,) = headline.aspect_table(tmp_path).splitlines()[2:]
    assert line == "| KolektorSDD | 416 x 160 | 80.0 / **90.0** | - / - | - / - |"
    each = {"dataset": "mtd", "split": "tile", "own_aspect": True}
    merge(
        tmp_path / "mtd" / "results.json",
        [
            run("sgfr", 0, 0.9, **each),
            run("patchcore", 0, 0.7, dataset="mtd", split="tile"),
        ],
    )
    (line,) = [line for line in headline.summary(tmp_path).splitlines() if "new tiles" in line]
    assert line.startswith("| magnetic tiles, new tiles | **90.0** / 70.0 / - |")


def test_the_documents_show_the_committed_results() -> None:
    for file, name, table in (
        ("README.md", "results", headline.summary(RESULTS)),
        ("benchmarks/README.md", "full results", headline.table(RESULTS)),
        ("benchmarks/README.md", "aspect results", headline.aspect_table(RESULTS)),
        ("benchmarks/README.md", "few results", headline.few_table(RESULTS)),
    ):
        text = (ROOT / file).read_text(encoding="utf-8")
        assert f"<!-- {name} -->\n{table}<!-- end of {name} -->" in text, (
            "run python -m benchmarks.headline"
        )
