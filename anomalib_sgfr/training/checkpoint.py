"""Checkpoint of a fitted model: written, checked, read from earlier formats, and restored."""

import copy
import inspect
import logging
import re
import sys
import zipfile
import zlib
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any

import torch
from anomalib.models.components import AnomalibModule
from anomalib.utils.serialization import anomalib_safe_globals
from lightning.pytorch import Trainer
from torch import nn

from anomalib_sgfr.core.linear_algebra import float64_device
from anomalib_sgfr.core.solvers import SOLVERS
from anomalib_sgfr.features.layers import (
    earlier_score_layers,
    layers_of_strides,
    resolve_layers,
    resolve_score_layers,
)
from anomalib_sgfr.post_processing.calibration import remove_threshold, upgrade_checkpoint
from anomalib_sgfr.post_processing.post_processor import SgfrPostProcessor, requested_sensitivities
from anomalib_sgfr.report.fit_record import FitRecord
from anomalib_sgfr.run_paths import EXPORTED, atomic_write, no_checkpoint
from anomalib_sgfr.torch_model import SgfrModel
from anomalib_sgfr.training.accept import AcceptanceHistory
from anomalib_sgfr.training.input_settings import InputSettings

__all__ = ["Snapshot", "damage", "load_file", "restore", "rewrite", "save"]

logger = logging.getLogger(__name__)

# keys of a checkpoint
_ACCEPTED = "sgfr_accepted"
_FIT = "sgfr_fit"
# as fitted: Lightning puts those of `load_from_checkpoint` among the hyper-parameters
_ARGUMENTS = "sgfr_arguments"
_COMPONENTS = "anomalib_components_enabled"
_POST_PROCESSOR = "anomalib_post_processor_config"

_EARLIER_STRIDES = (8, 16)  # of version 0.1
# removed arguments: what they always are now, and what to do with a checkpoint of another value
_EARLIER_READER = "load it with version 0.2.0, or fit again"
_REMOVED = {
    "pooling": ("binomial", _EARLIER_READER),
    "bank_per": ("layer", "fit again, as no release reads it"),
}


def damage(path: Path | str | None) -> str | None:
    """What is wrong with a checkpoint file: it is cut short, or its bytes have changed.

    Args:
        path (Path | str | None): A file on disk; anything else is left to Lightning.

    Returns:
        str | None: What to tell the user; ``None`` if nothing is known to be wrong.
    """
    if path is None or not Path(path).is_file():
        return None
    try:
        with zipfile.ZipFile(path) as file:
            broken = file.testzip()  # PyTorch does not verify the checksums that it writes
    # changed bytes may name a compression, known or not, or a password
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, ValueError):
        if Path(path).suffix in EXPORTED:
            return no_checkpoint(path)
        return f"'{path}' is not a whole checkpoint: it was cut short, or is another kind of file."
    except OSError:  # its reader will say why
        return None
    if broken is None:
        return None
    return (
        f"'{path}' is damaged: the checksum of {broken} is another. Copy the file again, or fit"
        " again."
    )


def save(
    checkpoint: dict[str, Any],
    arguments: Mapping[str, Any],
    post_processor: nn.Module | None,
    accepted: AcceptanceHistory | None,
    fit_record: FitRecord | None,
) -> None:
    """Put into a checkpoint what scores depend on and the records of the fit.

    Args:
        checkpoint (dict[str, Any]): As anomalib saves it; changed in place.
        arguments (Mapping[str, Any]): Of the model.
        post_processor (nn.Module | None): Of the model.
        accepted (AcceptanceHistory | None): New atoms of false alarms.
        fit_record (FitRecord | None): How the fit went.
    """
    _drop_callback_state(checkpoint, post_processor)
    checkpoint[_ARGUMENTS] = _score_arguments(arguments)
    if accepted is not None:
        checkpoint[_ACCEPTED] = accepted.plain()
    if fit_record is not None:
        checkpoint[_FIT] = fit_record._asdict()


def rewrite(module: Any, source: Path, target: Path) -> None:  # noqa: ANN401
    """Write a checkpoint with a model's present state, atomically.

    Args:
        module (Any): The model, with another threshold or other memory banks.
        source (Path): The checkpoint that it was loaded from.
        target (Path): The new one; may be the same file.
    """
    stored = torch.load(source, map_location="cpu", weights_only=False)
    enabled = stored.get(_COMPONENTS)  # of the run, which may have had others
    stored["state_dict"] = module.state_dict()
    stored.pop(_ACCEPTED, None)
    module.on_save_checkpoint(stored)
    if enabled is not None:
        stored[_COMPONENTS] = enabled
    with atomic_write(target) as part, part.open("wb") as file:
        torch.save(stored, file)


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
        _check(checkpoint, module.hparams, getattr(trainer, "ckpt_path", None))
        module.model = _build_earlier(module.model, checkpoint, module.hparams)
        _require_widths(checkpoint, module.model.embedder.widths)
        _prepare(checkpoint, module.post_processor, trainer)
        inputs.check(checkpoint, module.pre_processor)
        _drop_changed_threshold(checkpoint, module.hparams, module.post_processor)
        restore_components(checkpoint)
        inputs.restore(checkpoint, module.model, module.pre_processor, trainer)
        _store_current_threshold(checkpoint, module.post_processor)
        accepted = checkpoint.get(_ACCEPTED)
        module.accepted = None if accepted is None else AcceptanceHistory.restored(accepted)
        module.fit_record = FitRecord.restored(checkpoint.get(_FIT))
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
    wrong = damage(source) if is_file else None
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


