"""Which versions are installed, which are asked for, and whether they can be imported."""

import platform
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from typing import Any, NamedTuple

from anomalib_sgfr.commands.findings import Broken, Check, Finding, said

__all__ = ["OWN", "Demand", "demands", "installed", "package", "pip_install", "python", "version_checks"]

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
        Check("Python", python, f"install Python as {OWN} asks for it", known=platform.python_version()),
        Check(OWN, _own, "pip install ., in its folder", known=installed(OWN) or ""),
    ]
    for name, needs in _NEEDS.items():
        again = f"pip install --force-reinstall {name}"
        checks.append(Check(name, lambda name=name: package(name), again, needs, installed(name) or ""))  # type: ignore[misc]
    return checks


def installed(name: str) -> str | None:
    """Version of a distribution, or ``None`` if there is none."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


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
            applies = asked.marker is None or any(asked.marker.evaluate({"extra": extra}) for extra in _EXTRAS)
            if canonicalize_name(asked.name) == name and applies and asked.specifier:
                yield Demand(asked.specifier, by)


def pip_install(*names: str, again: bool = False) -> str:
    """The command that installs distributions in the ranges that are asked for.

    Args:
        *names (str): Of the distributions.
        again (bool): Whether they are there, but not whole.
    """
    ranges = [name + ",".join(dict.fromkeys(str(asked.range) for asked in demands(name))) for name in names]
    return " ".join(["pip install", *(["--force-reinstall"] if again else []), *(f'"{each}"' for each in ranges)])


def python() -> Finding:
    """Whether this Python is one that is asked for, and one that was tested."""
    from packaging.specifiers import SpecifierSet

    here = platform.python_version()
    if installed(OWN) is None:
        return Finding("ok", "Python", here)
    about = metadata(OWN)
    asked = about["Requires-Python"] or ""
    if not SpecifierSet(asked).contains(here, prereleases=True):
        return Finding("fault", "Python", f"{here}, outside {asked}", f"make an environment with Python {asked}")
    named = [item.rpartition(" ")[2] for item in about.get_all("Classifier") or [] if "Python :: 3." in item]
    if named and here.rpartition(".")[0] not in named:
        tested = ", ".join(named)
        return Finding("note", "Python", f"{here}, not among those tested", f"if something fails, take one of {tested}")
    return Finding("ok", "Python", here)


def _own() -> Finding:
    found = installed(OWN)
    if found is None:
        return Finding(
            "fault", OWN, "runs, but is not installed: versions cannot be judged", "pip install ., in its folder"
        )
    return Finding("ok", OWN, found)


def package(name: str) -> Finding:
    """Whether a package is installed, in a version that is asked for, and can be imported.

    Args:
        name (str): Of the distribution, and of its module.

    Raises:
        Broken: If it is not installed, or cannot be imported.
    """
    found = installed(name)
    if found is None and name in _OPTIONAL:
        raise Broken(Finding("note", name, "not installed", _OPTIONAL[name]))
    if found is None:
        raise Broken(Finding("fault", name, "not installed", pip_install(name)))
    outside = [asked for asked in demands(name) if not asked.range.contains(found, prereleases=True)]
    ranges = ", ".join(f"{asked.range} that {asked.by} asks for" for asked in outside)
    value = f"{found}, outside {ranges}" if outside else found
    names = _TOGETHER if name in _TOGETHER else (name,)
    try:
        import_module(name)
    except Exception as error:
        raise Broken(Finding("fault", name, f"{value}: {said(error)}", pip_install(*names, again=True))) from error
    if outside:
        return Finding("fault", name, value, pip_install(*names))
    return Finding("ok", name, found)
