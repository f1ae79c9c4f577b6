"""What must stay in floating point when an exported model is compressed to eight bits.

anomalib's exports, but whole or not at all, at an operator set that works, and with eight bits
where they do.
"""

import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self
from xml.etree import ElementTree as ET

import torch
from anomalib.data import AnomalibDataModule, ImageBatch
from anomalib.deploy import CompressionType
from anomalib.models.components.base.export_mixin import ExportMixin
from torch import Tensor, nn
from torchvision.transforms.v2 import Compose, Resize

from anomalib_sgfr.console import quiet_loggers
from anomalib_sgfr.images.bit_depth import reread_images
from anomalib_sgfr.images.pre_processor import geometric_steps
from anomalib_sgfr.run_paths import run_of_checkpoint

__all__ = [
    "WholeExports",
    "compare_labels",
    "float_operations",
    "keep_precision",
    "keeping_in_float",
    "read_whole",
    "resized_to_fit",
    "whole",
]

logger = logging.getLogger(__name__)

_CONVOLUTIONS = {"Convolution", "GroupConvolution"}
_LOOPS = {"TensorIterator", "Loop"}
_FIRST = 3  # convolutions at full resolution: 8 bits there alter every feature after them
_NOT_QUANTISED = {"Constant", "Parameter", "Result", *_LOOPS}


def float_operations(model: Any) -> list[str]:  # noqa: ANN401
    """Names of the operations of an exported Sgfr that eight bits would ruin.

    These are the resizing and what else precedes the backbone, the first convolutions, and all that
    follows the
    backbone: the pooling of features, and the map. (What rebuilds patches is the body of a loop,
    which NNCF leaves alone.)

    Args:
        model (openvino.Model): The exported model.

    Returns:
        list[str]: Friendly names.
    """
    operations = model.get_ordered_ops()
    loops = [operation for operation in operations if operation.get_type_name() in _LOOPS]
    found = [operation for operation in operations if operation.get_type_name() in _CONVOLUTIONS][
        :_FIRST
    ]
    before = {name for operation in found[:1] for name in _ancestors(operation)}
    found += [operation for operation in operations if operation.get_friendly_name() in before]
    backwards = [port.get_source_output().get_node() for loop in loops for port in loop.inputs()]
    seen: set[str] = set()
    while backwards:
        operation = backwards.pop()
        name, kind = operation.get_friendly_name(), operation.get_type_name()
        if name in seen or kind in {*_CONVOLUTIONS, "MatMul"}:  # the backbone begins
            continue
        seen.add(name)
        found.append(operation)
        if kind not in {"Add", "Clamp", "Relu", "Swish"}:  # its last sum or activation
            backwards += [port.get_source_output().get_node() for port in operation.inputs()]
    onwards = [
        target.get_node()
        for loop in loops
        for port in loop.outputs()
        for target in port.get_target_inputs()
    ]
    while onwards:
        operation = onwards.pop()
        if operation.get_friendly_name() not in seen:
            seen.add(operation.get_friendly_name())
            found.append(operation)
            onwards += [
                target.get_node()
                for port in operation.outputs()
                for target in port.get_target_inputs()
            ]
    return sorted(
        {item.get_friendly_name() for item in found if item.get_type_name() not in _NOT_QUANTISED}
    )


def _ancestors(operation: Any) -> set[str]:  # noqa: ANN401
    """Friendly names of all operations that an operation is computed from."""
    found: set[str] = set()
    left = [operation]
    while left:
        parents = [port.get_source_output().get_node() for port in left.pop().inputs()]
        new = [parent for parent in parents if parent.get_friendly_name() not in found]
        found.update(parent.get_friendly_name() for parent in new)
        left += new
    return found


@contextmanager
def keeping_in_float(model: Any) -> Iterator[None]:  # noqa: ANN401
    """Let anomalib's compression leave :func:`float_operations` alone, and depthwise weights, which
    are few.

    anomalib calls NNCF without a scope and takes none, so the calls are given one while the context
    lasts.

    Args:
        model (openvino.Model): The model to compress.
    """
    import nncf

    names = float_operations(model)
    scopes = {
        "quantize": nncf.IgnoredScope(names=names),
        "quantize_with_accuracy_control": nncf.IgnoredScope(names=names),
        "compress_weights": nncf.IgnoredScope(
            names=names, types=["GroupConvolution"], validate=False
        ),
    }
    originals = {name: getattr(nncf, name) for name in scopes}
    try:
        for name, scope in scopes.items():
            setattr(nncf, name, partial(originals[name], ignored_scope=scope))
        yield
    finally:
        for name, original in originals.items():
            setattr(nncf, name, original)


