"""Restoring a model from a checkpoint: all of it, or nothing is changed."""

import copy
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from anomalib.models.components import AnomalibModule
from anomalib.utils.serialization import anomalib_safe_globals
from torch import nn

from anomalib_sgfr.core.linear_algebra import float64_device
from anomalib_sgfr.training import checkpoint as checkpoints
from anomalib_sgfr.training.input_settings import InputSettings

__all__ = ["Snapshot", "load_file", "restore"]


def restore(
    module: Any,  # noqa: ANN401
    checkpoint: dict[str, Any],
    inputs: InputSettings,
    restore_components: Callable[[dict[str, Any]], None],
) -> "Snapshot":
    """Restore all but the state of a checkpoint; one that is refused changes nothing.

    Args:
        module (Sgfr): The model.
        checkpoint (dict[str, Any]): As Lightning read it; changed in place.
        inputs (InputSettings): Of the model.
        restore_components (Callable): anomalib's ``on_load_checkpoint``.

    Returns:
        Snapshot: The model before, in case its state cannot be loaded.

    Raises:
        ValueError: If the checkpoint cannot be used.
    """
    resize = getattr(module.pre_processor, "resize", None)  # in a list, not among the modules
    before = Snapshot(module, inputs, *([] if resize is None else [resize]))
    trainer = module._trainer  # noqa: SLF001  # may be none
    try:
        checkpoints.check(checkpoint, module.hparams, getattr(trainer, "ckpt_path", None))
        module.model = checkpoints.build_earlier(module.model, checkpoint, module.hparams)
        checkpoints.require_widths(checkpoint, module.model.embedder.widths)
        checkpoints.prepare(checkpoint, module.post_processor, trainer)
        inputs.check(checkpoint, module.pre_processor)
        checkpoints.drop_changed_threshold(checkpoint, module.hparams, module.post_processor)
        restore_components(checkpoint)
        inputs.restore(checkpoint, module.model, module.pre_processor, trainer)
        checkpoints.store_current_threshold(checkpoint, module.post_processor)
        module.accepted, module.fit_record = checkpoints.restore_records(checkpoint)
        if module.update:  # the pass over the images starts from the beginning
            checkpoint.pop("loops", None)
    except BaseException:
        before.put_back()
        raise
    return before


def load_file(
    kind: type[AnomalibModule],
    load: Callable[..., Any],
    source: Any,  # noqa: ANN401
    *args: Any,  # noqa: ANN401
    **kwargs: Any,  # noqa: ANN401
) -> Any:  # noqa: ANN401
    """Model from a checkpoint file, made on the CPU if the device lacks 64-bit floats.

    Args:
        kind (type[AnomalibModule]): Class of the model.
        load (Callable): anomalib's ``load_from_checkpoint``.
        source (Path | str | IO): The file.
        *args: For ``load``, as ``kwargs`` are.
        **kwargs: See ``args``.

    Returns:
        Sgfr: The model, on the device that was asked for.

    Raises:
        ValueError: If the file is not whole, or not one that Sgfr can use.
    """
    is_file = isinstance(source, str | Path)
    wrong = checkpoints.damage(source) if is_file else None
    if wrong:
        raise ValueError(wrong)
    given = _given_to_export()
    if isinstance(given, kind) and not args and not kwargs:
        device: torch.device | None = given.device
        restored: Any = _restored_copy(given, source)
    else:
        asked = kwargs.get("map_location")
        device = torch.device(asked) if isinstance(asked, str | torch.device) else None
        if device is not None:
            kwargs["map_location"] = float64_device(device)
        restored = load(source, *args, **kwargs)
    if is_file:
        restored.restored_from = Path(source).resolve()
    return restored if device is None else restored.to(device)


def _given_to_export() -> Any:  # noqa: ANN401
    """Model that ``Engine.export`` was given, where it asks for a checkpoint to be loaded.

    It would load one without the arguments of that model, and offers no other way.
    """
    frame, engine = sys._getframe(3), sys.modules.get("anomalib.engine")  # noqa: SLF001
    export = getattr(getattr(engine, "Engine", None), "export", None)
    if export and frame.f_code is inspect.unwrap(export).__code__:
        return frame.f_locals.get("model")
    return None


def _restored_copy(module: AnomalibModule, path: Path | str) -> AnomalibModule:
    """Copy of a model with a checkpoint restored, as a trainer would restore it."""
    other = copy.deepcopy(module)
    with anomalib_safe_globals(extra=type(module).checkpoint_safe_globals()):
        device = float64_device(module.device)
        checkpoint = torch.load(path, map_location=device, weights_only=True)
    other.on_load_checkpoint(checkpoint)
    other.load_state_dict(checkpoint["state_dict"])
    return other


class Snapshot:
    """All that a tree of modules holds, to put back exactly after a change that failed.

    Args:
        root (nn.Module): The tree.
        *parts (object): Other objects that the change may give new attributes.
    """

    def __init__(self, root: nn.Module, *parts: object) -> None:
        self._attributes = [(item, dict(vars(item))) for item in (*root.modules(), *parts)]
        self._parameters = [(item, item.detach().clone()) for item in root.parameters()]
        # others may hold the containers too: their contents are put back
        self._containers: list[tuple[Any, Any]] = []
        for _, attributes in self._attributes:
            for name, value in attributes.items():
                if name == "_buffers":
                    clones = {
                        key: None if buffer is None else buffer.clone()
                        for key, buffer in value.items()
                    }
                    self._containers.append((value, clones))
                elif isinstance(value, dict | list | set):
                    self._containers.append((value, copy.copy(value)))

    def put_back(self) -> None:
        """Put everything back."""
        for item, attributes in self._attributes:
            vars(item).clear()
            vars(item).update(attributes)
        for container, contents in self._containers:
            container.clear()
            (container.extend if isinstance(container, list) else container.update)(contents)
        for parameter, value in self._parameters:
            parameter.data = value
