"""Registration with anomalib, which has no entry point for models of other packages.

``install`` runs at every start of the interpreter (from ``anomalib_sgfr.pth``) and when this
package is imported, so this module imports only what the interpreter has already loaded. It adds an
import finder. When anything has imported ``anomalib.models`` or ``anomalib.data``, the finder makes
Sgfr and the datamodules known there by their short names. ``ANOMALIB_SGFR_PLUGIN=0`` turns it off.

Modules of this package import anomalib's, and registration imports modules of this package. So the
finder counts the imports of both that are running, and registers when the outermost has ended. No
half-imported module is ever used, whichever is imported first, and no module depends on this one.
"""

import os
import sys

__all__ = ["install", "register"]

_SWITCH = "ANOMALIB_SGFR_PLUGIN"
_OURS = "anomalib_sgfr."
# module of anomalib that names are added to: our module that lists them, and the name that
# anomalib's module defines last
_HOMES = {
    "anomalib.models": ("anomalib_sgfr.lightning_model", "get_model"),
    "anomalib.data": ("anomalib_sgfr.data", "get_datamodule"),
}
_warned: list[str] = []


def install() -> None:
    """Add the import finder once, unless it is switched off."""
    if os.environ.get(_SWITCH, "1").lower() in {"0", "false", "no", "off"}:
        return
    if not any(isinstance(finder, _RegisterOnImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _RegisterOnImport())
        if any(map(_is_complete, _HOMES)):  # imported before
            _register_or_warn()


def register(complete: str = "") -> None:
    """Make Sgfr and the datamodules known to anomalib by their short names; repeating is harmless.

    Args:
        complete (str): Module of anomalib whose import has just ended, even if its attributes do
            not show it.

    Raises:
        Exception: The first failure, after all other names were added.
    """
    from importlib import import_module

    failed: Exception | None = None
    for home, (ours, _) in _HOMES.items():
        if home != complete and not _is_complete(home):
            continue
        module = sys.modules[home]
        source = import_module(ours)
        wanted = [(name, getattr(source, name)) for name in source.__all__]
        wanted += [("__all__", _extended(module, "__all__", source.__all__))]
        if home == "anomalib.models":
            allowed = _extended(module, "ALLOWED_MODULES", ["anomalib_sgfr", ours])
            wanted += [("ALLOWED_MODULES", allowed)]
        for name, value in wanted:
            try:
                if value is None:
                    msg = f"{home} has no {name} to add to"
                    raise AttributeError(msg)  # noqa: TRY301
                setattr(module, name, value)
            except Exception as error:
                failed = failed or error
    if failed is not None:
        raise failed


def _extended(module: object, name: str, names: list[str]) -> object:
    """A module's list, tuple or set with names added: the same object if it can be changed."""
    found = getattr(module, name, None)
    if isinstance(found, set):
        found.update(names)
    elif isinstance(found, list):
        found += [each for each in names if each not in found]
    elif isinstance(found, frozenset | tuple):
        return type(found)([*found, *(each for each in names if each not in found)])
    return found


def _register_or_warn(complete: str = "") -> None:
    """Register; a failure must not break an anomalib that works without this package."""
    try:
        register(complete)
    except Exception as error:
        import warnings

        message = (
            f"anomalib_sgfr could not register with anomalib: {error!r}. --model anomalib_sgfr.Sgfr"
            " works without."
        )
        if message not in _warned:
            _warned.append(message)
            warnings.warn(message, RuntimeWarning, stacklevel=2)


def _is_complete(home: str) -> bool:
    """Whether a module is imported to its end: it has its last name, or its import has ended."""
    module = sys.modules.get(home)
    if module is None or hasattr(module, _HOMES[home][1]):
        return module is not None
    return getattr(getattr(module, "__spec__", None), "_initializing", True) is False


class _RegisterOnImport:
    """Meta-path finder that wraps the loaders of some modules, to register when they are imported.

    The other finders find the modules; this one only replaces the loader of what they found.

    Attributes:
        running (int): Imports that have begun and not ended, each within the one before.
        bypassed (bool): Whether another finder was in front, which may have found anomalib alone.
    """

    def __init__(self) -> None:
        self.running = 0
        self.bypassed = False

    def find_spec(self, fullname, path=None, target=None):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
        """Spec that the other finders give, with a loader that reports the end of the import."""
        if sys.meta_path[0] is not self:
            sys.meta_path.remove(self)
            sys.meta_path.insert(0, self)
            self.bypassed = True
        if self.bypassed and not self.running and all(map(_is_complete, _HOMES)):
            self.register()
            if fullname in sys.modules:  # imported meanwhile: do not execute it a second time
                return _spec_of_existing(fullname)
        if fullname not in _HOMES and not fullname.startswith(_OURS):
            return None
        for finder in list(sys.meta_path):
            find = None if finder is self else getattr(finder, "find_spec", None)
            spec = find(fullname, path, target) if find else None
            if spec is not None:
                if hasattr(spec.loader, "exec_module"):
                    spec.loader = _CountingLoader(spec.loader, self)
                return spec
        return None

    def register(self, complete: str = "") -> None:
        """Register, and count that as an import: what it imports must not register again."""
        self.bypassed = False
        self.running += 1
        try:
            _register_or_warn(complete)
        finally:
            self.running -= 1


def _spec_of_existing(fullname):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    from importlib.machinery import ModuleSpec

    module = sys.modules[fullname]
    loader = _ExistingModuleLoader(module, module.__spec__)
    return ModuleSpec(fullname, loader, is_package=hasattr(module, "__path__"))  # type: ignore[arg-type]


class _ExistingModuleLoader:
    """Loader that gives a module which is already imported."""

    def __init__(self, module, spec) -> None:  # type: ignore[no-untyped-def]  # noqa: ANN001
        self._module = module
        self._spec = spec

    def create_module(self, spec):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
        """Give the module."""
        del spec
        return self._module

    def exec_module(self, module) -> None:  # type: ignore[no-untyped-def]  # noqa: ANN001
        """Give the module its own spec back, and execute nothing."""
        module.__spec__ = self._spec


class _CountingLoader:
    """Loader that counts its import as running, and registers when no other is running.

    Everything else is left to the module's own loader.
    """

    def __init__(self, loader, finder) -> None:  # type: ignore[no-untyped-def]  # noqa: ANN001
        self._loader = loader
        self._finder = finder

    def __getattr__(self, name):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN204
        return getattr(self._loader, name)

    def create_module(self, spec):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
        """Create the module as its own loader does."""
        return self._loader.create_module(spec)

    def exec_module(self, module) -> None:  # type: ignore[no-untyped-def]  # noqa: ANN001
        """Execute the module; register if it was the outermost of the counted imports."""
        module.__loader__ = module.__spec__.loader = self._loader
        self._finder.running += 1
        try:
            self._loader.exec_module(module)
        finally:
            self._finder.running -= 1
        if not self._finder.running:
            self._finder.register(module.__name__)
