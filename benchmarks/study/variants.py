"""The studies: which choice each varies."""

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

from anomalib_sgfr import Sgfr
from benchmarks.common.records import Spec

__all__ = ["STUDIES", "Variant", "spec_of", "specs_of"]

_VARIED = {"pooling", "bank_size", "solver", "num_atoms", "regularisation", "blur"}
# Ideas that lost their study and left the code. Records still say that none was used, as those from before do: what
# was measured beside them stays valid.
_LEFT_OUT = {
    "scales": "own",
    "combination": "sum",
    "channel_scaling": "none",
    "residual_scaling": "none",
    "local_normalisation": False,
    "image_score": "max",
    "sampler": "stream",
}
_DEFAULTS: dict[str, Any] = {
    **{name: item.default for name, item in inspect.signature(Sgfr).parameters.items() if name in _VARIED},
    "strides": [8, 16],  # Sgfr's ``layers``, whatever the backbone calls them
    **_LEFT_OUT,
}


class Variant(NamedTuple):
    """A point of a study: what differs from the defaults."""

    label: str
    changes: dict[str, Any] | None = None
    image_size: int = 256
    limit_train: int | None = None


def _over(name: str, values: Sequence[Any]) -> list[Variant]:
    return [Variant(str(value), {name: value}) for value in values]


STUDIES: dict[str, list[Variant]] = {
    "k": _over("num_atoms", (1, 2, 3, 5, 10, 20, 50)),
    "bank": [
        Variant(f"{size}, k {k}", {"bank_size": size, "num_atoms": k})
        for size in (100, 250, 1000, 2000, 5000, 10_000, 16_000)
        for k in (1, 5)
    ],
    "solver": [
        *_over("solver", ("affine", "omp")),
        *(Variant(f"ridge {strength}", {"solver": "ridge", "regularisation": strength}) for strength in (1e-4, 1e-2)),
    ],
    "regularisation": _over("regularisation", (0.0, 1e-3, 1e-2, 1e-1)),
    "layers": [
        Variant("8, 16"),
        Variant("4, 8, 16", {"strides": [4, 8, 16]}),
        Variant("8", {"strides": [8]}),
        Variant("16", {"strides": [16]}),
        Variant("8, 16, 32", {"strides": [8, 16, 32]}),
    ],
    "pooling": _over("pooling", ("box", "binomial")),
    "blur": _over("blur", (0.0, 2.0, 4.0, 6.0, 8.0, 12.0)),
    "image-size": [Variant("256"), Variant("320", image_size=320)],
    "few-shot": [
        Variant(f"{images} images, k {k}", {"num_atoms": k}, limit_train=images)
        for images in (4, 16, 64)
        for k in (1, 5)
    ],
}


def spec_of(variant: Variant, dataset: str, split: str | None, seed: int) -> Spec:
    """The run of a variant on one data set, split and seed."""
    return Spec(
        dataset=dataset,
        split=split,
        model="sgfr",
        arguments={**_DEFAULTS, **(variant.changes or {})},
        backbone="tf_efficientnet_lite0",
        image_size=[variant.image_size] * 2,
        seed=seed,
        limit_train=variant.limit_train,
    )


def specs_of(study: str, dataset: str, split: str | None, seed: int) -> dict[str, Spec]:
    """The runs of a study on one data set, split and seed, by their keys."""
    specs = (spec_of(variant, dataset, split, seed) for variant in STUDIES[study])
    return {spec.key: spec for spec in specs}
