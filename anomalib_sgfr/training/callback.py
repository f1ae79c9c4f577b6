"""Lightning callback that collects the memory banks while the training images stream past."""

import logging
import os
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from anomalib_sgfr.console import LogFilters
from anomalib_sgfr.core.patch_grid import origins, to_patches
from anomalib_sgfr.core.sampler import LARGEST, SubspaceSampler
from anomalib_sgfr.report.score_table import ScoreTable
from anomalib_sgfr.run_folder import RunFolder
from anomalib_sgfr.training.distributed import is_padding
from anomalib_sgfr.training.errors import add_reasons
from anomalib_sgfr.training.fit import bank_sizes, build_samplers
from anomalib_sgfr.training.high_bit_depth import HighBitDepth
from anomalib_sgfr.training.input_settings import tiler_callbacks

__all__ = ["ModelCallbacks", "SubspaceSampling", "require_precision"]

logger = logging.getLogger(__name__)

_SEED = "PL_GLOBAL_SEED"  # Lightning's name for the seed of its distributed sampler
_JOINED = 32  # batches of one image that are sampled together, as one of the usual size is
_WAITING = 2  # batches that wait to be sampled, at most
_PATHS = 10_000  # paths kept of images that no atom comes from


_PRECISIONS = ("32-true", "64-true", "16-mixed", "bf16-mixed", "16-true", "bf16-true")
_CallbackT = TypeVar("_CallbackT", bound=Callback)


def _on_gpu(embedding: Tensor) -> bool:
    return embedding.is_cuda


def require_precision(trainer: Trainer) -> None:
    """Refuse a trainer whose precision is not one of 16, 32 or 64 bits.

    Raises:
        ValueError: If it is another.
    """
    if str(trainer.precision) not in _PRECISIONS:
        msg = f"precision must be one of {', '.join(_PRECISIONS)}, got '{trainer.precision}'."
        raise ValueError(msg)


def _require_whole_pass(trainer: Trainer) -> None:
    """Refuse a trainer that validates, and so fits, before all training images were seen.

    anomalib's Engine takes the model's ``trainer_arguments``; a trainer of Lightning's own has to
    be given them.
    """
    in_first_epoch = trainer.enable_validation and trainer.check_val_every_n_epoch in {None, 1}
    every = trainer.val_check_batch  # None if validation comes after a time
    if in_first_epoch and (every is None or every < trainer.num_training_batches):
        got = getattr(trainer, "val_check_interval", "a time")
        msg = (
            f"the trainer's val_check_interval must be 1.0, got {got}: Sgfr learns from all"
            " training images before it validates. Trainer(**model.trainer_arguments) has what it"
            " needs."
        )
        raise ValueError(msg)


