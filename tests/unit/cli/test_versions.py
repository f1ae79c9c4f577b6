"""Versions that are installed, asked for, and importable, in made circumstances."""

import importlib.metadata
from importlib.metadata import PackageNotFoundError
from types import SimpleNamespace

import pytest
from packaging.requirements import Requirement

from anomalib_sgfr.cli import environment as versions
from anomalib_sgfr.cli.environment import (
    OWN,
    CheckFailed,
    CheckResult,
    demands,
    package,
    pip_install,
    python,
    version_checks,
)
from anomalib_sgfr.report import fit_record

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
