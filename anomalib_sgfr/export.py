"""Export to PyTorch, ONNX and OpenVINO, whole or not at all."""

import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from xml.etree import ElementTree as ET

import torch
from anomalib.data import AnomalibDataModule
from anomalib.deploy import CompressionType
from anomalib.models.components import AnomalibModule
from timm.layers.conv2d_same import Conv2dSame
from torch import Tensor, nn
from torch.nn import functional

from anomalib_sgfr.console import quiet_loggers
from anomalib_sgfr.images.pre_processor import aspect_rule, geometric_steps, output_size
from anomalib_sgfr.images.resizing import GridResize
from anomalib_sgfr.quantisation import compare_with_file
from anomalib_sgfr.run_paths import run_of_checkpoint

__all__ = ["export_onnx", "export_openvino", "publish", "resolve_root"]

logger = logging.getLogger(__name__)

# operator set that the dynamo exporter implements: anomalib asks for 14, which it can only reach by
# a conversion that fails
_ONNX_OPTIONS: dict[str, Any] = {"opset_version": 18, "verbose": False}
_EXPORTERS = ("onnx_ir", "onnxscript", "torch.onnx")  # each logs every node
_DEFAULT_ROOT = Path("results")  # of anomalib's Engine

# OpenVINO's mark of an operation that no plugin may compute in less than 32 bits: from 2026 on, and
# before
_PRECISE = (
    {"name": "DisablePrecisionConversion", "version": "0", "value": "dynamic:f16,bf16"},
    {"name": "precise", "version": "0"},
)
_NEED_IMAGES = {CompressionType.INT8_PTQ, CompressionType.INT8_ACQ}


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


def publish(root: Path, export: Callable[[Path], Path]) -> Path:
    """Export into a temporary folder, then move the files: a failure leaves earlier ones.

    Args:
        root (Path): Folder that the export belongs in; it is made.
        export (Callable[[Path], Path]): Exports into a folder, and returns the file that names
            the others beside it; it is moved last.

    Returns:
        Path: Where that file is now.
    """
    root.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=root, prefix=".export-") as folder:
        file = export(Path(folder))
        target = root / file.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        for part in sorted(file.parent.iterdir(), key=lambda part: part == file):
            part.replace(target.parent / part.name)
        return target


def export_onnx(
    module: AnomalibModule,
    export: Callable[..., Path],
    root: Path,
    name: str,
    input_size: tuple[int, int] | None,
    **options: Any,  # noqa: ANN401
) -> Path:
    """Export a model to ONNX, with metadata for an Inspector.

    Args:
        module (AnomalibModule): A fitted Sgfr.
        export (Callable): anomalib's ``to_onnx``.
        root (Path): Folder to export to.
        name (str): Of the file.
        input_size (tuple[int, int] | None): Height and width of the input, if it is to be fixed.
        **options: For ``torch.onnx.export``.

    Returns:
        Path: The file.

    Raises:
        ModuleNotFoundError: If a package is missing.
        ValueError: If the size is no size.
    """
    _require_packages("onnx", "onnxscript")

    rule = None if input_size is not None else aspect_rule(module.pre_processor)
    if input_size is not None and tuple(input_size) != output_size(module.pre_processor):
        logger.warning(
            "The file takes images of %s pixels (height x width). Others are resized to that first,"
            " and then score otherwise than by the model.",
            " x ".join(map(str, input_size)),
        )

    def write(folder: Path) -> Path:
        try:
            file = export(folder, name, input_size, **{**_ONNX_OPTIONS, **options})
            if rule is not None:
                _resize_first(file, GridResize(*rule))
        except torch.onnx.errors.OnnxExporterError as error:
            if rule is None:
                raise
            msg = (
                "the model keeps each image's aspect ratio, and cannot be exported for images of"
                ' any size: pass --input_size "[HEIGHT, WIDTH]" (input_size=...) of your images.'
            )
            raise ValueError(msg) from error
        _write_metadata(file, module)
        return file

    with _tracing(module.model, input_size), _whole_steps(module.model, rule):
        return publish(root, write)


def export_openvino(
    module: AnomalibModule,
    export: Callable[..., Path],
    root: Path,
    compression: CompressionType | None,
    datamodule: AnomalibDataModule | None,
) -> Path:
    """Export a model to OpenVINO, and log the errors of its labels on validation images.

    Args:
        module (AnomalibModule): A fitted Sgfr.
        export (Callable): anomalib's ``to_openvino``, given all but the folder.
        root (Path): Folder to export to.
        compression (CompressionType | None): Of the file.
        datamodule (AnomalibDataModule | None): Gives images to compress with and to compare.

    Returns:
        Path: The file.

    Raises:
        ModuleNotFoundError: If a package is missing.
        ValueError: If a compression that needs images has none.
    """
    _require_packages("openvino", "onnx", "onnxscript")
    if compression in _NEED_IMAGES and datamodule is None:
        msg = (
            f"compression {CompressionType(compression).name} is measured on images and there are"
            " none: pass --data (datamodule=...)."
        )
        raise ValueError(msg)

    def write(folder: Path) -> Path:
        file = export(folder)
        _keep_precision(file)
        return file

    path = publish(root, write)
    compare_with_file(module, path, datamodule, compression, aspect_rule(module.pre_processor))
    return path


