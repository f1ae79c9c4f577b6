"""Two real processes under Lightning's own data-parallel strategy, against one."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from anomalib.engine import Engine

from anomalib_sgfr import Sgfr
from tests.conftest import folder_datamodule

ROOT = Path(__file__).parents[2]


def run(parts: Path, out: Path, devices: int) -> list[dict[str, Any]]:
    out.mkdir()
    command = [sys.executable, str(Path(__file__).with_name("two_processes.py")), str(parts), str(out), str(devices)]
    finished = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return [torch.load(path, weights_only=True) for path in sorted(out.glob("rank*.pt"))]


@pytest.fixture(scope="module")
def both(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("processes")
    (one,) = run(parts, folder / "one", 1)
    return one, run(parts, folder / "two", 2)


def test_every_process_ends_with_the_same_bank(both: tuple[dict[str, Any], list[dict[str, Any]]]) -> None:
    one, two = both
    assert len(two) == 2
    for mine, theirs, alone in zip(two[0]["banks"], two[1]["banks"], one["banks"], strict=True):
        assert torch.equal(mine, theirs)
        assert len(mine) == len(alone) == 150
        assert not torch.equal(mine, alone)  # it did see the images in another order
    assert two[0]["patches"] == two[1]["patches"] == one["patches"] == 12 * (8 * 8 + 4 * 4)
    assert two[0]["image_AUROC"] == two[1]["image_AUROC"]


def test_the_certificate_holds_and_the_bank_is_as_good(
    both: tuple[dict[str, Any], list[dict[str, Any]]], parts: Path, tmp_path: Path
) -> None:
    one, (two, _) = both
    datamodule = folder_datamodule(parts)
    datamodule.setup()
    worst = {}
    for name, ended in (("one", one), ("two", two)):
        model = Sgfr.load_from_checkpoint(ended["checkpoint"], visualizer=False)
        assert all(map(torch.equal, (bank.atoms for bank in model.model.banks), ended["banks"]))
        engine = Engine(accelerator="cpu", default_root_dir=tmp_path, logger=False)
        batches = engine.predict(model, dataset=datamodule.train_data, return_predictions=True)
        assert batches
        with torch.no_grad():
            lengths = model.model.residual_maps(model.model.embed(torch.cat([batch.image for batch in batches])))
        worst[name] = sum(float(length.max()) for length in lengths)
        assert worst[name] <= ended["largest"]
        assert sum(float(length.mean()) for length in lengths) <= ended["mean"]
    assert worst["two"] < 1.5 * worst["one"]
    # chosen once from all that both hold, not from what would be left of each: the bounds do not add up
    assert two["largest"] < 1.1 * one["largest"]
    assert two["mean"] < 1.1 * one["mean"]


def test_a_checkpoint_of_two_processes_is_an_ordinary_one(
    both: tuple[dict[str, Any], list[dict[str, Any]]],
) -> None:
    one, (two, _) = both
    keys = [set(torch.load(ended["checkpoint"], weights_only=True)["state_dict"]) for ended in (one, two)]
    assert keys[0] == keys[1]
