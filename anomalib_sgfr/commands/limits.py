"""What memory and processors are left to this process: of the machine, or of the container it runs in."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

__all__ = ["Memory", "memory", "processors"]

_ROOT = Path("/")
# limit, use, and what of the use is files that can be dropped: of control groups of version 2 and 1
_MEMORY_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


class Memory(NamedTuple):
    """Memory, in bytes.

    Attributes:
        available (int): What a process can still have, files that can be dropped included.
        total (int): Of the machine, or the limit of the container.
        limited (bool): Whether a container's limit is what counts.
    """

    available: int
    total: int
    limited: bool


def memory(root: Path = _ROOT) -> Memory | None:
    """What is left of the machine's memory, or of its control group's, whichever is less.

    Args:
        root (Path): Where ``proc`` and ``sys`` are.

    Returns:
        Memory | None: ``None`` where the system does not tell.
    """
    told = _table(root / "proc/meminfo")
    if not {"MemAvailable", "MemTotal"} <= set(told):
        return None
    found = Memory(1024 * told["MemAvailable"], 1024 * told["MemTotal"], limited=False)
    for folder in _groups(root, "memory"):
        for names, in_use, droppable in _MEMORY_FILES:
            limit = _number(folder / names)
            if limit is None or limit >= 1024 * told["MemTotal"]:  # version 1 says "none" by a number beyond all
                continue
            used = (_number(folder / in_use) or 0) - _table(folder / "memory.stat").get(droppable, 0)
            left = max(limit - max(used, 0), 0)
            if left < found.available:
                found = Memory(left, limit, limited=True)
    return found


def processors(root: Path = _ROOT) -> float:
    """How many processors this process may keep busy, by its affinity and its control group's quota.

    Args:
        root (Path): Where ``proc`` and ``sys`` are.
    """
    affinity = getattr(os, "sched_getaffinity", None)
    found = float(len(affinity(0)) if affinity else os.cpu_count() or 1)
    for folder in _groups(root, "cpu"):
        quota, period = [*_text(folder / "cpu.max").split(), "", ""][:2]
        if not quota:
            quota, period = _text(folder / "cpu.cfs_quota_us").strip(), _text(folder / "cpu.cfs_period_us").strip()
        if quota.isdecimal() and period.isdecimal() and int(period):  # neither "max" nor -1
            found = min(found, int(quota) / int(period))
    return found


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """Folders of the control group that this process is in, and of those above it: each may have a limit."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, names, path = [*line.split(":", 2), "", ""][:3]
        if names and controller not in names.split(","):
            continue
        home = root / "sys/fs/cgroup" / (controller if names else "")
        inner = home / path.lstrip("/")
        yield from (folder for folder in (inner, *inner.parents) if folder == home or home in folder.parents)


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError:
        return ""


def _number(file: Path) -> int | None:
    text = _text(file).strip()
    return int(text) if text.isdecimal() else None


def _table(file: Path) -> dict[str, int]:
    """Lines of a name and a number."""
    rows = (line.replace(":", " ").split() for line in _text(file).splitlines())
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdecimal()}
