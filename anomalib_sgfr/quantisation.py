"""Compression of an exported model to 8 bits, and what a file does to the labels."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from anomalib.data import AnomalibDataModule, ImageBatch
from anomalib.deploy import CompressionType
from anomalib.models.components import AnomalibModule
from torch import Tensor
from torchvision.transforms.v2 import Compose, Resize

from anomalib_sgfr.images.bit_depth import reread_images
from anomalib_sgfr.images.resizing import AspectResize

__all__ = [
    "compare_labels",
    "compare_with_file",
    "float_operations",
    "images_for",
    "keeping_in_float",
]

logger = logging.getLogger(__name__)

_COMPARED = 300  # validation images at most, whose labels are compared with the model's
_TOLERATED = 0.01  # difference in the rate of false alarms or of misses

_CONVOLUTIONS = {"Convolution", "GroupConvolution"}
_LOOPS = {"TensorIterator", "Loop"}
_NOT_QUANTISED = {"Constant", "Parameter", "Result", *_LOOPS}
_LAST = {"Add", "Clamp", "Relu", "Swish"}  # operations that end a backbone's layer
_FIRST = 3  # convolutions at full resolution: 8 bits there alter every feature after them


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
def _resized_to_fit(
    datamodule: Any,  # noqa: ANN401
    model: Any,  # noqa: ANN401
    rule: tuple[int, int] | None,
) -> Iterator[None]:
    """Have a data module give images of the size that a model takes, if it takes only one.

    If each image has its own, a batch has one: anomalib stretches the images of a batch to one.
    """
    height, width = (model.input(0).partial_shape[axis] for axis in (2, 3))
    is_fixed = height.is_static and width.is_static
    if datamodule is None or not (is_fixed or rule):
        yield
        return
    if is_fixed:
        resize = Resize((height.get_length(), width.get_length()), antialias=True)
        values: dict[str, Any] = {}
    else:
        resize = AspectResize((rule[0], rule[0]), rule)  # type: ignore[index]  # not None here
        values = {"eval_batch_size": 1}
    for name in ("val_augmentations", "test_augmentations"):
        original = getattr(datamodule, name, None)
        values[name] = resize if original is None else Compose([original, resize])
    with _replaced(datamodule, **values):
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
def images_for(
    model: Any,  # noqa: ANN401
    datamodule: Any,  # noqa: ANN401
    bit_depth: int,
    rule: tuple[int, int] | None = None,
) -> Iterator[None]:
    """Have a data module give images of a model's size and bit depth, not those of the files.

    Args:
        model (openvino.Model): The exported model.
        datamodule (AnomalibDataModule | None): Gives the images; changed in this context.
        bit_depth (int): Of the model.
        rule (tuple[int, int] | None): See :class:`~anomalib_sgfr.images.resizing.AspectResize`.
    """
    with _resized_to_fit(datamodule, model, rule), _full_bit_depth(datamodule, bit_depth):
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
    rule: tuple[int, int] | None = None,
) -> None:
    """Log the errors of an OpenVINO file's labels and of the model's, on validation images.

    Args:
        module (AnomalibModule): A fitted Sgfr.
        file (Path): The file.
        datamodule (AnomalibDataModule | None): Gives the images; nothing is compared without.
        compression (CompressionType | None): Of the file.
        rule (tuple[int, int] | None): See :class:`~anomalib_sgfr.images.resizing.AspectResize`.
    """
    if datamodule is not None:
        try:
            _compare(module, file, datamodule, rule)
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
def _compare(
    module: AnomalibModule, file: Path, datamodule: AnomalibDataModule, rule: tuple[int, int] | None
) -> None:
    import openvino

    model: Any = module.eval()
    network = openvino.Core().read_model(file)
    compiled = openvino.Core().compile_model(network, "CPU")  # as anomalib's inferencer does
    found = []
    with images_for(network, datamodule, model.model.bit_depth, rule):
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
