"""Environment of this process: memory, processors, and versions of installed packages.

Nothing heavy is imported: a check must work where PyTorch cannot be imported.
"""

import os
import platform
from collections.abc import Iterator
from functools import partial
from importlib import import_module
from importlib.metadata import metadata, requires
from pathlib import Path
from typing import Any, NamedTuple

from anomalib_sgfr.cli.checks import Check, CheckFailed, CheckResult, Mark, error_line
from anomalib_sgfr.report.fit_record import installed

__all__ = [
    "OWN",
    "Demand",
    "Memory",
    "demands",
    "memory",
    "package",
    "pip_install",
    "processors",
    "python",
    "version_checks",
]


_ROOT = Path("/")
# files of control groups, version 2 and 1: limit, use, and the part of the use that can be dropped
_MEMORY_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


class Memory(NamedTuple):
    """Memory of the machine or the container, in bytes.

    Attributes:
        available (int): Memory that a process can still have, file caches included.
        total (int): All memory of the machine, or the limit of the container.
        limited (bool): Whether the limit of a container applies.
    """

    available: int
    total: int
    limited: bool


def memory(root: Path = _ROOT) -> Memory | None:
    """Available memory of the machine or of the control group, whichever is less.

    Args:
        root (Path): Folder that holds ``proc`` and ``sys``.

    Returns:
        Memory | None: ``None`` where the system does not provide it.
    """
    table = _table(root / "proc/meminfo")
    if not {"MemAvailable", "MemTotal"} <= set(table):
        return None
    found = Memory(1024 * table["MemAvailable"], 1024 * table["MemTotal"], limited=False)
    for folder in _groups(root, "memory"):
        for limit_name, used_name, cache_name in _MEMORY_FILES:
            limit = _number(folder / limit_name)
            # version 1 stores "no limit" as a very large number
            if limit is None or limit >= 1024 * table["MemTotal"]:
                continue
            used = _number(folder / used_name) or 0
            used -= _table(folder / "memory.stat").get(cache_name, 0)
            left = max(limit - max(used, 0), 0)
            if left < found.available:
                found = Memory(left, limit, limited=True)
    return found


