"""How tight the certificate is: its bounds beside the residuals of all nominal patches, computed one by one.

    python -m benchmarks.tightness --root DIR --out DIR

Writes ``tightness.json`` and ``README.md``; an interrupted command, given again, goes on where it stopped.
"""

import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from anomalib_sgfr.bank import Bank
from benchmarks.common import features
from benchmarks.common.banks import covers
from benchmarks.common.places import DATA, Place, alike, median, seeds, study_places, title
from benchmarks.common.records import write_text

__all__ = ["main", "report"]

_SIZES = (250, 1000, 5000)
_CACHE = Path("runs/embeddings")
_ROWS = 65_536
_SCALES = (4, 8, 16, 32)  # the stride of each


@torch.no_grad()
def _evaluate(place: Place) -> list[dict[str, Any]]:
    """Bounds and residuals for banks of several sizes."""
    found = features.load(
        place.dataset, place.root, place.split, place.seed, None, "tf_efficientnet_lite0", _SCALES, (256, 256), _CACHE
    )
    rows = []
    for scale in range(len(found.strides)):
        batches = found.batches([scale], place.seed)
        for _, cover in covers(batches, _SIZES):
            bank = Bank()
            bank.set(cover)
            bound = bank.certificate()
            residual = (
                torch.cat([bank.residuals(part) for batch in batches for part in batch.split(_ROWS)]) / bank.nominal
            )
            rows.append(
                {
                    "scale": scale,
                    "atoms": len(bank.atoms),
                    "patches": len(residual),
                    "largest_bound": round(bound.largest, 5),
                    "largest": round(float(residual.max()), 5),
                    "mean_bound": round(bound.mean, 5),
                    "mean": round(float(residual.double().mean()), 5),
                }
            )
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and report; returns the exit code."""
    about = (__doc__ or "").splitlines()[0]
    return study_places("tightness", about, DATA, _evaluate, report, arguments)


def report(folder: Path) -> None:
    """Write ``README.md`` from ``tightness.json``: medians over seeds."""
    found = json.loads((folder / "tightness.json").read_text(encoding="utf-8"))
    lines = [
        "# How tight the certificate is",
        "",
        "`python -m benchmarks.tightness --root DIR`: the certificate's bounds on the residuals of all nominal",
        "patches, and those residuals computed one by one; in units of the map. Medians over seeds",
        f"{seeds(found)}.",
        "",
        "| data | stride | patches | atoms | largest: bound | measured | factor | mean: bound | measured | factor |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    names = ("dataset", "split", "scale", "atoms")
    for dataset, split, scale, atoms in dict.fromkeys(tuple(row[name] for name in names) for row in found):
        rows = alike(found, dataset=dataset, split=split, scale=scale, atoms=atoms)
        cells = []
        for name in ("largest", "mean"):
            bound, measured = median(rows, f"{name}_bound"), median(rows, name)
            factor = statistics.median(row[f"{name}_bound"] / row[name] for row in rows if row[name] > 0)
            cells += [f"{bound:.3f}", f"{measured:.3f}", f"{factor:.2f}"]
        patches = f"{median(rows, 'patches'):,.0f}"
        lines.append(
            f"| {title(dataset, split)} | {_SCALES[scale]} | {patches} | {atoms:,} | " + " | ".join(cells) + " |"
        )
    write_text(folder / "README.md", "\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.exit(main())
