"""Backends of the inspector: PyTorch for checkpoints, OpenVINO for exported files."""

import json
import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from anomalib_sgfr.images.frame_geometry import frame_transform

__all__ = ["Backend", "OpenVinoBackend", "TorchBackend"]

_MAX_FRAMES = 16
_CPU_PROPERTIES = {
    "PERFORMANCE_HINT": "LATENCY",
    # 16 bits would change scores on processors that have them
    "INFERENCE_PRECISION_HINT": "f32",
    "CPU_RUNTIME_CACHE_CAPACITY": "16",  # sizes of images: bounds the memory
}


class Backend(ABC):
    """Runs a model, in any number of threads at once.

    Attributes:
        steps (Sequence): What the model's pre-processor does to a frame, see
            :func:`~anomalib_sgfr.images.frame_geometry.frame_transform`.
        bit_depth (int): Bits of the camera.
        threshold (float | None): Of normalised scores.
        raw_threshold (float | None): Of raw scores, that scores are normalised by; ``None`` if
            there is none or the file does not tell.
        warning (str | None): That too few images support the threshold.
        max_batch (int): Images that the model takes at once.
    """

    steps: Sequence[Sequence[Any]]
    bit_depth: int
    threshold: float | None
    raw_threshold: float | None
    warning: str | None
    max_batch: int = _MAX_FRAMES

    @abstractmethod
    def pre_process(self, image: NDArray[np.float32]) -> NDArray[np.float32]:
        """Input of the model, shape ``(3, h, w)``, from an image of shape ``(H, W, 3)``."""

    @abstractmethod
    def predict(self, images: NDArray[np.float32]) -> Mapping[str, NDArray[Any]]:
        """Predictions by anomalib's names, and perhaps ``peak``, of images ``(B, 3, h, w)``."""


class TorchBackend(Backend):
    """A checkpoint, or anomalib's Torch export."""

    def __init__(self, file: Path, device: str) -> None:
        import torch

        from anomalib_sgfr.images.pre_processor import geometric_steps
        from anomalib_sgfr.lightning_model import Sgfr

        model: Any
        if file.suffix == ".ckpt":
            model = Sgfr.load_from_checkpoint(
                file, map_location=device, visualizer=False, evaluator=False
            )
        else:
            content = torch.load(file, map_location=device, weights_only=False)
            model = content.get("model") if isinstance(content, dict) else content
            if not isinstance(model, Sgfr):
                msg = (
                    f"'{file}' is not a file that `anomalib export --export_type torch` wrote of an"
                    " Sgfr."
                )
                raise ValueError(msg)
        model.require_fitted("inspect with")
        self._model = model.eval().to(device)
        self._transform = getattr(model.pre_processor, "transform", None)
        self.steps = geometric_steps(self._transform)
        self.bit_depth = model.model.bit_depth
        self.threshold = _threshold_of(model.post_processor)
        raw = float(getattr(model.post_processor, "image_threshold", math.nan))
        self.raw_threshold = None if math.isnan(raw) else raw
        self.warning = getattr(model.post_processor, "warning", None)

    def pre_process(self, image: NDArray[np.float32]) -> NDArray[np.float32]:
        """Transform as the model's pre-processor does."""
        import torch

        tensor = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
        return np.asarray(tensor if self._transform is None else self._transform(tensor))

    def predict(self, images: NDArray[np.float32]) -> Mapping[str, NDArray[Any]]:
        """Predictions and peaks, whatever mode the model is in."""
        import torch

        with torch.inference_mode():
            maps = self._model.model.score_maps(torch.from_numpy(images).to(self._model.device))
            predicted: Any = maps.prediction
            if self._model.post_processor is not None:
                predicted = self._model.post_processor(predicted)
            values = {**predicted._asdict(), "peak": maps.peak}.items()
            return {name: value.numpy(force=True) for name, value in values if value is not None}


