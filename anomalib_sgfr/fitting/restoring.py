"""What of a model is kept in a checkpoint, and how it is taken up again: of this version or an earlier one."""

import copy
import inspect
import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from anomalib.utils.serialization import anomalib_safe_globals
from lightning.pytorch import LightningModule
from torch import nn

from anomalib_sgfr.core.casts import home
from anomalib_sgfr.fitting.accepting import Record
from anomalib_sgfr.fitting.artefacts import (
    ARGUMENTS,
    BIT_DEPTH,
    bit_depth_of,
    changes,
    check,
    damage,
    earlier_layers,
    require_widths,
    that_matter,
)
from anomalib_sgfr.fitting.fit_record import FitRecord
from anomalib_sgfr.inspection.post_processing import SgfrPostProcessor, sensitivities
from anomalib_sgfr.torch_model import SgfrModel

__all__ = ["Restored", "Snapshot"]

logger = logging.getLogger(__name__)

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
        self._containers: list[tuple[Any, Any]] = []  # others may hold them too: their contents are put back
        self._tensors = [(parameter, parameter.detach().clone()) for parameter in root.parameters()]
        for module in root.modules():
            attributes = dict(vars(module))
            self._held.append((module, attributes))
            for name, value in attributes.items():
                if name == "_buffers":
                    clones = {key: None if buffer is None else buffer.clone() for key, buffer in value.items()}
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
    """Model that ``Engine.export`` was given, where it asks for one to be loaded: it forgets that model's arguments."""
    frame, engine = sys._getframe(2), sys.modules.get("anomalib.engine")  # noqa: SLF001  # there is no other way
    export = getattr(getattr(engine, "Engine", None), "export", None)
    return frame.f_locals.get("model") if export and frame.f_code is inspect.unwrap(export).__code__ else None


class Restored(LightningModule):
    """Mixin that saves what a model is made of beside its state, and restores it, or refuses what it cannot use.

    Attributes:
        accepted (Record | None): Good images that were called anomalous, and what was learnt from them.
        fit_record (FitRecord | None): What the fit took and learnt from; ``None`` of a checkpoint of earlier versions.
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
        if device is None or home(device) == device:
            restored: Self = super().load_from_checkpoint(checkpoint_path, *args, **kwargs)
            return restored
        restored = super().load_from_checkpoint(checkpoint_path, *args, **{**kwargs, "map_location": home(device)})
        return restored.to(device)

    def _with_checkpoint(self, path: Path | str) -> Self:
        """A copy that has restored a checkpoint, as a trainer would have this model restore it."""
        other = copy.deepcopy(self)
        extra = type(self).checkpoint_safe_globals()  # type: ignore[attr-defined]  # anomalib's
        with anomalib_safe_globals(extra=extra):
            checkpoint = torch.load(path, map_location=home(self.device), weights_only=True)
        other.on_load_checkpoint(checkpoint)
        other.load_state_dict(checkpoint["state_dict"])
        other.restored_from = Path(path).resolve()
        return other.to(self.device)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore as anomalib does; a fit that adds to the checkpoint's bank starts its pass from the beginning.

        A checkpoint that is refused, here or when its tensors are loaded, changes nothing of the model.

        Raises:
            ValueError: If the checkpoint is another model's or an earlier version's, of other arguments that scores
                depend on, or a bank is not finite.
        """
        self._before_load = Snapshot(self)
        try:
            self._restore(checkpoint)
        except BaseException:
            self._before_load.put_back()
            raise

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """As PyTorch's, but whole or not at all, together with what :meth:`on_load_checkpoint` restored."""
        before, self._before_load = self._before_load or Snapshot(self), None
        try:
            return super().load_state_dict(state_dict, *args, **kwargs)
        except BaseException:
            before.put_back()
            raise

    def _restore(self, checkpoint: dict[str, Any]) -> None:
        path = getattr(self._trainer, "ckpt_path", None)
        check(checkpoint, self.hparams, path)
        SgfrPostProcessor.adopt(checkpoint)
        self._drop_second_state(checkpoint)
        enabled = checkpoint.get("anomalib_components_enabled")
        if enabled and self._trainer is not None:  # metrics and pictures are the run's, which has begun with its own
            checkpoint["anomalib_components_enabled"] = {**enabled, "evaluator": True, "visualizer": True}
        earlier = earlier_layers(checkpoint)
        if earlier is not None:
            self._be_earlier(earlier)
        require_widths(checkpoint, self.model.embedder.widths)
        post_processor = self._own_post_processor
        stored = checkpoint.get("anomalib_post_processor_config")
        fits = self._trainer is not None and self.trainer.state.fn == "fit"
        unmet = post_processor.unmet(stored) if post_processor and stored and not fits else None
        if unmet:
            raise ValueError(unmet)
        asked = sensitivities(self.post_processor)
        self.model.bit_depth = bit_depth_of(checkpoint, self.bit_depth)
        changed = changes(checkpoint, self.hparams)
        if changed:
            logger.warning("%s: the threshold was chosen from other scores; choose it again.", ", ".join(changed))
            if post_processor:
                SgfrPostProcessor.without_threshold(checkpoint)
        super().on_load_checkpoint(checkpoint)
        for name, value in asked.items():
            setattr(self.post_processor, name, value)
        post_processor = self._own_post_processor
        if post_processor:  # the state that is now in use, also where another rate was asked for
            found = {f"{_POST_PROCESSOR}{name}": value.clone() for name, value in post_processor.named_buffers()}
            checkpoint["state_dict"] |= {name: found[name] for name in found.keys() & checkpoint["state_dict"].keys()}
        self.accepted = Record.restored(checkpoint[_ACCEPTED]) if _ACCEPTED in checkpoint else None
        self.fit_record = FitRecord.restored(checkpoint.get(_FIT))
        if self.update:
            checkpoint.pop("loops", None)

    def _drop_second_state(self, checkpoint: dict[str, Any]) -> None:
        """The post-processor is a callback too: Lightning keeps its tensors twice, and would restore these last."""
        states = checkpoint.get("callbacks", {})
        for kind in type(self.post_processor).__mro__:
            states.pop(kind.__qualname__, None)

    def _be_earlier(self, layers: list[str]) -> None:
        """Build the model again as it was when map and score heard the same layers, with a bank for each stride."""
        self.hparams.update({"layers": layers, "score_layers": layers, "bank_per": "stride"})
        names = ("backbone", "solver", "num_atoms", "regularisation", "blur", "pooling")
        arguments = {name: self.hparams[name] for name in (*names, "layers", "score_layers", "bank_per")}
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