def _require_packages(*packages: str) -> None:
    """Refuse an export whose packages are missing, before anything is computed for it."""
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        msg = (
            f'the export needs {", ".join(missing)}: `pip install "anomalib-sgfr[openvino]"` brings'
            " what it needs."
        )
        raise ModuleNotFoundError(msg)


@contextmanager
def _tracing(model: nn.Module, input_size: tuple[int, int] | None) -> Iterator[None]:
    """Conditions under which a model is traced for ONNX."""
    if input_size is not None and min(input_size) < 1:
        msg = (
            f"input_size must be a height and a width of at least 1 pixel, got {tuple(input_size)}."
        )
        raise ValueError(msg)
    logger.info("Tracing the model for the export: half a minute or so.")
    # activations that write over their input make tracing half as long again
    inplace = [part for part in model.modules() if getattr(part, "inplace", False) is True]
    for part in inplace:
        part.inplace = False  # type: ignore[assignment]  # of activations, a plain attribute
    try:
        with quiet_loggers(*_EXPORTERS):
            yield
    finally:
        for part in inplace:
            part.inplace = True  # type: ignore[assignment]


@contextmanager
def _whole_steps(model: nn.Module, rule: tuple[int, int] | None) -> Iterator[None]:
    """Have convolutions that pad by the size of the image pad as for a multiple of the step.

    The paddings are the same, but a trace need not work them out for sizes that it does not know.
    """
    padded = [] if rule is None else [m for m in model.modules() if isinstance(m, Conv2dSame)]
    for part in padded:
        part.forward = partial(_padded_convolution, part)
    try:
        yield
    finally:
        for part in padded:
            del part.forward


def _padded_convolution(layer: nn.Conv2d, images: Tensor) -> Tensor:
    padding: list[int] = []  # left, right, top, bottom
    for axis in (1, 0):
        span = (layer.kernel_size[axis] - 1) * layer.dilation[axis] + 1
        total = max(span - layer.stride[axis], 0)
        padding += [total // 2, total - total // 2]
    images = functional.pad(images, padding)
    return functional.conv2d(
        images, layer.weight, layer.bias, layer.stride, 0, layer.dilation, layer.groups
    )


def _resize_first(file: Path, resize: GridResize) -> None:
    """Put a resizing before a model that was traced for grids of unknown size."""
    import onnx

    axes = {0: "batch", 2: "height", 3: "width"}
    first = file.with_name("resize.onnx")
    with quiet_loggers(*_EXPORTERS):
        torch.onnx.export(
            resize.eval(),
            (torch.zeros(2, 3, 64, 96),),
            first,
            input_names=["input"],
            output_names=["resized", "grid"],
            dynamic_shapes=({axis: torch.export.Dim(name) for axis, name in axes.items()},),
            dynamo=True,
            **_ONNX_OPTIONS,
        )
    before = onnx.compose.add_prefix(onnx.load(first), "resize/")
    first.unlink()
    model = onnx.load(file, load_external_data=False)
    name = model.graph.input[0].name
    enlarged = next(
        node for node in model.graph.node if node.op_type == "Resize" and node.input[0] == name
    )
    others = [node for node in model.graph.node if node is not enlarged]
    _rename(others, {name: "resize/grid", enlarged.output[0]: "resize/resized"})
    start = before.graph.input[0]
    _rename(before.graph.node, {start.name: name})
    start.name = name
    graph = onnx.helper.make_graph(
        [*before.graph.node, *others],
        model.graph.name,
        [start],
        list(model.graph.output),
        [*before.graph.initializer, *model.graph.initializer],
    )
    for output in graph.output:
        for axis, side in zip(
            output.type.tensor_type.shape.dim[2:], ("rows", "columns"), strict=False
        ):
            axis.dim_param = side
    model.graph.CopyFrom(graph)
    onnx.save(model, file)


def _rename(nodes: Any, names: Mapping[str, str]) -> None:  # noqa: ANN401
    """Rename values that nodes of a graph take, also in the bodies of loops."""
    for node in nodes:
        for index, name in enumerate(node.input):
            node.input[index] = names.get(name, name)
        for attribute in node.attribute:
            for body in (attribute.g, *attribute.graphs):
                _rename(body.node, names)


def _write_metadata(file: Path, module: AnomalibModule) -> None:
    """Write what an Inspector needs into an ONNX file; what is converted from it keeps it."""
    import onnx  # installed for exports only

    about: dict[str, Any] = {
        "bit_depth": int(getattr(module.model, "bit_depth", 8)),
        "warning": getattr(module.post_processor, "warning", None),
    }
    threshold = float(getattr(module.post_processor, "image_threshold", math.nan))
    if not math.isnan(threshold):
        about["threshold"] = threshold  # raw, that scores are normalised by
    with suppress(ValueError):  # unknown steps; the file is of use without them
        about["steps"] = geometric_steps(getattr(module.pre_processor, "transform", None))
    model = onnx.load(file, load_external_data=False)
    onnx.helper.set_model_props(model, {"sgfr": json.dumps(about)})
    onnx.save(model, file)


def _keep_precision(file: Path) -> None:
    """Have OpenVINO compute a model in 32 bits, except for what is quantised.

    By itself it computes in bfloat16 where the processor can. The errors of a backbone's layers add
    up to several percent of its features, so that good parts score higher than those that the
    threshold was chosen from.
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
