"""The models under comparison, on the same backbone, weights, layers, image size and normalisation.

Each model keeps its own defaults for all else. Baselines read the backbone's weights under the name
that this package registers with timm, because anomalib's extractor takes no weights package.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import timm
from anomalib.models import AnomalyDINO, MHPatchcore, Padim, Patchcore
from anomalib.models.components import AnomalibModule
from anomalib.post_processing import PostProcessor
from lightning.pytorch import Callback
from torch import Tensor, nn

from anomalib_sgfr import Sgfr, SubspaceSampling
from anomalib_sgfr.core.sampler import SubspaceSampler
from anomalib_sgfr.features.layers import layers_of_strides, resolve_layers
from anomalib_sgfr.features.weights import OFFLINE_SUFFIX

__all__ = ["MODELS", "BareExtraction", "Entry", "resolve_arguments", "stored", "timed"]

_COMPONENTS = {"backbone", "encoder_name", "layers", "pre_trained", "seed"}
_COMPONENTS |= {"pre_processor", "post_processor", "evaluator", "visualizer", "thumbnails"}


@dataclass(frozen=True)
class Entry:
    """A model under comparison.

    Attributes:
        model (Callable[..., AnomalibModule]): Its class.
        sampling (Callable): From a model to the (owner, method name) pairs that do its own work
            during a fit.
        strides (tuple[int, ...] | None): Strides of the backbone stages it uses; ``None`` if it
            chooses for itself.
        environment (tuple[tuple[str, str], ...]): Environment variables its process needs.
    """

    model: Callable[..., AnomalibModule]
    sampling: Callable[[Any], list[tuple[Any, str]]]
    strides: tuple[int, ...] | None = (8, 16)
    environment: tuple[tuple[str, str], ...] = ()

    def layers(self, backbone: str) -> list[str] | None:
        """Backbone layers this model takes: its own choice of strides."""
        if self.strides is None:
            return None
        return layers_of_strides(backbone, self.strides) or resolve_layers(
            backbone
        )  # of a vision transformer

    def build(
        self,
        backbone: str,
        image_size: tuple[int, int],
        seed: int,
        arguments: dict[str, Any],
        *,
        own_aspect: bool = False,
    ) -> AnomalibModule:
        """Build the model, to give raw scores.

        With ``own_aspect``, which Sgfr alone can, each image keeps its own aspect ratio.
        """
        common: dict[str, Any] = {
            "pre_processor": Sgfr.configure_pre_processor(image_size, backbone),
            "post_processor": PostProcessor(enable_normalization=False, enable_thresholding=False),
            "evaluator": False,
            "visualizer": False,
        }
        if self.model is Sgfr and own_aspect:
            common |= {"pre_processor": True, "image_size": image_size[0]}
        if self.model is Sgfr:
            return Sgfr(backbone=backbone, seed=seed, **common, **arguments)
        offline = backbone + OFFLINE_SUFFIX
        name = offline if timm.is_model(offline) else backbone
        if self.model is AnomalyDINO:  # of the last block
            return AnomalyDINO(encoder_name=name, **common, **arguments)
        return self.model(backbone=name, layers=self.layers(backbone), **common, **arguments)


# Without the first, anomalib's coreset selection can fragment the C library's heap to many times
# what it needs. The second makes it faster.
_LARGE_BLOCKS = (
    ("MALLOC_MMAP_THRESHOLD_", "1048576"),
    ("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1"),
)

MODELS: dict[str, Entry] = {
    "sgfr": Entry(
        Sgfr,
        lambda _: [(SubspaceSampler, "observe"), (SubspaceSampler, "fitted_state")],
        strides=None,
    ),
    "patchcore": Entry(Patchcore, lambda model: [(model, "fit")], environment=_LARGE_BLOCKS),
    "padim": Entry(Padim, lambda model: [(model, "fit")], strides=(4, 8, 16)),
    "mhpatchcore": Entry(
        MHPatchcore,
        lambda model: [
            (part, step)
            for part in (model.model.pca, model.model.covariance, model.model.memory_bank)
            for step in ("forward", "update", "finalize")
        ],
    ),
    "anomalydino": Entry(AnomalyDINO, lambda model: [(model, "fit")], strides=None),
}


# Input settings: recorded only where they are given, as earlier records have none.
_UNRECORDED = {"image_size", "tile_size", "tile_stride", "roi", "bit_depth", "copies"}


def resolve_arguments(model: str, overrides: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a model but backbone, seed and components: defaults, then those asked for.

    Raises:
        ValueError: If the model has no such argument; the message lists those it has.
    """
    parameters = inspect.signature(MODELS[model].model).parameters
    defaults = {name: item.default for name, item in parameters.items() if name not in _COMPONENTS}
    unknown = set(overrides) - set(defaults)
    if unknown:
        msg = (
            f"{model} has no argument {', '.join(sorted(unknown))}; it has: {', '.join(defaults)}."
        )
        raise ValueError(msg)
    if (
        model == "padim"
    ):  # anomalib asks for it with any backbone but two; 100 is what it gives the smaller
        defaults["n_features"] = 100
    if model in {"patchcore", "anomalydino"}:  # an enumeration, which JSON cannot hold
        defaults["precision"] = "float32"
    recorded = defaults.keys() - _UNRECORDED
    return {
        name: value
        for name, value in {**defaults, **overrides}.items()
        if name in recorded | overrides.keys()
    }