class SubspaceSampling(Callback):
    """Pass the embeddings of training images to a sampler for each scale.

    Sgfr attaches one. To configure it, add your own to ``trainer.callbacks``: Sgfr then uses that
    one. It reports to the progress bar and the loggers the number of atoms held (more than the
    banks will have), the sum of the samplers' thresholds and the patches seen a second.

    Args:
        log_every_n_steps (int): How often to report, in batches; ``0`` for never.

    Attributes:
        images (dict[int, str]): Paths of the images that the atoms come from, by the numbers in the
            atoms' origins.
        seen (list[str]): Paths of all images of the running or latest fit that this process saw.

    Raises:
        ValueError: If ``log_every_n_steps`` is negative.

    Examples:
        >>> from anomalib_sgfr import SubspaceSampling
        >>> sampling = SubspaceSampling(log_every_n_steps=0)
        >>> sampling.patches_seen  # before Engine(callbacks=[sampling]).fit(model, datamodule)
        0
    """

    def __init__(self, log_every_n_steps: int = 1) -> None:
        super().__init__()
        if log_every_n_steps < 0:
            msg = f"log_every_n_steps must be at least 0, got {log_every_n_steps}."
            raise ValueError(msg)
        self.log_every_n_steps = log_every_n_steps
        self.images: dict[int, str] = {}
        self.seen: list[str] = []
        self._samplers: list[SubspaceSampler] = []
        self._worker: ThreadPoolExecutor | None = None
        self._waiting: deque[Future[None]] = deque()
        self._held: list[list[tuple[Tensor, Tensor]]] = []  # of batches, for each scale
        self._next_image = 0
        self._most_paths = _PATHS
        self._seen_before = 0  # patches
        self._started = 0.0
        self._batches = 0  # of this fit
        self._has_warned = self._has_validated = False
        self._replaced_seed: tuple[str | None] | None = None  # while another one is set

    @property
    def samplers(self) -> list[SubspaceSampler]:
        """Samplers of the running fit, the finest scale first, when they have seen all batches."""
        self._wait()
        return self._samplers

    @samplers.setter
    def samplers(self, samplers: list[SubspaceSampler]) -> None:
        self._samplers = samplers

    @property
    def patches_seen(self) -> int:
        """Number of patches that the samplers have seen, of all scales."""
        return sum(sampler.patches_seen_ for sampler in self.samplers)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Have the model's seed order the images of several processes too."""
        seed = getattr(pl_module, "seed", None)
        if seed is not None and isinstance(trainer.strategy, ParallelStrategy):
            self._replaced_seed = (os.environ.get(_SEED),)
            os.environ[_SEED] = str(seed)

    def _restore_seed(self) -> None:
        if self._replaced_seed is not None:
            (before,), self._replaced_seed = self._replaced_seed, None
            os.environ.pop(_SEED) if before is None else os.environ.update({_SEED: before})

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse to validate before the fit.

        Raises:
            ValueError: If the model is not fitted.
        """
        if not getattr(pl_module, "_is_fitted", True):
            msg = (
                f"the trainer's num_sanity_val_steps must be 0, got {trainer.num_sanity_val_steps}:"
                " Sgfr cannot validate before it is fitted. Trainer(**model.trainer_arguments) has"
                " what it needs."
            )
            raise ValueError(msg)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start with new samplers.

        Raises:
            ValueError: If the trainer validates before all images were seen.
        """
        self._restore_seed()
        _require_whole_pass(trainer)
        self._batches = 0
        self._has_warned = self._has_validated = False
        module: Any = pl_module
        self.samplers = build_samplers(
            module.model.banks,
            bank_sizes(module.model.embedder.scales, module.bank_size),
            module.tolerance,
            module.update,
            trainer.global_rank,
        )
        self.images = dict(enumerate(module.model.images if module.update else []))
        self.seen = []
        self._next_image = len(self.images)
        self._most_paths = self._next_image + _PATHS
        self._seen_before = self.patches_seen
        self._started = time.perf_counter()

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,  # noqa: ANN401
        batch: Any,  # noqa: ANN401
        batch_idx: int,
    ) -> None:
        """Pass the embeddings of a batch to the samplers.

        Raises:
            ValueError: If an embedding is not finite; the message names the images.
        """
        if not self._samplers or not isinstance(outputs, Mapping):
            return
        self._batches += 1
        embeddings = outputs["embeddings"]
        if _on_gpu(embeddings[0]):  # sampled later, when their memory may be used again
            embeddings = [part.clone() for part in embeddings]
        images = len(batch.image)
        paths = batch.image_path or [
            f"image {index} of batch {batch_idx}" for index in range(images)
        ]
        numbers = self._number_images(batch.image_path, images, embeddings[0].device)
        new = ~is_padding(trainer.train_dataloader, batch_idx, images)
        if batch.image_path is not None:
            self.seen += [str(path) for path, its in zip(paths, new.tolist(), strict=True) if its]
        inside = outputs.get("inside") or [None] * len(embeddings)
        self._submit(partial(self._observe, embeddings, paths, numbers, new, inside), embeddings[0])
        # not `patches_seen`, which waits for the batches under way
        seen = sum(sampler.patches_seen_ for sampler in self._samplers)
        if self.log_every_n_steps and batch_idx % self.log_every_n_steps == 0 and seen:
            seconds = max(time.perf_counter() - self._started, 1e-9)
            report = {
                "candidates": float(sum(sampler.atoms_held for sampler in self._samplers)),
                "admission_threshold": sum(sampler.threshold_ for sampler in self._samplers),
                "patches_per_s": (seen - self._seen_before) / seconds,
            }
            pl_module.log_dict(report, prog_bar=True, batch_size=images)

    def _observe(
        self,
        embeddings: list[Tensor],
        paths: list[Any],
        numbers: Tensor,
        new: Tensor,
        inside: list[Tensor | None],
    ) -> None:
        """Pass a batch to the samplers, without padding, if all of it can be used."""
        copies = len(embeddings[0]) // len(paths)
        usable = torch.stack([(part.flatten(1).abs() < LARGEST).all(1) for part in embeddings])
        usable = usable.all(0).unflatten(0, (copies, len(paths))).all(0)
        if not usable.all():
            named = ", ".join(
                str(path) for path, fine in zip(paths, usable.tolist(), strict=True) if not fine
            )
            finite = all(bool(torch.isfinite(part).all()) for part in embeddings)
            what = f"values of {LARGEST:g} and more" if finite else "NaN or infinite values"
            msg = (
                f"embeddings hold {what} for: {named}. Check the images and the backbone's weights."
            )
            raise ValueError(msg)
        numbers = numbers.repeat(copies)
        if not new.all():
            rows = new.repeat(copies).nonzero().flatten().to(numbers.device)
            numbers, embeddings = numbers[rows], [part[rows] for part in embeddings]
        seen = []
        for part, mask in zip(embeddings, inside, strict=True):
            patches, places = to_patches(part), origins(numbers, part.shape[2:])
            kept = slice(None) if mask is None else mask.flatten().repeat(len(part))
            seen.append((patches[kept], places[kept]))
        self._held.append(seen)
        if len(paths) > 1 or len(self._held) >= _JOINED:
            self._observe_held()

    def _observe_held(self) -> None:
        """Pass the patches of the batches that are held to the samplers, as those of one batch."""
        held, self._held = self._held, []
        for sampler, *batches in zip(self._samplers, *held, strict=True) if held else ():
            patches, places = batches[0]
            if len(batches) > 1:
                patches, places = map(torch.cat, zip(*batches, strict=True))
            sampler.observe(patches, places)

    def _submit(self, step: Callable[[], None], embedding: Tensor) -> None:
        """Sample now, or on a GPU in a thread, while the next batch is loaded and embedded."""
        if not _on_gpu(embedding):
            step()
            return
        if self._worker is None:
            self._worker = ThreadPoolExecutor(1, "subspace-sampling")

        def on_device() -> None:
            with torch.cuda.device_of(embedding):
                step()

        self._waiting.append(self._worker.submit(on_device))
        while len(self._waiting) > _WAITING:
            self._waiting.popleft().result()

    def _wait(self) -> None:
        """Wait until all batches are sampled."""
        while self._waiting:
            self._waiting.popleft().result()
        self._observe_held()

    def _free(self) -> None:
        """Drop the samplers and the thread."""
        if self._worker is not None:
            self._worker.shutdown(cancel_futures=True)
            self._worker = None
        self._waiting.clear()
        self._held = []
        self.samplers = []

    def _number_images(self, paths: Any, images: int, device: torch.device) -> Tensor:  # noqa: ANN401
        """Number the images of a batch; -1 if their paths are not known."""
        if paths is None:
            return torch.full((images,), -1, device=device)
        first = self._next_image
        self.images |= {first + index: str(path) for index, path in enumerate(paths)}
        self._next_image += images
        if len(self.images) > self._most_paths:  # bounded, however long the stream
            held = set().union(*(sampler.images() for sampler in self.samplers))
            self.images = {
                number: path
                for number, path in self.images.items()
                if number in held or number >= first
            }
            self._most_paths = len(self.images) + _PATHS
        return first + torch.arange(images, device=device)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn, before the fit, of images that are left out."""
        del pl_module
        if trainer.state.fn == TrainerFn.FITTING:
            self._warn_if_partial(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note that the fit was validated."""
        del pl_module
        self._has_validated = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End the fit after one pass over the images and one validation."""
        del pl_module
        self._warn_if_partial(trainer)
        if trainer.max_epochs != 1 and (self._has_validated or not trainer.enable_validation):
            logger.info(
                "Sgfr learns in one pass over the training images: the fit ends, whatever"
                " max_epochs is."
            )
            trainer.should_stop = True

    def _warn_if_partial(self, trainer: Trainer) -> None:
        """Warn once of batches that the trainer leaves out."""
        loader: Any = trainer.train_dataloader
        try:
            batches = len(loader)
        except TypeError:  # a stream, or several loaders
            return
        if 0 < self._batches < batches and not self._has_warned and trainer.is_global_zero:
            logger.warning(
                "The banks are made of %d of %d batches of training images: the trainer's"
                " limit_train_batches, max_steps or max_time leaves out the rest.",
                self._batches,
                batches,
            )
        self._has_warned = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Free the samplers' memory."""
        del trainer, pl_module
        self._free()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Add reasons to an error, free the samplers' memory, and return to an earlier fit."""
        if isinstance(exception, Exception):
            add_reasons(trainer, exception)
        self._restore_seed()
        self._free()
        module: Any = pl_module
        module.abandon_fit()


