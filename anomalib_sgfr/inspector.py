"""One object for one frame: load a checkpoint or an exported file, and inspect pictures in their own pixels.

What OpenVINO runs needs neither PyTorch nor anomalib, and imports neither.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from anomalib_sgfr.edge.placement import Placement, laid_over, placed
from anomalib_sgfr.pictures.reading import picture

__all__ = ["Inspection", "Inspector"]

_PROPERTIES = {
    "PERFORMANCE_HINT": "LATENCY",
    "INFERENCE_PRECISION_HINT": "f32",  # sixteen bits would change scores on processors that have them
    "CPU_RUNTIME_CACHE_CAPACITY": "16",  # of sizes seen: memory stays flat
}


class Inspection(NamedTuple):
    """What a frame is found to be.

    Attributes:
        score (float): 0.5 at the threshold, and below one; raw where there is no threshold.
        label (bool | None): Whether the frame is anomalous; ``None`` where there is no threshold.
        map (NDArray[np.float32]): Score of each pixel of the frame, shape ``(H, W)``; zero where it is not inspected.
        mask (NDArray[np.bool_] | None): What is anomalous, shape ``(H, W)``.
        window (tuple[int, int, int, int]): The part of the frame that is inspected, all of it unless the model crops:
            top, left, bottom, right.
        place (tuple[int, int] | None): Row and column of the pixel that raised the score, which need not be the map's
            largest; ``None`` from an ONNX or OpenVINO file, which does not tell.
    """

    score: float
    label: bool | None
    map: NDArray[np.float32]
    mask: NDArray[np.bool_] | None
    window: tuple[int, int, int, int]
    place: tuple[int, int] | None = None


class _Model(ABC):
    """What runs a model: gives what it predicts of a picture, and says how it looks at one."""

    steps: Sequence[Sequence[Any]]
    bit_depth: int

    @abstractmethod
    def predict(self, picture: NDArray[np.float32]) -> Mapping[str, Any]:
        """``pred_score``, ``anomaly_map`` and perhaps ``pred_label``, ``pred_mask``, ``place``, of ``(H, W, 3)``."""


class Inspector:
    """Inspect frames one by one.

    ::

        inspector = Inspector.load("results/Sgfr/parts/latest/weights/lightning/model.ckpt")
        found = inspector("parts/bad/00.png")
        found.score, found.label, found.map.shape

    Args:
        model (_Model): What :meth:`load` makes of a file.
    """

    def __init__(self, model: _Model) -> None:
        self._model = model

    @classmethod
    def load(cls, path: str | Path, device: str | None = None) -> "Inspector":
        """Load a model.

        Args:
            path (str | Path): A checkpoint (``.ckpt``), or a file that ``anomalib export`` wrote: Torch (``.pt``, which
                can run any code: load none that you do not trust), OpenVINO (``.xml``) or ONNX (``.onnx``, run by
                OpenVINO).
            device (str | None): PyTorch's name of it, or OpenVINO's. Defaults to the processor.

        Returns:
            Inspector: Ready to use.

        Raises:
            FileNotFoundError: If the file, or one that belongs to it, is not there.
            ValueError: If it is of another kind, or moves pixels in a way that cannot be followed.
        """
        file = Path(path)
        if not file.is_file():
            msg = f"'{file}': no such file. A fit writes model.ckpt, `anomalib export` writes model.xml or model.pt."
            raise FileNotFoundError(msg)
        if file.suffix in {".xml", ".onnx"}:
            return cls(_OpenVino(file, (device or "CPU").upper()))
        if file.suffix in {".ckpt", ".pt"}:
            return cls(_Torch(file, device or "cpu"))
        msg = f"'{file}' must be a checkpoint (.ckpt) or an exported file (.pt, .xml, .onnx)."
        raise ValueError(msg)

    def __call__(self, frame: Any) -> Inspection:  # noqa: ANN401
        """Inspect a frame.

        Args:
            frame (Any): A file, a PIL picture, or an array, see :func:`~anomalib_sgfr.pictures.reading.picture`.

        Returns:
            Inspection: In the frame's own pixels.

        Raises:
            OSError: If the file cannot be read.
            TypeError: If it is no picture.
            ValueError: If the frame cannot be right.
        """
        image = picture(frame, self._model.bit_depth)
        size = image.shape[:2]
        found = self._model.predict(image)
        over = placed(self._model.steps, size)
        label, mask, place = (found.get(name) for name in ("pred_label", "pred_mask", "place"))
        return Inspection(
            score=float(np.ravel(found["pred_score"])[0]),
            label=None if label is None else bool(np.ravel(label)[0]),
            map=_laid(found["anomaly_map"], over, size),
            mask=None if mask is None else _laid(mask, over, size) > 0.5,  # noqa: PLR2004
            window=over.window(size),
            place=None if place is None else over.pixel(place, np.shape(found["anomaly_map"])[-2:], size),
        )


def _laid(values: Any, over: Placement, size: Sequence[int]) -> NDArray[np.float32]:  # noqa: ANN401
    return laid_over(np.asarray(values).reshape(np.shape(values)[-2:]), over, size)


class _Torch(_Model):
    """A checkpoint, or a file that anomalib exported."""

    def __init__(self, file: Path, device: str) -> None:
        import torch

        from anomalib_sgfr.features.pre_processing import steps_of
        from anomalib_sgfr.lightning_model import Sgfr

        model: Any
        if file.suffix == ".ckpt":
            model = Sgfr.load_from_checkpoint(file, map_location=device, visualizer=False, evaluator=False)
        else:
            held = torch.load(file, map_location=device, weights_only=False)
            model = held.get("model") if isinstance(held, dict) else held
            if not isinstance(model, Sgfr):
                msg = f"'{file}' is not a file that `anomalib export --export_type torch` wrote of an Sgfr."
                raise ValueError(msg)
        model.require_fitted("inspect with")
        self._model = model.eval().to(device)
        self._transform = getattr(model.pre_processor, "transform", None)
        self.steps = steps_of(self._transform)
        self.bit_depth = model.model.bit_depth

    def predict(self, picture: NDArray[np.float32]) -> Mapping[str, Any]:
        import torch

        with torch.inference_mode():
            image = torch.from_numpy(np.ascontiguousarray(picture.transpose(2, 0, 1)))
            prepared = image if self._transform is None else self._transform(image)
            heard = self._model.model.hear(prepared[None].to(self._model.device))
            found: Any = heard.predicted
            if self._model.post_processor is not None:
                found = self._model.post_processor(found)
            values = {**found._asdict(), "place": heard.places[0]}.items()
            return {name: value.numpy(force=True) for name, value in values if value is not None}


class _OpenVino(_Model):
    """An exported file; needs openvino, numpy and Pillow alone."""

    def __init__(self, file: Path, device: str) -> None:
        import openvino as ov

        weights = file.with_suffix(".bin")
        if file.suffix == ".xml" and not weights.is_file():
            msg = f"'{weights}' is not beside '{file.name}': the two belong together."
            raise FileNotFoundError(msg)
        core = ov.Core()
        try:
            model = core.read_model(file)
        except RuntimeError as error:
            msg = f"'{file}' is not a model that OpenVINO can read: {str(error).splitlines()[-1].strip()}"
            raise ValueError(msg) from error
        known = [name.partition(".")[0] for name in core.available_devices]
        if device.partition(".")[0] not in {*known, "AUTO"}:
            msg = f"device must be one of {', '.join([*core.available_devices, 'AUTO'])}, got '{device}'."
            raise ValueError(msg)
        self._compiled = core.compile_model(model, device, _PROPERTIES if device == "CPU" else {})
        outputs = {name: output for output in self._compiled.outputs for name in output.get_names()}
        if not {"pred_score", "anomaly_map"} <= set(outputs):
            msg = f"'{file}' is not an export of an anomalib model: its outputs are {', '.join(outputs) or 'unnamed'}."
            raise ValueError(msg)
        self._outputs = outputs
        about = _about(model)
        if about is None or "steps" not in about:
            msg = (
                f"'{file}' does not say how it resizes a picture: it is of an earlier version, or its pre-processor "
                "does more than Resize, CenterCrop and Pad. Export it again."
            )
            raise ValueError(msg)
        self._steps = [tuple(step) for step in about["steps"]]
        self.bit_depth = about.get("bit_depth", 8)
        height, width = self._compiled.input(0).partial_shape[2], self._compiled.input(0).partial_shape[3]
        # what is resized here is resized no more in the graph, which then sees but one size
        self._first: tuple[int, int] | None = None
        if height.is_static and width.is_static:
            self._first = (height.get_length(), width.get_length())
        elif self._steps and self._steps[0][0] == "resize":
            self._first = (int(self._steps[0][1]), int(self._steps[0][2]))
        self.steps = [("resize", *self._first), *self._steps] if self._first else self._steps

    def predict(self, picture: NDArray[np.float32]) -> Mapping[str, Any]:
        image = picture.transpose(2, 0, 1)
        if self._first is not None:
            image = np.stack([_resized(channel, self._first) for channel in image])
        found = self._compiled(np.ascontiguousarray(image[None]))
        return {name: found[output] for name, output in self._outputs.items()}


def _about(model: Any) -> Mapping[str, Any] | None:  # noqa: ANN401
    """What the export wrote into the file."""
    for path in (["sgfr"], ["framework", "sgfr"]):
        if model.has_rt_info(path):
            stored: Mapping[str, Any] = json.loads(model.get_rt_info(path).astype(str))
            return stored
    return None


def _resized(channel: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.float32]:
    """Bilinear, antialiased: as the model's own pre-processor."""
    if channel.shape == size:
        return channel
    picture = Image.fromarray(np.ascontiguousarray(channel))
    return np.asarray(picture.resize((size[1], size[0]), Image.Resampling.BILINEAR))