class BareExtraction(Sgfr):
    """What every model does at least: load the training images and embed them. Keeps nothing."""

    def training_step(self, batch: Any, *args: Any, **kwargs: Any) -> dict[str, Tensor]:  # noqa: ANN401
        """Embed a batch and drop it."""
        return {"loss": super().training_step(batch, *args, **kwargs)["loss"]}

    def configure_callbacks(self) -> list[Callback]:
        """No sampling."""
        return [
            callback
            for callback in super().configure_callbacks()
            if not isinstance(callback, SubspaceSampling)
        ]

    def fit(self) -> None:
        """Nothing was kept to learn from."""


def stored(model: AnomalibModule) -> tuple[int | None, int]:
    """Number of embeddings a fitted model stores, and the bytes of all it learnt."""
    inner: Any = model.model
    extractor: nn.Module = (
        inner.embedder.extractor if isinstance(model, Sgfr) else _extractor(inner)
    )
    backbone = {id(tensor) for tensor in (*extractor.parameters(), *extractor.buffers())}
    kept = inner.state_dict().keys()
    fitted_state = [
        tensor
        for name, tensor in (*inner.named_parameters(), *inner.named_buffers())
        if name in kept
        and id(tensor) not in backbone
        and "blur" not in name  # a Gaussian, not learnt
    ]
    atoms = None
    if isinstance(model, Sgfr):
        atoms = sum(len(bank.atoms) for bank in inner.banks)
    elif isinstance(model, Patchcore | AnomalyDINO):
        atoms = len(inner.memory_bank)
    elif isinstance(model, MHPatchcore):
        atoms = len(inner.memory_bank.bank)
    return atoms, sum(tensor.numel() * tensor.element_size() for tensor in fitted_state)


def _extractor(inner: Any) -> nn.Module:  # noqa: ANN401
    found: nn.Module = (
        inner.feature_encoder if hasattr(inner, "feature_encoder") else inner.feature_extractor
    )
    return found


@contextmanager
def timed(steps: list[tuple[Any, str]]) -> Iterator[list[float]]:
    """Collect the seconds spent in methods, given as (owner, name), while the context lasts."""
    seconds: list[float] = []
    wrapped = []
    for owner, name in steps:
        original = getattr(owner, name)
        was_own = name in vars(owner)

        def timing(*args: Any, _original: Callable[..., Any] = original, **kwargs: Any) -> Any:  # noqa: ANN401
            start = perf_counter()
            try:
                return _original(*args, **kwargs)
            finally:
                seconds.append(perf_counter() - start)

        setattr(owner, name, timing)
        wrapped.append((owner, name, original, was_own))
    try:
        yield seconds
    finally:
        for owner, name, original, was_own in wrapped:
            if was_own:
                setattr(owner, name, original)
            else:
                delattr(owner, name)
