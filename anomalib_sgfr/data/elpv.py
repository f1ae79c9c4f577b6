"""ELPV: electroluminescence photographs of solar cells.

2,624 grey images of 300 x 300 pixels, each with a defect probability (0, 1/3, 2/3 or 1) and a cell
type; no masks. Buerhop-Lutz et al., "A Benchmark for Visual Identification of Defective Solar Cells
in Electroluminescence Imagery" (EU PVSEC 2018). The images are licensed CC BY-NC-SA 4.0, and come
with the PyPI package ``elpv-dataset``.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pandas as pd
from anomalib.data import AnomalibDataset
from anomalib.data.utils import Split
from torchvision.transforms.v2 import Transform

from anomalib_sgfr.data.datamodule import SplitDataModule

__all__ = ["ELPV", "ELPVDataset"]

CELL_TYPES = ("mono", "poly", "both")


class ELPVDataset(AnomalibDataset):
    """One split of ELPV.

    Args:
        root (Path | str | None): Folder that holds ``labels.csv`` and ``images``; ``None`` for the
            installed package.
        cell_type (str): ``"mono"``, ``"poly"`` or ``"both"``. Defaults to ``"mono"``.
        threshold (float): See :class:`ELPV`.
        test_ratio (float): See :class:`ELPV`.
        split_seed (int): See :class:`ELPV`.
        split (str | Split | None): ``"train"``, ``"test"``, or ``None`` for both.
        augmentations (Transform | None): Augmentations to apply to the images.

    Raises:
        ValueError: If an argument is out of range.
        FileNotFoundError: If there is no data at ``root``, or the package is not installed.
    """

    def __init__(
        self,
        root: Path | str | None = None,
        cell_type: str = "mono",
        threshold: float = 1.0,
        test_ratio: float = 0.2,
        split_seed: int = 0,
        split: str | Split | None = None,
        augmentations: Transform | None = None,
    ) -> None:
        super().__init__(augmentations=augmentations)
        self.category = cell_type
        self.split = split
        self.samples = make_elpv_samples(root, cell_type, threshold, test_ratio, split_seed, split)


def make_elpv_samples(
    root: Path | str | None,
    cell_type: str,
    threshold: float,
    test_ratio: float,
    split_seed: int,
    split: str | Split | None = None,
) -> pd.DataFrame:
    """List the images of a split with their labels; arguments as for :class:`ELPVDataset`.

    Returns:
        pd.DataFrame: Columns ``image_path``, ``label`` (``"good"`` or ``"defect"``),
        ``label_index``, ``probability``, ``mask_path`` (empty) and ``split``.
    """
    if cell_type not in CELL_TYPES:
        msg = f"cell_type must be one of {', '.join(CELL_TYPES)}, got '{cell_type}'."
        raise ValueError(msg)
    if not 0.0 < threshold <= 1.0:
        msg = f"threshold must be a defect probability above 0 and at most 1, got {threshold}."
        raise ValueError(msg)
    if not 0.0 < test_ratio < 1.0:
        msg = f"test_ratio must lie between 0 and 1, got {test_ratio}."
        raise ValueError(msg)
    root = _installed_root() if root is None else Path(root)
    table = root / "labels.csv"
    if not table.is_file():
        msg = (
            f"no ELPV data at root '{root}' (labels.csv is missing). Leave root out and `pip"
            " install elpv-dataset`."
        )
        raise FileNotFoundError(msg)

    samples = pd.read_csv(table, sep=r"\s+", header=None, names=["file", "probability", "type"])
    if cell_type != "both":
        samples = samples[samples["type"] == cell_type]
    normal = samples["probability"] == 0
    # the table rounds thirds; cells between normal and the threshold are neither
    defect = samples["probability"] >= threshold - 1e-6
    samples = samples[normal | defect].copy()
    samples["label_index"] = (samples["probability"] > 0).astype(int)  # as anomalib's LabelName
    samples["label"] = samples["label_index"].map({0: "good", 1: "defect"})
    samples["image_path"] = [str(root / file) for file in samples["file"]]
    samples["mask_path"] = ""
    good = samples["label_index"] == 0
    held_out = samples[good].sample(frac=test_ratio, random_state=split_seed).index
    samples["split"] = Split.TRAIN.value
    samples.loc[~good, "split"] = Split.TEST.value
    samples.loc[held_out, "split"] = Split.TEST.value
    if split is not None:
        samples = samples[samples["split"] == Split(split).value]
    samples = samples.drop(columns=["file", "type"]).reset_index(drop=True)
    samples.attrs["task"] = "classification"
    return samples


def _installed_root() -> Path:
    spec = find_spec("elpv_dataset")
    if spec is None or spec.origin is None:
        msg = (
            "the ELPV images are not installed: `pip install elpv-dataset` (licence CC BY-NC-SA"
            " 4.0), or pass root."
        )
        raise FileNotFoundError(msg)
    return Path(spec.origin).parent / "data"


class ELPV(SplitDataModule):
    """Electroluminescence photographs of solar cells (CC BY-NC-SA 4.0), from ``elpv-dataset``.

    Cells of defect probability 0 are normal, cells of at least ``threshold`` anomalous, those
    between are left out. A seeded part of the normal cells is held out for testing, with all
    anomalous ones.

    Args:
        root (Path | str | None): Folder that holds ``labels.csv`` and ``images``; ``None`` for the
            installed package. Defaults to ``None``.
        cell_type (str): ``"mono"`` for monocrystalline cells, ``"poly"`` for polycrystalline ones,
            or ``"both"``. Defaults to ``"mono"``.
        threshold (float): Least defect probability of an anomalous cell. Defaults to ``1.0``.
        test_ratio (float): Part of the normal cells that is held out for testing. Defaults to
            ``0.2``.
        split_seed (int): Seed of the choice of those cells. Defaults to ``0``.
        **arguments (Any): As for :class:`~anomalib_sgfr.data.datamodule.SplitDataModule`.
    """

    def __init__(
        self,
        root: Path | str | None = None,
        cell_type: str = "mono",
        threshold: float = 1.0,
        test_ratio: float = 0.2,
        split_seed: int = 0,
        **arguments: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(**arguments)
        self.root = root
        self.cell_type = cell_type
        self.threshold = threshold
        self.test_ratio = test_ratio
        self.split_seed = split_seed
        self.category = cell_type

    def part(self, split: Split) -> ELPVDataset:
        """The cells for training, or those for testing."""
        return ELPVDataset(
            self.root, self.cell_type, self.threshold, self.test_ratio, self.split_seed, split
        )
