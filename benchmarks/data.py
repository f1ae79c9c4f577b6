"""The benchmark's data sets, by name."""

from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
from anomalib.data import AnomalibDataModule, Folder
from anomalib.data.utils import ValSplitMode
from numpy.typing import NDArray

from anomalib_sgfr.data import ELPV, MTD

__all__ = ["DATASETS", "build", "kinds"]

DATASETS = ("mtd", "elpv-mono", "elpv-poly", "elpv-both", "folder")


def build(
    dataset: str,
    root: Path | None = None,
    split: str | None = None,
    seed: int = 0,
    limit_train: int | None = None,
    num_workers: int = 2,
) -> AnomalibDataModule:
    """Build a data set, set up and ready to use.

    Args:
        dataset (str): One of :data:`DATASETS`. ``folder`` is your own: ``good`` and ``bad`` under ``root``, and where
            they exist ``good_test`` and ``masks`` (of the names in ``bad``).
        root (Path | None): Where the images are; needed by ``mtd`` and ``folder``.
        split (str | None): Split of ``mtd``. Defaults to ``canonical``.
        seed (int): Split of ``elpv-*`` and of ``folder``, and choice of the ``limit_train`` images.
        limit_train (int | None): Number of training images to use; ``None`` for all.
        num_workers (int): Worker processes that load images.

    Returns:
        AnomalibDataModule: After ``setup``.

    Raises:
        ValueError: If the name is unknown, ``root`` is missing, or there are fewer than ``limit_train`` images.
        FileNotFoundError: If the data is not there; the message says where it comes from.
    """
    module: AnomalibDataModule
    if dataset == "mtd":
        if root is None:
            msg = (
                "--root is needed for mtd: the folder of "
                "`git clone https://github.com/abin24/Magnetic-tile-defect-datasets.`"
            )
            raise ValueError(msg)
        module = MTD(root=root, split=split or "canonical", num_workers=num_workers)
    elif dataset.startswith("elpv-"):
        module = ELPV(root, cell_type=dataset.removeprefix("elpv-"), split_seed=seed, num_workers=num_workers)
    elif dataset == "folder":
        if root is None:
            msg = "--root is needed for folder: it holds the folders good and bad."
            raise ValueError(msg)
        module = Folder(
            name=root.name,
            root=root,
            normal_dir="good",
            abnormal_dir="bad",
            normal_test_dir="good_test" if (root / "good_test").is_dir() else None,
            mask_dir="masks" if (root / "masks").is_dir() else None,
            val_split_mode=ValSplitMode.SAME_AS_TEST,
            num_workers=num_workers,
            seed=seed,
        )
    else:
        msg = f"dataset must be one of {', '.join(DATASETS)}, got '{dataset}'."
        raise ValueError(msg)
    if limit_train is not None:
        _limit(module, limit_train, seed)
    module.setup()
    return module


def kinds(samples: pd.DataFrame) -> NDArray[np.str_]:
    """Kind of defect of each sample, ``"good"`` for none."""
    names = ("good" if not row.label_index else getattr(row.label, "value", row.label) for row in samples.itertuples())
    return np.array([str(name) for name in names])


def _limit(module: AnomalibDataModule, number: int, seed: int) -> None:
    """Keep ``number`` training images whenever the module is set up: a trainer sets it up once more."""
    set_up = module._setup  # noqa: SLF001

    def set_up_and_limit(stage: str | None = None) -> None:
        set_up(stage)
        samples = module.train_data.samples
        if not 1 <= number <= len(samples):
            msg = f"limit_train must lie between 1 and the {len(samples)} training images, got {number}."
            raise ValueError(msg)
        chosen = samples.sample(n=number, random_state=seed).sort_index().reset_index(drop=True)
        chosen.attrs.update(samples.attrs)
        module.train_data.samples = chosen

    cast("Any", module)._setup = set_up_and_limit  # noqa: SLF001
