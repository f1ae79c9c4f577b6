"""Registration with anomalib, which has no entry point for models of others.

``install`` runs at every start of the interpreter (from ``anomalib_sgfr.pth``), so this module imports nothing but what
the interpreter has already loaded. It leaves a finder that waits for ``anomalib.models`` to be imported, by anybody,
and then makes Sgfr and the datamodules known by their short names. Set ``ANOMALIB_SGFR_PLUGIN=0`` to turn it off.
"""

import os
import sys

__all__ = ["install", "register"]

_SWITCH = "ANOMALIB_SGFR_PLUGIN"
_TRIGGER = "anomalib.models"
# Modules of ours that import anomalib.models, and what each defines: whichever is imported first waits for the others.
_BUILT_ON_IT = {"embedding": "PatchEmbedder", "torch_model": "SgfrModel", "lightning_model": "Sgfr"}


def install() -> None:
    """Leave the finder, once, unless switched off."""
    if _is_off():
        return
    if _TRIGGER in sys.modules:
        _register_or_warn()
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


def register() -> None:
    """Make Sgfr and the datamodules known to anomalib by their short names. Does nothing the second time.

    Importing ``anomalib.models`` asks for this, also when a module of this package does so that is not yet complete:
    that call returns without effect, and the one at the end of the module registers.
    """
    models = sys.modules.get(_TRIGGER)
    if _is_off() or models is None or not hasattr(models, "ALLOWED_MODULES") or _is_incomplete():
        return
    import anomalib.data as anomalib_data

    from anomalib_sgfr import data, lightning_model

    models.ALLOWED_MODULES.update({"anomalib_sgfr", "anomalib_sgfr.lightning_model"})
    exports = [(models, "Sgfr", lightning_model.Sgfr)]
    exports += [(anomalib_data, name, getattr(data, name)) for name in data.__all__]
    for module, name, value in exports:
        setattr(module, name, value)
        if name not in module.__all__:
            module.__all__.append(name)


def _is_off() -> bool:
    return os.environ.get(_SWITCH, "1").lower() in {"0", "false", "no", "off"}


def _is_incomplete() -> bool:
    """Whether a module that registers at its end is being imported."""
    loaded = [(sys.modules.get(f"anomalib_sgfr.{module}"), name) for module, name in _BUILT_ON_IT.items()]
    return any(module is not None and not hasattr(module, name) for module, name in loaded)


def _register_or_warn() -> None:
    """Whatever goes wrong here must not break an anomalib that works without us."""
    try:
        if not _is_incomplete():
            from importlib import import_module

            import_module("anomalib_sgfr.lightning_model")
            register()
    except Exception as error:  # see above
        import warnings

        warnings.warn(f"anomalib_sgfr could not register with anomalib: {error!r}", RuntimeWarning, stacklevel=2)


class _AfterImport:
    """Meta-path finder that acts once, after ``anomalib.models`` has been executed."""

    def find_spec(self, fullname, path=None, target=None):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
        """Hand on the real module's spec, with a loader that registers when it is done."""
        if fullname != _TRIGGER:
            return None
        from importlib.util import find_spec

        if self in sys.meta_path:
            sys.meta_path.remove(self)  # also keeps the next line from coming back here
        spec = find_spec(fullname)
        del path, target
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenRegister(spec.loader)  # type: ignore[assignment]  # a loader by duck typing
        return spec


class _ThenRegister:
    """Loader that executes a module as its own loader would, then registers."""

    def __init__(self, loader) -> None:  # type: ignore[no-untyped-def]  # noqa: ANN001
        self._loader = loader

    def __getattr__(self, name):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN204
        return getattr(self._loader, name)

    def create_module(self, spec):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
        """As the module's own loader."""
        return self._loader.create_module(spec)

    def exec_module(self, module) -> None:  # type: ignore[no-untyped-def]  # noqa: ANN001
        """Execute the module; if that fails, be ready for the next attempt."""
        module.__loader__ = module.__spec__.loader = self._loader
        try:
            self._loader.exec_module(module)
        except BaseException:
            install()
            raise
        _register_or_warn()
