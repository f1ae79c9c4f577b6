"""Registration with anomalib, which has no entry point for models of others.

``install`` runs at every start of the interpreter (from ``anomalib_sgfr.pth``) and when this
package is imported, so this module imports nothing but what the interpreter has already loaded. It
leaves a finder that waits for ``anomalib.models`` and ``anomalib.data`` to be imported, by anybody,
and then makes Sgfr and the datamodules known there by their short names. Set
``ANOMALIB_SGFR_PLUGIN=0`` to turn it off.

Modules of this package import anomalib's, and registration imports modules of this package. So the
finder counts what is being imported of both, and registers when the outermost import has ended: no
module is ever seen half done, whichever is imported first, and none has to know of this one.
"""

import os
import sys

__all__ = ["install", "register"]

_SWITCH = "ANOMALIB_SGFR_PLUGIN"
_OURS = "anomalib_sgfr."
# Modules of anomalib that names are added to: the module of ours that lists them, and what the
# other defines last.
_HOMES = {
    "anomalib.models": ("anomalib_sgfr.lightning_model", "get_model"),
    "anomalib.data": ("anomalib_sgfr.data", "get_datamodule"),
}
_warned: list[str] = []


def install() -> None:
    """Leave the finder, once, unless switched off."""
    if os.environ.get(_SWITCH, "1").lower() in {"0", "false", "no", "off"}:
        return
    if not any(isinstance(finder, _RegisterOnImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _RegisterOnImport())
        if any(map(_is_complete, _HOMES)):  # imported before
            _register_or_warn()


def register(whole: str = "") -> None:
    """Make Sgfr and the datamodules known to anomalib by their short names. Does nothing the second
    time.

    Args:
        whole (str): Module of anomalib that has just been imported to its end, whether it looks so
            or not.
    """
    from importlib import import_module

    failed: Exception | None = None
    for home, (ours, _) in _HOMES.items():
        if home != whole and not _is_complete(
            home
        ):  # nor is what somebody else's finder is still at
            continue
        module = sys.modules[home]
        source = import_module(ours)
        wanted = [(name, getattr(source, name)) for name in source.__all__]
        wanted += [("__all__", _extended(module, "__all__", source.__all__))]
        if home == "anomalib.models":
            wanted += [
                ("ALLOWED_MODULES", _extended(module, "ALLOWED_MODULES", ["anomalib_sgfr", ours]))
            ]
        for name, value in wanted:  # one that is refused does not cost the others
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
    """A module's list, tuple or set with names added, of the same type, and the same object where
    that can be.
    """
    found = getattr(module, name, None)
    if isinstance(found, set):
        found.update(names)
    elif isinstance(found, list):
        found += [each for each in names if each not in found]
    elif isinstance(found, frozenset | tuple):
        return type(found)([*found, *(each for each in names if each not in found)])
    return found


def _register_or_warn(whole: str = "") -> None:
    """Whatever goes wrong here must not break an anomalib that works without us."""
    try:
        register(whole)
    except Exception as error:  # see above
        import warnings

        said = (
            f"anomalib_sgfr could not register with anomalib: {error!r}. --model anomalib_sgfr.Sgfr"
            " works without."
        )
        if said not in _warned:
            _warned.append(said)
            warnings.warn(said, RuntimeWarning, stacklevel=2)


def _is_complete(home: str) -> bool:
    """Whether a module has been executed to its end: it has what it defines last, or is no longer
    being imported.
    """
    module = sys.modules.get(home)
    if module is None or hasattr(module, _HOMES[home][1]):
        return module is not None
    return getattr(getattr(module, "__spec__", None), "_initializing", True) is False


class _RegisterOnImport:
    """Meta-path finder that has every module found as ever, and acts when those it waits for have
    been executed.
    """

    def __init__(self) -> None:
        self.running = 0  # modules that are being executed, each within the one before
        self.bypassed = False

    def find_spec(self, fullname, path=None, target=None):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
        """Hand on the real module's spec, with a loader that tells when it is done."""
        if sys.meta_path[0] is not self:  # who was put in front may find anomalib without asking us
            sys.meta_path.remove(self)
            sys.meta_path.insert(0, self)
            self.bypassed = True
        if self.bypassed and not self.running and all(map(_is_complete, _HOMES)):
            self.register()
            if (
                fullname in sys.modules
            ):  # imported on the way: to be executed again would make it another module
                return _spec_of_present(fullname)
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

    def register(self, whole: str = "") -> None:
        """Register, unless that is what is being done: what it imports must find it neither done
        nor to do.
        """
        self.bypassed = False
        self.running += 1
        try:
            _register_or_warn(whole)
        finally:
            self.running -= 1


def _spec_of_present(fullname):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    from importlib.machinery import ModuleSpec

    module = sys.modules[fullname]
    return ModuleSpec(
        fullname,
        _ExistingModuleLoader(module, module.__spec__),
        is_package=hasattr(module, "__path__"),
    )  # type: ignore[arg-type]


class _ExistingModuleLoader:
    """Loader of a module that is there already."""

    def __init__(self, module, spec) -> None:  # type: ignore[no-untyped-def]  # noqa: ANN001
        self._module = module
        self._spec = spec

    def create_module(self, spec):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
        """The module."""
        del spec
        return self._module

    def exec_module(self, module) -> None:  # type: ignore[no-untyped-def]  # noqa: ANN001
        """Leave it as it is."""
        module.__spec__ = self._spec


class _CountingLoader:
    """Loader that executes a module as its own loader would, and then lets the finder register."""

    def __init__(self, loader, finder) -> None:  # type: ignore[no-untyped-def]  # noqa: ANN001
        self._loader = loader
        self._finder = finder

    def __getattr__(self, name):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN204
        return getattr(self._loader, name)

    def create_module(self, spec):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
        """As the module's own loader."""
        return self._loader.create_module(spec)

    def exec_module(self, module) -> None:  # type: ignore[no-untyped-def]  # noqa: ANN001
        """Execute the module; if it was the outermost of those that are waited for, register."""
        module.__loader__ = module.__spec__.loader = self._loader
        self._finder.running += 1
        try:
            self._loader.exec_module(module)
        finally:
            self._finder.running -= 1
        if not self._finder.running:
            self._finder.register(module.__name__)
