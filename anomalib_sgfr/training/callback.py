"""Lightning callback that learns the banks while the training images stream past."""

import logging
import os
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from anomalib_sgfr.core.patch_grid import origins, to_patches
from anomalib_sgfr.core.sampler import LARGEST, SubspaceSampler
from anomalib_sgfr.training.distributed import is_padding
from anomalib_sgfr.training.errors import add_reasons

__all__ = ["SubspaceSampling", "require_whole_pass"]

logger = logging.getLogger(__name__)

_SEED = "PL_GLOBAL_SEED"  # Lightning's name for the seed of its distributed sampler
_STEPS = 2  # batches that wait to be sampled, at most
_PATHS = 10_000  # of images whose patches are no atoms any more, before they are forgotten


def _worth_a_worker(where: Tensor) -> bool:
    return where.is_cuda


def _finite(embedding: Tensor) -> bool:
    return bool(torch.isfinite(embedding).all())


def require_whole_pass(trainer: Trainer) -> None:
    """Refuse a trainer that validates before all training images were seen: the banks would be made
    without the rest.

    anomalib's Engine takes over the model's ``trainer_arguments``; a trainer of Lightning's own has
    to be given them.

    Args:
        trainer (Trainer): With its data loaders set up.

    Raises:
        ValueError: If validation comes earlier in the first epoch than at its end.
    """
    in_first_epoch = trainer.enable_validation and trainer.check_val_every_n_epoch in {None, 1}
    every = trainer.val_check_batch  # None for so many seconds
    if in_first_epoch and (every is None or every < trainer.num_training_batches):
        got = getattr(trainer, "val_check_interval", "a time")
        msg = (
            f"the trainer's val_check_interval must be 1.0, got {got}: Sgfr learns from all"
            " training images before it validates. Trainer(**model.trainer_arguments) has what it"
            " needs."
        )
        raise ValueError(msg)


