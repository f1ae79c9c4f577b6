"""Files that a run is given: checkpoints checked before they are used, and what cannot be read
named.

What of a model is kept in a checkpoint, and how it is taken up again: of this version or an earlier
one.
"""

import copy
import inspect
import logging
import re
import sys
import time
import traceback
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from anomalib.data.utils import read_image
from anomalib.utils.serialization import anomalib_safe_globals
from lightning.pytorch import LightningModule, Trainer
from torch import nn

from anomalib_sgfr.core.linear_algebra import float64_device
from anomalib_sgfr.features.layers import layers_of_strides, resolve_layers, resolve_score_layers
from anomalib_sgfr.post_processing.post_processor import SgfrPostProcessor, requested_sensitivities
from anomalib_sgfr.report.fit_record import FitRecord
from anomalib_sgfr.torch_model import SgfrModel
from anomalib_sgfr.training.accept import Record

__all__ = [
    "ARGUMENTS",
    "BIT_DEPTH",
    "Reason",
    "Restored",
    "Snapshot",
    "bit_depth_of",
    "changes",
    "check",
    "damage",
    "earlier_layers",
    "remedy",
    "require_widths",
    "that_matter",
    "unreadable",
]

logger = logging.getLogger(__name__)

# of a checkpoint
BIT_DEPTH = "sgfr_bit_depth"
# as fitted: Lightning puts those of `load_from_checkpoint` among the hyper-parameters
ARGUMENTS = "sgfr_arguments"
_MATTERS = {
    "affine": ("num_atoms", "regularisation"),
    "omp": ("num_atoms",),
    "ridge": ("regularisation",),
}
_EARLIER_STRIDES = (8, 16)  # before the map and the score had layers of their own
_LOOKED_FOR_S = 30.0  # images that cannot be read, after a failure


class Reason(str):
    """A note on an exception of somebody else's that tells the user what is wrong."""

    __slots__ = ()


# what others' messages mean, and what to do: of anomalib's data sets and metrics
_REMEDIES = (
    (
        r"not enough values to unpack \(expected 2, got 0\)",
        "anomalib/data/",
        (
            "too few good images: anomalib splits images to test with off the training images, and"
            " none are left. Pass at least 5 in --data.normal_dir, or others to test with:"
            " --data.normal_test_dir, --data.abnormal_dir."
        ),
    ),
    (
        r"Cannot update metric of type .*(?:name|field:) pred_(?:label|mask)",
        "anomalib/metrics/",
        (
            "a metric of labels or masks cannot be among val_metrics: the threshold is chosen when"
            " validation ends. Put F1Score and the like into test_metrics, or use F1Max, AUROC or"
            " AUPR, which take scores."
        ),
    ),
    (
        r"'\w+' object has no attribute '(?:val|test)_data'",
        "anomalib/data/",
        (
            "there are no images to validate or test with: pass --data.normal_test_dir or"
            " --data.abnormal_dir, or leave --data.val_split_mode and --data.test_split_mode as"
            " they are."
        ),
    ),
)


def remedy(exception: BaseException) -> str | None:
    """What an error of anomalib's data sets or metrics means, and what to do.

    Args:
        exception (BaseException): The error.

    Returns:
        str | None: ``None`` if it is not one of those known.
    """
    places = [
        Path(frame.f_code.co_filename).as_posix()
        for frame, _ in traceback.walk_tb(exception.__traceback__)
    ]
    for pattern, place, said in _REMEDIES:
        found = re.search(pattern, str(exception))
        if found and any(place in name for name in places):
            return said.format(**found.groupdict())
    return None


