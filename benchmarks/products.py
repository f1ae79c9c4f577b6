"""Several products on one line: does the inspector tell them apart, and what does it cost?

    python -m benchmarks.products --root mvtec=DIR --root mvtec_3d=DIR --root kolektor=DIR --out DIR

A model for each product. Every test image is given to :class:`anomalib_sgfr.ProductInspector` with
the models of all products, and with all but its own. Writes ``products.json`` and ``README.md``; an
interrupted command, given again, goes on where it stopped.
"""

import argparse
import itertools
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from sklearn.metrics import roc_auc_score

from anomalib_sgfr import Inspection, Inspector
from anomalib_sgfr.inspector import choose_product
from benchmarks.common import data
from benchmarks.common.cases import (
    Case,
    add_options,
    alike,
    chosen,
    median,
    seeds,
    show_page,
    title,
)
from benchmarks.common.engine import fitted
from benchmarks.common.records import Row, read_rows, table, write_rows, write_text

__all__ = ["main", "report"]

_DATA = ("mvtec:bottle", "mvtec:grid", "mvtec_3d:tire", "kolektor")
_RESULTS = "products.json"


def _evaluate(cases: Sequence[Case]) -> list[Row]:
    """Shares of images that are told apart, and image AUROC, for each product."""
    tested = {}
    with tempfile.TemporaryDirectory() as folder:
        inspectors = {}
        for number, case in enumerate(cases):
            module = data.build(case.dataset, case.root, case.split, case.seed)
            model = fitted(module, case.seed)
            file = Path(folder) / f"{number}.ckpt"
            model.trainer.save_checkpoint(file)
            inspectors[title(case.dataset, case.split)] = Inspector.load(file)
            tested[title(case.dataset, case.split)] = module.test_data.samples
    rows = []
    for case in cases:
        own = title(case.dataset, case.split)
        together: list[Inspection] = []
        alone, unknown = [], []
        for path in tested[own]["image_path"]:
            found = {product: inspector(path) for product, inspector in inspectors.items()}
            together.append(choose_product(found))
            alone.append(found.pop(own).score)
            unknown.append(choose_product(found).product is None)
        labels = tested[own]["label_index"].to_numpy() == 1
        right = np.array([each.product == own for each in together])
        scores = [each.score for each in together]
        rows.append(
            {
                "dataset": case.dataset,
                "split": case.split,
                "seed": case.seed,
                "good_right": float(right[~labels].mean()),
                "defective_right": float(right[labels].mean()),
                "unknown": float(np.mean(unknown)),
                "own_AUROC": float(roc_auc_score(labels, alone)),
                "together_AUROC": float(roc_auc_score(labels, scores)),
            }
        )
        print(rows[-1], flush=True)
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and report; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.products", description=__doc__.splitlines()[0]
    )
    add_options(parser, _DATA, Path("benchmarks/results/products"))
    options = parser.parse_args(arguments)
    found = read_rows(options.out / _RESULTS)
    for seed, cases in itertools.groupby(chosen(parser, options), lambda case: case.seed):
        if not alike(found, seed=seed):
            found += _evaluate(list(cases))
            write_rows(options.out / _RESULTS, found)
    return show_page(report, options.out)


def report(folder: Path) -> None:
    """Write ``README.md`` from ``products.json``: medians over seeds."""
    found = read_rows(folder / _RESULTS)
    names = ["good_right", "defective_right", "unknown", "own_AUROC", "together_AUROC"]
    rows = []
    for dataset, split in dict.fromkeys((row["dataset"], row["split"]) for row in found):
        values = [100 * median(found, name, dataset=dataset, split=split) for name in names]
        rows.append([title(dataset, split), *(f"{value:.1f}" for value in values)])
    heads = [
        "product",
        "good images told",
        "defective images told",
        "unknown without its model",
        "image AUROC, its model",
        "image AUROC, all models",
    ]
    write_text(
        folder / "README.md",
        f"""\
# Several products

Percent, medians of seeds {seeds(found)}. A model for each product by default; each image of a test
set is given to all of them, and the answer is that of the model with the least median of the
anomaly map. "Told": that is the model of its product. "Unknown without its model": with the other
models alone, the image is said to be of no known product.

{table(heads, rows)}
""",
    )


if __name__ == "__main__":
    sys.exit(main())
