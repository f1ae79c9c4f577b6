"""What a look at the machine finds: a line each, also where looking fails.

What memory and processors are left to this process: of the machine, or of the container it runs in.

Which versions are installed, which are asked for, and whether they can be imported.
"""

import io
import logging
import os
import platform
import warnings
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib import import_module
from importlib.metadata import metadata, requires
from pathlib import Path
from typing import Any, Literal, NamedTuple

from anomalib_sgfr.cli.errors import in_one_line
from anomalib_sgfr.report.fit_record import installed

__all__ = [
    "OWN",
    "Check",
    "CheckFailed",
    "CheckResult",
    "Demand",
    "Mark",
    "Memory",
    "demands",
    "error_line",
    "memory",
    "package",
    "pip_install",
    "processors",
    "python",
    "run_check",
    "version_checks",
]


Mark = Literal["ok", "note", "fault"]
_LONGEST = 300  # characters of somebody else's error


class CheckResult(NamedTuple):
    """A line of the screen.

    Attributes:
        mark (Mark): ``"ok"``; ``"note"``, what may be as it is; ``"fault"``, what will not do.
        what (str): What was looked at.
        value (str): What was found.
        remedy (str): What to do; empty where all is well.
    """

    mark: Mark
    what: str
    value: str
    remedy: str = ""


class Check(NamedTuple):
    """Something to look at.

    Attributes:
        what (str): Its name.
        look (Callable[[], CheckResult]): Looks; may raise.
        remedy (str): What to do if it raises something unforeseen.
        needs (tuple[str, ...]): Names of checks without which there is no use in looking.
        known (str): What is known of it without looking.
    """

    what: str
    look: Callable[[], CheckResult]
    remedy: str
    needs: tuple[str, ...] = ()
    known: str = ""


class CheckFailed(Exception):  # noqa: N818
    """A check found what nothing that needs it can do without.

    Args:
        finding (CheckResult): Its line.
    """

    def __init__(self, finding: CheckResult) -> None:
        super().__init__(finding.value)
        self.finding = finding


def run_check(check: Check, broken: MutableMapping[str, str]) -> CheckResult:
    """Carry out a check; whatever it raises is a line too.

    Args:
        check (Check): The check.
        broken (MutableMapping[str, str]): Checks that others need not try to build on, and for each
            the one that broke first; this one is added if it is among them.

    Returns:
        CheckResult: Its line.
    """
    before = f"{check.known}: " if check.known else ""
    culprit = next((broken[name] for name in check.needs if name in broken), None)
    if culprit is not None:
        broken[check.what] = culprit
        return CheckResult(
            "note", check.what, f"{before}not tried without {culprit}", f"see to {culprit} first"
        )
    try:
        with _silence():
            return check.look()
    except CheckFailed as found:
        broken[check.what] = check.what
        return found.finding
    except Exception as error:  # noqa: BLE001  # whatever it is, the screen goes on
        broken[check.what] = check.what
        return CheckResult("fault", check.what, before + error_line(error), check.remedy)


def error_line(error: BaseException) -> str:
    """An error in one line.

    Args:
        error (BaseException): Anybody's.
    """
    text = in_one_line(f"{type(error).__name__}: {error}".removesuffix(": "))
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 4]} ..."


