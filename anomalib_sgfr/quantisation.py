"""Compression of an exported model to 8 bits, where these do no harm."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from anomalib.data import ImageBatch
from torchvision.transforms.v2 import Compose, Resize

from anomalib_sgfr.images.bit_depth import reread_images
from anomalib_sgfr.images.resizing import AspectResize

__all__ = ["compressing", "float_operations", "images_for", "keeping_in_float"]

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


@contextmanager
def compressing(
    model: Any,  # noqa: ANN401
    datamodule: Any,  # noqa: ANN401
    bit_depth: int,
    rule: tuple[int, int] | None = None,
) -> Iterator[None]:
    """Conditions under which anomalib compresses an exported Sgfr.

    What 8 bits would harm stays in floating point. Calibration images, which anomalib takes as they
    are on disk, have the size and the bit depth of the model.

    Args:
        model (openvino.Model): The model to compress.
        datamodule (AnomalibDataModule | None): Gives calibration images.
        bit_depth (int): Of the model.
        rule (tuple[int, int] | None): See :class:`~anomalib_sgfr.images.resizing.AspectResize`.
    """
    with keeping_in_float(model), images_for(model, datamodule, bit_depth, rule):
        yield