def processors(root: Path = _ROOT) -> float:
    """Number of processors that this process may use, by its affinity and control group's quota.

    Args:
        root (Path): Folder that holds ``proc`` and ``sys``.
    """
    affinity = getattr(os, "sched_getaffinity", None)
    found = float(len(affinity(0)) if affinity else os.cpu_count() or 1)
    for folder in _groups(root, "cpu"):
        quota, period = [*_text(folder / "cpu.max").split(), "", ""][:2]
        if not quota:
            names = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
            quota, period = (_text(folder / name).strip() for name in names)
        if quota.isdecimal() and period.isdecimal() and int(period):  # neither "max" nor -1
            found = min(found, int(quota) / int(period))
    return found


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """Folders of this process's control group and of its parents, each of which may set a limit."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, names, path = [*line.split(":", 2), "", ""][:3]
        if names and controller not in names.split(","):
            continue
        top = root / "sys/fs/cgroup" / (controller if names else "")
        inner = top / path.lstrip("/")
        yield from (each for each in (inner, *inner.parents) if each == top or top in each.parents)


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError:
        return ""


def _number(file: Path) -> int | None:
    text = _text(file).strip()
    return int(text) if text.isdecimal() else None


def _table(file: Path) -> dict[str, int]:
    """Lines of a name and a number."""
    rows = (line.replace(":", " ").split() for line in _text(file).splitlines())
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdecimal()}


OWN = "anomalib-sgfr"
# packages that are checked, and those that each needs to be imported
_NEEDS: dict[str, tuple[str, ...]] = {
    "torch": (),
    "torchvision": ("torch",),
    "lightning": ("torch",),
    "timm": ("torch", "torchvision"),
    "anomalib": ("torch", "torchvision", "lightning", "timm"),
    "openvino": (),
}
_OPTIONAL = {"openvino": 'pip install "anomalib[openvino]", to export to OpenVINO and run there'}
_TOGETHER = ("torch", "torchvision")  # each is built for a version of the other
_EXTRAS = ("", "openvino")


class Demand(NamedTuple):
    """A range of versions, such as ``>=2.9``, and the distribution that requires it."""

    range: Any  # a packaging.specifiers.SpecifierSet
    by: str


def version_checks() -> list[Check]:
    """Checks of Python, of this package and of the packages that it needs."""
    again = f"install Python as {OWN} asks for it"
    checks = [
        Check("Python", python, again, known=platform.python_version()),
        Check(OWN, _own, "pip install ., in its folder", known=installed(OWN) or ""),
    ]
    for name, needs in _NEEDS.items():
        again = f"pip install --force-reinstall {name}"
        checks.append(Check(name, partial(package, name), again, needs, installed(name) or ""))
    return checks


def demands(name: str) -> Iterator[Demand]:
    """Versions of a distribution that installed distributions require.

    Args:
        name (str): The distribution that is required.

    Yields:
        Demand: A requirement of this package, of anomalib, or of a package that they need.
    """
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    for by in (OWN, *_NEEDS):
        for line in (requires(by) or []) if installed(by) else []:
            asked = Requirement(line)
            marker = asked.marker
            applies = marker is None or any(marker.evaluate({"extra": each}) for each in _EXTRAS)
            if canonicalize_name(asked.name) == name and applies and asked.specifier:
                yield Demand(asked.specifier, by)


def pip_install(*names: str, again: bool = False) -> str:
    """The command that installs distributions in the required versions.

    Args:
        *names (str): Names of the distributions.
        again (bool): Whether they are installed, but damaged.
    """
    command = "pip install --force-reinstall" if again else "pip install"
    for name in names:
        command += f' "{name}{",".join(dict.fromkeys(str(each.range) for each in demands(name)))}"'
    return command


def python() -> CheckResult:
    """Check that this version of Python is among the required and the tested ones."""
    from packaging.specifiers import SpecifierSet

    here = platform.python_version()
    if installed(OWN) is None:
        return CheckResult("ok", "Python", here)
    about = metadata(OWN)
    asked = about["Requires-Python"] or ""
    if not SpecifierSet(asked).contains(here, prereleases=True):
        remedy = f"make an environment with Python {asked}"
        return CheckResult("fault", "Python", f"{here}, outside {asked}", remedy)
    classifiers = about.get_all("Classifier") or []
    tested = [item.rpartition(" ")[2] for item in classifiers if "Python :: 3." in item]
    if tested and here.rpartition(".")[0] not in tested:
        remedy = f"if something fails, take one of {', '.join(tested)}"
        return CheckResult("note", "Python", f"{here}, not among those tested", remedy)
    return CheckResult("ok", "Python", here)


def _own() -> CheckResult:
    found = installed(OWN)
    if found is None:
        value = "runs, but is not installed: versions cannot be judged"
        return CheckResult("fault", OWN, value, "pip install ., in its folder")
    return CheckResult("ok", OWN, found)


def package(name: str) -> CheckResult:
    """Check that a package is installed, in a required version, and can be imported.

    Args:
        name (str): Name of the distribution and of its module.

    Raises:
        CheckFailed: If it is not installed, or cannot be imported.
    """
    found = installed(name)
    if found is None:
        mark: Mark = "note" if name in _OPTIONAL else "fault"
        remedy = _OPTIONAL.get(name) or pip_install(name)
        raise CheckFailed(CheckResult(mark, name, "not installed", remedy))
    outside = [each for each in demands(name) if not each.range.contains(found, prereleases=True)]
    ranges = ", ".join(f"{each.range} that {each.by} asks for" for each in outside)
    value = f"{found}, outside {ranges}" if outside else found
    names = _TOGETHER if name in _TOGETHER else (name,)
    try:
        import_module(name)
    except Exception as error:
        value = f"{value}: {error_line(error)}"
        result = CheckResult("fault", name, value, pip_install(*names, again=True))
        raise CheckFailed(result) from error
    if outside:
        return CheckResult("fault", name, value, pip_install(*names))
    return CheckResult("ok", name, found)
