"""The rules of the house bite: a module that breaks one fails ``make lint``."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BROKEN = [
    ("anomalib_sgfr/core/neighbours.py", "import timm", "The method needs PyTorch and NumPy alone"),
    (
        "anomalib_sgfr/core/neighbours.py",
        "from anomalib_sgfr.memory_bank import Bank",
        "Arrows run one way",
    ),
    ("anomalib_sgfr/images/reading.py", "import torch", "Images are read without PyTorch"),
    (
        "anomalib_sgfr/training/distributed.py",
        "from anomalib_sgfr.lightning_model import Sgfr",
        "Arrows run one way",
    ),
    (
        "anomalib_sgfr/report/crops.py",
        "def f():\n    from anomalib_sgfr.fitting import learning",
        "Arrows run one",
    ),
    ("anomalib_sgfr/core/clusters.py", "from anomalib_sgfr.core import certificate", "No circle"),
    (
        "anomalib_sgfr/training/callback.py",
        "from anomalib_sgfr.plugin import register",
        "No module asks for its registration",
    ),
    (
        "anomalib_sgfr/report/page.py",
        "from anomalib_sgfr.training.callback import SubspaceSampling",
        "Arrows run one way",
    ),
    (
        "anomalib_sgfr/data/mtd.py",
        "from anomalib_sgfr.lightning_model import Sgfr",
        "Data sets stand alone",
    ),
    (
        "anomalib_sgfr/memory_bank.py",
        "from benchmarks.common import scores",
        "The product does not need its benchmarks",
    ),
]


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = tmp_path_factory.mktemp("house")
    for name in ("anomalib_sgfr", "benchmarks"):
        shutil.copytree(
            ROOT / name, copy / name, ignore=shutil.ignore_patterns("results", "__pycache__")
        )
    shutil.copy(ROOT / "pyproject.toml", copy)
    return copy


def lint(house: Path) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-logo", "--no-cache"]
    environment = {
        **os.environ,
        "PYTHONPATH": str(house),
    }  # this copy, and not the one that is installed
    return subprocess.run(
        command, cwd=house, env=environment, capture_output=True, text=True, check=False
    )


def test_the_house_keeps_its_rules(house: Path) -> None:
    found = lint(house)
    assert found.returncode == 0, found.stdout
    assert " 0 broken" in found.stdout


@pytest.mark.parametrize(("file", "line", "contract"), BROKEN)
def test_a_broken_rule_is_named(file: str, line: str, contract: str, house: Path) -> None:
    module = house / file
    whole = module.read_text(encoding="utf-8")
    try:
        module.write_text(f"{whole}\n{line}\n", encoding="utf-8")
        found = lint(house)
    finally:
        module.write_text(whole, encoding="utf-8")
    assert found.returncode == 1
    assert any(contract in row and "BROKEN" in row for row in found.stdout.splitlines()), (
        found.stdout
    )