def _score_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a model that its scores depend on, as plain data; layers by name."""
    names = ("backbone", "solver", *SOLVERS[arguments.get("solver", "affine")].arguments, "blur")
    found = {name: arguments[name] for name in names if name in arguments}
    if "score_layers" in arguments:
        backbone, layers, score_layers = (
            arguments[name] for name in ("backbone", "layers", "score_layers")
        )
        found["layers"] = resolve_layers(backbone, layers)
        weights = resolve_score_layers(backbone, layers, score_layers)
        whole = all(weight == 1.0 for weight in weights.values())
        found["score_layers"] = list(weights) if whole else weights
    return found


def _fitted_arguments(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments that the scores of a checkpoint depend on, as of a model."""
    arguments = checkpoint.get("hyper_parameters", {})
    found = _score_arguments(arguments)
    stored = checkpoint.get(_ARGUMENTS, {}).get("score_layers")
    if arguments.get("score_layers", ()) is None and not isinstance(stored, Mapping):
        found["score_layers"] = _earlier_score_layers(arguments)
    return found


def _earlier_score_layers(arguments: Mapping[str, Any]) -> list[str]:
    return earlier_score_layers(arguments["backbone"], arguments["layers"])


def _earlier_layers(checkpoint: Mapping[str, Any]) -> list[str] | None:
    """Layers of version 0.1, in which map and score shared them; ``None`` for a later version."""
    if (
        "model.banks.0.stored" not in checkpoint["state_dict"]
        or "model.banks.0.nominal" in checkpoint["state_dict"]
    ):
        return None
    fitted = checkpoint["hyper_parameters"]
    backbone, layers = fitted["backbone"], fitted.get("layers")
    strided = layers_of_strides(backbone, _EARLIER_STRIDES)
    return resolve_layers(backbone, layers if layers is not None else strided or None)


def _build_earlier(
    model: SgfrModel, checkpoint: Mapping[str, Any], arguments: MutableMapping[str, Any]
) -> SgfrModel:
    """Model with the layers of an earlier version's checkpoint, unless others were asked for.

    In version 0.1 map and score shared their layers; before layers had weights, the score had none
    of stride 4. The arguments are changed where the model is another one.
    """
    earlier = _earlier_layers(checkpoint)
    if earlier is not None:
        arguments.update({"layers": earlier, "score_layers": earlier})
    else:
        fitted = _fitted_arguments(checkpoint).get("score_layers")
        if fitted is None or fitted == _score_arguments(arguments).get("score_layers"):
            return model
        arguments["score_layers"] = fitted
    names = ("backbone", "solver", "num_atoms", "regularisation", "blur", "layers")
    own = {name: arguments[name] for name in (*names, "score_layers")}
    other = SgfrModel(**own)
    other.bit_depth, other.tiler = model.bit_depth, model.tiler
    return other.to(model.region.device).train(model.training)


def _check(
    checkpoint: Mapping[str, Any], arguments: Mapping[str, Any], path: Path | str | None
) -> None:
    """Refuse a checkpoint that a model cannot use, and say why."""
    name = f"checkpoint '{path}'" if path else "the checkpoint"
    wrong = damage(path)
    if wrong:
        raise ValueError(wrong)
    state = checkpoint.get("state_dict", {})
    if "model.bank" in state:
        msg = f"{name} is of an earlier Sgfr, which had one bank for all scales: fit again."
        raise ValueError(msg)
    banks = [
        value
        for key, value in state.items()
        if key.startswith("model.banks.") and key.endswith(".stored")
    ]
    if not banks:
        msg = (
            f"{name} is not Sgfr's: it holds no bank. Pass one that `anomalib fit --model Sgfr`"
            " saved."
        )
        raise ValueError(msg)
    earlier = _earlier_layers(checkpoint)
    _refuse_removed_arguments(checkpoint, name)
    if earlier is not None and len(banks) < len(earlier):
        msg = f"{name} has one bank for several layers of {earlier}: {_EARLIER_READER}."
        raise ValueError(msg)
    _require_same_arguments(checkpoint, arguments, earlier, name)
    if not all(bool(torch.isfinite(bank).all()) for bank in banks):
        msg = f"the bank in {name} holds NaN or infinite values: the file is damaged; fit again."
        raise ValueError(msg)


