"""The import rules bite: a module that breaks one fails ``make lint``."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BROKEN = [
    ("core.neighbours", "timm", "The method needs PyTorch and NumPy alone"),
    ("core.neighbours", "anomalib_sgfr.memory_bank", "Arrows run one way"),
    ("images.reading", "torch", "Images are read without PyTorch"),
    ("training.distributed", "anomalib_sgfr.lightning_model", "Arrows run one way"),
    ("report.page", "anomalib_sgfr.training.callback", "Arrows run one way"),
    ("core.clusters", "anomalib_sgfr.core.certificate", "No circle"),
    ("training.callback", "anomalib_sgfr.plugin", "No module asks for its registration"),
    ("data.mtd", "anomalib_sgfr.lightning_model", "Data sets stand alone"),
    ("memory_bank", "benchmarks.common.scores", "The product does not need its benchmarks"),
]


def lint(copy: Path) -> str:
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-logo", "--no-cache"]
    environment = {**os.environ, "PYTHONPATH": str(copy)}  # not what is installed
    return subprocess.run(
        command, cwd=copy, env=environment, capture_output=True, text=True, check=False
    ).stdout


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = tmp_path_factory.mktemp("copy")
    for name in ("anomalib_sgfr", "benchmarks"):
        shutil.copytree(
            ROOT / name, copy / name, ignore=shutil.ignore_patterns("results", "__pycache__")
        )
    shutil.copy(ROOT / "pyproject.toml", copy)
    return copy


@pytest.fixture(scope="module")
def broken(copy: Path) -> str:
    """What the linter says of a copy with every forbidden import, each inside a function."""
    whole = lint(copy)
    assert " 0 broken" in whole, whole
    for module, imported, _ in BROKEN:
        path = copy / "anomalib_sgfr" / f"{module.replace('.', '/')}.py"
        path.write_text(f"{path.read_text()}\ndef f() -> None:\n    import {imported}\n")
    return lint(copy)


@pytest.mark.parametrize(("module", "imported", "contract"), BROKEN)
def test_a_broken_rule_is_named(module: str, imported: str, contract: str, broken: str) -> None:
    rows = broken.splitlines()
    assert any(contract in row and "BROKEN" in row for row in rows)
    ends = [name.rpartition(".")[2] for name in (module, imported)]
    arrows = (
        f"anomalib_sgfr.{module} -> {imported} (l.",
        ".{} -> .{} (1 import)".format(*ends),  # within a package
    )
    assert any(arrow in row for arrow in arrows for row in rows), broken
