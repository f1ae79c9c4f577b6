"""What a fit took and learnt from, small enough to keep in its checkpoint."""

import platform
import resource
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:  # the checks of an installation need no PyTorch
    import torch

__all__ = ["FitRecord", "installed", "versions"]

_PACKAGES = ("anomalib-sgfr", "anomalib", "torch", "timm")
_FOLDERS = 50  # the fullest, kept by name


class FitRecord(NamedTuple):
    """How a fit went.

    Attributes:
        seconds (float): From its start to the bank in use, calibration by training images included.
        memory (int): Most that the process had held of the machine's memory, in bytes; ``0`` if
            that is not known.
        card_memory (int): Most that it had held of a card's, in bytes; ``0`` without one.
        device (str): What it ran on.
        images (int): Training images.
        folders (dict[str, int]): Folders of the training images, and how many there were of each.
        versions (dict[str, str]): Of Python and of the packages that scores depend on.
    """

    seconds: float
    memory: int
    card_memory: int
    device: str
    images: int
    folders: dict[str, int]
    versions: dict[str, str]

    @classmethod
    def of(cls, seconds: float, device: "torch.device", images: Sequence[str]) -> "FitRecord":
        """Note what a fit that ends now took.

        Args:
            seconds (float): Since its start.
            device (torch.device): What it ran on.
            images (Sequence[str]): Paths of the training images.
        """
        import torch

        on_card = device.type == "cuda"
        folders = Counter(str(PurePath(path).parent) for path in images)
        return cls(
            seconds=seconds,
            memory=_peak_memory(),
            card_memory=torch.cuda.max_memory_allocated(device) if on_card else 0,
            device=torch.cuda.get_device_name(device)
            if on_card
            else platform.machine() or device.type,
            images=len(images),
            folders=dict(folders.most_common(_FOLDERS)),
            versions=versions(),
        )

    @classmethod
    def restored(cls, stored: Any) -> "FitRecord | None":  # noqa: ANN401
        """Record from what :meth:`plain` gave; ``None`` if that is of an earlier version."""
        if not isinstance(stored, Mapping) or not set(cls._fields) <= set(stored):
            return None
        return cls(**{name: stored[name] for name in cls._fields})

    def plain(self) -> dict[str, Any]:
        """Plain data, to store."""
        return self._asdict()


def versions() -> dict[str, str]:
    """Of Python and of the packages that scores depend on."""
    packages = {name: installed(name) or "not installed" for name in _PACKAGES}
    return {"python": platform.python_version(), **packages}


def installed(name: str) -> str | None:
    """Version of an installed distribution, or ``None`` if there is none."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _peak_memory() -> int:
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else 1024 * used
