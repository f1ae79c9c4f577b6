"""One object for frames: load a checkpoint or an exported file, and inspect pictures in their own
pixels.

What OpenVINO runs needs neither PyTorch nor anomalib, and imports neither.
"""

import json
import math
from abc import ABC, abstractmethod
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Self, overload

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from anomalib_sgfr.images.frame_geometry import FrameTransform, frame_transform, resample_to_frame
from anomalib_sgfr.images.reading import read_image

__all__ = ["Inspection", "Inspector"]

_FRAMES, _PIXELS = 16, 16 * 256 * 256  # most of a batch
_TRIED = ((31, 47), (64, 50))  # sizes of frames
_PROPERTIES = {
    "PERFORMANCE_HINT": "LATENCY",
    # sixteen bits would change scores on processors that have them
    "INFERENCE_PRECISION_HINT": "f32",
    "CPU_RUNTIME_CACHE_CAPACITY": "16",  # of sizes seen: memory stays flat
}


class Inspection(NamedTuple):
    """What a frame is found to be.

    Attributes:
        score (float): 0.5 at the threshold, and below one; raw where there is no threshold.
        label (bool | None): Whether the frame is anomalous; ``None`` where there is no threshold.
        map (NDArray[np.float32]): Score of each pixel of the frame, shape ``(H, W)``; zero where it
            is not inspected.
        mask (NDArray[np.bool_] | None): What is anomalous, shape ``(H, W)``.
        window (tuple[int, int, int, int]): The part of the frame that is inspected, all of it
            unless the model crops: top, left, bottom, right.
        place (tuple[int, int] | None): Row and column of the pixel that raised the score, which
            need not be the map's largest; ``None`` from an ONNX or OpenVINO file that does not
            tell.
    """

    score: float
    label: bool | None
    map: NDArray[np.float32]
    mask: NDArray[np.bool_] | None
    window: tuple[int, int, int, int]
    place: tuple[int, int] | None = None


class _Model(ABC):
    """What runs a model, in any number of threads at once, and says how it looks at a picture.

    Attributes:
        steps (Sequence): What is done to a picture, as
            :func:`~anomalib_sgfr.images.frame_geometry.frame_transform` takes it.
        bit_depth (int): Bits that the camera gives.
        threshold (float | None): Of reported scores.
        warning (str | None): That too few images support it.
        most (int): Frames that it takes at once.
    """

    steps: Sequence[Sequence[Any]]
    bit_depth: int
    threshold: float | None
    warning: str | None
    most: int = _FRAMES

    @abstractmethod
    def prepared(self, picture: NDArray[np.float32]) -> NDArray[np.float32]:
        """What the model takes, ``(3, h, w)``, of a picture ``(H, W, 3)``."""

    @abstractmethod
    def predict(self, images: NDArray[np.float32]) -> Mapping[str, NDArray[Any]]:
        """``pred_score``, ``anomaly_map`` and perhaps ``pred_label``, ``pred_mask``, ``place``, of
        ``(B, 3, h, w)``.
        """


