"""The studies: which choice each varies."""

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

from anomalib_sgfr import Sgfr
from benchmarks.common.records import Spec

__all__ = ["STUDIES", "Variant", "spec_of", "specs_of"]

_VARIED = {"bank_size", "solver", "num_atoms", "regularisation", "blur"}
_DEFAULTS: dict[str, Any] = {
    **{
        name: item.default
        for name, item in inspect.signature(Sgfr).parameters.items()
        if name in _VARIED
    },
    # Sgfr's ``layers`` and ``score_layers``, whatever the backbone calls them; without stride 4,
    # whose weight is the subject of `benchmarks.score_weights`
    "strides": [4, 8, 16],
    "score_strides": [8, 16, 32],
    # what Sgfr does not leave to choose: each scale over its ``residual_scale``, or as it is;
    # stages of the score alone summed into its map, or each by its own maximum
    "weights": "equal",
    "deep": "summed",
}


class Variant(NamedTuple):
    """A point of a study: what differs from the defaults."""

    label: str
    changes: dict[str, Any] | None = None
    image_size: int = 256
    limit_train: int | None = None


def _over(name: str, values: Sequence[Any]) -> list[Variant]:
    return [Variant(str(value), {name: value}) for value in values]


def _layers(in_map: Sequence[int], in_score: Sequence[int], **changes: Any) -> Variant:  # noqa: ANN401
    named = [", ".join(map(str, strides)) for strides in (in_map, in_score)]
    words = "".join(f"; {name} {value}" for name, value in changes.items())
    return Variant(
        " and ".join(named) + words,
        {"strides": list(in_map), "score_strides": list(in_score), **changes},
    )


STUDIES: dict[str, list[Variant]] = {
    "layers": [
        _layers((4, 8, 16), (8, 16, 32)),
        _layers((8, 16), (8, 16)),
        _layers((8, 16), (8, 16, 32)),
        _layers((4, 8, 16), (4, 8, 16)),
        _layers((4, 8, 16), (4, 8, 16, 32)),
        _layers((4, 8, 16), (16, 32)),
        _layers((4, 8, 16, 32), (8, 16, 32)),
        _layers((4, 8, 16), (8, 16, 32), weights="sum"),
        _layers((4, 8, 16), (8, 16, 32), deep="maximum"),
    ],
    "bank": [
        Variant("1,000, 1,000, 5,000, 3,000"),
        *(
            Variant(", ".join(f"{size:,}" for size in sizes), {"bank_size": list(sizes)})
            for sizes in (
                (250, 250, 1250, 750),
                (500, 500, 2500, 1500),
                (1000, 1000, 1000, 1000),
                (2000, 2000, 5000, 3000),
                (5000, 5000, 5000, 3000),
                (1000, 1000, 10_000, 3000),
                (1000, 1000, 5000, 1000),
                (1000, 1000, 5000, 5000),
            )
        ),
    ],
    "k": _over("num_atoms", (1, 2, 3, 5, 10, 20)),
    "solver": [
        *_over("solver", ("affine", "omp")),
        *(
            Variant(f"ridge {strength}", {"solver": "ridge", "regularisation": strength})
            for strength in (1e-4, 1e-2)
        ),
    ],
    "blur": _over("blur", (0.0, 2.0, 4.0, 6.0, 8.0)),
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
