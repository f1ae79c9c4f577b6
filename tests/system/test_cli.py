"""anomalib's own command line, in a process of its own, on small images: what a user types."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml
from anomalib.cli import AnomalibCLI
from anomalib.pipelines.benchmark.generator import BenchmarkJobGenerator
from PIL import Image

CONFIGS = Path(__file__).parents[2] / "configs"
OUTPUT = "weights/lightning/model.ckpt"


def anomalib(
    *arguments: object, cwd: Path, warm: Path | None = None, module: str = "", **environment: str
) -> str:
    """Run a command to its end and return what it printed; fail with that if it failed.

    In an interpreter of its own, or in a fork of one that has imported anomalib, if ``warm`` is
    given.
    """
    console = (warm or Path(sys.executable).parent) / "anomalib"
    result = subprocess.run(
        [*([sys.executable, "-m", module] if module else [console]), *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "200", "TERM": "dumb", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout
    return result.stdout


@pytest.fixture(scope="module")
def data_config(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "data.yaml"
    arguments = {
        "name": "parts",
        "root": str(parts),
        "normal_dir": "good",
        "abnormal_dir": "bad",
        "normal_test_dir": "good_test",
        "mask_dir": "masks",
        "num_workers": 0,
        "val_split_mode": "same_as_test",
    }
    path.write_text(
        yaml.safe_dump({"class_path": "anomalib.data.Folder", "init_args": arguments}),
        encoding="utf-8",
    )
    return path


@pytest.fixture(scope="module")
def trained(data_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of ``anomalib train``, by the short name and nothing imported."""
    cwd = tmp_path_factory.mktemp("run")
    output = anomalib(
        "train",
        "--model",
        "Sgfr",
        "--model.bank_size",
        300,
        "--model.seed",
        0,
        "--data",
        data_config,
        cwd=cwd,
    )
    assert "image_AUROC" in output
    assert "pixel_AUROC" in output
    return cwd / "results" / "Sgfr" / "parts" / "latest"


def test_train_leaves_a_checkpoint_and_pictures(trained: Path) -> None:
    assert (trained / OUTPUT).is_file()
    pictures = sorted((trained / "images").rglob("*.png"))
    assert len(pictures) == 12
    assert (
        Image.open(pictures[0]).width == 4 * Image.open(pictures[0]).height
    )  # image, truth, heatmap, outline


@pytest.mark.parametrize("subcommand", ["test", "validate"])
def test_evaluate_from_the_checkpoint(
    subcommand: str, trained: Path, data_config: Path, warm: Path, tmp_path: Path
) -> None:
    arguments = ("--model", "Sgfr", "--ckpt_path", trained / OUTPUT, "--data", data_config)
    output = anomalib(subcommand, *arguments, cwd=tmp_path, warm=warm)
    assert subcommand != "test" or "image_AUROC" in output


def test_predict_a_folder_by_the_dotted_name(
    trained: Path, parts: Path, warm: Path, tmp_path: Path
) -> None:
    output = anomalib(
        "predict",
        "--model",
        "anomalib_sgfr.Sgfr",
        "--ckpt_path",
        trained / OUTPUT,
        "--data",
        parts / "bad",
        cwd=tmp_path,
        warm=warm,
    )
    assert len(list(tmp_path.rglob("*.png"))) == 6
    (table,) = tmp_path.rglob("scores.csv")
    scores = pd.read_csv(table)
    assert sorted(scores["image"]) == sorted(map(str, (parts / "bad").iterdir()))
    assert (scores["label"] == (scores["score"] > scores["threshold"])).all()
    assert output.count(f"Scores: {table}") == 1  # once, though anomalib has two handlers tell it
    assert output.count(f"Images: {table.parent / 'images'}") == 1
    assert "pin_memory" not in output


def test_fit_through_the_module_without_the_plugin(data_config: Path, tmp_path: Path) -> None:
    arguments = (
        "--model",
        "anomalib_sgfr.Sgfr",
        "--model.solver",
        "omp",
        "--model.layers",
        "[blocks.4]",
    )
    anomalib(
        "fit",
        *arguments,
        "--data",
        data_config,
        cwd=tmp_path,
        module="anomalib_sgfr",
        ANOMALIB_SGFR_PLUGIN="0",
    )
    assert len(list(tmp_path.rglob("model.ckpt"))) == 1


def test_export_to_openvino_runs(trained: Path, parts: Path, warm: Path, tmp_path: Path) -> None:
    output = anomalib(
        "export",
        "--model",
        "Sgfr",
        "--ckpt_path",
        trained / OUTPUT,
        "--export_type",
        "openvino",
        "--export_root",
        tmp_path,
        cwd=tmp_path,
        warm=warm,
    )
    (model,) = tmp_path.rglob("model.xml")
    assert len(output.splitlines()) < 36, output  # each line twice, by anomalib's two handlers
    from anomalib.deploy import OpenVINOInferencer

    prediction = OpenVINOInferencer(model).predict(parts / "bad" / "00.png")
    assert prediction.anomaly_map.shape[-2:] == (256, 256)


