"""Rows of a table from benchmark records: one for the runs of a model on a data set."""

import functools
import math
import statistics
from collections.abc import Callable, Container, Iterable, Sequence
from typing import Any

from benchmarks.common.records import Record, Spec
from benchmarks.common.zoo import resolve_arguments

__all__ = [
    "NAMES",
    "Row",
    "changes",
    "data_title",
    "keeps_aspect",
    "model_title",
    "rows_by_data",
    "side",
    "title",
]

NAMES = {
    "sgfr": "Sgfr",
    "patchcore": "Patchcore",
    "padim": "Padim",
    "mhpatchcore": "MHPatchcore",
    "anomalydino": "AnomalyDINO",
}


@functools.cache
def _defaults(model: str) -> dict[str, Any]:
    return resolve_arguments(model, {})


def title(spec: Spec) -> str:
    """Description of a run: data, model, and the arguments that differ from the defaults."""
    return f"{data_title(spec)}: {model_title(spec)}"


def data_title(spec: Spec) -> str:
    """Data of a run: data set, split, and the training images if limited or contaminated."""
    images = f", {spec.limit_train} training images" if spec.limit_train else ""
    defective = f", {100 * spec.contamination:g}% of them defective" if spec.contamination else ""
    return spec.dataset + (f" {spec.split}" if spec.split else "") + images + defective


def changes(spec: Spec) -> list[str]:
    """The arguments that are not the model's defaults, each as ``name value``."""
    defaults = _defaults(spec.model)
    return [
        f"{name} {value}" for name, value in spec.arguments.items() if defaults.get(name) != value
    ]


def keeps_aspect(spec: Spec) -> bool:
    """Whether images are not squeezed to a square."""
    return spec.own_aspect or spec.image_size[0] != spec.image_size[1]


def model_title(spec: Spec) -> str:
    """The model of a run, for people, with :func:`changes` and the shape of the images."""
    changed = changes(spec)
    if spec.own_aspect:
        changed.append("each image's own aspect ratio")
    elif keeps_aspect(spec):
        changed.append("{} x {} px".format(*spec.image_size))
    return NAMES[spec.model] + (f" ({', '.join(changed)})" if changed else "")


class Row:
    """Records that differ in their seed alone, one or more.

    Args:
        records (Sequence[Record]): The records, failed runs among them.
    """

    def __init__(self, records: Sequence[Record]) -> None:
        self.records = records
        self.spec = records[0]
        self.finished = [record for record in records if record.error is None]

    def median(
        self, value: Callable[[Record], float | None], seeds: Container[int] | None = None
    ) -> float | None:
        """Median of a value over the finished runs of these seeds; ``None`` if none has it."""
        of = [record for record in self.finished if seeds is None or record.seed in seeds]
        values = [found for found in map(value, of) if found is not None]
        return statistics.median(values) if values else None

    @property
    def seeds(self) -> set[int]:
        """Seeds of the finished runs."""
        return {record.seed for record in self.finished}


def rows_by_data(records: Iterable[Record]) -> dict[str, list[Row]]:
    """Rows by data set, backbone and image size; each data set's in the order of its models."""
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        same = (data_title(record), record.backbone, side(record))
        groups.setdefault((*same, list(NAMES).index(record.model), model_title(record)), []).append(
            record
        )
    rows: dict[str, list[Row]] = {}
    for (data, backbone, size, *_), group in sorted(groups.items(), key=lambda item: str(item[0])):
        rows.setdefault(f"{data} ({backbone}, {size} px)", []).append(Row(group))
    return rows


def side(spec: Spec) -> int:
    """Side in pixels of a square of about as many pixels as the images have."""
    if not keeps_aspect(spec) or spec.own_aspect:
        return spec.image_size[0]
    height, width = spec.image_size
    step = math.gcd(height, width)
    return round(math.sqrt(height * width) / step) * step
