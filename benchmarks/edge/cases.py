"""The models under measurement at the edge, and how their exported files are run."""

from dataclasses import dataclass, field
from typing import Any

__all__ = ["ANSWERS", "BACKBONES", "CASES", "F32", "PRECISIONS", "SEARCHED", "Case"]

_LITE, _VIT = "tf_efficientnet_lite0", "vit_small_patch14_dinov2"
_SIZES = {_LITE: [256, 256], _VIT: [392, 392]}


@dataclass(frozen=True)
class Case:
    """A model to export.

    Attributes:
        model (str): As in :mod:`benchmarks.compare`, or ``bare`` for the backbone alone.
        backbone (str): A timm name.
        atoms (int): Atoms of Patchcore's bank.
        arguments (dict[str, Any]): Arguments of the model that differ from its defaults.
        compared (bool): Whether its answers are compared.
        compressed (bool): Whether those of its compressed files are.
        side (int | None): Of its images, in pixels, where it is another than the backbone's; only
            costs are measured.
    """

    model: str
    backbone: str = _LITE
    atoms: int = 0
    arguments: dict[str, Any] = field(default_factory=dict)
    compared: bool = False
    compressed: bool = False
    side: int | None = None

    @property
    def pre_trained(self) -> bool:
        """Whether the backbone has weights without a network; without, only time is measured."""
        return self.backbone == _LITE

    @property
    def size(self) -> list[int]:
        """Height and width of its images, in pixels."""
        return [self.side, self.side] if self.side else _SIZES[self.backbone]


_HALF, _QUARTER = [500, 500, 2500, 1500], [250, 250, 1250, 750]
_FOUR_LAYERS = {
    "layers": ["blocks.3", "blocks.4", "blocks.6", "blocks.9"]
}  # as in configs/mvtecad_dinov2s.yaml
CASES: dict[str, Case] = {
    "bare": Case("bare"),
    "sgfr": Case("sgfr", compared=True, compressed=True),
    "sgfr-half": Case("sgfr", arguments={"bank_size": _HALF}),
    "sgfr-quarter": Case("sgfr", arguments={"bank_size": _QUARTER}),
    **{f"sgfr-{side}": Case("sgfr", side=side) for side in (512, 1024, 2048)},
    "sgfr-omp": Case("sgfr", arguments={"solver": "omp"}, compared=True),
    "sgfr-ridge": Case("sgfr", arguments={"solver": "ridge"}, compared=True),
    "padim": Case("padim"),
    "mhpatchcore": Case("mhpatchcore"),
    "patchcore-0.01": Case("patchcore", atoms=2048, arguments={"coreset_sampling_ratio": 0.001}),
    "patchcore-0.1": Case("patchcore", atoms=20_480, arguments={"coreset_sampling_ratio": 0.001}),
    "bare-vit": Case("bare", backbone=_VIT, arguments=_FOUR_LAYERS),
    "sgfr-vit": Case("sgfr", backbone=_VIT, arguments={**_FOUR_LAYERS, "bank_size": 2000}),
}
BACKBONES = {_LITE: "bare", _VIT: "bare-vit"}  # and the case that is the backbone alone
F32: dict[str, str] = {"INFERENCE_PRECISION_HINT": "f32"}
PRECISIONS: dict[str, dict[str, str]] = {"f32": F32, "default": {}}


def _scales(*atoms: int) -> tuple[tuple[int, int, int], ...]:
    return tuple(zip((25, 41, 113, 193), (1024, 1024, 256, 64), atoms, strict=True))


# of each scale, width of what is searched, patches of an image, atoms
SEARCHED: dict[str, dict[str, tuple[tuple[int, int, int], ...]]] = {
    _LITE: {
        "sgfr": _scales(1000, 1000, 5000, 3000),
        "sgfr-half": _scales(*_HALF),
        "sgfr-quarter": _scales(*_QUARTER),
    },
    _VIT: {"sgfr-vit": ((385, 784, 2000),) * 4},
}
ANSWERS: dict[str, tuple[str, dict[str, str], list[int] | None]] = {
    "ONNX Runtime": ("model.onnx", {}, None),
    "OpenVINO f32": ("any_size.xml", F32, None),
    "OpenVINO f32, fixed size": ("model.xml", F32, _SIZES[_LITE]),
    "OpenVINO default": ("model.xml", {}, _SIZES[_LITE]),
    "FP16, f32": ("fp16.xml", F32, _SIZES[_LITE]),
    "FP16, default": ("fp16.xml", {}, _SIZES[_LITE]),
    "INT8": ("int8.xml", {}, _SIZES[_LITE]),
    "INT8_PTQ": ("int8_ptq.xml", {}, _SIZES[_LITE]),
}
