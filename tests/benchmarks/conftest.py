"""Records without a run, and fits on small images."""

from functools import partial

import pytest

from benchmarks.common import engine
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


@pytest.fixture
def small_images(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fit to images of 128 pixels in the benchmark that the test's file is named for."""
    benchmark = request.module.__name__.rpartition("test_")[2]
    monkeypatch.setattr(f"benchmarks.{benchmark}.fitted", partial(engine.fitted, image_size=128))
