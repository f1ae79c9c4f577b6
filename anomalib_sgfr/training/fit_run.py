"""Start and end of a fit, and the return to an earlier one if it fails."""

import copy
import itertools
import time
from typing import Any

import torch

from anomalib_sgfr.core.processes import failing_together, gathered
from anomalib_sgfr.post_processing.post_processor import SgfrPostProcessor
from anomalib_sgfr.report.fit_record import FitRecord
from anomalib_sgfr.torch_model import SgfrModel
from anomalib_sgfr.training import fit
from anomalib_sgfr.training.callback import ModelCallbacks
from anomalib_sgfr.training.input_settings import InputSettings

__all__ = ["FitRun"]


class FitRun:
    """Fit of an Sgfr, which keeps an earlier fit until all of the new one is made.

    Args:
        inputs (InputSettings): Of the model.
        callbacks (ModelCallbacks): Of the model; they have the samplers.
    """

    def __init__(self, inputs: InputSettings, callbacks: ModelCallbacks) -> None:
        self._inputs = inputs
        self._callbacks = callbacks
        self._started = 0.0
        self._earlier: tuple[dict[str, Any], int] | None = None  # backbone weights, bit depth

    def start(self, module: Any) -> None:  # noqa: ANN401
        """Start afresh from pretrained weights, or go on from a fit that has ended.

        Args:
            module (Sgfr): With its trainer.

        Raises:
            RuntimeError: If there is no fit to resume from or to add to, or weights are missing.
        """
        if module.update:
            module.require_fitted("add to")
        elif module.trainer.ckpt_path is not None:
            module.require_fitted("resume from")
            return
        self._started = time.perf_counter()
        if module.seed is not None:
            torch.manual_seed(module.seed)
        extractor = module.model.embedder.extractor
        weights = copy.deepcopy(extractor.state_dict()) if module._is_fitted else None  # noqa: SLF001
        if module.pre_trained and not module.update:
            module.model.embedder.load_pretrained()
        self._earlier = None if weights is None else (weights, module.model.bit_depth)
        _set_fitted(module, fitted=False)

    def finish(self, module: Any) -> None:  # noqa: ANN401
        """Make memory banks and threshold from the pass over the images, then use them.

        Args:
            module (Sgfr): With its trainer; it is not changed if anything fails before its use.

        Raises:
            ValueError: If no training image was seen, or most are nearly constant.
        """
        sampling, trainer = self._callbacks.sampling, module.trainer
        with failing_together():
            seen = sampling.patches_seen
        if not sum(gathered(seen)):
            msg = (
                "Sgfr is not fitted and no training image was seen: the training set is empty, or"
                " fit was not called."
            )
            raise ValueError(msg)
        with failing_together():
            self._callbacks.high_bit_depth.require_no_constant_images()
        model: SgfrModel = module.model
        earlier = model.fitted_state if module.update else None
        images = sorted(set(itertools.chain.from_iterable(gathered(sampling.seen))))
        post_processor = module.post_processor
        own = post_processor if isinstance(post_processor, SgfrPostProcessor) else None
        found = fit.fit(
            model,
            fit.build_banks(sampling.samplers, sampling.images, earlier, module.device),
            module.pre_processor,
            images,
            trim=module.trim,
            thumbnails=module.thumbnails,
            earlier=earlier,
            post_processor=own,
            trainer=trainer,
        )
        fit.write_suspects(found.suspects, trainer)
        record = FitRecord.of(time.perf_counter() - self._started, module.device, images)
        model.load_fitted_state(found.fitted_state)
        if own and found.threshold:
            own.use(found.threshold)
        module.accepted, module.suspects, module.fit_record = None, found.suspects, record
        self._earlier = None
        self._inputs.keep(model)
        _set_fitted(module, fitted=True)
        fit.report_certificate(model, trainer)

    def abandon(self, module: Any) -> None:  # noqa: ANN401
        """Return to an earlier fit, if there is one and this fit has not ended.

        Args:
            module (Sgfr): The model that is fitted.
        """
        if self._earlier is not None:
            weights, module.model.bit_depth = self._earlier
            module.model.embedder.extractor.load_state_dict(weights)
            self._earlier = None
            _set_fitted(module, fitted=True)
        self._inputs.apply_fitted(module.model)


def _set_fitted(module: Any, *, fitted: bool) -> None:  # noqa: ANN401
    module._is_fitted = torch.tensor([fitted], device=module.device)  # noqa: SLF001  # anomalib's
