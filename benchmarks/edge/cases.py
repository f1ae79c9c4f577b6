"""The models under measurement at the edge, and how their exported files are run."""

from dataclasses import dataclass, field
from typing import Any

__all__ = ["ANSWERS", "BACKBONE", "CASES", "F32", "LATENCIES", "SEARCHED", "SIZE", "Case"]

BACKBONE, SIZE = "tf_efficientnet_lite0", [256, 256]


@dataclass(frozen=True)
class Case:
    """A model to export.

    Attributes:
        model (str): As in :mod:`benchmarks.compare`, or ``bare`` for the backbone alone.
        atoms (int): Atoms of Patchcore's bank.
        arguments (dict[str, Any]): Arguments of the model that differ from its defaults.
        compared (bool): Whether its answers are compared.
        side (int | None): Of its images, in pixels, where it is another than that of ``SIZE``;
            only costs are measured.
    """

    model: str
    atoms: int = 0
    arguments: dict[str, Any] = field(default_factory=dict)
    compared: bool = False
    side: int | None = None

    @property
    def size(self) -> list[int]:
        """Height and width of its images, in pixels."""
        return [self.side, self.side] if self.side else SIZE


_HALF, _QUARTER = [500, 500, 2500, 1500], [250, 250, 1250, 750]
CASES: dict[str, Case] = {
    "bare": Case("bare"),
    "sgfr": Case("sgfr", compared=True),
    "sgfr-half": Case("sgfr", arguments={"bank_size": _HALF}),
    "sgfr-quarter": Case("sgfr", arguments={"bank_size": _QUARTER}),
    "sgfr-1024": Case("sgfr", side=1024),
    "sgfr-2048": Case("sgfr", side=2048),
    "padim": Case("padim"),
    "patchcore-0.01": Case("patchcore", atoms=2048, arguments={"coreset_sampling_ratio": 0.001}),
}
F32: dict[str, str] = {"INFERENCE_PRECISION_HINT": "f32"}
# by column: properties of the runtime, and whether models are reshaped to one image beforehand
LATENCIES: dict[str, tuple[dict[str, str], bool]] = {
    "f32": (F32, False),
    "f32, one image": (F32, True),
    "default": ({}, False),
}


def _scales(*atoms: int) -> tuple[tuple[int, int, int], ...]:
    return tuple(zip((25, 41, 113, 193), (1024, 1024, 256, 64), atoms, strict=True))


# of each scale, width of what is searched, patches of an image, atoms
SEARCHED = {
    "sgfr": _scales(1000, 1000, 5000, 3000),
    "sgfr-half": _scales(*_HALF),
    "sgfr-quarter": _scales(*_QUARTER),
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
}
