"""Whether image files are ones that a checkpoint knows: by whatever path, as copies, or in a folder that was moved."""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from anomalib_sgfr.inspection.evidence import file_of

__all__ = ["known_among"]

_NAMES = 2  # of folders that have to agree where a folder was moved


def known_among(files: Sequence[str], known: Iterable[str]) -> tuple[list[bool], int]:
    """Tell which images are known ones.

    An image is known if its path leads to a known file, through links too; if it has the content of one; or if the
    known file is gone, its folder is found again where the image lies, and the name is the same. A gone folder is found
    again in a folder of the same name, and of the same name of the folder above, that holds all images known of it: so
    ``bottle/test/good`` is not taken for a ``bottle/train/good`` that was moved.

    Args:
        files (Sequence[str]): Images; empty where the file is not known.
        known (Iterable[str]): Images that a checkpoint names.

    Returns:
        tuple[list[bool], int]: One for each of ``files``; and how many of them are known by their names alone.
    """
    real = [file_of(path) for path in files]
    paths = {file_of(path) for path in known if path}
    there = {path for path in paths if Path(path).is_file()}
    moved = _moved(paths - there, {str(Path(path).parent) for path in real if path})
    copies = _copies([path for path in real if path and path not in there], there)
    found = [path in there or path in copies for path in real]
    by_name = [path in moved and not its for path, its in zip(real, found, strict=True)]
    return [one or other for one, other in zip(found, by_name, strict=True)], sum(by_name)


def _copies(files: Iterable[str], known: Iterable[str]) -> set[str]:
    """Files with the content of a known one; only files of equal size are read."""
    by_size = defaultdict(list)
    for path in known:
        by_size[_size(path)].append(path)
    digests: dict[int, set[bytes]] = {}
    found = set()
    for path in files:
        size = _size(path)
        if size not in by_size or size < 0:
            continue
        if size not in digests:
            digests[size] = {_digest(other) for other in by_size[size]}
        if _digest(path) in digests[size]:
            found.add(path)
    return found


def _size(path: str) -> int:
    """In bytes; -1 of what is no file."""
    try:
        return Path(path).stat().st_size
    except OSError:
        return -1


def _digest(path: str) -> bytes:
    try:
        with Path(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError:  # like no other
        return path.encode(errors="surrogateescape")


def _moved(gone: Iterable[str], folders: Iterable[str]) -> set[str]:
    """Where files that are gone lie now, if their folder lies in or beside one of the folders given."""
    names: dict[Path, set[str]] = defaultdict(set)
    for path in map(Path, gone):
        names[path.parent].add(path.name)
    around = sorted({part for folder in folders for part in (Path(folder), *Path(folder).parents)}, reverse=True)
    found = set()
    for folder, its in names.items():
        parts = folder.parts[1:]
        longest_first = (base.joinpath(*parts[start:]) for start in range(len(parts) - _NAMES + 1) for base in around)
        place = next((place for place in longest_first if place.is_dir()), None)
        if place is not None and all((place / name).is_file() for name in its):
            found |= {str(place / name) for name in its}
    return found