@contextmanager
def resized_to_fit(datamodule: Any, model: Any) -> Iterator[None]:  # noqa: ANN401
    """Let a data module give images of the one size a model takes, if it takes but one, while the
    context lasts.

    anomalib calibrates with images as they are on disk.

    Args:
        datamodule (AnomalibDataModule | None): Gives calibration images.
        model (openvino.Model): Takes them.
    """
    height, width = (model.input(0).partial_shape[axis] for axis in (2, 3))
    if datamodule is None or not (height.is_static and width.is_static):
        yield
        return
    resize = Resize((height.get_length(), width.get_length()), antialias=True)
    names = ("val_augmentations", "test_augmentations")
    originals = {name: getattr(datamodule, name, None) for name in names}
    try:
        for name, original in originals.items():
            setattr(datamodule, name, resize if original is None else Compose([original, resize]))
        yield
    finally:
        for name, original in originals.items():
            setattr(datamodule, name, original)


@contextmanager
def read_whole(datamodule: Any, bit_depth: int) -> Iterator[None]:  # noqa: ANN401
    """Let a data module give pictures of more than 8 bits at their true range, while the context
    lasts.

    Args:
        datamodule (AnomalibDataModule | None): Gives calibration images.
        bit_depth (int): Of the model.
    """
    if datamodule is None:
        yield
        return
    original = datamodule.external_collate_fn
    try:
        datamodule.external_collate_fn = partial(
            _collated, datamodule, original or ImageBatch.collate, bit_depth
        )
        yield
    finally:
        datamodule.external_collate_fn = original


def _collated(datamodule: Any, collate: Any, bit_depth: int, items: Any) -> Any:  # noqa: ANN401
    batch = collate(items)
    reread_images(batch, datamodule.val_data, bit_depth)
    return batch


# What the dynamo exporter implements natively; anomalib asks for 14, which it can only reach by a
# failing conversion.
_ONNX_OPSET = 18
_EXPORTERS = (
    "onnx_ir",
    "onnxscript",
    "torch.onnx",
)  # each tells of every node that it has looked at
_ANOMALIBS_ROOT = Path("results")  # where its Engine exports to if no folder is named
_MEASURED = {CompressionType.INT8_PTQ, CompressionType.INT8_ACQ}  # need images
# How OpenVINO is told of an operation that no plugin may compute it in less than 32 bits: from 2026
# on, and before.
_PRECISE = (
    {"name": "DisablePrecisionConversion", "version": "0", "value": "dynamic:f16,bf16"},
    {"name": "precise", "version": "0"},
)
_COMPARED = 300  # validation images at most, whose labels are compared with the model's
_TOLERATED = 0.01  # difference in the rate of false alarms or of misses


class _Part:
    """Folder beside the final one that an export is made in."""

    def __init__(self, folder: Path, root: Path) -> None:
        self.folder = folder
        self._root = root

    def done(self, made: Path) -> Path:
        """Move what was made, and what lies beside it, to where it belongs.

        Args:
            made (Path): The file that names the others: moved last.

        Returns:
            Path: Where it is now.
        """
        target = self._root / made.relative_to(self.folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        for file in sorted(made.parent.iterdir(), key=lambda file: file == made):
            file.replace(target.parent / file.name)
        return target


@contextmanager
def whole(export_root: Path | str) -> Iterator[_Part]:
    """Export into a folder of its own, so that a failed or killed export leaves an earlier one as
    it was.

    Args:
        export_root (Path | str): Folder that the export belongs in.
    """
    root = Path(export_root)
    root.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=root, prefix=".export-") as folder:
        yield _Part(Path(folder), root)


@contextmanager
def _out_of_place(model: nn.Module) -> Iterator[None]:
    """Have activations make new tensors: writing over their input takes the exporter half as long
    again to trace.
    """
    writing = [part for part in model.modules() if getattr(part, "inplace", False) is True]
    for part in writing:
        part.inplace = False  # type: ignore[assignment]  # of activations, a plain attribute
    try:
        yield
    finally:
        for part in writing:
            part.inplace = True  # type: ignore[assignment]


def _inscribe(file: Path, transform: Any, bit_depth: int, warning: str | None) -> None:  # noqa: ANN401
    """Write into an ONNX file how a picture becomes what the model sees; what is made of the file
    keeps that.

    And that too few images support its threshold, if that is so.
    """
    import onnx  # comes with what exports need

    about: dict[str, Any] = {"bit_depth": bit_depth, "warning": warning}
    with suppress(ValueError):  # the file does its work all the same
        about["steps"] = geometric_steps(transform)
    model = onnx.load(file, load_external_data=False)
    onnx.helper.set_model_props(model, {"sgfr": json.dumps(about)})
    onnx.save(model, file)


