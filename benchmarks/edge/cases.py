"""The models under measurement at the edge, and how their exported files are run."""

from dataclasses import dataclass, field
from typing import Any

__all__ = ["ANSWERS", "BACKBONES", "CASES", "F32", "PRECISIONS", "SEARCHED", "SIZE", "Case"]

_LITE, _WIDE = "tf_efficientnet_lite0", "wide_resnet50_2"


@dataclass(frozen=True)
class Case:
    """A model to export.

    Attributes:
        model (str): As in :mod:`benchmarks.compare`, or ``bare`` for the backbone alone.
        backbone (str): A timm name.
        atoms (int): Atoms of the bank.
        arguments (dict[str, Any]): Arguments of the model that differ from its defaults.
        compared (bool): Whether its answers are compared.
        compressed (bool): Whether those of its compressed files are.
    """

    model: str
    backbone: str = _LITE
    atoms: int = 0
    arguments: dict[str, Any] = field(default_factory=dict)
    compared: bool = False
    compressed: bool = False

    @property
    def pre_trained(self) -> bool:
        """Whether weights that work without a network exist; without them, only time can be measured."""
        return self.backbone == _LITE


CASES: dict[str, Case] = {
    "bare": Case("bare"),
    "sgfr-1000": Case("sgfr", atoms=1000, compared=True, compressed=True),
    "sgfr-5000": Case("sgfr", atoms=5000),
    "sgfr-omp-1000": Case("sgfr", atoms=1000, arguments={"solver": "omp"}, compared=True),
    "sgfr-ridge": Case("sgfr", atoms=1000, arguments={"solver": "ridge"}, compared=True),
    "padim": Case("padim"),
    "mhpatchcore": Case("mhpatchcore"),
    "patchcore-0.01": Case("patchcore", atoms=2048, arguments={"coreset_sampling_ratio": 0.001}),
    "patchcore-0.1": Case("patchcore", atoms=20_480, arguments={"coreset_sampling_ratio": 0.001}),
    "bare-wide": Case("bare", backbone=_WIDE),
    "sgfr-wide-1000": Case("sgfr", backbone=_WIDE, atoms=1000),
}
BACKBONES = {_LITE: "bare", _WIDE: "bare-wide"}  # and the case that is the backbone alone
F32: dict[str, str] = {"INFERENCE_PRECISION_HINT": "f32"}
PRECISIONS: dict[str, dict[str, str]] = {"f32": F32, "default": {}}
SIZE = [256, 256]
SEARCHED = {  # of each scale, width of what is searched, and patches of an image
    _LITE: ((41, 1024), (113, 256)),
    _WIDE: ((513, 1024), (1025, 256)),
}
ANSWERS: dict[str, tuple[str, dict[str, str], list[int] | None]] = {
    "ONNX Runtime": ("model.onnx", {}, None),
    "OpenVINO f32": ("any_size.xml", F32, None),
    "OpenVINO f32, fixed size": ("model.xml", F32, SIZE),
    "OpenVINO default": ("model.xml", {}, SIZE),
    "FP16, f32": ("fp16.xml", F32, SIZE),
    "FP16, default": ("fp16.xml", {}, SIZE),
    "INT8": ("int8.xml", {}, SIZE),
    "INT8_PTQ": ("int8_ptq.xml", {}, SIZE),
    "INT8_ACQ": ("int8_acq.xml", {}, SIZE),
}
