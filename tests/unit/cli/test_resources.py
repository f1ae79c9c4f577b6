"""What is left of memory and processors, in made copies of what the system tells."""

import os
from pathlib import Path

import pytest

from anomalib_sgfr.cli.environment import Memory, memory, processors

GIB = 2**30
MEMINFO = (
    f"MemTotal:       {16 * 2**20} kB\nMemFree: 1 kB\nMemAvailable:   {8 * 2**20}"
    " kB\nHugePages_Total:       0\n"
)


def told(root: Path, group: str, files: dict[str, object]) -> Path:
    for name, text in {"proc/meminfo": MEMINFO, "proc/self/cgroup": group, **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(str(text), encoding="utf-8")
    return root


def two(folder: str, limit: object, used: int, files: int = 0) -> dict[str, object]:
    float64_device = f"sys/fs/cgroup/{folder}"
    return {
        f"{float64_device}/memory.max": limit,
        f"{float64_device}/memory.current": used,
        f"{float64_device}/memory.stat": f"anon 5\ninactive_file {files}\n",
    }


def one(folder: str, limit: int, used: int, files: int) -> dict[str, object]:
    float64_device = f"sys/fs/cgroup/memory/{folder}"
    return {
        f"{float64_device}/memory.limit_in_bytes": limit,
        f"{float64_device}/memory.usage_in_bytes": used,
        f"{float64_device}/memory.stat": f"total_inactive_file {files}\n",
    }


MACHINE = Memory(8 * GIB, 16 * GIB, limited=False)


@pytest.mark.parametrize(
    ("group", "files", "found"),
    [
        ("0::/a/b\n", two("a/b", "max", GIB), MACHINE),
        ("0::/a/b\n", two("a/b", 4 * GIB, 3 * GIB, GIB), Memory(2 * GIB, 4 * GIB, limited=True)),
        (
            "0::/a/b\n",
            {**two("a/b", "max", 0), **two("a", 3 * GIB, GIB)},
            Memory(2 * GIB, 3 * GIB, limited=True),
        ),
        ("0::/../elsewhere\n", two("", 2 * GIB, GIB), Memory(GIB, 2 * GIB, limited=True)),
        (
            "0::/a\n",
            two("a", 12 * GIB, GIB),
            MACHINE,
        ),  # the machine has less than the container may have
        ("0::/a\n", two("a", GIB, 2 * GIB), Memory(0, GIB, limited=True)),
        (
            "4:memory:/a\n0::/\n",
            one("a", 4 * GIB, 3 * GIB, 2 * GIB),
            Memory(3 * GIB, 4 * GIB, limited=True),
        ),
        ("4:memory:/a\n0::/\n", one("a", 9223372036854771712, 3 * GIB, 0), MACHINE),
        ("3:cpu:/a\n", one("a", GIB, 0, 0), MACHINE),
        ("", {}, MACHINE),
    ],
)
def test_memory_is_the_machines_or_the_containers(
    group: str, files: dict[str, object], found: Memory, tmp_path: Path
) -> None:
    assert memory(told(tmp_path, group, files)) == found


def test_memory_that_is_not_told(tmp_path: Path) -> None:
    assert memory(tmp_path) is None


def test_memory_of_this_machine_is_within_its_total() -> None:
    found = memory()
    assert found is None or 0 < found.available <= found.total


@pytest.mark.parametrize(
    ("group", "files", "found"),
    [
        ("0::/a\n", {"a/cpu.max": "150000 100000\n"}, 1.5),
        ("0::/a\n", {"a/cpu.max": "max 100000\n", "cpu.max": "50000 100000\n"}, 0.5),
        ("0::/a\n", {"a/cpu.max": "max 100000\n"}, 4.0),
        ("0::/a\n", {"a/cpu.max": "800000 100000\n"}, 4.0),
        (
            "2:cpu,cpuacct:/a\n",
            {"cpu/a/cpu.cfs_quota_us": "200000\n", "cpu/a/cpu.cfs_period_us": "100000\n"},
            2.0,
        ),
        (
            "2:cpu,cpuacct:/a\n",
            {"cpu/a/cpu.cfs_quota_us": "-1\n", "cpu/a/cpu.cfs_period_us": "100000\n"},
            4.0,
        ),
        ("", {}, 4.0),
    ],
)
def test_processors_are_those_that_may_be_kept_busy(
    group: str,
    files: dict[str, object],
    found: float,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 5}, raising=False)
    root = told(tmp_path, group, {f"sys/fs/cgroup/{name}": text for name, text in files.items()})
    assert processors(root) == found
