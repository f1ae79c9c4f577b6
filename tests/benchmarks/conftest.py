"""Records without a run."""

from benchmarks.common.records import METRICS, Record
from benchmarks.common.zoo import resolve_arguments


def record_of(model: str, seed: int, value: float = 0.5, **changes: object) -> Record:
    """A record of solar cells with ``value`` for its image metrics; ``changes`` are of the model's
    arguments.
    """
    return Record(
        dataset="elpv-mono",
        split=None,
        model=model,
        arguments=resolve_arguments(model, changes),
        backbone="b",
        image_size=[256, 256],
        seed=seed,
        limit_train=None,
        versions={"torch": "2"},
        metrics={**dict.fromkeys(METRICS), "image_AUROC": value, "image_F1Max": value},
    )