class Inspector:
    """Inspect frames: one, or several at once.

    ::

        with Inspector.load("results/Sgfr/parts/latest/weights/lightning/model.ckpt") as inspector:
            found = inspector("parts/bad/00.png")
            found.score, found.label, found.map.shape
            several = inspector(["parts/bad/00.png", "parts/bad/01.png"])

    One object serves any number of threads.

    Args:
        model (_Model): What :meth:`load` makes of a file.
    """

    def __init__(self, model: _Model) -> None:
        self._open: _Model | None = model

    @classmethod
    def load(cls, path: str | Path, device: str | None = None) -> "Inspector":
        """Load a model.

        Args:
            path (str | Path): A checkpoint (``.ckpt``), or a file that ``anomalib export`` wrote:
                Torch (``.pt``, which can run any code: load none that you do not trust), OpenVINO
                (``.xml``) or ONNX (``.onnx``, run by OpenVINO).
            device (str | None): PyTorch's name of it, or OpenVINO's. Defaults to the processor.

        Returns:
            Inspector: Ready to use.

        Raises:
            FileNotFoundError: If the file, or one that belongs to it, is not there.
            ValueError: If it is of another kind, or moves pixels in a way that cannot be followed.
        """
        file = Path(path)
        if not file.is_file():
            msg = (
                f"'{file}': no such file. A fit writes model.ckpt, `anomalib export` writes"
                " model.xml or model.pt."
            )
            raise FileNotFoundError(msg)
        if file.suffix in {".xml", ".onnx"}:
            return cls(_OpenVino(file, (device or "CPU").upper()))
        if file.suffix in {".ckpt", ".pt"}:
            return cls(_Torch(file, device or "cpu"))
        msg = f"'{file}' must be a checkpoint (.ckpt) or an exported file (.pt, .xml, .onnx)."
        raise ValueError(msg)

    @property
    def _model(self) -> _Model:
        if self._open is None:
            msg = "this Inspector is closed: load the model again."
            raise RuntimeError(msg)
        return self._open

    @property
    def threshold(self) -> float | None:
        """The score above which a frame is labelled anomalous; ``None`` where there is no
        threshold.
        """
        return self._model.threshold

    @property
    def warning(self) -> str | None:
        """One sentence about a threshold that too few good images support; ``None`` where there is
        none.
        """
        return self._model.warning

    @property
    def bit_depth(self) -> int:
        """Bits a value that the model reads pictures of more than 8 bits with."""
        return self._model.bit_depth

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width that the model sees of any frame; ``None`` if that depends on the frame."""
        sizes = {frame_transform(self._model.steps, size).size for size in _TRIED}
        return sizes.pop() if len(sizes) == 1 else None

    def close(self) -> None:
        """Let the model go; what is under way in other threads still ends."""
        self._open = None

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()

    @overload
    def __call__(self, frame: list[Any] | tuple[Any, ...] | Iterator[Any]) -> list[Inspection]: ...

    @overload
    def __call__(self, frame: Any) -> Inspection: ...  # noqa: ANN401

    def __call__(self, frame: Any) -> Inspection | list[Inspection]:
        """Inspect a frame, or several.

        Args:
            frame (Any): A file, a PIL picture, or an array, see
                :func:`~anomalib_sgfr.images.reading.read_image`. Or a list, a tuple or an iterator of
                these, of any sizes: a few are scored at once, which is faster and, but for
                rounding, the same as one by one.

        Returns:
            Inspection | list[Inspection]: In the frame's own pixels; of several, a list in their
                order.

        Raises:
            OSError: If a file cannot be read.
            RuntimeError: If the Inspector is closed.
            TypeError: If it is no picture.
            ValueError: If the frame cannot be right.
        """
        if isinstance(frame, list | tuple | Iterator):
            return list(self._inspected(frame))
        return next(self._inspected([frame]))

    def _inspected(self, frames: Iterable[Any]) -> Iterator[Inspection]:
        model, left = self._model, iter(frames)
        while some := list(islice(left, model.most)):
            pictures = [read_image(frame, model.bit_depth) for frame in some]
            sizes = [(image.shape[0], image.shape[1]) for image in pictures]
            found = _predicted(model, [model.prepared(image) for image in pictures])
            yield from (
                _inspection(model.steps, one, size) for one, size in zip(found, sizes, strict=True)
            )


def _predicted(
    model: _Model, images: Sequence[NDArray[np.float32]]
) -> list[Mapping[str, NDArray[Any]]]:
    """What a model finds in each of some images, those of one size together."""
    alike = defaultdict(list)
    for number, image in enumerate(images):
        alike[image.shape].append(number)
    found: dict[int, Mapping[str, NDArray[Any]]] = {}
    for shape, numbers in alike.items():
        most = max(1, _PIXELS // math.prod(shape[1:]))
        for first in range(0, len(numbers), most):
            some = numbers[first : first + most]
            values = model.predict(np.stack([images[number] for number in some]))
            for row, number in enumerate(some):
                found[number] = {name: value[row] for name, value in values.items()}
    return [found[number] for number in range(len(images))]


def _inspection(
    steps: Sequence[Sequence[Any]], found: Mapping[str, NDArray[Any]], size: tuple[int, int]
) -> Inspection:
    over = frame_transform(steps, size)
    label, mask, place = (found.get(name) for name in ("pred_label", "pred_mask", "place"))
    return Inspection(
        score=float(np.ravel(found["pred_score"])[0]),
        label=None if label is None else bool(np.ravel(label)[0]),
        map=_laid(found["anomaly_map"], over, size),
        mask=None if mask is None else _laid(mask, over, size) > 0.5,  # noqa: PLR2004
        window=over.inspected_area(size),
        place=(
            None
            if place is None
            else over.pixel(place.tolist(), found["anomaly_map"].shape[-2:], size)
        ),
    )


def _laid(values: Any, over: FrameTransform, size: Sequence[int]) -> NDArray[np.float32]:  # noqa: ANN401
    return resample_to_frame(np.asarray(values).reshape(np.shape(values)[-2:]), over, size)


class _Torch(_Model):
    """A checkpoint, or a file that anomalib exported."""

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
            held = torch.load(file, map_location=device, weights_only=False)
            model = held.get("model") if isinstance(held, dict) else held
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
        self.threshold = _threshold(model.post_processor)
        self.warning = getattr(model.post_processor, "warning", None)

    def prepared(self, picture: NDArray[np.float32]) -> NDArray[np.float32]:
        import torch

        image = torch.from_numpy(np.ascontiguousarray(picture.transpose(2, 0, 1)))
        return np.asarray(image if self._transform is None else self._transform(image))

    def predict(self, images: NDArray[np.float32]) -> Mapping[str, NDArray[Any]]:
        import torch

        with torch.inference_mode():
            maps = self._model.model.score_maps(torch.from_numpy(images).to(self._model.device))
            found: Any = maps.prediction
            if self._model.post_processor is not None:
                found = self._model.post_processor(found)
            values = {**found._asdict(), "place": maps.peak}.items()
            return {name: value.numpy(force=True) for name, value in values if value is not None}


def _threshold(post_processor: Any) -> float | None:  # noqa: ANN401
    """That of reported scores, moved by the sensitivity; ``None`` where there is none."""
    value = float(getattr(post_processor, "normalized_image_threshold", math.nan))
    there = getattr(post_processor, "is_set", True) and getattr(
        post_processor, "enable_thresholding", True
    )
    return value if there and not math.isnan(value) else None


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
            msg = (
                f"'{file}' is not a model that OpenVINO can read:"
                f" {str(error).splitlines()[-1].strip()}"
            )
            raise ValueError(msg) from error
        known = [name.partition(".")[0] for name in core.available_devices]
        if device.partition(".")[0] not in {*known, "AUTO"}:
            msg = (
                f"device must be one of {', '.join([*core.available_devices, 'AUTO'])}, got"
                f" '{device}'."
            )
            raise ValueError(msg)
        outputs = {
            name: number
            for number, output in enumerate(model.outputs)
            for name in output.get_names()
        }
        if not {"pred_score", "anomaly_map"} <= set(outputs):
            msg = (
                f"'{file}' is not an export of an anomalib model: its outputs are"
                f" {', '.join(outputs) or 'unnamed'}."
            )
            raise ValueError(msg)
        self.threshold = (
            _threshold_in(core, model.output("pred_label")) if "pred_label" in outputs else None
        )
        self._outputs, self._score_map = outputs, None
        score_map = _score_map(model.output("pred_score"))
        if score_map is not None:
            self._score_map = len(model.outputs)
            model.add_outputs([score_map])
        self._compiled = core.compile_model(model, device, _PROPERTIES if device == "CPU" else {})
        self._idle: deque[Any] = deque()  # requests: one serves one thread at a time
        # the bindings set themselves up at the first use of an array, in which two threads at once
        # would wait for ever
        _ = ov.Tensor(np.zeros(1, np.float32)).data
        about = _about(model)
        if about is None or "steps" not in about:
            msg = (
                f"'{file}' does not say how it resizes a picture: it is of an earlier version, or"
                " its pre-processor does more than Resize, CenterCrop and Pad. Export it again."
            )
            raise ValueError(msg)
        self._steps = [tuple(step) for step in about["steps"]]
        self.bit_depth, self.warning = about.get("bit_depth", 8), about.get("warning")
        batch, _, height, width = self._compiled.input(0).partial_shape
        self.most = batch.get_length() if batch.is_static else _FRAMES
        # what is resized here is resized no more in the graph, which then sees but one size
        self._first: tuple[int, int] | None = None
        if height.is_static and width.is_static:
            self._first = (height.get_length(), width.get_length())
        elif self._steps and self._steps[0][0] == "resize":
            self._first = (int(self._steps[0][1]), int(self._steps[0][2]))
        self.steps = [("resize", *self._first), *self._steps] if self._first else self._steps

    def prepared(self, picture: NDArray[np.float32]) -> NDArray[np.float32]:
        image = picture.transpose(2, 0, 1)
        return (
            image
            if self._first is None
            else np.stack([_resized(channel, self._first) for channel in image])
        )

    def predict(self, images: NDArray[np.float32]) -> Mapping[str, NDArray[Any]]:
        try:
            request = self._idle.pop()
        except IndexError:  # all are at work
            request = self._compiled.create_infer_request()
        try:
            results = list(request.infer({0: np.ascontiguousarray(images)}).values())
        finally:
            self._idle.append(request)
        found = {name: results[number] for name, number in self._outputs.items()}
        if self._score_map is not None:
            score_map = results[self._score_map]
            highest = score_map.reshape(len(score_map), -1).argmax(1)
            found["place"] = np.stack(np.divmod(highest, score_map.shape[-1]), 1)
        return found


def _behind(output: Any, kind: str) -> Any:  # noqa: ANN401
    """The nearest operation of a kind among those that an output of a graph is made from; ``None``
    for none.
    """
    nodes, seen = deque([output.get_node()]), set()
    while nodes:
        node = nodes.popleft()
        if node.get_type_name() == kind:
            return node
        if node.get_friendly_name() not in seen:
            seen.add(node.get_friendly_name())
            nodes += [port.get_source_output().get_node() for port in node.inputs()]
    return None


def _score_map(score: Any) -> Any:  # noqa: ANN401
    """What the score is the maximum of, in the graph; ``None`` if that is not found."""
    node = _behind(score, "ReduceMax")
    source = None if node is None else node.input(0).get_source_output()
    return source if source is not None and len(source.get_partial_shape()) == 4 else None  # noqa: PLR2004


def _threshold_in(core: Any, label: Any) -> float | None:  # noqa: ANN401
    """What the score is compared with in the graph; ``None`` if that is not found."""
    import openvino as ov

    node = _behind(label, "Greater")
    if node is None:
        return None
    try:
        value = ov.Model([node.input(1).get_source_output()], [])
        return float(np.ravel(core.compile_model(value, "CPU")([])[0])[0])
    except RuntimeError:  # it follows from the picture
        return None


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