def test_help_documents_every_argument(warm: Path, tmp_path: Path) -> None:
    output = anomalib("train", "--model.help", "Sgfr", cwd=tmp_path, warm=warm)
    flat = " ".join(output.split())
    for argument in (
        "backbone",
        "layers",
        "pre_trained",
        "bank_size",
        "solver",
        "num_atoms",
        "regularisation",
        "blur",
    ):
        assert f"--model.init_args.{argument}" in flat or f"--model.{argument}" in flat, output
    assert "Most embeddings (atoms)" in flat
    assert "affine,omp,ridge" in flat


@pytest.mark.parametrize(
    "model",
    ["sgfr", *(pytest.param(name, marks=pytest.mark.slow) for name in ("patchcore", "padim"))],
)
def test_anomalibs_benchmark_pipeline(model: str, parts: Path, warm: Path, tmp_path: Path) -> None:
    config = yaml.safe_load((CONFIGS / f"benchmark_{model}.yaml").read_text(encoding="utf-8"))
    assert config["benchmark"]["data"]["class_path"] == "ELPV"
    config["benchmark"]["data"] = {
        "class_path": "Folder",
        "init_args": {
            "name": "parts",
            "root": str(parts),
            "normal_dir": "good",
            "abnormal_dir": "bad",
            "normal_test_dir": "good_test",
            "num_workers": 0,
            "val_split_mode": "same_as_test",
            "eval_batch_size": {"grid": [4, 6]},
        },
    }
    path = tmp_path / "benchmark.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    output = anomalib("benchmark", "--config", path, cwd=tmp_path, warm=warm)
    tables = list(tmp_path.rglob("results.csv"))
    assert len(tables) == 1, output  # the exit code does not tell
    table = pd.read_csv(tables[0])
    assert sorted(table["data.init_args.eval_batch_size"]) == [4, 6]
    assert {name.lower() for name in table["model.class_path"]} == {model}
    assert table["image_AUROC"].between(0, 1).all()


@pytest.mark.parametrize(
    "path", sorted(CONFIGS.glob("benchmark_*.yaml")), ids=lambda path: path.stem
)
def test_every_benchmark_configuration_names_models_and_data_that_exist(path: Path) -> None:
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    jobs = list(
        BenchmarkJobGenerator(config["accelerator"]).generate_jobs(config["benchmark"], None)
    )
    assert [job.datamodule.category for job in jobs] == ["mono", "poly"]
    assert {type(job.model).__name__ for job in jobs} == {
        config["benchmark"]["model"]["class_path"]
    }


@pytest.mark.parametrize(
    "path",
    [path for path in sorted(CONFIGS.glob("*.yaml")) if not path.name.startswith("benchmark_")],
    ids=lambda path: path.stem,
)
def test_every_configuration_is_parsed_by_the_real_command_line(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        AnomalibCLI(args=["train", "--model", "Sgfr", "--config", str(path), "--print_config"])
    output = capsys.readouterr().out
    assert not stopped.value.code, output
    parsed = yaml.safe_load(output[output.index("seed_everything") :])
    given = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert parsed["model"]["class_path"].endswith("Sgfr")
    assert parsed["data"]["class_path"].split(".")[-1] == given["data"]["class_path"]
    for part in ("model", "data"):
        for name, value in given[part].get("init_args", {}).items():
            assert json.dumps(parsed[part]["init_args"][name]) == json.dumps(value)


def test_there_is_an_edge_and_a_paper_style_run_for_each_data_set() -> None:
    for data in ("mvtecad", "btech", "mtd", "visa", "kolektor", "elpv"):
        for kind, backbone in (("edge", "tf_efficientnet_lite0"), ("paper", "wide_resnet50_2")):
            config = yaml.safe_load((CONFIGS / f"{data}_{kind}.yaml").read_text(encoding="utf-8"))
            assert config["model"]["init_args"]["backbone"] == backbone


def test_the_datamodules_are_known_by_short_name(warm: Path, tmp_path: Path) -> None:
    for name in ("MTD", "ELPV", "anomalib_sgfr.data.MTD"):
        extra = (
            ["--data.root", "somewhere"] if name.endswith("MTD") else ["--data.cell_type", "poly"]
        )
        output = anomalib(
            "train",
            "--model",
            "Sgfr",
            "--data",
            name,
            *extra,
            "--print_config",
            cwd=tmp_path,
            warm=warm,
        )
        parsed = yaml.safe_load(output[output.index("seed_everything") :])
        assert parsed["data"]["class_path"].split(".")[-1] == name.split(".")[-1]
