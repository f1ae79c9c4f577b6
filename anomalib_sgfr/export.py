"""Export to PyTorch, ONNX and OpenVINO, whole or not at all, with 8 bits where these do no harm."""

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple
from xml.etree import ElementTree as ET

import torch
from anomalib.data import AnomalibDataModule, ImageBatch
from anomalib.deploy import CompressionType
from anomalib.models.components import AnomalibModule
from torch import Tensor, nn
from torchvision.transforms.v2 import Compose, Resize

from anomalib_sgfr.console import quiet_loggers
from anomalib_sgfr.images.bit_depth import reread_images
from anomalib_sgfr.images.pre_processor import geometric_steps
from anomalib_sgfr.run_paths import run_of_checkpoint

__all__ = [
    "ONNX_OPTIONS",
    "ExportFolder",
    "compare_labels",
    "compare_with_file",
    "compressing",
    "export_folder",
    "float_operations",
    "keep_precision",
    "keeping_in_float",
    "require_images",
    "require_packages",
    "resolve_root",
    "tracing",
    "write_metadata",
]

logger = logging.getLogger(__name__)

# operator set that the dynamo exporter implements: anomalib asks for 14, which it can only reach by
# a conversion that fails
ONNX_OPTIONS: dict[str, Any] = {"opset_version": 18, "verbose": False}
_EXPORTERS = ("onnx_ir", "onnxscript", "torch.onnx")  # each logs every node
_DEFAULT_ROOT = Path("results")  # of anomalib's Engine

# OpenVINO's mark of an operation that no plugin may compute in less than 32 bits: from 2026 on, and
# before
_PRECISE = (
    {"name": "DisablePrecisionConversion", "version": "0", "value": "dynamic:f16,bf16"},
    {"name": "precise", "version": "0"},
)
_CONVOLUTIONS = {"Convolution", "GroupConvolution"}
_LOOPS = {"TensorIterator", "Loop"}
_NOT_QUANTISED = {"Constant", "Parameter", "Result", *_LOOPS}
_LAST = {"Add", "Clamp", "Relu", "Swish"}  # operations that end a backbone's layer
_FIRST = 3  # convolutions at full resolution: 8 bits there alter every feature after them
_NEED_IMAGES = {CompressionType.INT8_PTQ, CompressionType.INT8_ACQ}
_COMPARED = 300  # validation images at most, whose labels are compared with the model's
_TOLERATED = 0.01  # difference in the rate of false alarms or of misses


def resolve_root(export_root: Path | str, checkpoint: Path | None) -> Path:
    """Folder to export to.

    Args:
        export_root (Path | str): As asked for. anomalib's default is one folder for all models.
        checkpoint (Path | None): That the model was loaded from: its export goes beside it instead.
    """
    if checkpoint is None or Path(export_root) != _DEFAULT_ROOT:
        return Path(export_root)
    root = run_of_checkpoint(checkpoint) or checkpoint.with_name(f"{checkpoint.stem}_export")
    logger.info("Exporting to %s, beside the checkpoint; --export_root names another folder.", root)
    return root


class ExportFolder(NamedTuple):
    """Temporary folder beside the final one that an export is made in.

    Attributes:
        folder (Path): The temporary folder.
        root (Path): The final one.
    """

    folder: Path
    root: Path

    def publish(self, file: Path) -> Path:
        """Move an exported file, and those beside it, to the final folder.

        Args:
            file (Path): The file that names the others; it is moved last.

        Returns:
            Path: Where it is now.
        """
        target = self.root / file.relative_to(self.folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        for part in sorted(file.parent.iterdir(), key=lambda part: part == file):
            part.replace(target.parent / part.name)
        return target


@contextmanager
def export_folder(root: Path) -> Iterator[ExportFolder]:
    """Temporary folder for an export: one that fails leaves an earlier one as it was.

    Args:
        root (Path): Folder that the export belongs in; it is made.
    """
    root.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=root, prefix=".export-") as folder:
        yield ExportFolder(Path(folder), root)


def require_packages(*packages: str) -> None:
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


def require_images(compression: CompressionType | None, datamodule: object | None) -> None:
    """Refuse a compression that needs images and has none, before the conversion.

    Raises:
        ValueError: If images are missing.
    """
    if compression in _NEED_IMAGES and datamodule is None:
        msg = (
            f"compression {CompressionType(compression).name} is measured on images and there are"
            " none: pass --data (datamodule=...)."
        )
        raise ValueError(msg)


