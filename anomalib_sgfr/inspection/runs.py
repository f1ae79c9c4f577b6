"""Folders of runs: which one ``latest`` names, and where the results of a checkpoint go.

anomalib makes ``<root>/Sgfr/<data>/v0``, ``v1`` ... and a link ``latest`` to the newest. Needs no other package.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path, PurePath

__all__ = [
    "LATEST",
    "checkpoint_in",
    "claim_folder",
    "give_back_latest",
    "names_of",
    "newest_whole_run",
    "point_latest",
    "results_base",
    "run_of",
    "whole_checkpoint",
]

LATEST = "latest"
_ABOUT = "about.json"
_CHECKPOINT = PurePath("weights", "lightning", "model.ckpt")


def checkpoint_in(run: Path) -> Path | None:
    """Checkpoint of a run: ``weights/lightning/model.ckpt``, or another in that folder.

    Args:
        run (Path): Folder of the run.

    Returns:
        Path | None: The file; ``None`` if there is none.
    """
    usual = run / _CHECKPOINT
    if usual.is_file():
        return usual
    return min(usual.parent.glob("*.ckpt"), default=None)


def _version(run: Path) -> int:
    found = re.fullmatch(r"v(\d+)", run.name)
    return int(found[1]) if found else -1


def newest_whole_run(root: Path) -> Path | None:
    """Newest run that ended: the one of the highest number that has a checkpoint.

    Args:
        root (Path): Folder of the runs, ``<root>/Sgfr/<data>``.
    """
    runs = sorted((path for path in root.glob("v*") if _version(path) >= 0), key=_version, reverse=True)
    return next((run for run in runs if checkpoint_in(run)), None)


def point_latest(run: Path) -> None:
    """Point the link ``latest`` beside a run to it, in one step. Does nothing where ``latest`` is no link.

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


def give_back_latest(run: Path) -> Path | None:
    """Point ``latest`` to the newest whole run, if it names a run without a checkpoint.

    Args:
        run (Path): Folder of a run that has not ended.

    Returns:
        Path | None: The run that ``latest`` names now; ``None`` if nothing was changed.
    """
    link = run.parent / LATEST
    whole = newest_whole_run(run.parent)
    if whole is None or not link.is_symlink() or checkpoint_in(link) is not None:
        return None
    point_latest(whole)
    return whole


def whole_checkpoint(path: Path) -> Path | None:
    """Checkpoint to use in place of one that is missing because ``latest`` names a run that did not end.

    Args:
        path (Path): ``.../latest/weights/lightning/model.ckpt``, or what else was asked for.

    Returns:
        Path | None: That of the newest whole run; ``None`` if the file is there, or no other can be meant.
    """
    if path.exists() or LATEST not in path.parts:
        return None
    place = len(path.parts) - 1 - path.parts[::-1].index(LATEST)
    run = newest_whole_run(Path(*path.parts[:place]))
    found = run and run.joinpath(*path.parts[place + 1 :])
    return found if found and found.exists() else None


def run_of(checkpoint: Path | str | None) -> Path | None:
    """Folder of the run that a checkpoint was saved by.

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


def results_base(root: Path, checkpoint: Path | str | None, model: str = "Sgfr") -> Path:
    """Folder that predictions and tests of a checkpoint get folders in.

    Args:
        root (Path): The trainer's, ``<results>/Sgfr[/<data>]/v0``; ``.../latest`` where anomalib found no run.
        checkpoint (Path | str | None): That the model is from.
        model (str): anomalib's name of the model.

    Returns:
        Path: The checkpoint's own run if that lies in the same results; else ``root``, but never a folder ``latest``,
        which would be in the way of the link of that name.
    """
    run = run_of(checkpoint)
    root = root.absolute()
    top = next((part for part in (root, *root.parents) if part.name == model), None)
    if run is not None and top is not None and run.is_relative_to(top.resolve()):
        return run
    return root.parent if root.name == LATEST and not root.is_symlink() else root


def claim_folder(wanted: Path, about: Mapping[str, object]) -> Path:
    """Make a folder for results, which those of other input do not share.

    Args:
        wanted (Path): The folder. If it holds results of other input, a number is added: ``-2``, ``-3`` ...
        about (Mapping[str, object]): What the results are of, as JSON can keep it; written beside them.

    Returns:
        Path: The folder. The same input gets the same folder again.

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
                with suppress(FileExistsError), file.open("x", encoding="utf-8") as text:  # another process was first
                    json.dump(dict(about), text, indent=1)
                    return folder
                number -= 1
        except ValueError:  # of other making
            continue


def names_of(paths: Iterable[str], *, keep_suffix: bool = False) -> dict[str, Path]:
    """Names of results for images, each its own: their paths below the folder that holds all of them.

    Args:
        paths (Iterable[str]): Image files.
        keep_suffix (bool): Whether names end as the files do; without, only where that tells two images apart.

    Returns:
        dict[str, Path]: Relative paths.
    """
    whole = {path: Path(path).absolute() for path in paths}
    if not whole:
        return {}
    common = Path(os.path.commonpath([path.parent for path in whole.values()]))
    relative = {path: where.relative_to(common) for path, where in whole.items()}
    counts = Counter(name.with_suffix("") for name in set(relative.values()))
    bare = {path: name.with_suffix("") for path, name in relative.items()}
    return {path: relative[path] if keep_suffix or counts[bare[path]] > 1 else bare[path] for path in whole}
