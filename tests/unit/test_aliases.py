"""Earlier names of modules and classes."""

import pickle
import sys
from importlib import import_module

import pytest

from anomalib_sgfr import aliases


@pytest.mark.parametrize("earlier", aliases.MODULES)
def test_every_earlier_module_gives_what_is_there_now(earlier: str) -> None:
    if earlier == "core.programs":
        pytest.importorskip("triton")
    new = import_module(f"anomalib_sgfr.{aliases.MODULES[earlier]}")
    old = import_module(f"anomalib_sgfr.{earlier}")
    for name in getattr(new, "__all__", ()):
        assert getattr(old, name) is getattr(new, name)
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        _ = old.nothing_of_the_kind


@pytest.mark.parametrize("module", aliases.NAMES)
def test_earlier_names_are_read_from_pickles(module: str) -> None:
    new = import_module(f"anomalib_sgfr.{aliases.MODULES[module]}")
    for earlier, name in aliases.NAMES[module].items():
        found = pickle.loads(f"canomalib_sgfr.{module}\n{earlier}\n.".encode())
        assert found is getattr(new, name)


def test_an_earlier_name_belongs_to_its_module() -> None:
    assert hasattr(import_module("anomalib_sgfr.pictures.placement"), "Axis")
    for other in ("report.charts", "inspection.evidence"):
        assert not hasattr(import_module(f"anomalib_sgfr.{other}"), "Axis")


def test_an_earlier_public_name_is_found_by_class_paths() -> None:
    package = import_module("anomalib_sgfr")
    assert package.MimicView is package.ExplanationFigure
    assert "MimicView" not in dir(package)


def test_other_names_are_unknown_as_ever() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"anomalib_sgfr\.fitting\.nothing"):
        import_module("anomalib_sgfr.fitting.nothing")
    aliases.install()
    assert sys.meta_path.count(aliases._Finder) == 1
