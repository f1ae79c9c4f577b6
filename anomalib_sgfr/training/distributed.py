"""Fits of several processes: one memory bank of all, padding, empty processes, the anchor."""

from collections.abc import Callable, Mapping, Sequence, Sized
from functools import partial
from typing import Any, cast

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor, nn
from torch.utils.data import DistributedSampler
from torchmetrics import Metric

from anomalib_sgfr.core.clusters import Clusters, merge, renumber_images, shift_images
from anomalib_sgfr.core.processes import gathered, gathered_tensors, several
from anomalib_sgfr.memory_bank import MemoryBankState
from anomalib_sgfr.torch_model import FittedState

__all__ = [
    "DataParallelAnchor",
    "drop_padding",
    "is_padding",
    "prepare",
    "support_idle_processes",
    "unite",
]


def unite(own: FittedState, sizes: Sequence[int], tolerance: float = 0.0) -> FittedState:
    """One memory bank of each scale from those of all processes.

    Args:
        own (FittedState): Banks of this process; they may have more atoms than are to be kept.
        sizes (Sequence[int]): Largest number of atoms of each scale to keep.
        tolerance (float): Distance within which an atom can represent another, see
            :func:`~anomalib_sgfr.core.clusters.merge`.

    Returns:
        FittedState: The same in all processes; ``own`` if there is only one.

    Raises:
        ValueError: In all processes, if none has an atom.
    """
    known = gathered((own.images, [state.threshold for state in own.states]))
    tensors = gathered_tensors([part for state in own.states for part in state.clusters])
    if not several():
        return own
    first = [sum(len(images) for images, _ in known[:rank]) for rank in range(len(known))]
    parts = len(Clusters._fields)
    scale_clusters, thresholds = [], []
    for scale, size in enumerate(sizes):
        every = [
            shift_images(Clusters(*theirs[parts * scale : parts * (scale + 1)]), by)
            for theirs, by in zip(tensors, first, strict=True)
        ]
        if not any(len(clusters.atoms) for clusters in every):
            msg = "no nominal embedding was observed: the training set is empty."
            raise ValueError(msg)
        clusters, radius = merge(every, size, tolerance)
        scale_clusters.append(clusters)
        thresholds.append(max(radius, *(theirs[scale] for _, theirs in known)))
    scale_clusters, images = renumber_images(
        scale_clusters, dict(enumerate(path for images, _ in known for path in images))
    )
    return FittedState(list(map(MemoryBankState, scale_clusters, thresholds)), images)


def is_padding(loader: Any, batch: int, images: int) -> Tensor:  # noqa: ANN401
    """Images of a batch that another process has too, so that all have the same number.

    Args:
        loader (Any): The process's data loader.
        batch (int): Number of the batch in the process.
        images (int): Number in the batch, and in those before it.

    Returns:
        Tensor: A mask of shape ``(images,)``, ``bool``.
    """
    sampler = getattr(loader, "sampler", None)
    if not isinstance(sampler, DistributedSampler) or sampler.drop_last:
        return torch.zeros(images, dtype=torch.bool)
    place = batch * (loader.batch_size or 1) + torch.arange(images)  # in this process
    return place * sampler.num_replicas + sampler.rank >= len(cast("Sized", sampler.dataset))


def prepare(
    trainer: Trainer, evaluator: nn.Module | None, post_processor: nn.Module | None
) -> None:
    """Prepare a run of several processes, of which some may have no images.

    Args:
        trainer (Trainer): Of the run.
        evaluator (nn.Module | None): Of the model.
        post_processor (nn.Module | None): Of the model.
    """
    if trainer.world_size == 1:
        return
    for owner in (evaluator, post_processor):
        if owner is not None:
            support_idle_processes(owner)


def drop_padding(batch: Any, loaders: Any, number: int, loader: int = 0) -> None:  # noqa: ANN401
    """Drop padding from a batch, in place, so that metrics count each image once.

    Args:
        batch (Any): anomalib's, from the process's data loader.
        loaders (Any): The data loader, or a list or a mapping of several.
        number (int): Of the batch in the process.
        loader (int): Number of its loader among several.
    """
    images = len(batch.image)
    if isinstance(loaders, Mapping):
        loaders = list(loaders.values())
    if isinstance(loaders, list | tuple):
        loaders = loaders[loader]
    kept = ~is_padding(loaders, number, images)
    if kept.all():
        return
    rows = kept.nonzero().flatten().tolist()
    for field in ("image", *(name for name in vars(batch) if name != "image")):
        value = getattr(batch, field)
        if isinstance(value, Tensor) and value.ndim and len(value) == images:
            setattr(batch, field, value[rows])
        elif isinstance(value, list) and len(value) == images:
            setattr(batch, field, [value[row] for row in rows])


def support_idle_processes(owner: Any) -> None:  # noqa: ANN401
    """Have a callback compute its metrics in processes without images too.

    Metrics are not given batches that :func:`drop_padding` left empty, which some refuse. Before
    they are computed, each process learns whether any has updated them, so that all compute. They
    exchange their states by :func:`~anomalib_sgfr.core.processes.gathered_tensors`, to which a
    process may contribute nothing.

    Args:
        owner (Any): anomalib's evaluator or post-processor.
    """
    for stage in ("validation", "test"):
        for hook, wrapper in (
            (f"on_{stage}_batch_end", _unless_empty),
            (f"on_{stage}_epoch_end", _with_idle),
        ):
            method = getattr(owner, hook)
            if not isinstance(method, partial):
                setattr(owner, hook, partial(wrapper, method))


def _unless_empty(method: Callable[..., None], *arguments: Any) -> None:  # noqa: ANN401
    _, _, _, batch, *_ = arguments  # trainer, model, outputs first
    if len(batch.image):
        method(*arguments)


def _with_idle(method: Callable[..., None], *arguments: Any) -> None:  # noqa: ANN401
    owner: Any = method.__self__  # type: ignore[attr-defined]  # it is bound
    metrics = [part for part in owner.modules() if isinstance(part, Metric)]
    # anomalib's own metrics read it
    updates = gathered([metric._update_count for metric in metrics])  # noqa: SLF001
    for metric, counts in zip(metrics, zip(*updates, strict=True), strict=True):
        metric._update_count = max(counts)  # noqa: SLF001
        if metric.dist_sync_fn is None and metric.process_group is None:
            metric.dist_sync_fn = _gathered_state
    method(*arguments)


def _gathered_state(state: Tensor, group: Any = None) -> list[Tensor]:  # noqa: ANN401
    """Part of a metric's state from all processes, as torchmetrics asks for it."""
    del group
    return [theirs for (theirs,) in gathered_tensors([state])]


class DataParallelAnchor(nn.Module):
    """Trainable parameter for data-parallel wrappers, which refuse a model without one.

    It is no part of the model: no checkpoint has it.

    Args:
        device (torch.device): Of the model.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.zero = nn.Parameter(torch.zeros((), device=device))

    @staticmethod
    def needed(trainer: Trainer) -> bool:
        """Whether a trainer wraps the model, be it in one process."""
        return isinstance(trainer.strategy, ParallelStrategy)

    def forward(self) -> Tensor:
        """A loss of zero that depends on the parameter."""
        return 0 * self.zero

    def _save_to_state_dict(self, *_: object) -> None:
        """Leave the parameter out of a state."""

    def _load_from_state_dict(self, *_: object) -> None:
        """Ask nothing of a state."""
