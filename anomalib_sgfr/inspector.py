"""Inspection of single frames by a checkpoint or an exported file, in the frames' own pixels.

Models that OpenVINO runs need neither PyTorch nor anomalib, and neither is imported for them.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice, tee
from pathlib import Path
from typing import Any, NamedTuple, Self, overload

import numpy as np
from numpy.typing import NDArray

from anomalib_sgfr.backends import Backend, OpenVinoBackend, TorchBackend
from anomalib_sgfr.images.frame_geometry import frame_transform
from anomalib_sgfr.images.reading import read_image
from anomalib_sgfr.monitor import Monitor

__all__ = ["Inspection", "Inspector", "ProductInspector", "choose_product"]

_MAX_PIXELS = 16 * 256 * 256  # of a batch
_TRIED_SIZES = ((31, 47), (64, 50))
_HALF = 0.5  # normalised value at a threshold


class Inspection(NamedTuple):
    """Image-level and pixel-level prediction of a frame.

    Attributes:
        score (float): Anomaly score: 0.5 at the threshold; raw if there is no threshold.
        label (bool | None): Whether the frame is anomalous; ``None`` if there is no threshold.
        map (NDArray[np.float32]): Anomaly map, shape ``(H, W)`` of the frame; zero outside of
            ``window``.
        mask (NDArray[np.bool_] | None): Anomalous pixels, shape ``(H, W)``; ``None`` if there is no
            threshold.
        window (tuple[int, int, int, int]): Inspected area: top, left, bottom, right; the whole
            frame unless the pre-processor crops.
        place (tuple[int, int] | None): Row and column of the score map's peak, which need not be
            the anomaly map's; ``None`` if an exported file does not tell.
        product (str | None): Name of the product, of a :class:`ProductInspector`; ``None`` if it is
            unknown.

    Examples:
        >>> from anomalib_sgfr import Inspection, Inspector
        >>> found = Inspector.load(checkpoint)(image)
        >>> isinstance(found, Inspection)
        True
        >>> found.map.shape == found.mask.shape
        True
    """

    score: float
    label: bool | None
    map: NDArray[np.float32]
    mask: NDArray[np.bool_] | None
    window: tuple[int, int, int, int]
    place: tuple[int, int] | None = None
    product: str | None = None


class Inspector:
    """Inspects frames, one or several at once; serves any number of threads.

    Args:
        backend (Backend): What :meth:`load` makes from a file.
        monitor (Monitor | None): Takes every score, in the order of the frames. Defaults to
            ``None``.

    Raises:
        TypeError: If the monitor is none.
        ValueError: If it is of a model with another threshold.

    Examples:
        >>> from anomalib_sgfr import Inspector
        >>> inspector = Inspector.load(checkpoint)
        >>> found = inspector(image)
        >>> found.label == (found.score > inspector.threshold)
        True
        >>> len(inspector([image, image]))
        2
    """

    def __init__(self, backend: Backend, monitor: Monitor | None = None) -> None:
        if not isinstance(monitor, Monitor | None):
            msg = f"monitor must be a Monitor, got {monitor!r}: Monitor.read reads a saved one."
            raise TypeError(msg)
        self._open_backend: Backend | None = backend
        self.monitor = monitor
        known = (None if monitor is None else monitor.threshold, backend.raw_threshold)
        if None not in known and not math.isclose(*known, rel_tol=1e-5):  # type: ignore[arg-type]
            msg = (
                f"the monitor is of scores with the threshold {known[0]:.6g}, the model's is"
                f" {known[1]:.6g}: make it anew with Monitor.of_checkpoint."
            )
            raise ValueError(msg)

    @classmethod
    def load(
        cls, path: str | Path, device: str | None = None, monitor: Monitor | None = None
    ) -> "Inspector":
        """Load a model.

        Args:
            path (str | Path): A checkpoint (``.ckpt``), or a file that ``anomalib export`` wrote:
                Torch (``.pt``, which can run any code: load none that you do not trust), OpenVINO
                (``.xml``) or ONNX (``.onnx``, run by OpenVINO).
            device (str | None): PyTorch's or OpenVINO's name of the device. Defaults to the CPU.
            monitor (Monitor | None): As of the class.

        Returns:
            Inspector: Ready to use.

        Raises:
            FileNotFoundError: If the file, or one that belongs to it, does not exist.
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
            return cls(OpenVinoBackend(file, (device or "CPU").upper()), monitor)
        if file.suffix in {".ckpt", ".pt"}:
            return cls(TorchBackend(file, device or "cpu"), monitor)
        msg = f"'{file}' must be a checkpoint (.ckpt) or an exported file (.pt, .xml, .onnx)."
        raise ValueError(msg)

    @property
    def _backend(self) -> Backend:
        if self._open_backend is None:
            msg = "this Inspector is closed: load the model again."
            raise RuntimeError(msg)
        return self._open_backend

    @property
    def threshold(self) -> float | None:
        """Score above which a frame is anomalous; ``None`` if there is no threshold."""
        return self._backend.threshold

    @property
    def warning(self) -> str | None:
        """Warning that too few good images support the threshold, or ``None``."""
        return self._backend.warning

    @property
    def bit_depth(self) -> int:
        """Bits of the camera, with which images of more than 8 bits are read."""
        return self._backend.bit_depth

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width of the model's input; ``None`` if they depend on the frame."""
        sizes = {frame_transform(self._backend.steps, size).input_size for size in _TRIED_SIZES}
        return sizes.pop() if len(sizes) == 1 else None

    def close(self) -> None:
        """Release the model; calls in other threads still finish."""
        self._open_backend = None

    def __enter__(self) -> Self:
        """Return the inspector."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the inspector."""
        self.close()

    @overload
    def __call__(self, frame: list[Any] | tuple[Any, ...] | Iterator[Any]) -> list[Inspection]: ...

    @overload
    def __call__(self, frame: Any) -> Inspection: ...  # noqa: ANN401

    def __call__(self, frame: Any) -> Inspection | list[Inspection]:
        """Inspect a frame, or several.

        Args:
            frame (Any): A file, a Pillow image, or an array, see
                :func:`~anomalib_sgfr.images.reading.read_image`. Or a list, a tuple or an iterator
                of these, of any sizes: they are scored in batches, which is faster and, but for
                rounding, the same as one by one.

        Returns:
            Inspection | list[Inspection]: In the frame's own pixels; a list if there are several.

        Raises:
            OSError: If a file cannot be read.
            RuntimeError: If the Inspector is closed.
            TypeError: If it is not an image.
            ValueError: If values are out of range, or the shape is not that of an image.
        """
        if isinstance(frame, list | tuple | Iterator):
            return list(self._inspect(frame))
        return next(self._inspect([frame]))

    def _inspect(self, frames: Iterable[Any]) -> Iterator[Inspection]:
        for frame, found in self.answers(frames):
            self.tell_monitor(frame, found)
            yield found

    def answers(self, frames: Iterable[Any]) -> Iterator[tuple[Any, Inspection]]:
        """Inspect frames in batches, as they are asked for, without telling the monitor.

        Args:
            frames (Iterable[Any]): Each as when the inspector is called.

        Yields:
            tuple[Any, Inspection]: Each frame and its inspection.
        """
        backend, remaining = self._backend, iter(frames)
        while batch := list(islice(remaining, backend.max_batch)):
            images = [read_image(frame, backend.bit_depth) for frame in batch]
            predictions = _predict(backend, [backend.pre_process(image) for image in images])
            for frame, image, prediction in zip(batch, images, predictions, strict=True):
                yield frame, _to_inspection(backend.steps, prediction, image.shape[:2])

    def tell_monitor(self, frame: Any, found: Inspection) -> None:  # noqa: ANN401
        """Give the monitor, if there is one, the score of a frame.

        Args:
            frame (Any): As when the inspector is called.
            found (Inspection): Its inspection.
        """
        if self.monitor is not None:
            path = str(frame) if isinstance(frame, str | Path) else ""
            self.monitor.update(found.score, path)