def keep_precision(file: Path) -> None:
    """Have OpenVINO compute a model in 32 bits, but for what is quantised, on a processor that
    would choose less.

    By itself it computes in bfloat16 where the processor can. The errors of a backbone's layers add
    up to several percent of its features, which makes good parts score higher than those that the
    threshold was chosen from.

    Args:
        file (Path): OpenVINO's XML file; rewritten.
    """
    tree = ET.parse(file)  # noqa: S314  # made just now
    names = {attribute["name"] for attribute in _PRECISE}
    for layer in tree.iter("layer"):  # also those of loops
        if layer.get("type") in {"Const", "Parameter", "Result"}:
            continue
        info = layer.find("rt_info")
        info = ET.SubElement(layer, "rt_info") if info is None else info
        for known in [attribute for attribute in info if attribute.get("name") in names]:
            info.remove(known)
        for attribute in _PRECISE:
            ET.SubElement(info, "attribute", attribute)
    tree.write(file, encoding="utf-8", xml_declaration=True)


def compare_labels(truth: Tensor, labels: Tensor, exported: Tensor) -> tuple[str, float]:
    """Errors of a model's labels beside those of its exported file on the same images.

    Args:
        truth (Tensor): ``True`` for defective images, shape ``(N,)``, ``bool``.
        labels (Tensor): The model's, alike.
        exported (Tensor): The file's, alike.

    Returns:
        tuple[str, float]: The counts in words, and the larger difference of the two rates of
            errors, between 0 and 1.
    """
    words, largest = [], 0.0
    for what, kind, images in (("false alarms", "good", ~truth), ("misses", "defective", truth)):
        total = int(images.sum())
        before, after = (int(((found != truth) & images).sum()) for found in (labels, exported))
        words.append(f"{what} on {total} {kind} images: {after}, the model {before}")
        largest = max(largest, abs(after - before) / max(total, 1))
    return "; ".join(words), largest


def _require(*packages: str) -> None:
    """Refuse an export whose packages are missing, before anything is computed for it.

    Raises:
        ModuleNotFoundError: The message says what to install.
    """
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        msg = (
            f'the export needs {", ".join(missing)}: `pip install "anomalib-sgfr[openvino]"` brings'
            " what it needs."
        )
        raise ModuleNotFoundError(msg)