@contextmanager
def tracing(model: nn.Module, input_size: tuple[int, int] | None) -> Iterator[None]:
    """Conditions under which a model is traced for ONNX.

    The exporter's loggers are quiet, and activations make new tensors: if they write over their
    input, tracing takes half as long again.

    Args:
        model (nn.Module): The model.
        input_size (tuple[int, int] | None): Height and width of the input, if it is to be fixed.

    Raises:
        ValueError: If the size is no size.
    """
    if input_size is not None and min(input_size) < 1:
        msg = (
            f"input_size must be a height and a width of at least 1 pixel, got {tuple(input_size)}."
        )
        raise ValueError(msg)
    logger.info("Tracing the model for the export: half a minute or so.")
    inplace = [part for part in model.modules() if getattr(part, "inplace", False) is True]
    for part in inplace:
        part.inplace = False  # type: ignore[assignment]  # of activations, a plain attribute
    try:
        with quiet_loggers(*_EXPORTERS):
            yield
    finally:
        for part in inplace:
            part.inplace = True  # type: ignore[assignment]


def write_metadata(file: Path, module: AnomalibModule) -> None:
    """Write into an ONNX file what an Inspector needs; what is converted from the file keeps it.

    That is the bit depth, the steps of the pre-processing, and the warning of a threshold that too
    few images support.

    Args:
        file (Path): The file; rewritten.
        module (AnomalibModule): Exported to it.
    """
    import onnx  # installed for exports only

    about: dict[str, Any] = {
        "bit_depth": int(getattr(module.model, "bit_depth", 8)),
        "warning": getattr(module.post_processor, "warning", None),
    }
    with suppress(ValueError):  # unknown steps; the file is of use without them
        about["steps"] = geometric_steps(getattr(module.pre_processor, "transform", None))
    model = onnx.load(file, load_external_data=False)
    onnx.helper.set_model_props(model, {"sgfr": json.dumps(about)})
    onnx.save(model, file)


def keep_precision(file: Path) -> None:
    """Have OpenVINO compute a model in 32 bits, except for what is quantised.

    By itself it computes in bfloat16 where the processor can. The errors of a backbone's layers add
    up to several percent of its features, so that good parts score higher than those that the
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


def float_operations(model: Any) -> list[str]:  # noqa: ANN401
    """Names of the operations of an exported Sgfr that 8 bits would harm.

    These are the resizing and whatever else precedes the backbone, the first convolutions, and all
    that follows the backbone: the pooling of features, and the map. (Patches are rebuilt in the
    body of a loop, which NNCF does not quantise.)

    Args:
        model (openvino.Model): The exported model.

    Returns:
        list[str]: Friendly names.
    """
    operations = model.get_ordered_ops()
    loops = [item for item in operations if item.get_type_name() in _LOOPS]
    first = [item for item in operations if item.get_type_name() in _CONVOLUTIONS][:_FIRST]
    found = {item.get_friendly_name(): item for item in first}
    before: dict[str, Any] = {}
    _walk(_parents(first[0]) if first else [], _parents, before)
    around: dict[str, Any] = {}
    _walk(
        [part for loop in loops for part in _parents_after_backbone(loop)],
        _parents_after_backbone,
        around,
    )
    _walk([part for loop in loops for part in _children(loop)], _children, around)
    found |= before | around
    return sorted(
        name for name, item in found.items() if item.get_type_name() not in _NOT_QUANTISED
    )


def _walk(start: list[Any], neighbours: Callable[[Any], list[Any]], seen: dict[str, Any]) -> None:
    """Add to ``seen``, by name, all operations that can be reached and are not in it."""
    left = list(start)
    while left:
        operation = left.pop()
        if operation.get_friendly_name() not in seen:
            seen[operation.get_friendly_name()] = operation
            left += neighbours(operation)


def _parents(operation: Any) -> list[Any]:  # noqa: ANN401
    return [port.get_source_output().get_node() for port in operation.inputs()]


def _parents_after_backbone(operation: Any) -> list[Any]:  # noqa: ANN401
    if operation.get_type_name() in _LAST:
        return []
    parents = _parents(operation)
    return [item for item in parents if item.get_type_name() not in {*_CONVOLUTIONS, "MatMul"}]


def _children(operation: Any) -> list[Any]:  # noqa: ANN401
    return [
        target.get_node() for port in operation.outputs() for target in port.get_target_inputs()
    ]


@contextmanager
def _replaced(owner: Any, **values: Any) -> Iterator[None]:  # noqa: ANN401
    """Attributes of an object replaced while the context lasts."""
    originals = {name: getattr(owner, name, None) for name in values}
    try:
        for name, value in values.items():
            setattr(owner, name, value)
        yield
    finally:
        for name, original in originals.items():
            setattr(owner, name, original)


@contextmanager
def keeping_in_float(model: Any) -> Iterator[None]:  # noqa: ANN401
    """Have anomalib's compression leave out :func:`float_operations`, and depthwise weights.

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
    calls = {
        name: partial(getattr(nncf, name), ignored_scope=scope) for name, scope in scopes.items()
    }
    with _replaced(nncf, **calls):
        yield