@contextmanager
def _silence() -> Iterator[None]:
    """Leave out what libraries tell when they are imported and used: the line says what matters."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            redirect_stdout(io.StringIO()),
            redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


_ROOT = Path("/")
# limit, use, and what of the use is files that can be dropped: of control groups of version 2 and 1
_MEMORY_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


class Memory(NamedTuple):
    """Memory, in bytes.

    Attributes:
        available (int): What a process can still have, files that can be dropped included.
        total (int): Of the machine, or the limit of the container.
        limited (bool): Whether a container's limit is what counts.
    """

    available: int
    total: int
    limited: bool


def memory(root: Path = _ROOT) -> Memory | None:
    """What is left of the machine's memory, or of its control group's, whichever is less.

    Args:
        root (Path): Where ``proc`` and ``sys`` are.

    Returns:
        Memory | None: ``None`` where the system does not tell.
    """
    told = _table(root / "proc/meminfo")
    if not {"MemAvailable", "MemTotal"} <= set(told):
        return None
    found = Memory(1024 * told["MemAvailable"], 1024 * told["MemTotal"], limited=False)
    for folder in _groups(root, "memory"):
        for names, in_use, droppable in _MEMORY_FILES:
            limit = _number(folder / names)
            if (
                limit is None or limit >= 1024 * told["MemTotal"]
            ):  # version 1 says "none" by a number beyond all
                continue
            used = (_number(folder / in_use) or 0) - _table(folder / "memory.stat").get(
                droppable, 0
            )
            left = max(limit - max(used, 0), 0)
            if left < found.available:
                found = Memory(left, limit, limited=True)
    return found


def processors(root: Path = _ROOT) -> float:
    """How many processors this process may keep busy, by its affinity and its control group's
    quota.

    Args:
        root (Path): Where ``proc`` and ``sys`` are.
    """
    affinity = getattr(os, "sched_getaffinity", None)
    found = float(len(affinity(0)) if affinity else os.cpu_count() or 1)
    for folder in _groups(root, "cpu"):
        quota, period = [*_text(folder / "cpu.max").split(), "", ""][:2]
        if not quota:
            quota, period = (
                _text(folder / "cpu.cfs_quota_us").strip(),
                _text(folder / "cpu.cfs_period_us").strip(),
            )
        if quota.isdecimal() and period.isdecimal() and int(period):  # neither "max" nor -1
            found = min(found, int(quota) / int(period))
    return found


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """Folders of the control group that this process is in, and of those above it: each may have a
    limit.
    """
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, names, path = [*line.split(":", 2), "", ""][:3]
        if names and controller not in names.split(","):
            continue
        home = root / "sys/fs/cgroup" / (controller if names else "")
        inner = home / path.lstrip("/")
        yield from (
            folder for folder in (inner, *inner.parents) if folder == home or home in folder.parents
        )


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
# and what each needs of the others, without which there is no use in importing it
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
    """A range of versions, such as ``>=2.9``, and the distribution that asks for it."""

    range: Any  # a packaging.specifiers.SpecifierSet
    by: str


def version_checks() -> list[Check]:
    """Checks of Python, of this package and of those that matter to it."""
    checks = [
        Check(
            "Python",
            python,
            f"install Python as {OWN} asks for it",
            known=platform.python_version(),
        ),
        Check(OWN, _own, "pip install ., in its folder", known=installed(OWN) or ""),
    ]
    for name, needs in _NEEDS.items():
        again = f"pip install --force-reinstall {name}"
        checks.append(
            Check(name, lambda name=name: package(name), again, needs, installed(name) or "")
        )  # type: ignore[misc]
    return checks


def demands(name: str) -> Iterator[Demand]:
    """What installed distributions ask of one another.

    Args:
        name (str): The distribution that is asked for.

    Yields:
        Demand: Of this package, of anomalib, and of those below it.
    """
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    for by in (OWN, *_NEEDS):
        for line in (requires(by) or []) if installed(by) else []:
            asked = Requirement(line)
            applies = asked.marker is None or any(
                asked.marker.evaluate({"extra": extra}) for extra in _EXTRAS
            )
            if canonicalize_name(asked.name) == name and applies and asked.specifier:
                yield Demand(asked.specifier, by)


def pip_install(*names: str, again: bool = False) -> str:
    """The command that installs distributions in the ranges that are asked for.

    Args:
        *names (str): Of the distributions.
        again (bool): Whether they are there, but not whole.
    """
    ranges = [
        name + ",".join(dict.fromkeys(str(asked.range) for asked in demands(name)))
        for name in names
    ]
    return " ".join(
        [
            "pip install",
            *(["--force-reinstall"] if again else []),
            *(f'"{each}"' for each in ranges),
        ]
    )


def python() -> CheckResult:
    """Whether this Python is one that is asked for, and one that was tested."""
    from packaging.specifiers import SpecifierSet

    here = platform.python_version()
    if installed(OWN) is None:
        return CheckResult("ok", "Python", here)
    about = metadata(OWN)
    asked = about["Requires-Python"] or ""
    if not SpecifierSet(asked).contains(here, prereleases=True):
        return CheckResult(
            "fault",
            "Python",
            f"{here}, outside {asked}",
            f"make an environment with Python {asked}",
        )
    named = [
        item.rpartition(" ")[2]
        for item in about.get_all("Classifier") or []
        if "Python :: 3." in item
    ]
    if named and here.rpartition(".")[0] not in named:
        tested = ", ".join(named)
        return CheckResult(
            "note",
            "Python",
            f"{here}, not among those tested",
            f"if something fails, take one of {tested}",
        )
    return CheckResult("ok", "Python", here)


def _own() -> CheckResult:
    found = installed(OWN)
    if found is None:
        return CheckResult(
            "fault",
            OWN,
            "runs, but is not installed: versions cannot be judged",
            "pip install ., in its folder",
        )
    return CheckResult("ok", OWN, found)


def package(name: str) -> CheckResult:
    """Whether a package is installed, in a version that is asked for, and can be imported.

    Args:
        name (str): Of the distribution, and of its module.

    Raises:
        CheckFailed: If it is not installed, or cannot be imported.
    """
    found = installed(name)
    if found is None and name in _OPTIONAL:
        raise CheckFailed(CheckResult("note", name, "not installed", _OPTIONAL[name]))
    if found is None:
        raise CheckFailed(CheckResult("fault", name, "not installed", pip_install(name)))
    outside = [
        asked for asked in demands(name) if not asked.range.contains(found, prereleases=True)
    ]
    ranges = ", ".join(f"{asked.range} that {asked.by} asks for" for asked in outside)
    value = f"{found}, outside {ranges}" if outside else found
    names = _TOGETHER if name in _TOGETHER else (name,)
    try:
        import_module(name)
    except Exception as error:
        raise CheckFailed(
            CheckResult(
                "fault", name, f"{value}: {error_line(error)}", pip_install(*names, again=True)
            )
        ) from error
    if outside:
        return CheckResult("fault", name, value, pip_install(*names))
    return CheckResult("ok", name, found)