class SubspaceSampling(Callback):
    """Feed each training batch's embeddings to a
    :class:`~anomalib_sgfr.core.sampler.SubspaceSampler` for each scale.

    Sgfr attaches one by itself. To configure it, add your own under ``trainer.callbacks``; Sgfr
    then uses that one. Shows the number of atoms held (more than the banks will have), the sum of
    the samplers' thresholds and the patches seen a second, in the progress bar and to the
    configured loggers.

    Args:
        log_every_n_steps (int): How often to report, in batches; ``0`` never. Defaults to ``1``.

    Attributes:
        images (dict[int, str]): Paths of the images that atoms held come from, by the numbers in
            the atoms' origins.
        seen (list[str]): Paths of all images of the running or latest fit that this process has
            seen.

    Raises:
        ValueError: If ``log_every_n_steps`` is negative.
    """

    def __init__(self, log_every_n_steps: int = 1) -> None:
        super().__init__()
        if log_every_n_steps < 0:
            msg = f"log_every_n_steps must be at least 0, got {log_every_n_steps}."
            raise ValueError(msg)
        self.log_every_n_steps = log_every_n_steps
        self._samplers: list[SubspaceSampler] = []
        self._worker: ThreadPoolExecutor | None = None
        self._steps: deque[Future[None]] = deque()
        self.images: dict[int, str] = {}
        self.seen: list[str] = []
        self._next_image = 0
        self._room = _PATHS
        self._already_seen = 0
        self._started = 0.0
        self._batches = 0  # of training images, in this fit
        self._is_partial_told = self._has_validated = False
        self._global_seed: tuple[str | None] | None = (
            None  # the variable of before, while another one stands for it
        )

    @property
    def samplers(self) -> list[SubspaceSampler]:
        """Of the running fit, the finest scale's first, with all that they were given taken in;
        none outside one.
        """
        self._wait()
        return self._samplers

    @samplers.setter
    def samplers(self, samplers: list[SubspaceSampler]) -> None:
        self._samplers = samplers

    @property
    def patches_seen(self) -> int:
        """Patches of all scales that the samplers know of."""
        return sum(sampler.patches_seen_ for sampler in self.samplers)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let the model's seed order the images of several processes too: Lightning's sampler has
        its own seed.
        """
        seed = getattr(pl_module, "seed", None)
        if seed is not None and isinstance(trainer.strategy, ParallelStrategy):
            self._global_seed = (os.environ.get(_SEED),)
            os.environ[_SEED] = str(seed)

    def _restore_global_seed(self) -> None:
        if self._global_seed is not None:
            (before,), self._global_seed = self._global_seed, None
            os.environ.pop(_SEED) if before is None else os.environ.update({_SEED: before})

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse to validate before the fit.

        Raises:
            ValueError: If there is nothing to validate with.
        """
        if not getattr(pl_module, "_is_fitted", True):
            msg = (
                f"the trainer's num_sanity_val_steps must be 0, got {trainer.num_sanity_val_steps}:"
                " Sgfr cannot validate before it is fitted. Trainer(**model.trainer_arguments) has"
                " what it needs."
            )
            raise ValueError(msg)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start fresh samplers.

        Raises:
            ValueError: If the trainer limits the batches of an epoch.
        """
        self._restore_global_seed()
        require_whole_pass(trainer)
        self._batches = 0
        self._is_partial_told = self._has_validated = False
        self.samplers = cast("Callable[[], list[SubspaceSampler]]", pl_module.new_samplers)()
        self.images = dict(enumerate(cast("Callable[[], list[str]]", pl_module.images_known)()))
        self.seen = []
        self._next_image = len(self.images)
        self._room = self._next_image + _PATHS
        self._already_seen = self.patches_seen
        self._started = time.perf_counter()

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,  # noqa: ANN401
        batch: Any,  # noqa: ANN401
        batch_idx: int,
    ) -> None:
        """Observe the embeddings of one batch.

        Raises:
            ValueError: If an embedding is not finite; the message names the images.
        """
        if not self._samplers or not isinstance(outputs, Mapping):
            return
        self._batches += 1
        embeddings = outputs["embeddings"]
        if _worth_a_worker(
            embeddings[0]
        ):  # which reads them later: whoever made them may use their memory again
            embeddings = [part.clone() for part in embeddings]
        images = len(batch.image)
        paths = batch.image_path or [
            f"image {index} of batch {batch_idx}" for index in range(images)
        ]
        numbers = self._numbers(batch.image_path, images, embeddings[0].device)
        new = ~is_padding(trainer.train_dataloader, batch_idx, images)
        if batch.image_path is not None:
            self.seen += [str(path) for path, its in zip(paths, new.tolist(), strict=True) if its]
        inside = outputs.get("inside") or [None] * len(embeddings)
        self._later(partial(self._observe, embeddings, paths, numbers, new, inside), embeddings[0])
        if self.log_every_n_steps and batch_idx % self.log_every_n_steps == 0:
            seconds = max(time.perf_counter() - self._started, 1e-9)
            seen = sum(
                sampler.patches_seen_ for sampler in self._samplers
            )  # without waiting for what is under way
            report = {
                "candidates": float(sum(sampler.atoms_held for sampler in self._samplers)),
                "admission_threshold": sum(sampler.threshold_ for sampler in self._samplers),
                "patches_per_s": (seen - self._already_seen) / seconds,
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
        """Let the samplers see a batch, if it is sound."""
        images = len(paths)
        copies = len(embeddings[0]) // images
        finite = torch.stack([(part.flatten(1).abs() < LARGEST).all(1) for part in embeddings]).all(
            0
        )
        finite = finite.unflatten(0, (copies, images)).all(0)
        if not finite.all():
            named = ", ".join(
                str(path) for path, fine in zip(paths, finite.tolist(), strict=True) if not fine
            )
            what = (
                "NaN or infinite values"
                if not all(map(_finite, embeddings))
                else f"values of {LARGEST:g} and more"
            )
            msg = (
                f"embeddings hold {what} for: {named}. Check the images and the backbone's weights."
            )
            raise ValueError(msg)
        numbers = numbers.repeat(copies)
        if not new.all():
            rows = new.repeat(copies).nonzero().flatten().to(numbers.device)
            numbers, embeddings = numbers[rows], [part[rows] for part in embeddings]
        for sampler, part, mask in zip(self._samplers, embeddings, inside, strict=True):
            patches, places = to_patches(part), origins(numbers, part.shape[2:])
            seen = slice(None) if mask is None else mask.flatten().repeat(len(part))
            sampler.observe(patches[seen], places[seen])

    def _later(self, step: Callable[[], None], where: Tensor) -> None:
        """Take a step; where a card does the work, beside the loading and embedding of the next
        batch.
        """
        if not _worth_a_worker(where):
            step()
            return
        if self._worker is None:
            self._worker = ThreadPoolExecutor(1, "subspace-sampling")

        def there() -> None:
            with torch.cuda.device_of(where):
                step()

        self._steps.append(self._worker.submit(there))
        while len(self._steps) > _STEPS:
            self._steps.popleft().result()

    def _wait(self) -> None:
        """Until every step is taken."""
        while self._steps:
            self._steps.popleft().result()

    def _free(self) -> None:
        """Let the samplers' stores go, and whoever fills them."""
        if self._worker is not None:
            self._worker.shutdown(cancel_futures=True)
            self._worker = None
        self._steps.clear()
        self.samplers = []

    def _numbers(self, paths: Any, images: int, device: torch.device) -> Tensor:  # noqa: ANN401
        """Number the images of a batch; -1 if their paths are not known."""
        if paths is None:
            return torch.full((images,), -1, device=device)
        numbers = self._next_image + torch.arange(images, device=device)
        self.images |= {self._next_image + index: str(path) for index, path in enumerate(paths)}
        self._next_image += images
        if len(self.images) > self._room:  # bounded, however long the stream
            held = set().union(*(sampler.images() for sampler in self.samplers))
            first = self._next_image - images  # not yet observed
            self.images = {
                number: path
                for number, path in self.images.items()
                if number in held or number >= first
            }
            self._room = len(self.images) + _PATHS
        return numbers

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say before the banks are made if images are left out of them."""
        del pl_module
        if trainer.state.fn == TrainerFn.FITTING:
            self._tell_if_partial(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note that nothing is left to wait for."""
        del pl_module
        self._has_validated = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End the fit after one pass, which is all that is learnt from, and the first validation
        after it.
        """
        del pl_module
        self._tell_if_partial(trainer)
        if trainer.max_epochs != 1 and (self._has_validated or not trainer.enable_validation):
            logger.info(
                "Sgfr learns in one pass over the training images: the fit ends, whatever"
                " max_epochs is."
            )
            trainer.should_stop = True

    def _tell_if_partial(self, trainer: Trainer) -> None:
        """Warn once of batches that the trainer leaves out."""
        loader: Any = trainer.train_dataloader
        try:
            batches = len(loader)
        except TypeError:  # a stream, or several loaders
            return
        if 0 < self._batches < batches and not self._is_partial_told and trainer.is_global_zero:
            logger.warning(
                "The banks are made of %d of %d batches of training images: the trainer's"
                " limit_train_batches, max_steps or max_time leaves out the rest.",
                self._batches,
                batches,
            )
        self._is_partial_told = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Free the samplers' stores."""
        del trainer, pl_module
        self._free()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Name the image that could not be read; free the store after a failed fit too, and keep an
        earlier bank.
        """
        if isinstance(exception, Exception):
            add_reasons(trainer, exception)
        self._restore_global_seed()
        self._free()
        cast("Callable[[], None]", pl_module.abandon_fit)()