def _threshold_of(post_processor: Any) -> float | None:  # noqa: ANN401
    """Threshold of normalised scores at the current sensitivity; ``None`` if there is none."""
    value = float(getattr(post_processor, "normalized_image_threshold", math.nan))
    is_applied = getattr(post_processor, "is_set", True) and getattr(
        post_processor, "enable_thresholding", True
    )
    return value if is_applied and not math.isnan(value) else None


@cache
def _openvino_core() -> Any:  # noqa: ANN401
    """OpenVINO's core, one for the process.

    OpenVINO 2026.4 gives the thread that first uses a core a signal stack and takes it back when
    the core ends. Of two cores that end in the order in which they began, or in another thread, it
    leaves the stack of one that is gone: the next signal, such as Ctrl-C, ends the process.
    """
    import openvino as ov

    return ov.Core()


class OpenVinoBackend(Backend):
    """An exported file; needs only openvino, NumPy and Pillow."""

    def __init__(self, file: Path, device: str) -> None:
        import openvino as ov

        core = _openvino_core()
        model = _read_openvino(core, file, device)
        self._outputs = {
            name: number
            for number, output in enumerate(model.outputs)
            for name in output.get_names()
        }
        if not {"pred_score", "anomaly_map"} <= set(self._outputs):
            msg = (
                f"'{file}' is not an export of an anomalib model: its outputs are"
                f" {', '.join(self._outputs) or 'unnamed'}."
            )
            raise ValueError(msg)
        self.threshold = None
        if "pred_label" in self._outputs:
            self.threshold = _threshold_in_graph(core, model.output("pred_label"))
        score_map = _score_map_in_graph(model.output("pred_score"))
        self._score_map = None if score_map is None else len(model.outputs)
        if score_map is not None:
            model.add_outputs([score_map])
        # the bindings initialise at the first use of an array, in which two threads would deadlock
        _ = ov.Tensor(np.zeros(1, np.float32)).data
        settings = _export_settings(model)
        if "steps" not in settings:
            msg = (
                f"'{file}' does not say how it resizes an image: it is of an earlier version, or"
                " its pre-processor does more than Resize, CenterCrop and Pad. Export it again."
            )
            raise ValueError(msg)
        self.steps = [tuple(step) for step in settings["steps"]]
        self.bit_depth, self.warning = settings.get("bit_depth", 8), settings.get("warning")
        self.raw_threshold = settings.get("threshold")
        batch, channels, height, width = model.input(0).partial_shape
        self.max_batch = batch.get_length() if batch.is_static else _MAX_FRAMES
        # images are resized here rather than in the graph, which then compiles for few sizes
        self._first_step: Sequence[Any] | None = None
        if height.is_static and width.is_static:
            self._first_step = ("resize", height.get_length(), width.get_length())
        elif self.steps and self.steps[0][0] in {"resize", "aspect"}:
            self._first_step = self.steps[0]
        if self._first_step is not None:
            self.steps = [self._first_step, *self.steps]
        # of one image, and of several where the file takes them
        self._models = {1: _Compiled(core, model, device)}
        if self.max_batch > 1:
            self._models[self.max_batch] = self._models[1]
            if self._first_step is not None and self._first_step[0] == "resize":
                # shapes that are known save a fifth of the time
                one = model.clone()
                one.reshape([1, channels.get_length(), *self._first_step[1:]])
                self._models[1] = _Compiled(core, one, device)
        self._models[1].compile()

    def pre_process(self, image: NDArray[np.float32]) -> NDArray[np.float32]:
        """Resize as the model's pre-processor does; the graph does what follows."""
        channels = image.transpose(2, 0, 1)
        if self._first_step is None:
            return channels
        height, width = frame_transform([self._first_step], image.shape[:2]).input_size
        if channels.shape[1:] == (height, width):
            return channels
        size = (width, height)  # as Pillow takes it
        # bilinear with antialiasing, as the model's own pre-processor
        return np.stack(
            [
                np.asarray(
                    Image.fromarray(np.ascontiguousarray(channel)).resize(
                        size, Image.Resampling.BILINEAR
                    )
                )
                for channel in channels
            ]
        )

    def predict(self, images: NDArray[np.float32]) -> Mapping[str, NDArray[Any]]:
        """Outputs of the graph, and peaks if it has a score map."""
        model = self._models[1 if len(images) == 1 else self.max_batch]
        results = model(np.ascontiguousarray(images))
        predictions = {name: results[number] for name, number in self._outputs.items()}
        if self._score_map is not None:
            score_map = results[self._score_map]
            peak = score_map.reshape(len(score_map), -1).argmax(1)
            predictions["peak"] = np.stack(np.divmod(peak, score_map.shape[-1]), 1)
        return predictions