@contextmanager
def _resized_to_fit(datamodule: Any, model: Any) -> Iterator[None]:  # noqa: ANN401
    """Have a data module give images of the size that a model takes, if it takes only one."""
    height, width = (model.input(0).partial_shape[axis] for axis in (2, 3))
    if datamodule is None or not (height.is_static and width.is_static):
        yield
        return
    resize = Resize((height.get_length(), width.get_length()), antialias=True)
    augmentations: dict[str, Any] = {}
    for name in ("val_augmentations", "test_augmentations"):
        original = getattr(datamodule, name, None)
        augmentations[name] = resize if original is None else Compose([original, resize])
    with _replaced(datamodule, **augmentations):
        yield


@contextmanager
def _full_bit_depth(datamodule: Any, bit_depth: int) -> Iterator[None]:  # noqa: ANN401
    """Have a data module give images of more than 8 bits at their own bit depth."""
    if datamodule is None:
        yield
        return
    collate = datamodule.external_collate_fn or ImageBatch.collate
    collated = partial(_collated, datamodule, collate, bit_depth)
    with _replaced(datamodule, external_collate_fn=collated):
        yield


def _collated(datamodule: Any, collate: Any, bit_depth: int, items: Any) -> Any:  # noqa: ANN401
    batch = collate(items)
    reread_images(batch, datamodule.val_data, bit_depth)
    return batch


@contextmanager
def compressing(model: Any, datamodule: Any, bit_depth: int) -> Iterator[None]:  # noqa: ANN401
    """Conditions under which anomalib compresses an exported Sgfr.

    What 8 bits would harm stays in floating point. Calibration images, which anomalib takes as they
    are on disk, have the size and the bit depth of the model.

    Args:
        model (openvino.Model): The model to compress.
        datamodule (AnomalibDataModule | None): Gives calibration images.
        bit_depth (int): Of the model.
    """
    with (
        keeping_in_float(model),
        _resized_to_fit(datamodule, model),
        _full_bit_depth(datamodule, bit_depth),
    ):
        yield


def compare_labels(truth: Tensor, labels: Tensor, exported: Tensor) -> tuple[str, float]:
    """Errors of a model's labels beside those of its exported file on the same images.

    Args:
        truth (Tensor): ``True`` for defective images, shape ``(N,)``, ``bool``.
        labels (Tensor): The model's, of the same shape and type.
        exported (Tensor): The file's, of the same shape and type.

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


def compare_with_file(
    module: AnomalibModule,
    file: Path,
    datamodule: AnomalibDataModule | None,
    compression: CompressionType | None,
) -> None:
    """Log the errors of an OpenVINO file's labels and of the model's, on validation images.

    Args:
        module (AnomalibModule): The model.
        file (Path): Exported from it.
        datamodule (AnomalibDataModule | None): Gives the images; without it nothing is compared.
        compression (CompressionType | None): Of the file.
    """
    if datamodule is not None:
        try:
            _compare(module, file, datamodule)
        except (OSError, RuntimeError, ValueError) as error:  # the file is whole
            logger.warning(
                "The labels of the exported file could not be compared with the model's: %s", error
            )
    elif compression == CompressionType.INT8:
        logger.info(
            "What 8 bits do to the labels was not measured: pass --data (datamodule=...) to"
            " compare them."
        )


@torch.no_grad()
def _compare(module: AnomalibModule, file: Path, datamodule: AnomalibDataModule) -> None:
    import openvino

    model: Any = module.eval()
    network = openvino.Core().read_model(file)
    compiled = openvino.Core().compile_model(network, "CPU")  # as anomalib's inferencer does
    found = []
    with _resized_to_fit(datamodule, network), _full_bit_depth(datamodule, model.model.bit_depth):
        datamodule.setup("fit")
        images: Any = getattr(datamodule, "val_data", None)
        if images is None or not len(images):
            logger.info(
                "There are no validation images: the labels of the exported file were not measured."
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
