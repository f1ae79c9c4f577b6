"""Fit and test on small images in one or two processes: ``python two_processes.py PARTS OUT
DEVICES``.
"""

import sys
from pathlib import Path

import torch
from anomalib.engine import Engine
from anomalib.metrics import AUROC, Evaluator, create_anomalib_metric
from torchmetrics import SumMetric

from anomalib_sgfr import Sgfr
from tests.conftest import folder_datamodule


def main(parts: Path, out: Path, devices: int) -> None:
    """Leave what each process ended with in ``out``."""
    # of 11 test images two processes have six each: one is there twice, in a batch of its own
    datamodule = folder_datamodule(parts, train_batch_size=2, eval_batch_size=5)
    defects = create_anomalib_metric(SumMetric)(fields=["gt_label"], prefix="defects_")
    model = Sgfr(
        bank_size=120,
        seed=0,
        visualizer=False,
        evaluator=Evaluator(
            test_metrics=[AUROC(fields=["pred_score", "gt_label"], prefix="image_"), defects]
        ),
        image_size=64,
        tile_size=32,
        roi=str(parts / "roi.png"),
    )
    engine = Engine(
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        default_root_dir=out,
    )
    engine.fit(model, datamodule=datamodule)
    (metrics,) = engine.test(model, datamodule=datamodule)
    certificate = model.certificate()
    torch.save(
        {
            "banks": [bank.atoms for bank in model.model.banks],
            "nominal": [float(bank.residual_scale) for bank in model.model.banks],
            "patches": certificate.patches,
            "largest": certificate.largest,
            "mean": certificate.mean,
            "image_AUROC": float(metrics["image_AUROC"]),
            "defects": float(metrics["defects_SumMetric"]),
            "threshold": float(model.post_processor.image_threshold),
            "scored": len(model.post_processor.calibration_scores.scores),
            "checkpoint": str(engine.best_model_path),
        },
        out / f"rank{engine.trainer.global_rank}.pt",
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