def damage(path: Path | str | None) -> str | None:
    """What is wrong with a checkpoint file, before it is used: it is cut short, or its bytes have
    changed.

    Args:
        path (Path | str | None): A file on disk; anything else is left to Lightning.

    Returns:
        str | None: What to tell the user, or ``None`` if nothing is known to be wrong.
    """
    if path is None or not Path(path).is_file():
        return None
    try:
        with zipfile.ZipFile(path) as file:
            broken = file.testzip()  # PyTorch does not look at the checksums that it writes
    except (zipfile.BadZipFile, EOFError, NotImplementedError, ValueError):
        return f"'{path}' is not a whole checkpoint: it was cut short, or is another kind of file."
    except OSError:  # whoever reads it says why not
        return None
    return (
        broken
        and f"'{path}' is damaged: the checksum of {broken} is another. Copy the file again, or fit again."
    )


def that_matter(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a model's arguments that its scores depend on, as plain data; layers by name."""
    names = (
        "backbone",
        "pooling",
        "solver",
        *_MATTERS[arguments.get("solver", "affine")],
        "blur",
        "bank_per",
    )
    found = {name: arguments[name] for name in names if name in arguments}
    if "score_layers" in arguments:
        backbone, layers, score_layers = (
            arguments[name] for name in ("backbone", "layers", "score_layers")
        )
        found["layers"] = resolve_layers(backbone, layers)
        found["score_layers"] = resolve_score_layers(backbone, layers, score_layers)
    return found


def earlier_layers(checkpoint: Mapping[str, Any]) -> list[str] | None:
    """Layers of a checkpoint of before the map and the score had each their own, and every layer a
    bank.

    Args:
        checkpoint (Mapping[str, Any]): As Lightning read it.

    Returns:
        list[str] | None: Names; ``None`` if the checkpoint is a later one.
    """
    if (
        "model.banks.0.stored" not in checkpoint["state_dict"]
        or "model.banks.0.nominal" in checkpoint["state_dict"]
    ):
        return None
    fitted = checkpoint["hyper_parameters"]
    backbone, layers = fitted["backbone"], fitted.get("layers")
    strided = layers_of_strides(backbone, _EARLIER_STRIDES)
    return resolve_layers(backbone, layers if layers is not None else strided or None)


def check(
    checkpoint: Mapping[str, Any], arguments: Mapping[str, Any], path: Path | str | None = None
) -> None:
    """Refuse a checkpoint that a model cannot use, and say why.

    Args:
        checkpoint (Mapping[str, Any]): As Lightning read it.
        arguments (Mapping[str, Any]): Of the model to restore.
        path (Path | str | None): Where the checkpoint was read from, if that is known.

    Raises:
        ValueError: If it is another model's or an earlier version's, of other arguments that scores
            depend on, or a bank is not finite.
    """
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
    earlier = earlier_layers(checkpoint)
    ours, theirs = that_matter(arguments), that_matter(checkpoint.get("hyper_parameters", {}))
    if earlier is not None:  # what was not asked for is as it was then
        asked = {
            key: ours[key] for key in ("layers", "score_layers") if arguments.get(key) is not None
        }
        then = {"layers": earlier, "score_layers": earlier, "bank_per": ours.get("bank_per")}
        ours, theirs = {**ours, **then, **asked}, {**theirs, **then}
    # a bank is of no use to other embeddings, nor a threshold to other scores
    for argument, wanted in theirs.items():
        if ours.get(argument) == wanted:
            continue
        if isinstance(wanted, list):
            option = f'--model.{argument} "[{", ".join(wanted)}]"'
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
    if not all(bool(torch.isfinite(bank).all()) for bank in banks):
        msg = f"the bank in {name} holds NaN or infinite values: the file is damaged; fit again."
        raise ValueError(msg)


def require_widths(checkpoint: Mapping[str, Any], widths: Sequence[int]) -> None:
    """Refuse banks of other embeddings than a model makes: of layers that were asked for instead of
    those of the fit.

    Args:
        checkpoint (Mapping[str, Any]): As Lightning read it, and :func:`check` let it pass.
        widths (Sequence[int]): Of the model's embeddings, scale by scale.

    Raises:
        ValueError: If they differ.
    """
    numbered = (
        re.fullmatch(r"model\.banks\.(\d+)\.stored", key) for key in checkpoint["state_dict"]
    )
    scales = sorted(int(key[1]) for key in numbered if key)
    found = [checkpoint["state_dict"][f"model.banks.{scale}.stored"].shape[-1] for scale in scales]
    if any(found) and found != list(widths):  # a fit that has not ended has no atoms yet
        msg = (
            f"the checkpoint's banks are of {' + '.join(map(str, found))} values a patch, the"
            f" model's layers give {' + '.join(map(str, widths))}: leave layers, score_layers and"
            " bank_per out, or fit again."
        )
        raise ValueError(msg)


def changes(checkpoint: Mapping[str, Any], arguments: Mapping[str, Any]) -> list[str]:
    """Arguments that scores depend on and that were asked for instead of those of the fit, in
    words.

    Args:
        checkpoint (Mapping[str, Any]): As Lightning read it, and :func:`check` let it pass.
        arguments (Mapping[str, Any]): Of the model to restore.
    """
    ours, fitted = that_matter(arguments), checkpoint.get(ARGUMENTS, {})
    return [
        f"{name} is {ours.get(name)!r}, and was {theirs!r} in the fit"
        for name, theirs in fitted.items()
        if name in ours and ours[name] != theirs
    ]


def bit_depth_of(checkpoint: Mapping[str, Any], given: int | None) -> int:
    """Depth at which pictures of more than 8 bits are to be read.

    Args:
        checkpoint (Mapping[str, Any]): As Lightning read it.
        given (int | None): What the user asks for. Takes effect where the training images were of 8
            bits.

    Raises:
        ValueError: If the training images were read otherwise.
    """
    fitted: int = checkpoint.get(BIT_DEPTH, 8)
    if given not in {None, fitted} and fitted > 8:  # noqa: PLR2004
        msg = (
            f"the checkpoint's training images were read with bit_depth {fitted}, the model has"
            f" {given}: pass --model.bit_depth {fitted}, or fit again."
        )
        raise ValueError(msg)
    return given or fitted


def unreadable(trainer: Trainer, exception: Exception) -> list[tuple[str, str]]:
    """First image that cannot be read in each data set in use, and why: what readers raise seldom
    names the file.

    Args:
        trainer (Trainer): Of the run that failed.
        exception (Exception): How it failed; unless it came from reading an image, nothing is
            looked for.

    Returns:
        list[tuple[str, str]]: Paths and reasons; looks for half a minute at most.
    """
    # the only trace that an exception from another process has is text
    if read_image.__name__ not in "".join(traceback.format_exception(exception)):
        return []
    loaders = [
        loader
        for name in (
            "train_dataloader",
            "val_dataloaders",
            "test_dataloaders",
            "predict_dataloaders",
        )
        if (found := getattr(trainer, name, None)) is not None
        for loader in (found if isinstance(found, list | tuple) else [found])
    ]
    until = time.perf_counter() + _LOOKED_FOR_S
    failed = []
    for loader in loaders:
        dataset = getattr(loader, "dataset", None)
        samples = getattr(dataset, "samples", None)
        paths = (
            getattr(dataset, "image_filenames", None) if samples is None else samples["image_path"]
        )
        for path in () if paths is None else paths:
            if time.perf_counter() > until:
                break
            try:
                read_image(path)
            except Exception as error:  # noqa: BLE001  # whatever a reader of images may raise
                failed.append((str(path), f"{type(error).__name__}: {error}{_aside(Path(path))}"))
                break
    return failed


def _aside(path: Path) -> str:
    """What a file that cannot be read may be."""
    if path.name.startswith("._"):
        return f" (macOS writes such files beside images: find '{path.parent}' -name '._*' -delete)"
    return ""


_ACCEPTED = "sgfr_accepted"
_FIT = "sgfr_fit"
_POST_PROCESSOR = "post_processor."  # before the names of its buffers in a checkpoint


class Snapshot:
    """All that a tree of modules holds, to put back exactly after a change that failed.

    Args:
        root (nn.Module): The tree.
    """

    def __init__(self, root: nn.Module) -> None:
        self._held: list[tuple[nn.Module, dict[str, Any]]] = []
        self._containers: list[
            tuple[Any, Any]
        ] = []  # others may hold them too: their contents are put back
        self._tensors = [(parameter, parameter.detach().clone()) for parameter in root.parameters()]
        for module in root.modules():
            attributes = dict(vars(module))
            self._held.append((module, attributes))
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
        for module, attributes in self._held:
            vars(module).clear()
            vars(module).update(attributes)
        for container, contents in self._containers:
            container.clear()
            (container.extend if isinstance(container, list) else container.update)(contents)
        for parameter, value in self._tensors:
            parameter.data = value


def _given_to_export() -> Any:  # noqa: ANN401
    """Model that ``Engine.export`` was given, where it asks for one to be loaded: it forgets that
    model's arguments.
    """
    # there is no other way
    frame, engine = sys._getframe(2), sys.modules.get("anomalib.engine")  # noqa: SLF001
    export = getattr(getattr(engine, "Engine", None), "export", None)
    return (
        frame.f_locals.get("model")
        if export and frame.f_code is inspect.unwrap(export).__code__
        else None
    )


class Restored(LightningModule):
    """Mixin that saves what a model is made of beside its state, and restores it, or refuses what
    it cannot use.

    Attributes:
        accepted (Record | None): Good images that were called anomalous, and what was learnt from
            them.
        fit_record (FitRecord | None): What the fit took and learnt from; ``None`` of a checkpoint
            of earlier versions.
    """

    model: SgfrModel
    post_processor: Any
    bit_depth: int | None
    update: bool
    accepted: Record | None
    fit_record: FitRecord | None
    restored_from: Path | None
    _before_load: Snapshot | None = None

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Self:  # noqa: ANN401
        """Restore as anomalib does; a file that is cut short is refused by name.

        Read on the CPU where ``map_location`` is a device without 64 bits of floating point.

        Raises:
            ValueError: If the file is not a whole checkpoint, or not one that Sgfr can use.
        """
        wrong = damage(checkpoint_path) if isinstance(checkpoint_path, str | Path) else None
        if wrong:
            raise ValueError(wrong)
        given = _given_to_export()
        if isinstance(given, cls) and not args and not kwargs:
            return given._with_checkpoint(checkpoint_path)  # noqa: SLF001  # of this class
        device = kwargs.get("map_location")
        device = torch.device(device) if isinstance(device, str | torch.device) else None
        if device is None or float64_device(device) == device:
            restored: Self = super().load_from_checkpoint(checkpoint_path, *args, **kwargs)
            return restored
        restored = super().load_from_checkpoint(
            checkpoint_path, *args, **{**kwargs, "map_location": float64_device(device)}
        )
        return restored.to(device)

    def _with_checkpoint(self, path: Path | str) -> Self:
        """A copy that has restored a checkpoint, as a trainer would have this model restore it."""
        other = copy.deepcopy(self)
        extra = type(self).checkpoint_safe_globals()  # type: ignore[attr-defined]  # anomalib's
        with anomalib_safe_globals(extra=extra):
            checkpoint = torch.load(
                path, map_location=float64_device(self.device), weights_only=True
            )
        other.on_load_checkpoint(checkpoint)
        other.load_state_dict(checkpoint["state_dict"])
        other.restored_from = Path(path).resolve()
        return other.to(self.device)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore as anomalib does; a fit that adds to the checkpoint's bank starts its pass from
        the beginning.

        A checkpoint that is refused, here or when its tensors are loaded, changes nothing of the
        model.

        Raises:
            ValueError: If the checkpoint is another model's or an earlier version's, of other
                arguments that scores depend on, or a bank is not finite.
        """
        self._before_load = Snapshot(self)
        try:
            self._restore(checkpoint)
        except BaseException:
            self._before_load.put_back()
            raise

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """As PyTorch's, but whole or not at all, together with what :meth:`on_load_checkpoint`
        restored.
        """
        before, self._before_load = self._before_load or Snapshot(self), None
        try:
            return super().load_state_dict(state_dict, *args, **kwargs)
        except BaseException:
            before.put_back()
            raise

    def _restore(self, checkpoint: dict[str, Any]) -> None:
        path = getattr(self._trainer, "ckpt_path", None)
        check(checkpoint, self.hparams, path)
        SgfrPostProcessor.upgrade_checkpoint(checkpoint)
        self._drop_second_state(checkpoint)
        enabled = checkpoint.get("anomalib_components_enabled")
        if (
            enabled and self._trainer is not None
        ):  # metrics and pictures are the run's, which has begun with its own
            checkpoint["anomalib_components_enabled"] = {
                **enabled,
                "evaluator": True,
                "visualizer": True,
            }
        earlier = earlier_layers(checkpoint)
        if earlier is not None:
            self._be_earlier(earlier)
        require_widths(checkpoint, self.model.embedder.widths)
        post_processor = self._own_post_processor
        stored = checkpoint.get("anomalib_post_processor_config")
        fits = self._trainer is not None and self.trainer.state.fn == "fit"
        if post_processor and stored and not fits:
            post_processor.require_compatible(stored)
        asked = requested_sensitivities(self.post_processor)
        self.model.bit_depth = bit_depth_of(checkpoint, self.bit_depth)
        changed = changes(checkpoint, self.hparams)
        if changed:
            logger.warning(
                "%s: the threshold was chosen from other scores; choose it again.",
                ", ".join(changed),
            )
            if post_processor:
                SgfrPostProcessor.remove_threshold(checkpoint)
        super().on_load_checkpoint(checkpoint)
        for name, value in asked.items():
            setattr(self.post_processor, name, value)
        post_processor = self._own_post_processor
        if post_processor:  # the state that is now in use, also where another rate was asked for
            found = {
                f"{_POST_PROCESSOR}{name}": value.clone()
                for name, value in post_processor.named_buffers()
            }
            checkpoint["state_dict"] |= {
                name: found[name] for name in found.keys() & checkpoint["state_dict"].keys()
            }
        self.accepted = Record.restored(checkpoint[_ACCEPTED]) if _ACCEPTED in checkpoint else None
        self.fit_record = FitRecord.restored(checkpoint.get(_FIT))
        if self.update:
            checkpoint.pop("loops", None)

    def _drop_second_state(self, checkpoint: dict[str, Any]) -> None:
        """The post-processor is a callback too: Lightning keeps its tensors twice, and would
        restore these last.
        """
        states = checkpoint.get("callbacks", {})
        for kind in type(self.post_processor).__mro__:
            states.pop(kind.__qualname__, None)

    def _be_earlier(self, layers: list[str]) -> None:
        """Build the model again as it was when map and score heard the same layers, with a bank for
        each stride.
        """
        self.hparams.update({"layers": layers, "score_layers": layers, "bank_per": "stride"})
        names = ("backbone", "solver", "num_atoms", "regularisation", "blur", "pooling")
        arguments = {
            name: self.hparams[name] for name in (*names, "layers", "score_layers", "bank_per")
        }
        other = SgfrModel(**arguments).to(self.device)
        other.bit_depth, other.tiler = self.model.bit_depth, self.model.tiler
        self.model = other.train(self.model.training)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save as anomalib does, the arguments that matter, the depth of pictures and the records."""
        super().on_save_checkpoint(checkpoint)
        self._drop_second_state(checkpoint)
        checkpoint[BIT_DEPTH] = self.model.bit_depth
        checkpoint[ARGUMENTS] = that_matter(self.hparams)
        if self.accepted is not None:
            checkpoint[_ACCEPTED] = self.accepted.plain()
        if self.fit_record is not None:
            checkpoint[_FIT] = self.fit_record.plain()

    @property
    def _own_post_processor(self) -> SgfrPostProcessor | None:
        return self.post_processor if isinstance(self.post_processor, SgfrPostProcessor) else None
