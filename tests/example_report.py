"""Contents of reports that need no model."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from anomalib_sgfr.report.contents import (
    AtomCrop,
    ChangeExample,
    ChangeMaps,
    ExplanationRow,
    ImageExplanation,
    ImageMedia,
    ImageRow,
    LayerChange,
    ReportContents,
    WatchedStream,
)
from anomalib_sgfr.report.media import outline, small_map, webp
from anomalib_sgfr.report.model_facts import ModelFacts, ScaleFacts, SuspectedImage
from anomalib_sgfr.report.score_table import ScoreRow

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
    values = {
        "backbone": "tiny",
        "scales": [scale],
        "certified": 2.0,
        "arguments": [("backbone", "tiny")],
        "fit": None,
        "images": 12,
        "suspected": [SuspectedImage("/parts/good/gone.png", 0.4, None)],
        "inspected": 12,
        "checkpoint": "/models/my model.ckpt",
        "sha256": "0" * 64,
        "versions": {"anomalib-sgfr": "0"},
    }
    return ModelFacts(**{**values, **others})


def media(seed: int, *, defect: bool = False) -> ImageMedia:
    """A square of noise with a bright disk, which is anomalous and has a mask if it is a defect."""
    rng = np.random.default_rng(seed)
    image = rng.uniform(0.3, 0.5, (64, 64, 3)).astype(np.float32)
    rows, columns = np.mgrid[:64, :64]
    disk = (rows - 20) ** 2 + (columns - 40) ** 2 < 64
    image[disk] = 0.9
    values = np.where(disk & defect, 0.9, 0.2).astype(np.float32)
    mask = outline(disk.astype(np.float32), 0.5) if defect else ""
    return ImageMedia(webp(image, 64), small_map(values), outline(values, THRESHOLD), mask, 1.0)


def explanation() -> ImageExplanation:
    patch = webp(np.full((16, 16, 3), 0.5, np.float32), 16)
    atoms = [AtomCrop(patch, 0.7, "/parts/good/00.png"), AtomCrop(None, 0.3, "/parts/gone.png")]
    return ImageExplanation([ExplanationRow(1, (0.1, 0.2, 0.3, 0.3), 8, 3.0, 1.0, patch, atoms)])


def stream(name: str = "", **others: Any) -> WatchedStream:
    """A stream of 60 images that changed after 20, as an alarm after 50 says."""
    patch = webp(np.full((16, 16, 3), 0.5, np.float32), 16)
    values = {
        "name": name,
        "images": 60,
        "evidence": [*[0.5] * 20, *[10.0 ** (0.1 * step - 1.0) for step in range(40)]],
        "limit": 200.0,
        "changed_at": 50,
        "start": 20,
        "direction": "higher",
        "basis": "40 images after the change and 20 images before the change",
        "layers": [
            LayerChange("layer1", 8, "map and score", 1.0, 1.5, 2.5),
            LayerChange("layer2", 16, "score", 2.0, 1.0, -9.25),
        ],
        "maps": ChangeMaps(patch, patch, patch, 2.0, 0.5, (0.9, 0.1)),
        "examples": [
            ChangeExample("typical after the change", f"in/{name}.png", 30, 0.6, patch, patch)
        ],
        "new_images": ["in/0 1.png", "in/2.png"],
        "notes": ["1 image is gone."],
    }
    return WatchedStream(**{**values, **others})


def contents(
    scores: Sequence[float], truths: Sequence[int | None], **others: Any
) -> ReportContents:
    """Contents for images in ``/parts/test``, all but the first ``with_media`` without media.

    The first ``trained_on`` of them were trained on, and the first ``chose`` chose the threshold.
    """
    with_media = others.pop("with_media", len(scores))
    names = others.pop("names", [f"{number:04}.png" for number in range(len(scores))])
    kinds = others.pop("kinds", [{0: "good", 1: "scratch", None: ""}[truth] for truth in truths])
    trained_on, chose = others.pop("trained_on", 0), others.pop("chose", 0)
    threshold = others.get("threshold", THRESHOLD)
    images = []
    for number, (score, truth, name, kind) in enumerate(
        zip(scores, truths, names, kinds, strict=True)
    ):
        label = None if threshold is None else int(score > threshold)
        path = f"/parts/test/{kind or 'new'}/{name}"
        shown = media(number % 7, defect=bool(truth)) if number < with_media else None
        result = ScoreRow(path, score, threshold, label, truth, 30 + number, 40)
        known = (number < trained_on, number < chose)
        images.append(ImageRow(result, kind, (0.625, 0.3), shown, *known))
    values = {
        "images": images,
        "threshold": THRESHOLD,
        "normalised": True,
        "basis": "12 good images",
        "independent_images": 12,
        "model": facts(),
        "made": "2026-01-01 12:00",
    }
    return ReportContents(**{**values, **others})


def drawn_scores(number: int, seed: int = 0) -> tuple[list[float], list[int | None]]:
    """Scores of good and defective images that overlap."""
    rng = np.random.default_rng(seed)
    truths = rng.integers(0, 2, number)
    scores = np.clip(rng.normal(0.4 + 0.2 * truths, 0.1), 0.02, 0.98).astype(np.float32)
    return scores.tolist(), truths.tolist()
