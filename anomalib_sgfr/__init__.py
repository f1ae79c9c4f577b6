"""Sgfr: subspace-guided feature reconstruction, an anomaly-detection model for anomalib.

This package is imported at every start of the interpreter (see :mod:`anomalib_sgfr.plugin`), so its
names are looked up only when used (PEP 562).
"""

from anomalib_sgfr.aliases import install as _install_aliases
from anomalib_sgfr.plugin import install as _install

# what type checkers take for true; importing it from typing would cost more than all the rest
TYPE_CHECKING = False
if TYPE_CHECKING:
    from anomalib_sgfr.core.sampler import SubspaceSampler
    from anomalib_sgfr.inspector import Inspection, Inspector, ProductInspector
    from anomalib_sgfr.lightning_model import Sgfr
    from anomalib_sgfr.monitor import Monitor, MonitorReading
    from anomalib_sgfr.post_processing.post_processor import NominalPostProcessor, SgfrPostProcessor
    from anomalib_sgfr.report.callback import Report
    from anomalib_sgfr.report.explanation import explain
    from anomalib_sgfr.report.figure import ExplanationFigure
    from anomalib_sgfr.report.score_table import ScoreTable
    from anomalib_sgfr.report.sensitivity import measure_sensitivity
    from anomalib_sgfr.report.visualizer import Predictions
    from anomalib_sgfr.torch_model import SgfrModel
    from anomalib_sgfr.training.accept import accept
    from anomalib_sgfr.training.adapt import adapt
    from anomalib_sgfr.training.callback import SubspaceSampling
    from anomalib_sgfr.training.reject import reject

    __version__: str

_HOME = {
    "ExplanationFigure": "report.figure",
    "Inspection": "inspector",
    "Inspector": "inspector",
    "Monitor": "monitor",
    "MonitorReading": "monitor",
    "NominalPostProcessor": "post_processing.post_processor",
    "Predictions": "report.visualizer",
    "ProductInspector": "inspector",
    "Report": "report.callback",
    "ScoreTable": "report.score_table",
    "Sgfr": "lightning_model",
    "SgfrModel": "torch_model",
    "SgfrPostProcessor": "post_processing.post_processor",
    "SubspaceSampler": "core.sampler",
    "SubspaceSampling": "training.callback",
    "accept": "training.accept",
    "adapt": "training.adapt",
    "explain": "report.explanation",
    "measure_sensitivity": "report.sensitivity",
    "reject": "training.reject",
}
_EARLIER = {"MimicView": "ExplanationFigure"}

__all__ = [
    "ExplanationFigure",
    "Inspection",
    "Inspector",
    "Monitor",
    "MonitorReading",
    "NominalPostProcessor",
    "Predictions",
    "ProductInspector",
    "Report",
    "ScoreTable",
    "Sgfr",
    "SgfrModel",
    "SgfrPostProcessor",
    "SubspaceSampler",
    "SubspaceSampling",
    "__version__",
    "accept",
    "adapt",
    "explain",
    "measure_sensitivity",
    "reject",
]


def __getattr__(name: str) -> object:
    if name == "__version__":
        from anomalib_sgfr.report.fit_record import installed

        return installed("anomalib-sgfr")
    own = _EARLIER.get(name, name)
    if own in _HOME:
        from importlib import import_module

        return getattr(import_module(f"{__name__}.{_HOME[own]}"), own)
    msg = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(msg)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


_install()
_install_aliases()