class WholeExports(ExportMixin, ABC):
    """anomalib's exports for a fitted model; an earlier export stays until the new one is whole."""

    pre_processor: Any
    restored_from: Path | None = None  # checkpoint file that the model was loaded from

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Self:  # noqa: ANN401
        """Restore as anomalib does, and note the file: an export goes beside it where no other
        folder is asked for.
        """
        restored: Self = super().load_from_checkpoint(checkpoint_path, *args, **kwargs)  # type: ignore[misc]  # anomalib's
        if isinstance(checkpoint_path, str | Path):
            restored.restored_from = Path(checkpoint_path).resolve()
        return restored

    @abstractmethod
    def require_fitted(self, action: str) -> None:
        """Refuse what only a fitted model can do; the model says when it is."""

    def _root(self, export_root: Path | str) -> Path:
        """Folder to export to: anomalib's default, ``results``, would be one for all models."""
        if self.restored_from is None or Path(export_root) != _ANOMALIBS_ROOT:
            return Path(export_root)
        root = run_of_checkpoint(self.restored_from) or self.restored_from.with_name(
            f"{self.restored_from.stem}_export"
        )
        logger.info(
            "Exporting to %s, beside the checkpoint; --export_root names another folder.", root
        )
        return root

    @property
    def _bit_depth(self) -> int:
        return int(getattr(self.model, "bit_depth", 8))

    def to_torch(self, export_root: Path | str, model_file_name: str = "model") -> Path:
        """Export as anomalib does, once fitted; the file is replaced when the new one is whole."""
        self.require_fitted("export")
        with whole(self._root(export_root)) as part:
            return part.done(super().to_torch(part.folder, model_file_name))

    def to_onnx(
        self,
        export_root: Path | str,
        model_file_name: str = "model",
        input_size: tuple[int, int] | None = None,
        **kwargs: Any,  # noqa: ANN401
    ) -> Path:
        """Export as anomalib does, once fitted, at an operator set that the exporter reaches
        without a conversion.

        The files are replaced when the new ones are whole. Their metadata tell the depth at which
        pictures are read.
        """
        self.require_fitted("export")
        _require("onnx", "onnxscript")
        if input_size is not None and min(input_size) < 1:
            msg = (
                "input_size must be a height and a width of at least 1 pixel, got"
                f" {tuple(input_size)}."
            )
            raise ValueError(msg)
        options = {"opset_version": _ONNX_OPSET, "verbose": False, **kwargs}
        logger.info("Tracing the model for the export: half a minute or so.")
        with (
            whole(self._root(export_root)) as part,
            quiet_loggers(*_EXPORTERS),
            _out_of_place(self.model),
        ):
            made = super().to_onnx(part.folder, model_file_name, input_size, **options)
            warning = getattr(getattr(self, "post_processor", None), "warning", None)
            _inscribe(
                made, getattr(self.pre_processor, "transform", None), self._bit_depth, warning
            )
            return part.done(made)

    def to_openvino(
        self,
        export_root: Path | str,
        model_file_name: str = "model",
        input_size: tuple[int, int] | None = None,
        compression_type: CompressionType | None = None,
        datamodule: AnomalibDataModule | None = None,
        *args: Any,  # noqa: ANN401
        **kwargs: Any,  # noqa: ANN401
    ) -> Path:
        """Export as anomalib does, once fitted; the files are replaced when the new ones are whole.

        With a ``datamodule``, whatever the compression, the labels of its validation images by the
        file, as OpenVINO computes it on this processor, are compared with the model's, and the log
        has the errors.

        Raises:
            ValueError: If a compression that needs images is given none: before the conversion, not
                after.
        """
        self.require_fitted("export")
        _require("openvino", "onnx", "onnxscript")
        if compression_type in _MEASURED and datamodule is None:
            name = CompressionType(compression_type).name
            msg = (
                f"compression {name} is measured on images and there are none: pass --data"
                " (datamodule=...)."
            )
            raise ValueError(msg)
        with whole(self._root(export_root)) as part:
            made = super().to_openvino(
                part.folder,
                model_file_name,
                input_size,
                compression_type,
                datamodule,
                *args,
                **kwargs,
            )
            keep_precision(made)
            path = part.done(made)
        if datamodule is not None:
            try:
                self._compare(path, datamodule)
            except (OSError, RuntimeError, ValueError) as error:  # the file is there, and whole
                logger.warning(
                    "The labels of the exported file could not be compared with the model's: %s",
                    error,
                )
        elif compression_type == CompressionType.INT8:
            logger.info(
                "What 8 bits do to the labels was not measured: pass --data (datamodule=...) to"
                " compare them."
            )
        return path

    @torch.no_grad()
    def _compare(self, file: Path, datamodule: AnomalibDataModule) -> None:
        """Log the errors of the labels of a file and of the model, on validation images."""
        import openvino

        # of the module that this is mixed into
        model: Any = self.eval()  # type: ignore[attr-defined]
        network = openvino.Core().read_model(file)
        compiled = openvino.Core().compile_model(
            network, "CPU"
        )  # as anomalib's inferencer compiles it
        found = []
        with resized_to_fit(datamodule, network), read_whole(datamodule, self._bit_depth):
            datamodule.setup("fit")
            images: Any = getattr(datamodule, "val_data", None)
            if images is None or not len(images):
                logger.info(
                    "There are no validation images: the labels of the exported file were not"
                    " measured."
                )
                return
            logger.info(
                "Comparing the file's labels with the model's, on at most %d validation images.",
                _COMPARED,
            )
            collate: Any = datamodule.val_dataloader().collate_fn
            for row in range(0, len(images), -(-len(images) // _COMPARED)):
                batch = collate([images[row]])
                labels = (
                    model(batch.image.to(model.device)).pred_label,
                    compiled(batch.image.numpy())["pred_label"],
                )
                found.append([bool(batch.gt_label), *map(bool, labels)])
        words, difference = compare_labels(*torch.tensor(found).T)
        apart = difference > _TOLERATED
        logger.log(
            logging.WARNING if apart else logging.INFO,
            "Labels of the exported file on validation images, as OpenVINO computes it here: %s.%s",
            words,
            (
                " These rates are more than 1 percentage point apart: compress the model less."
                if apart
                else ""
            ),
        )

    def _compress_ov_model(
        self,
        model: Any,  # noqa: ANN401
        compression_type: CompressionType | None = None,
        datamodule: AnomalibDataModule | None = None,
        *args: Any,  # noqa: ANN401
        **kwargs: Any,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        """Compress as anomalib does, but for what eight bits would ruin, with images of the size
        the model takes.
        """
        model = model.clone()  # without what no output needs: NNCF fails on such operations
        with (
            keeping_in_float(model),
            resized_to_fit(datamodule, model),
            read_whole(datamodule, self._bit_depth),
        ):
            return super()._compress_ov_model(model, compression_type, datamodule, *args, **kwargs)