class ProductInspector:
    """Inspects frames of several products, each by the model of its product.

    Every model scores a frame. Its product is that of the model with the least median of the
    anomaly map, in which 0.5 is the threshold of pixels. If the least median exceeds 0.5, more
    than half of the frame is anomalous to every model, and the product is unknown.

    Args:
        inspectors (Mapping[str, Inspector]): The inspector of each product. Their monitors take
            the scores of frames of their own products alone.

    Raises:
        TypeError: If it is no mapping of names to inspectors.
        ValueError: If there is none, or one of a model without a threshold.

    Examples:
        >>> from anomalib_sgfr import ProductInspector
        >>> inspector = ProductInspector.load({"screws": checkpoint})
        >>> inspector(image).product
        'screws'
    """

    def __init__(self, inspectors: Mapping[str, Inspector]) -> None:
        _require_mapping("inspectors", inspectors)
        self.inspectors = dict(inspectors)
        if not self.inspectors:
            msg = "inspectors must hold the inspector of at least one product, got none."
            raise ValueError(msg)
        for product, inspector in self.inspectors.items():
            if not isinstance(inspector, Inspector):
                msg = (
                    f"the inspector of '{product}' must be an Inspector, got {inspector!r}:"
                    " ProductInspector.load takes files."
                )
                raise TypeError(msg)
            if inspector.threshold is None:
                msg = (
                    f"the model of '{product}' has no threshold, so that its maps cannot be"
                    " compared with those of others: choose one with `anomalib-sgfr threshold`."
                )
                raise ValueError(msg)

    @classmethod
    def load(cls, paths: Mapping[str, str | Path], device: str | None = None) -> "ProductInspector":
        """Load the model of each product.

        Args:
            paths (Mapping[str, str | Path]): A file for each product, as ``Inspector.load``
                takes it.
            device (str | None): As for ``Inspector.load``.

        Returns:
            ProductInspector: Ready to use.

        Raises:
            FileNotFoundError: As ``Inspector.load``.
            TypeError: As the class.
            ValueError: As ``Inspector.load``, and as the class.
        """
        _require_mapping("paths", paths)
        return cls({product: Inspector.load(path, device) for product, path in paths.items()})

    @overload
    def __call__(self, frame: list[Any] | tuple[Any, ...] | Iterator[Any]) -> list[Inspection]: ...

    @overload
    def __call__(self, frame: Any) -> Inspection: ...  # noqa: ANN401

    def __call__(self, frame: Any) -> Inspection | list[Inspection]:
        """Inspect a frame, or several.

        Args:
            frame (Any): As for :class:`Inspector`.

        Returns:
            Inspection | list[Inspection]: By the model of the product, with its name; of an
            unknown one, by the model that finds the least of it anomalous. A list if there are
            several frames.

        Raises:
            OSError: As :class:`Inspector`; so for ``TypeError`` and ``ValueError``.
        """
        if isinstance(frame, list | tuple | Iterator):
            return list(self._inspect(frame))
        return next(self._inspect([frame]))

    def _inspect(self, frames: Iterable[Any]) -> Iterator[Inspection]:
        copies = tee(frames, len(self.inspectors))
        by_model = map(Inspector.answers, self.inspectors.values(), copies)
        for answers in zip(*by_model, strict=True):
            frame = answers[0][0]
            named = zip(self.inspectors, answers, strict=True)
            found = choose_product({product: answer for product, (_, answer) in named})
            if found.product is not None:
                self.inspectors[found.product].tell_monitor(frame, found)
            yield found


