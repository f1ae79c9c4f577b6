"""The edge benchmark: what it plans, measures and reports."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from benchmarks.edge import command, report, run

ROOT = Path(__file__).parents[3]


def test_images_are_resized_as_the_engine_does() -> None:
    image = np.random.default_rng(0).random((1, 3, 70, 333), np.float32)
    expected = functional.interpolate(
        torch.from_numpy(image), (64, 96), mode="bilinear", antialias=True
    )
    np.testing.assert_allclose(run._resized(image, [64, 96]), expected.numpy(), atol=1e-5)
    assert run._resized(image, None) is image


def ran(*arguments: str) -> dict[str, Any]:
    """What a process of its own printed as JSON."""
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, check=True, cwd=ROOT
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_the_runner_measures_without_pytorch(tmp_path: Path) -> None:
    import openvino

    ops = openvino.opset8
    image = ops.parameter([-1, 3, 16, 16], np.float32)
    openvino.save_model(openvino.Model([ops.relu(image)], [image]), tmp_path / "model.xml")
    common = {"config": {}, "runs": 20, "size": [16, 16]}
    jobs = {
        "latency": {"models": {"relu": str(tmp_path / "model.xml")}, "fixed": True, **common},
        "products": {
            "bare": str(tmp_path / "model.xml"),
            "searched": {"sgfr": [[9, 12, 16], [5, 4, 19]]},
            **common,
        },
        "throughput": {"models": {"relu": str(tmp_path / "model.xml")}, **common},
    }
    memory = {"model": str(tmp_path / "model.xml"), "shape": [2, 3, 16, 16], **common}
    found = ran("-m", "benchmarks.edge.run", "memory", json.dumps(memory))
    assert found["runtime_mib"] > 0
    assert found["median_ms"] > 0
    every = (  # in one process, which imports OpenVINO once
        "import json, sys; from benchmarks.edge import run;"
        "found = {step: getattr(run, step)(job) for step, job in json.loads(sys.argv[1]).items()};"
        "assert 'torch' not in sys.modules; print(json.dumps(found))"
    )
    found = ran("-c", every, json.dumps(jobs))
    assert min(found["throughput"]["relu"].values()) > 0
    for step in ("latency", "products"):
        assert all(times["median_ms"] >= times["least_ms"] > 0 for times in found[step].values())


def test_the_report_holds_ratios_differences_and_failures(tmp_path: Path) -> None:
    times = {
        "bare": {"median_ms": 2.0, "least_ms": 1.0},
        "sgfr": {"median_ms": 5.0, "least_ms": 3.0},
    }
    found = {
        "export sgfr": {"bytes": {"model.xml": 3 * 2**20, "fp16.xml": 2**20}},
        "latency f32": times,
        "latency f32, one image": {**times, "sgfr": {"median_ms": 4.0, "least_ms": 2.0}},
        "products": {
            "bare": {"median_ms": 2.0, "least_ms": 1.0},
            "sgfr": {"median_ms": 1.0, "least_ms": 1.0},
        },
        "throughput": {"sgfr": {"alone": 50.0, "together": 75.0, "requests": 2}},
        "memory sgfr-1024 batch 1": {"inference_mib": 99.6, "median_ms": 210.0},
        "memory sgfr batch 1": {"runtime_mib": 50.0, "loaded_mib": 7.0, "inference_mib": 31.0},
        "answers sgfr OpenVINO f32": {
            "map_difference": 2e-4,
            "score_difference": 1e-5,
            "labels_changed": 0,
            "images": 12,
            "image_AUROC": 0.95,
            "reference_image_AUROC": 0.951,
        },
        "export padim": {"error": "no space left"},
    }
    (tmp_path / "edge.json").write_text(json.dumps(found), encoding="utf-8")
    report.report(tmp_path)
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "| sgfr | 5.00 | 2.50 | 3.00 | 4.00 | 2.00 | 2.00 | - | - | - |" in text
    assert "| sgfr | 1,000, 1,000, 5,000, 3,000 | 0.50 | 1.00 | 499 | 2.00 | 1.50 |" in text
    assert "| sgfr | 50.0 | 75.0 | 2 | 1.50 |" in text
    assert "| 1024 x 1024 | 210 | 200 | 100 | 95 |" in text
    assert "| sgfr | 3.0 | 1.0 | - | 7 | 31 | - | - |" in text
    assert "| sgfr | OpenVINO f32 | 2.0e-04 | 1.0e-05 | 0 of 12 | 95.00 (-0.10) |" in text
    assert "- export padim: no space left" in text
    assert (tmp_path / "latency.png").exists()


def test_what_is_unknown_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["--cases", "sgfr-7"])
    assert "unknown sgfr-7; choose from bare, sgfr," in capsys.readouterr().err
