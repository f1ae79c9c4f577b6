"""The benchmark for a graphics card: every step of it, small and on a CPU."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import main


def test_without_a_gpu_it_says_so_and_all_is_well(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "no GPU: nothing was measured.\n"
    assert list(tmp_path.iterdir()) == []


def test_every_step_runs_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.gpu._SIZE", (64, 64))
    monkeypatch.setattr("benchmarks.gpu._SECONDS", 0.0)
    sizes = ["--images", "6", "--single", "2", "--batch", "3", "--sizes", "1,3"]
    assert (
        main(
            [
                "--device",
                "cpu",
                *sizes,
                "--compiler",
                "eager",
                "--models",
                "padim",
                "--out",
                str(tmp_path),
            ]
        )
        == 0
    )
    found = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    assert list(found["score"]) == ["bare", "sgfr", "sgfr, compiled", "padim"]
    assert all(list(of) == ["1", "3"] and of["3"]["ms"] > 0 for of in found["score"].values())
    assert {name: list(of) for name, of in found["fit"].items()} == {
        "bare": ["batch 3", "one batch, the first", "batch 1"],
        "sgfr": ["batch 3", "one batch, the first", "batch 1"],
        "padim": ["batch 3"],
    }
    assert list(found["stages"]["sgfr"]["3"])[:2] == ["backbone", "backbone and pooling"]
    assert len(found["stages"]["sgfr"]["3"]) == 7  # four banks, and the maps
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "| scoring | 1 image | 3 images | MiB of 3 |" in text
    assert "| fit | batch 3 | one batch, the first | batch 1 | MiB |" in text


def test_an_unknown_model_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--device", "cpu", "--models", "padim,spade"])
    assert "unknown spade; choose from padim, patchcore" in capsys.readouterr().err