def _require_mapping(name: str, given: object) -> None:
    if not isinstance(given, Mapping):
        kind = type(given).__name__
        msg = f'{name} must name each product, as in {{"screws": ..., "nuts": ...}}, got a {kind}.'
        raise TypeError(msg)


def choose_product(found: Mapping[str, Inspection]) -> Inspection:
    """Inspection of a frame by the model of its product, see :class:`ProductInspector`.

    Args:
        found (Mapping[str, Inspection]): By the model of each product.

    Returns:
        Inspection: One of them, with the name of its product or ``None``.
    """
    medians = {product: _median_inside(its.map) for product, its in found.items()}
    product = min(medians, key=medians.__getitem__)
    return found[product]._replace(product=product if medians[product] <= _HALF else None)


def _median_inside(anomaly_map: NDArray[np.float32]) -> float:
    """Median of the inspected pixels: others are zero, and no residual is."""
    inside = anomaly_map[anomaly_map > 0]
    return float(np.median(inside)) if inside.size else 0.0


def _predict(
    backend: Backend, images: Sequence[NDArray[np.float32]]
) -> list[Mapping[str, NDArray[Any]]]:
    """Predictions of each image; images of one size are batched."""
    by_shape = defaultdict(list)
    for number, image in enumerate(images):
        by_shape[image.shape].append(number)
    predictions: dict[int, Mapping[str, NDArray[Any]]] = {}
    for shape, numbers in by_shape.items():
        most = max(1, _MAX_PIXELS // math.prod(shape[1:]))
        for first in range(0, len(numbers), most):
            batch = numbers[first : first + most]
            values = backend.predict(np.stack([images[number] for number in batch]))
            for row, number in enumerate(batch):
                predictions[number] = {name: value[row] for name, value in values.items()}
    return [predictions[number] for number in range(len(images))]


def _to_inspection(
    steps: Sequence[Sequence[Any]], prediction: Mapping[str, NDArray[Any]], size: Sequence[int]
) -> Inspection:
    transform = frame_transform(steps, size)
    anomaly_map = _two_dimensional(prediction["anomaly_map"])
    label, mask, peak = (prediction.get(name) for name in ("pred_label", "pred_mask", "peak"))
    return Inspection(
        score=float(np.ravel(prediction["pred_score"])[0]),
        label=None if label is None else bool(np.ravel(label)[0]),
        map=transform.resample(anomaly_map),
        mask=None if mask is None else transform.resample(_two_dimensional(mask)) > _HALF,
        window=transform.inspected_area,
        place=None if peak is None else transform.frame_pixel(peak.tolist(), anomaly_map.shape),
    )


def _two_dimensional(values: NDArray[Any]) -> NDArray[Any]:
    return values.reshape(values.shape[-2:])
