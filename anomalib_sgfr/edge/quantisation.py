"""What must stay in floating point when an exported model is compressed to eight bits."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from anomalib.data import ImageBatch
from torchvision.transforms.v2 import Compose, Resize

from anomalib_sgfr.features.true_range import at_true_range

__all__ = ["float_operations", "keeping_in_float", "read_whole", "resized_to_fit"]

_CONVOLUTIONS = {"Convolution", "GroupConvolution"}
_LOOPS = {"TensorIterator", "Loop"}
_FIRST = 3  # convolutions at full resolution: 8 bits there alter every feature after them
_NOT_QUANTISED = {"Constant", "Parameter", "Result", *_LOOPS}


def float_operations(model: Any) -> list[str]:  # noqa: ANN401
    """Names of the operations of an exported Sgfr that eight bits would ruin.

    These are the resizing and what else precedes the backbone, the first convolutions, and all that follows the
    backbone: the pooling of features, and the map. (What rebuilds patches is the body of a loop, which NNCF leaves
    alone.)

    Args:
        model (openvino.Model): The exported model.

    Returns:
        list[str]: Friendly names.
    """
    operations = model.get_ordered_ops()
    loops = [operation for operation in operations if operation.get_type_name() in _LOOPS]
    found = [operation for operation in operations if operation.get_type_name() in _CONVOLUTIONS][:_FIRST]
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
    onwards = [target.get_node() for loop in loops for port in loop.outputs() for target in port.get_target_inputs()]
    while onwards:
        operation = onwards.pop()
        if operation.get_friendly_name() not in seen:
            seen.add(operation.get_friendly_name())
            found.append(operation)
            onwards += [target.get_node() for port in operation.outputs() for target in port.get_target_inputs()]
    return sorted({item.get_friendly_name() for item in found if item.get_type_name() not in _NOT_QUANTISED})


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
    """Let anomalib's compression leave :func:`float_operations` alone, and depthwise weights, which are few.

    anomalib calls NNCF without a scope and takes none, so the calls are given one while the context lasts.

    Args:
        model (openvino.Model): The model to compress.
    """
    import nncf

    names = float_operations(model)
    scopes = {
        "quantize": nncf.IgnoredScope(names=names),
        "quantize_with_accuracy_control": nncf.IgnoredScope(names=names),
        "compress_weights": nncf.IgnoredScope(names=names, types=["GroupConvolution"], validate=False),
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
    """Let a data module give images of the one size a model takes, if it takes but one, while the context lasts.

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
    """Let a data module give pictures of more than 8 bits at their true range, while the context lasts.

    Args:
        datamodule (AnomalibDataModule | None): Gives calibration images.
        bit_depth (int): Of the model.
    """
    if datamodule is None:
        yield
        return
    original = datamodule.external_collate_fn
    try:
        datamodule.external_collate_fn = partial(_collated, datamodule, original or ImageBatch.collate, bit_depth)
        yield
    finally:
        datamodule.external_collate_fn = original


def _collated(datamodule: Any, collate: Any, bit_depth: int, items: Any) -> Any:  # noqa: ANN401
    batch = collate(items)
    at_true_range(batch, datamodule.val_data, bit_depth)
    return batch
