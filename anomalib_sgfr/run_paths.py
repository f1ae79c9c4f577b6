"""Paths of runs and of their results: checkpoints, the link ``latest``, folders, atomic writes.

It imports the standard library only: the command line needs it before PyTorch is loaded.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path, PurePath

__all__ = [
    "EXPORTED",
    "LATEST",
    "atomic_write",
    "complete_checkpoint",
    "make_results_folder",
    "names_of",
    "newest_complete_run",
    "no_checkpoint",
    "restore_latest",
    "results_base",
    "run_of_checkpoint",
    "set_latest",
]

EXPORTED = {".bin", ".onnx", ".pt", ".xml"}  # endings of files that an export writes
LATEST = "latest"
_ABOUT = "about.json"
_CHECKPOINT = PurePath("weights", "lightning", "model.ckpt")


@contextmanager
def atomic_write(file: Path) -> Iterator[Path]:
    """Write a file whole or not at all.

    Args:
        file (Path): The file; its folder is made.

    Yields:
        Path: A temporary file beside it. It replaces ``file`` when the block has ended without an
            error.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.name}.part")
    try:
        yield part
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)


def no_checkpoint(path: Path | str, error: BaseException | None = None) -> str:
    """Message that a file is not a checkpoint, and of an exported file what to pass in its place.

    Args:
        path (Path | str): The file.
        error (BaseException | None): What reading it has raised.
    """
    what = f"'{path}' is not a checkpoint that `anomalib fit --model Sgfr` saved"
    if Path(path).suffix in EXPORTED:
        return f"{what}: it is an exported file. Pass the checkpoint (.ckpt) that it was made from."
    return f"{what} ({type(error).__name__})." if error else f"{what}."


def _checkpoint_in(run: Path) -> Path | None:
    """Checkpoint of a run: ``weights/lightning/model.ckpt``, else another file in that folder."""
    usual = run / _CHECKPOINT
    return usual if usual.is_file() else min(usual.parent.glob("*.ckpt"), default=None)


def run_of_checkpoint(checkpoint: Path | str | None) -> Path | None:
    """Folder of the run that saved a checkpoint.

    Args:
        checkpoint (Path | str | None): The file.

    Returns:
        Path | None: ``None`` if the file does not lie where anomalib saves it.
    """
    if not checkpoint:
        return None
    parents = Path(checkpoint).resolve().parents
    usual = len(parents) > 2 and (parents[1].name, parents[0].name) == _CHECKPOINT.parts[:2]  # noqa: PLR2004
    return parents[2] if usual else None


def newest_complete_run(root: Path) -> Path | None:
    """The run of the highest version number that has a checkpoint.

    Args:
        root (Path): Folder of the runs, ``<root>/Sgfr/<data>``.

    Returns:
        Path | None: Folder of the run; ``None`` if no run has a checkpoint.
    """
    numbered = ((re.fullmatch(r"v(\d+)", path.name), path) for path in root.glob("v*"))
    runs = sorted(((int(found[1]), path) for found, path in numbered if found), reverse=True)
    return next((run for _, run in runs if _checkpoint_in(run)), None)


def set_latest(run: Path) -> None:
    """Point the link ``latest`` beside a run to that run, atomically.

    Nothing is done where ``latest`` is not a link.

    Args:
        run (Path): Folder of the run, ``v0``, ``v1`` ...
    """
    link = run.parent / LATEST
    if not link.is_symlink():
        return
    part = link.with_name(f".{LATEST}-{os.getpid()}")
    part.unlink(missing_ok=True)
    part.symlink_to(run.resolve(), target_is_directory=True)
    part.replace(link)


def restore_latest(run: Path) -> None:
    """Point ``latest`` to the newest complete run, if it names a run without a checkpoint.

    Args:
        run (Path): Folder of a run that has not ended.
    """
    link = run.parent / LATEST
    complete = newest_complete_run(run.parent)
    if complete is not None and link.is_symlink() and _checkpoint_in(link) is None:
        set_latest(complete)


def complete_checkpoint(path: Path) -> Path | None:
    """Replacement for a checkpoint that is missing because ``latest`` names an incomplete run.

    Args:
        path (Path): ``.../latest/weights/lightning/model.ckpt``, or any other path.

    Returns:
        Path | None: The same file of the newest complete run; ``None`` if ``path`` exists, does not
            contain ``latest``, or has no replacement.
    """
    if path.exists() or LATEST not in path.parts:
        return None
    index = len(path.parts) - 1 - path.parts[::-1].index(LATEST)
    run = newest_complete_run(Path(*path.parts[:index]))
    found = run and run.joinpath(*path.parts[index + 1 :])
    return found if found and found.exists() else None


def results_base(root: Path, checkpoint: Path | str | None, model: str = "Sgfr") -> Path:
    """Folder below which predictions and tests of a checkpoint get their own folders.

    Args:
        root (Path): Root folder of the trainer, ``<results>/Sgfr[/<data>]/v0``; ``.../latest``
            where anomalib found no run.
        checkpoint (Path | str | None): The checkpoint that the model comes from.
        model (str): anomalib's name of the model.

    Returns:
        Path: The run of the checkpoint if it lies in the same results; else ``root``, or its parent
            where ``root`` would be a folder in the place of the link ``latest``.
    """
    run = run_of_checkpoint(checkpoint)
    root = root.absolute()
    top = next((part for part in (root, *root.parents) if part.name == model), None)
    if run is not None and top is not None and run.is_relative_to(top.resolve()):
        return run
    return root.parent if root.name == LATEST and not root.is_symlink() else root


def make_results_folder(wanted: Path, about: Mapping[str, object]) -> Path:
    """Make a folder for the results of one input; the same input gets the same folder again.

    Args:
        wanted (Path): The folder. If it holds results of other input, a number is added: ``-2``,
            ``-3`` ...
        about (Mapping[str, object]): Description of the input, to be stored as JSON beside the
            results.

    Returns:
        Path: The folder.

    Raises:
        OSError: If the folder cannot be made.
    """
    number = 1
    while True:
        folder = wanted if number == 1 else wanted.with_name(f"{wanted.name}-{number}")
        file = folder / _ABOUT
        number += 1
        if folder.exists() and not folder.is_dir():
            continue
        try:
            if json.loads(file.read_text(encoding="utf-8")) == dict(about):
                return folder
        except FileNotFoundError:
            if not folder.is_dir() or not any(folder.iterdir()):
                folder.mkdir(parents=True, exist_ok=True)
                # if another process made the file first, read what it wrote
                with suppress(FileExistsError), file.open("x", encoding="utf-8") as text:
                    json.dump(dict(about), text, indent=1)
                    return folder
                number -= 1
        except ValueError:  # not JSON: somebody else's file
            continue


def names_of(paths: Iterable[str], *, keep_suffix: bool = False) -> dict[str, Path]:
    """Unique names for the results of images: their paths below their common folder.

    Args:
        paths (Iterable[str]): Image files.
        keep_suffix (bool): Whether names keep the files' suffixes. Otherwise a suffix is kept only
            where two images differ in nothing else.

    Returns:
        dict[str, Path]: Relative paths, by image file.
    """
    absolute = {path: Path(path).absolute() for path in paths}
    if not absolute:
        return {}
    common = Path(os.path.commonpath([path.parent for path in absolute.values()]))
    relative = {path: where.relative_to(common) for path, where in absolute.items()}
    counts = Counter(name.with_suffix("") for name in set(relative.values()))
    return {
        path: name if keep_suffix or counts[name.with_suffix("")] > 1 else name.with_suffix("")
        for path, name in relative.items()
    }
