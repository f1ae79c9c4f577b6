"""Matplotlib without a screen, and figures written whole or not at all."""

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt

__all__ = ["plt", "save_figure"]


def save_figure(figure: Any, path: Path) -> None:  # noqa: ANN401
    """Write a figure whole or not at all, and close it."""
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, dpi=110, bbox_inches="tight", format="png")
    plt.close(figure)
    temporary.replace(path)
