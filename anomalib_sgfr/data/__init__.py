"""Datamodules of data sets that anomalib lacks."""

from anomalib_sgfr.data.elpv import ELPV, ELPVDataset
from anomalib_sgfr.data.mtd import MTD, MTDDataset

__all__ = ["ELPV", "MTD", "ELPVDataset", "MTDDataset"]
