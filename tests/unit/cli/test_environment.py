"""Memory and processors by copies of the system's files; versions of installed packages."""

import importlib.metadata
import os
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace

import pytest
from packaging.requirements import Requirement

from anomalib_sgfr.cli import environment as versions
from anomalib_sgfr.cli.checks import CheckFailed, CheckResult
from anomalib_sgfr.cli.environment import (
    OWN,
    Memory,
    demands,
    memory,
    package,
    pip_install,
    processors,
    python,
    version_checks,
)
from anomalib_sgfr.report import fit_record

GIB = 2**30
MEMINFO = (
    f"MemTotal:       {16 * 2**20} kB\nMemFree: 1 kB\nMemAvailable:   {8 * 2**20}"
    " kB\nHugePages_Total:       0\n"
)


def told(root: Path, group: str, files: dict[str, object]) -> Path:
    for name, text in {"proc/meminfo": MEMINFO, "proc/self/cgroup": group, **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(str(text), encoding="utf-8")
    return root


def two(folder: str, limit: object, used: int, files: int = 0) -> dict[str, object]:
    group = f"sys/fs/cgroup/{folder}"
    return {
        f"{group}/memory.max": limit,
        f"{group}/memory.current": used,
        f"{group}/memory.stat": f"anon 5\ninactive_file {files}\n",
    }


def one(folder: str, limit: int, used: int, files: int) -> dict[str, object]:
    group = f"sys/fs/cgroup/memory/{folder}"
    return {
        f"{group}/memory.limit_in_bytes": limit,
        f"{group}/memory.usage_in_bytes": used,
        f"{group}/memory.stat": f"total_inactive_file {files}\n",
    }


MACHINE = Memory(8 * GIB, 16 * GIB, limited=False)


@pytest.mark.parametrize(
    ("group", "files", "found"),
    [
        ("0::/a/b\n", two("a/b", "max", GIB), MACHINE),
        ("0::/a/b\n", two("a/b", 4 * GIB, 3 * GIB, GIB), Memory(2 * GIB, 4 * GIB, limited=True)),
        (
            "0::/a/b\n",
            {**two("a/b", "max", 0), **two("a", 3 * GIB, GIB)},
            Memory(2 * GIB, 3 * GIB, limited=True),
        ),
        ("0::/../elsewhere\n", two("", 2 * GIB, GIB), Memory(GIB, 2 * GIB, limited=True)),
        (
            "0::/a\n",
            two("a", 12 * GIB, GIB),
            MACHINE,
        ),  # the machine has less than the container may have
        ("0::/a\n", two("a", GIB, 2 * GIB), Memory(0, GIB, limited=True)),
        (
            "4:memory:/a\n0::/\n",
            one("a", 4 * GIB, 3 * GIB, 2 * GIB),
            Memory(3 * GIB, 4 * GIB, limited=True),
        ),
        ("4:memory:/a\n0::/\n", one("a", 9223372036854771712, 3 * GIB, 0), MACHINE),
        ("3:cpu:/a\n", one("a", GIB, 0, 0), MACHINE),
        ("", {}, MACHINE),
    ],
)
def test_memory_is_the_machines_or_the_containers(
    group: str, files: dict[str, object], found: Memory, tmp_path: Path
) -> None:
    assert memory(told(tmp_path, group, files)) == found


def test_memory_that_is_not_told(tmp_path: Path) -> None:
    assert memory(tmp_path) is None


def test_memory_of_this_machine_is_within_its_total() -> None:
    found = memory()
    assert found is None or 0 < found.available <= found.total


@pytest.mark.parametrize(
    ("group", "files", "found"),
    [
        ("0::/a\n", {"a/cpu.max": "150000 100000\n"}, 1.5),
        ("0::/a\n", {"a/cpu.max": "max 100000\n", "cpu.max": "50000 100000\n"}, 0.5),
        ("0::/a\n", {"a/cpu.max": "max 100000\n"}, 4.0),
        ("0::/a\n", {"a/cpu.max": "800000 100000\n"}, 4.0),
        (
            "2:cpu,cpuacct:/a\n",
            {"cpu/a/cpu.cfs_quota_us": "200000\n", "cpu/a/cpu.cfs_period_us": "100000\n"},
            2.0,
        ),
        (
            "2:cpu,cpuacct:/a\n",
            {"cpu/a/cpu.cfs_quota_us": "-1\n", "cpu/a/cpu.cfs_period_us": "100000\n"},
            4.0,
        ),
        ("", {}, 4.0),
    ],
)
def test_processors_are_those_that_may_be_kept_busy(
    group: str,
    files: dict[str, object],
    found: float,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 5}, raising=False)
    root = told(tmp_path, group, {f"sys/fs/cgroup/{name}": text for name, text in files.items()})
    assert processors(root) == found


ASKED = {
    OWN: [
        "torch>=2.9",
        "torchvision>=0.24",
        "anomalib<3,>=2.7",
        "timm",
        'nonsense>3; extra == "dev"',
    ],
    "anomalib": [
        "lightning!=2.6.2,>=2.6",
        'torch>=2.10; extra == "cpu"',
        'openvino>=2024.0; extra == "openvino"',
    ],
    "torchvision": ["torch (==2.14.1)"],
}
INSTALLED = {
    OWN: "0.2.0",
    "torch": "2.14.1+cpu",
    "torchvision": "0.29.1",
    "anomalib": "2.7.0",
    "lightning": "2.6.6",
    "timm": "1.0.7",
    "openvino": "2026.4.1",
}