class ModelCallbacks:
    """Callbacks that Sgfr attaches, or the trainer's own of the same kinds.

    Attributes:
        sampling (SubspaceSampling): Collects the memory banks.
        high_bit_depth (HighBitDepth): Reads images of more than 8 bits.
    """

    def __init__(self) -> None:
        self.sampling = SubspaceSampling()
        self.high_bit_depth = HighBitDepth()
        self._table = ScoreTable()
        self._folder = RunFolder()

    def attach(
        self, trainer: Trainer | None, components: Sequence[Callback] | Callback
    ) -> list[Callback]:
        """Callbacks to add to a trainer's, in the order that they need.

        Args:
            trainer (Trainer | None): Of the run.
            components (Sequence[Callback] | Callback): anomalib's, such as the pre-processor.

        Returns:
            list[Callback]: Without those that the trainer has already.
        """
        for tiler in tiler_callbacks(trainer):
            if tiler.stride is None:  # as its documentation says; its code fails
                tiler.stride = tiler.tile_size
        attached = list(getattr(trainer, "callbacks", []))

        # Lightning would replace the user's callback by the model's of the same type
        def chosen(own: _CallbackT) -> _CallbackT:
            return next((item for item in attached if isinstance(item, type(own))), own)

        self.sampling = chosen(self.sampling)
        self.high_bit_depth = chosen(self.high_bit_depth)
        callbacks = [
            chosen(LogFilters()),
            self.high_bit_depth,
            *(components if isinstance(components, Sequence) else [components]),
            self.sampling,
            chosen(self._table),
            chosen(self._folder),
        ]
        return [item for item in callbacks if not any(item is other for other in attached)]
