"""The studies: which choice each varies, and the ideas among them that Sgfr does not have."""

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

from anomalib_sgfr import Sgfr
from benchmarks.common.records import Spec

__all__ = ["DEFAULTS", "PRODUCT", "STUDIES", "Variant", "spec_of"]

PRODUCT = {"pooling", "bank_size", "solver", "num_atoms", "regularisation", "blur"}
DEFAULTS: dict[str, Any] = {
    **{name: item.default for name, item in inspect.signature(Sgfr).parameters.items() if name in PRODUCT},
    # not arguments of Sgfr, or not by this name: ideas under study, and what it does
    "strides": [8, 16],
    "scales": "own",
    "combination": "sum",
    "channel_scaling": "none",
    "residual_scaling": "none",
    "local_normalisation": False,
    "image_score": "max",
    "sampler": "stream",
}


class Variant(NamedTuple):
    """A point of a study: what differs from the defaults."""

    label: str
    changes: dict[str, Any] | None = None
    image_size: int = 256
    limit_train: int | None = None


def _over(name: str, values: Sequence[Any], **fixed: Any) -> list[Variant]:  # noqa: ANN401
    return [Variant(str(value), {**fixed, name: value}) for value in values]


STUDIES: dict[str, list[Variant]] = {
    "k": _over("num_atoms", (1, 2, 3, 5, 10, 20, 50)),
    "bank": [
        Variant(f"{size}, k {k}", {"bank_size": size, "num_atoms": k})
        for size in (100, 250, 1000, 2000, 5000, 10_000, 16_000)
        for k in (1, 5)
    ],
    "sampler": [
        Variant(f"{sampler}, {size}", {"sampler": sampler, "bank_size": size})
        for sampler in ("random", "narrow", "stream", "whole", "residual", "pruned")
        for size in (250, 1000, 5000)
    ],
    "means": [
        Variant("stream, 5000"),
        Variant("unmoved, 5000", {"sampler": "unmoved"}),
        *(
            Variant(f"{sampler}, {size}", {"sampler": sampler, "bank_size": size})
            for size in (1000, 250)
            for sampler in ("stream", "unmoved")
        ),
    ],
    "solver": [
        *_over("solver", ("affine", "omp")),
        *(Variant(f"ridge {strength}", {"solver": "ridge", "regularisation": strength}) for strength in (1e-4, 1e-2)),
    ],
    "regularisation": _over("regularisation", (0.0, 1e-3, 1e-2, 1e-1)),
    "scales": [
        Variant(f"{', '.join(map(str, strides))}, {banks}", {"strides": strides, "scales": scales})
        for strides in ([8, 16], [4, 8, 16])
        for banks, scales in (("a bank each", "own"), ("one bank", "joint"))
    ],
    "combination": _over("combination", ("sum", "squares", "equal")),
    "layers": [
        Variant("8, 16"),
        Variant("4, 8, 16", {"strides": [4, 8, 16]}),
        Variant("8", {"strides": [8]}),
        Variant("16", {"strides": [16]}),
        Variant("8, 16, 32", {"strides": [8, 16, 32]}),
    ],
    "pooling": _over("pooling", ("box", "binomial")),
    "channels": _over("channel_scaling", ("none", "spread")),
    "residual": [
        Variant("plain"),
        Variant("spread", {"residual_scaling": "spread"}),
        Variant("local", {"local_normalisation": True}),
        Variant("spread and local", {"residual_scaling": "spread", "local_normalisation": True}),
    ],
    "blur": _over("blur", (0.0, 2.0, 4.0, 6.0, 8.0, 12.0)),
    "image-score": _over("image_score", ("max", "top 0.1%", "top 1%", "top 5%")),
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
        arguments={**DEFAULTS, **(variant.changes or {})},
        backbone="tf_efficientnet_lite0",
        image_size=[variant.image_size] * 2,
        seed=seed,
        limit_train=variant.limit_train,
    )
