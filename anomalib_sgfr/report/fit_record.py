"""Record of a fit for its checkpoint: time, memory, device, training folders, versions."""

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
_FOLDERS = 50  # most folders to keep, those with the most images


class FitRecord(NamedTuple):
    """Record of a fit.

    Attributes:
        seconds (float): Duration, including calibration by training images.
        memory (int): Peak main memory of the process, in bytes; ``0`` if unknown.
        card_memory (int): Peak memory on the GPU, in bytes; ``0`` without one.
        device (str): Name of the GPU or architecture of the processor.
        images (int): Number of training images.
        folders (dict[str, int]): Number of training images by folder.
        versions (dict[str, str]): Versions of Python and of the packages that scores depend on.
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
        """Record of a fit that ends now.

        Args:
            seconds (float): Duration of the fit.
            device (torch.device): Device of the fit.
            images (Sequence[str]): Paths of the training images.

        Returns:
            FitRecord: The record.
        """
        import torch

        on_gpu = device.type == "cuda"
        folders = Counter(str(PurePath(path).parent) for path in images)
        return cls(
            seconds=seconds,
            memory=_peak_memory(),
            card_memory=torch.cuda.max_memory_allocated(device) if on_gpu else 0,
            device=torch.cuda.get_device_name(device)
            if on_gpu
            else platform.machine() or device.type,
            images=len(images),
            folders=dict(folders.most_common(_FOLDERS)),
            versions=versions(),
        )

    @classmethod
    def restored(cls, stored: Any) -> "FitRecord | None":  # noqa: ANN401
        """Record from the dictionary of its fields; ``None`` if fields are missing."""
        if not isinstance(stored, Mapping) or not set(cls._fields) <= set(stored):
            return None
        return cls(**{name: stored[name] for name in cls._fields})


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that scores depend on."""
    packages = {name: installed(name) or "not installed" for name in _PACKAGES}
    return {"python": platform.python_version(), **packages}


def installed(name: str) -> str | None:
    """Version of an installed distribution; ``None`` if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _peak_memory() -> int:
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else 1024 * used
