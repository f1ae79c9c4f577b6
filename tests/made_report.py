"""Digests of reports that no model was needed for."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from anomalib_sgfr.report.contents import (
    Crop,
    Digest,
    Mimic,
    MimicRow,
    ModelFacts,
    Picture,
    ScaleFacts,
    Suspect,
    Unit,
)
from anomalib_sgfr.report.media import outline, small_heat, webp
from anomalib_sgfr.report.score_table import Scored

THRESHOLD = 0.5
HOSTILE = [
    "</script><script>alert(1)</script>.png",
    '"><img src=x onerror=alert(1)>.png',
    'it\'s & a "name".png',
    "Бракованная 良品 عيب.png",
    "line\u2028break\u202e.png",
    "bytes\udcff\udcfe.png",
    "{{ 7 * 7 }} ${x}.png",
]


def facts(**others: Any) -> ModelFacts:
    scale = ScaleFacts("layer1", 8, "map and score", 100, 40, 4000, 0.5, 2.0, [0, 5, 9, 2])
    return ModelFacts(
        **{
            "backbone": "tiny",
            "scales": [scale],
            "certified": 2.0,
            "arguments": [("backbone", "tiny")],
            "fit": None,
            "images": 12,
            "suspects": [Suspect("/parts/good/gone.png", 0.4, None)],
            "looked_at": 12,
            "checkpoint": "/models/my model.ckpt",
            "sha256": "0" * 64,
            "versions": {"anomalib-sgfr": "0"},
            **others,
        }
    )


def picture(seed: int, *, defect: bool = False) -> Picture:
    """A noisy square, with a bright blob in it and a mask of that if it is a defect."""
    rng = np.random.default_rng(seed)
    image = rng.uniform(0.3, 0.5, (64, 64, 3)).astype(np.float32)
    rows, columns = np.mgrid[:64, :64]
    blob = (rows - 20) ** 2 + (columns - 40) ** 2 < 64
    image[blob] = 0.9
    heat = np.where(blob & defect, 0.9, 0.2).astype(np.float32)
    mask = outline(blob.astype(np.float32), 0.5) if defect else ""
    return Picture(webp(image, 64), small_heat(heat), outline(heat, THRESHOLD), mask, 1.0)


def mimic() -> Mimic:
    patch = webp(np.full((16, 16, 3), 0.5, np.float32), 16)
    crops = [Crop(patch, 0.7, "/parts/good/00.png"), Crop(None, 0.3, "/parts/good/gone.png")]
    return Mimic([MimicRow(1, (0.1, 0.2, 0.3, 0.3), 8, 3.0, 1.0, patch, crops)])


def digest(scores: Sequence[float], truths: Sequence[int | None], **others: Any) -> Digest:
    """Of images in ``/parts/test``, all but the first ``pictured`` without pictures.

    The first ``trained_on`` of them were trained on, and the first ``chose`` chose the threshold.
    """
    pictured = others.pop("pictured", len(scores))
    names = others.pop("names", [f"{number:04}.png" for number in range(len(scores))])
    kinds = others.pop("kinds", [{0: "good", 1: "scratch", None: ""}[truth] for truth in truths])
    trained_on, chose = others.pop("trained_on", 0), others.pop("chose", 0)
    threshold = others.get("threshold", THRESHOLD)
    drawn = [
        picture(number % 7, defect=bool(truth)) for number, truth in enumerate(truths[:pictured])
    ]
    units = [
        Unit(
            Scored(
                f"/parts/test/{kind or 'new'}/{name}",
                score,
                threshold,
                None if threshold is None else int(score > threshold),
                truth,
                30 + number,
                40,
            ),
            kind,
            (0.625, 0.3),
            drawn[number] if number < pictured else None,
            number < trained_on,
            number < chose,
        )
        for number, (score, truth, name, kind) in enumerate(
            zip(scores, truths, names, kinds, strict=True)
        )
    ]
    return Digest(
        **{
            "units": units,
            "threshold": THRESHOLD,
            "heat_threshold": 0.5,
            "scaled": True,
            "basis": "12 good images",
            "nominal_units": 12,
            "model": facts(),
            "made": "2026-01-01 12:00",
            **others,
        }
    )


def drawn_scores(number: int, seed: int = 0) -> tuple[list[float], list[int | None]]:
    """Scores of good and defective images that overlap."""
    rng = np.random.default_rng(seed)
    truths = rng.integers(0, 2, number)
    scores = np.clip(rng.normal(0.4 + 0.2 * truths, 0.1), 0.02, 0.98).astype(np.float32)
    return scores.tolist(), truths.tolist()
