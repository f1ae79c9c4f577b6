"""Lightning callback that learns the bank while the training images stream past."""

import time
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from anomalib_sgfr.artefacts import damage, unreadable
from anomalib_sgfr.sampling import SubspaceSampler

__all__ = ["SubspaceSampling"]

_SCALED_BY = 32  # training images, at least, that the factors of channels are taken from
_PATHS = 10_000  # of images whose patches are no atoms any more, before they are forgotten


class SubspaceSampling(Callback):
    """Feed each training batch's embeddings, scaled, to a :class:`~anomalib_sgfr.sampling.SubspaceSampler`.

    Sgfr attaches one by itself. To configure it, add your own under ``trainer.callbacks``; Sgfr then uses that one.
    Shows the number of atoms held (more than the bank will have), the sampler's threshold and the patches seen a
    second, in the progress bar and to the configured loggers.

    Args:
        log_every_n_steps (int): How often to report, in batches; ``0`` never. Defaults to ``1``.

    Attributes:
        sampler (SubspaceSampler | None): The sampler of the running fit; ``None`` outside one.
        scale (Tensor | None): Factors of channels, from the first 32 images; ``None`` before.
        images (dict[int, str]): Paths of the images that atoms held come from, by the numbers in the atoms' origins.
        grid (tuple[int, int]): Rows and columns of the latest images' patches.

    Raises:
        ValueError: If ``log_every_n_steps`` is negative.
    """

    def __init__(self, log_every_n_steps: int = 1) -> None:
        super().__init__()
        if log_every_n_steps < 0:
            msg = f"log_every_n_steps must be at least 0, got {log_every_n_steps}."
            raise ValueError(msg)
        self.log_every_n_steps = log_every_n_steps
        self.sampler: SubspaceSampler | None = None
        self.scale: Tensor | None = None
        self._waiting: list[tuple[Tensor, Tensor]] = []  # patches and their origins, while there is no scale
        self._images_seen = 0
        self.images: dict[int, str] = {}
        self.grid = (0, 0)
        self._next_image = 0
        self._room = _PATHS
        self._already_seen = 0
        self._started = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start a fresh sampler."""
        del trainer
        self.sampler = cast("Callable[[], SubspaceSampler]", pl_module.new_sampler)()
        self.scale = cast("Callable[[], Tensor | None]", pl_module.known_scale)()
        self._waiting, self._images_seen = [], 0
        self.images = dict(enumerate(cast("Callable[[], list[str]]", pl_module.images_known)()))
        self._next_image = len(self.images)
        self._room = self._next_image + _PATHS
        self._already_seen = self.sampler.patches_seen_
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
        if self.sampler is None or not isinstance(outputs, Mapping):
            return
        features = outputs["features"]
        images = len(batch.image)
        finite = torch.isfinite(features.reshape(images, -1)).all(1)
        if not finite.all():
            paths = batch.image_path or [f"image {index} of batch {batch_idx}" for index in range(images)]
            named = ", ".join(str(path) for path, fine in zip(paths, finite.tolist(), strict=True) if not fine)
            msg = f"embeddings hold NaN or infinite values for: {named}. Check the images and the backbone's weights."
            raise ValueError(msg)
        self._waiting.append((features, self._origin(outputs["grid"], batch.image_path, images, features.device)))
        self._images_seen += images
        if self.scale is not None or self._images_seen >= _SCALED_BY or trainer.is_last_batch:
            self.catch_up(pl_module)
        if self.log_every_n_steps and batch_idx % self.log_every_n_steps == 0:
            seconds = max(time.perf_counter() - self._started, 1e-9)
            report = {
                "atoms": float(self.sampler.atoms_held),
                "threshold": self.sampler.threshold_,
                "patches_per_s": (self.sampler.patches_seen_ - self._already_seen) / seconds,
            }
            pl_module.log_dict(report, prog_bar=True, batch_size=images)

    def catch_up(self, pl_module: LightningModule) -> None:
        """Observe what waits: a fit that ends with fewer than 32 images has no more to wait for."""
        waiting, self._waiting = self._waiting, []
        if self.sampler is None or not waiting:
            return
        if self.scale is None:
            every = torch.cat([features for features, _ in waiting])
            self.scale = cast("Callable[[Tensor], Tensor]", pl_module.new_scale)(every)
        for features, origin in waiting:
            self.sampler.observe(features * self.scale if self.scale.numel() else features, origin)

    def _origin(self, grid: tuple[int, int], paths: Any, images: int, device: torch.device) -> Tensor:  # noqa: ANN401
        """Number the images of a batch; image, row and column of each of its patches."""
        self.grid = grid
        numbers = torch.full((images,), -1, device=device)
        if paths is not None and self.sampler is not None:
            numbers = self._next_image + torch.arange(images, device=device)
            self.images |= {self._next_image + index: str(path) for index, path in enumerate(paths)}
            self._next_image += images
            if len(self.images) > self._room:  # bounded, however long the stream
                held = self.sampler.images()
                self.images = {number: path for number, path in self.images.items() if number in held}
                self._room = len(self.images) + _PATHS
        return torch.cartesian_prod(numbers, *(torch.arange(length, device=device) for length in grid))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Free the sampler's store."""
        del trainer, pl_module
        self.sampler, self._waiting = None, []

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Name the image that could not be read; free the store after a failed fit too, and keep an earlier bank."""
        if isinstance(exception, Exception):
            wrong = damage(trainer.ckpt_path)
            if wrong:
                exception.add_note(wrong)
            for path, reason in unreadable(trainer, exception):
                exception.add_note(f"{path} cannot be read: {reason}")
        if self.sampler is not None:
            self.sampler, self._waiting = None, []
            cast("Callable[[], None]", pl_module.abandon_fit)()