class _Compiled:
    """A model for a device, compiled at its first use; serves any number of threads at once."""

    def __init__(self, core: Any, model: Any, device: str) -> None:  # noqa: ANN401
        self._compile = partial(
            core.compile_model, model, device, _CPU_PROPERTIES if device == "CPU" else {}
        )
        self._lock = Lock()
        self._compiled: Any = None
        self._idle_requests: deque[Any] = deque()  # each serves one thread at a time

    def compile(self) -> Any:  # noqa: ANN401
        """OpenVINO's compiled model."""
        with self._lock:
            if self._compiled is None:
                self._compiled = self._compile()
            return self._compiled

    def __call__(self, images: NDArray[np.float32]) -> list[NDArray[Any]]:
        """Outputs, in the order of the model's."""
        try:
            request = self._idle_requests.pop()
        except IndexError:  # all are in use
            request = self.compile().create_infer_request()
        try:
            return list(request.infer({0: images}).values())
        finally:
            self._idle_requests.append(request)


def _read_openvino(core: Any, file: Path, device: str) -> Any:  # noqa: ANN401
    """Model of an exported file, if the device exists."""
    weights = file.with_suffix(".bin")
    if file.suffix == ".xml" and not weights.is_file():
        msg = f"'{weights}' is not beside '{file.name}': the two belong together."
        raise FileNotFoundError(msg)
    try:
        model = core.read_model(file)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        msg = f"'{file}' is not a model that OpenVINO can read: {reason}"
        raise ValueError(msg) from error
    devices = [*core.available_devices, "AUTO"]
    if device.partition(".")[0] not in {name.partition(".")[0] for name in devices}:
        msg = f"device must be one of {', '.join(devices)}, got '{device}'."
        raise ValueError(msg)
    return model


def _find_operation(output: Any, kind: str) -> Any:  # noqa: ANN401
    """The nearest operation of a kind that an output depends on; ``None`` if there is none."""
    nodes, seen = deque([output.get_node()]), set()
    while nodes:
        node = nodes.popleft()
        if node.get_type_name() == kind:
            return node
        if node.get_friendly_name() not in seen:
            seen.add(node.get_friendly_name())
            nodes += [port.get_source_output().get_node() for port in node.inputs()]
    return None


def _score_map_in_graph(score: Any) -> Any:  # noqa: ANN401
    """The map that the score is the maximum of; ``None`` if it is not found."""
    maximum = _find_operation(score, "ReduceMax")
    source = None if maximum is None else maximum.input(0).get_source_output()
    return source if source is not None and len(source.get_partial_shape()) == 4 else None  # noqa: PLR2004


def _threshold_in_graph(core: Any, label: Any) -> float | None:  # noqa: ANN401
    """The constant that the score is compared with; ``None`` if it is not found."""
    import openvino as ov

    comparison = _find_operation(label, "Greater")
    if comparison is None:
        return None
    try:
        constant = ov.Model([comparison.input(1).get_source_output()], [])
        return float(np.ravel(core.compile_model(constant, "CPU")([])[0])[0])
    except RuntimeError:  # it depends on the image
        return None


def _export_settings(model: Any) -> Mapping[str, Any]:  # noqa: ANN401
    """Settings that the export wrote into the file; empty if there are none."""
    for path in (["sgfr"], ["framework", "sgfr"]):
        if model.has_rt_info(path):
            settings: Mapping[str, Any] = json.loads(model.get_rt_info(path).astype(str))
            return settings
    return {}