@pytest.fixture(autouse=True)
def made(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What is installed; a test changes it."""
    there = dict(INSTALLED)

    def version(name: str) -> str:
        if name not in there:
            raise PackageNotFoundError(name)
        return there[name]

    monkeypatch.setattr(fit_record, "version", version)
    monkeypatch.setattr(versions, "requires", ASKED.get)
    monkeypatch.setattr(versions, "import_module", lambda _: None)
    return there


@pytest.mark.parametrize("name", [name for name in INSTALLED if name != OWN])
def test_what_is_as_asked_for_is_well(name: str) -> None:
    assert package(name) == CheckResult("ok", name, INSTALLED[name])


@pytest.mark.parametrize(
    ("name", "version", "value", "remedy"),
    [
        (
            "torch",
            "2.8.0",
            "2.8.0, outside >=2.9 that anomalib-sgfr asks for, ==2.14.1 that torchvision asks for",
            'pip install "torch>=2.9,==2.14.1" "torchvision>=0.24"',
        ),
        (
            "torch",
            "2.14.0",
            "2.14.0, outside ==2.14.1 that torchvision asks for",
            '"torchvision>=0.24"',
        ),
        (
            "anomalib",
            "3.0.0",
            "3.0.0, outside <3,>=2.7 that anomalib-sgfr asks for",
            'pip install "anomalib<3,>=2.7"',
        ),
        (
            "lightning",
            "2.6.2",
            "2.6.2, outside !=2.6.2,>=2.6 that anomalib asks for",
            '"lightning!=2.6.2,>=2.6"',
        ),
        (
            "openvino",
            "2023.3",
            "2023.3, outside >=2024.0 that anomalib asks for",
            'pip install "openvino>=2024.0"',
        ),
    ],
)
def test_what_is_outside_its_range_says_of_whose(
    name: str, version: str, value: str, remedy: str, made: dict[str, str]
) -> None:
    made[name] = version
    found = package(name)
    assert found[:3] == ("fault", name, value)
    assert found.remedy.endswith(remedy)


def test_what_is_before_a_release_is_not_outside_for_that(made: dict[str, str]) -> None:
    made["anomalib"] = "2.8.0rc1"
    assert package("anomalib").mark == "ok"


def broken(name: str) -> CheckResult:
    with pytest.raises(CheckFailed) as caught:
        package(name)
    return caught.value.result


def test_what_is_not_installed(made: dict[str, str]) -> None:
    del made["timm"], made["openvino"]
    assert broken("timm") == CheckResult("fault", "timm", "not installed", 'pip install "timm"')
    found = broken("openvino")
    assert found.mark == "note"  # nothing but exports needs it
    assert 'pip install "anomalib[openvino]"' in found.remedy


def test_what_cannot_be_imported_says_why_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        msg = f"operator {name}::nms\n   does not exist"
        raise RuntimeError(msg)

    monkeypatch.setattr(versions, "import_module", fail)
    found = broken("torchvision")
    assert found.value == "0.29.1: RuntimeError: operator torchvision::nms does not exist"
    assert found.remedy == 'pip install --force-reinstall "torch>=2.9,==2.14.1" "torchvision>=0.24"'
    assert broken("lightning").remedy == 'pip install --force-reinstall "lightning!=2.6.2,>=2.6"'


def about(requires: str, *tested: str) -> SimpleNamespace:
    lines = ["Typing :: Typed", "Programming Language :: Python :: 3"]
    lines += [f"Programming Language :: Python :: {item}" for item in tested]
    table = {"Requires-Python": requires}

    class About(SimpleNamespace):
        def __getitem__(self, name: str) -> str:
            return table[name]

    return About(get_all=lambda _: lines)


@pytest.mark.parametrize(
    ("here", "mark", "value"),
    [
        ("3.12.4", "ok", "3.12.4"),
        ("3.14.0", "note", "3.14.0, not among those tested"),
        ("3.10.9", "fault", "3.10.9, outside >=3.11"),
    ],
)
def test_python(here: str, mark: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions.platform, "python_version", lambda: here)
    monkeypatch.setattr(versions, "metadata", lambda _: about(">=3.11", "3.11", "3.12"))
    found = python()
    assert found[:3] == (mark, "Python", value)
    assert bool(found.remedy) == (mark != "ok")


def test_a_copy_that_is_not_installed_says_so(made: dict[str, str]) -> None:
    del made[OWN]
    own = next(check for check in version_checks() if check.what == OWN)
    assert own.run().mark == "fault"
    made["torch"] = "1.0"
    assert (
        "that torchvision asks for" in package("torch").value
    )  # what others ask for is judged all the same


def test_ranges_are_those_of_the_projects_own_metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    every = map(Requirement, importlib.metadata.requires(OWN) or ())
    asked = {
        each.name: each.specifier for each in every if each.specifier
    }  # extras ask for more of the same
    for name in ("torch", "torchvision", "timm", "lightning", "anomalib"):
        assert [each.range for each in demands(name) if each.by == OWN] == [asked[name]]
    assert {each.by for each in demands("openvino")} == {"anomalib"}
    assert pip_install("timm") == f'pip install "timm{asked["timm"]}"'