def _require_same_arguments(
    checkpoint: Mapping[str, Any],
    arguments: Mapping[str, Any],
    earlier: list[str] | None,
    name: str,
) -> None:
    """A bank is of no use to other embeddings, nor a threshold to other scores."""
    ours, theirs = _score_arguments(arguments), _fitted_arguments(checkpoint)
    if earlier is not None:  # not asked for: as it was then
        asked = {
            key: ours[key] for key in ("layers", "score_layers") if arguments.get(key) is not None
        }
        then = {"layers": earlier, "score_layers": earlier}
        ours, theirs = {**ours, **then, **asked}, {**theirs, **then}
    elif arguments.get("score_layers", ()) is None:
        before = _earlier_score_layers(arguments)
        if before == theirs.get("score_layers"):  # not asked for: as it was then
            ours["score_layers"] = before
    for argument, wanted in theirs.items():
        if ours.get(argument) == wanted:
            continue
        if isinstance(wanted, list | dict):
            option = f'--model.{argument} "{_in_yaml(wanted)}"'
            msg = (
                f"{name} was fitted with {argument} {wanted}, the model has {ours.get(argument)}:"
                f" pass {option}."
            )
        else:
            msg = (
                f"{name} was fitted with {argument} '{wanted}', the model has"
                f" '{ours.get(argument)}': pass --model.{argument} {wanted}."
            )
        raise ValueError(msg)


def _in_yaml(layers: list[str] | dict[str, float]) -> str:
    if isinstance(layers, list):
        return f"[{', '.join(layers)}]"
    return f"{{{', '.join(f'{name}: {weight:g}' for name, weight in layers.items())}}}"


def _refuse_removed_arguments(checkpoint: Mapping[str, Any], name: str) -> None:
    for kept in (checkpoint.get("hyper_parameters", {}), checkpoint.get(_ARGUMENTS, {})):
        for argument, (only, remedy) in _REMOVED.items():
            if kept.get(argument, only) != only:
                msg = (
                    f"{name} was fitted with {argument} '{kept[argument]}', which this version does"
                    f" not have: {remedy}."
                )
                raise ValueError(msg)


def _require_widths(checkpoint: Mapping[str, Any], widths: Sequence[int]) -> None:
    """Refuse memory banks of other embeddings than the model's."""
    state = checkpoint["state_dict"]
    keys = (re.fullmatch(r"model\.banks\.(\d+)\.stored", key) for key in state)
    scales = sorted(int(key[1]) for key in keys if key)
    found = [state[f"model.banks.{scale}.stored"].shape[-1] for scale in scales]
    if any(found) and found != list(widths):  # a fit that has not ended has no atoms yet
        msg = (
            f"the checkpoint's banks are of {' + '.join(map(str, found))} values a patch, the"
            f" model's layers give {' + '.join(map(str, widths))}: leave layers and"
            " score_layers out, or fit again."
        )
        raise ValueError(msg)


def _prepare(
    checkpoint: dict[str, Any], post_processor: nn.Module | None, trainer: Trainer | None
) -> None:
    """Bring a checkpoint into this version's form, with the post-processor that was asked for."""
    upgrade_checkpoint(checkpoint)
    _drop_callback_state(checkpoint, post_processor)
    if checkpoint.get(_COMPONENTS) and trainer is not None:  # the run has its own
        checkpoint[_COMPONENTS] |= {"evaluator": True, "visualizer": True}
    config = checkpoint.get(_POST_PROCESSOR)
    if not config:
        return
    checkpoint[_POST_PROCESSOR] = {**config, **requested_sensitivities(post_processor)}
    fits = trainer is not None and trainer.state.fn == "fit"
    if isinstance(post_processor, SgfrPostProcessor) and not fits:
        post_processor.require_compatible(config)


def _drop_changed_threshold(
    checkpoint: dict[str, Any], arguments: Mapping[str, Any], post_processor: nn.Module | None
) -> None:
    """Drop the threshold of a checkpoint whose scores other arguments change, and warn."""
    ours = _score_arguments(arguments)
    changed = [
        f"{name} is {ours[name]!r}, and was {fitted!r} in the fit"
        for name, fitted in checkpoint.get(_ARGUMENTS, {}).items()
        if name in ours and ours[name] != fitted
    ]
    if changed:
        logger.warning(
            "%s: the threshold was chosen from other scores; choose it again.", ", ".join(changed)
        )
        if isinstance(post_processor, SgfrPostProcessor):
            remove_threshold(checkpoint)


def _store_current_threshold(checkpoint: dict[str, Any], post_processor: nn.Module | None) -> None:
    """Put the buffers of a restored post-processor into the state that is loaded after it.

    Its threshold may be another than the checkpoint's, if another rate was asked for.
    """
    if isinstance(post_processor, SgfrPostProcessor):
        state = checkpoint["state_dict"]
        for name, value in post_processor.named_buffers():
            if f"post_processor.{name}" in state:
                state[f"post_processor.{name}"] = value.clone()


def _drop_callback_state(checkpoint: dict[str, Any], post_processor: nn.Module | None) -> None:
    """Drop the second copy of a post-processor, which Lightning keeps as that of a callback.

    It would be restored last.
    """
    for kind in type(post_processor).__mro__:
        checkpoint.get("callbacks", {}).pop(kind.__qualname__, None)
