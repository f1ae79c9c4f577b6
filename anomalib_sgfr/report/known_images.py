"""Images of a run that a checkpoint knows: by path, by content, or in a folder that was moved."""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from anomalib_sgfr.post_processing.calibration import real_path

__all__ = ["known_images"]

_NAMES = 2  # folder names that have to agree where a folder was moved


def known_images(files: Sequence[str], known: Iterable[str]) -> tuple[list[bool], int]:
    """Tell which images a checkpoint knows.

    An image is known in three cases: its path leads to a known file, also through links; it has
    the content of a known file; or the known file is gone, but its folder and its name are found
    where the image is. A moved folder is recognised by its own name and that of its parent, and
    only if it holds all known images: ``bottle/test/good`` is not taken for a moved
    ``bottle/train/good``.

    Args:
        files (Sequence[str]): Paths of images; empty where unknown.
        known (Iterable[str]): Paths of images that the checkpoint names.

    Returns:
        tuple[list[bool], int]: Whether each of ``files`` is known, and how many of them are known
        by their names alone.
    """
    real = [real_path(path) for path in files]
    paths = {real_path(path) for path in known if path}
    present = {path for path in paths if Path(path).is_file()}
    moved = _moved(paths - present, {str(Path(path).parent) for path in real if path})
    copies = _copies([path for path in real if path and path not in present], present)
    found = [path in present or path in copies for path in real]
    by_name = [path in moved and not is_known for path, is_known in zip(real, found, strict=True)]
    return [one or other for one, other in zip(found, by_name, strict=True)], sum(by_name)


def _copies(files: Iterable[str], known: Iterable[str]) -> set[str]:
    """Files with the content of a known file; only files of equal size are read."""
    by_size = defaultdict(list)
    for path in known:
        by_size[_size(path)].append(path)
    hashes: dict[int, set[bytes]] = {}
    found = set()
    for path in files:
        size = _size(path)
        if size < 0 or size not in by_size:
            continue
        if size not in hashes:
            hashes[size] = {_sha256(other) for other in by_size[size]}
        if _sha256(path) in hashes[size]:
            found.add(path)
    return found


def _size(path: str) -> int:
    """Size in bytes; -1 without a file."""
    try:
        return Path(path).stat().st_size
    except OSError:
        return -1


def _sha256(path: str) -> bytes:
    """Hash of a file's content; of its path if it cannot be read, so that it equals no other."""
    try:
        with Path(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError:
        return path.encode(errors="surrogateescape")


def _moved(gone: Iterable[str], folders: Iterable[str]) -> set[str]:
    """New paths of files that are gone, if their folder is in or beside one of ``folders``."""
    names: dict[Path, set[str]] = defaultdict(set)
    for path in map(Path, gone):
        names[path.parent].add(path.name)
    bases = sorted(
        {part for folder in folders for part in (Path(folder), *Path(folder).parents)}, reverse=True
    )
    found = set()
    for folder, files in names.items():
        parts = folder.parts[1:]
        longest_first = (
            base.joinpath(*parts[start:])
            for start in range(len(parts) - _NAMES + 1)
            for base in bases
        )
        new = next((candidate for candidate in longest_first if candidate.is_dir()), None)
        if new is not None and all((new / name).is_file() for name in files):
            found |= {str(new / name) for name in files}
    return found
