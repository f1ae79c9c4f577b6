"""Arguments, images and checkpoints of Sgfr's own commands, refused in one line that says why."""

import argparse
import logging
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from anomalib_sgfr.run_paths import EXPORTED, complete_checkpoint, no_checkpoint

if TYPE_CHECKING:
    from anomalib_sgfr.lightning_model import Sgfr
    from anomalib_sgfr.post_processing.post_processor import SgfrPostProcessor

__all__ = [
    "Parser",
    "at_least",
    "existing",
    "image_files",
    "images_in",
    "load",
    "new_file",
    "new_folder",
    "post_processor_of",
    "require_images",
    "require_named_group",
    "take_checkpoint",
]

_LOGGERS = ("anomalib.engine", "lightning.pytorch", "lightning.fabric", "lightning_fabric")


class Parser(argparse.ArgumentParser):
    """Parser whose errors are one line, without the usage."""

    def add_checkpoint(self) -> None:
        """Add the checkpoint as first argument."""
        self.add_argument("ckpt_path", type=existing, help="checkpoint of a fitted Sgfr")

    def add_out(self, suffix: str) -> None:
        """Add ``--out``, a new checkpoint."""
        about = f"new checkpoint (default: beside the old, named CKPT{suffix})"
        self.add_argument("--out", type=new_file, help=about)

    def error(self, message: str) -> NoReturn:
        """End with exit code 2."""
        if "required: ckpt_path" in message:
            message += "; it comes before options that take several folders"
        self.exit(2, f"error: {message} ({self.prog} --help)\n")


def at_least(least: int) -> Any:  # noqa: ANN401
    """Type of an argument that is an integer, and not less than ``least``."""

    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if number < least:
            msg = f"must be an integer of at least {least}, got '{text}'"
            raise argparse.ArgumentTypeError(msg)
        return number

    return parse


def existing(text: str) -> Path:
    """Type of an argument that names a file or folder which is there."""
    path = Path(text)
    other = complete_checkpoint(path)
    if other is not None:
        note = f"note: {path} is missing, as that run has not ended: {other} is used."
        print(note, file=sys.stderr)
        return other
    if not path.exists():
        msg = f"{path}: no such file or folder"
        raise argparse.ArgumentTypeError(msg)
    return path


def new_file(text: str) -> Path:
    """Type of an argument that names a file to write, checked before anything is computed."""
    path = Path(text)
    if path.is_dir():
        msg = f"{path} is a folder: name a file, for instance {path / 'NAME'}"
        raise argparse.ArgumentTypeError(msg)
    _require_writable(path, path.absolute().parent)
    return path


def new_folder(text: str) -> Path:
    """Type of an argument that names a folder to write to, checked before anything is computed."""
    path = Path(text)
    _require_writable(path, path.absolute())
    return path


def _require_writable(path: Path, folder: Path) -> None:
    there = next(part for part in (folder, *folder.parents) if part.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)):
        why = "cannot be written to" if there.is_dir() else "is a file, not a folder"
        msg = f"{path} cannot be written: {there} {why}"
        raise argparse.ArgumentTypeError(msg)


def take_checkpoint(
    parser: argparse.ArgumentParser, given: Path | None, *lists: list[Path]
) -> Path:
    """Checkpoint of a command, wherever it stands among the arguments.

    Args:
        parser (ArgumentParser): Ends the command if there is none.
        given (Path | None): What was given in the checkpoint's own place.
        *lists (list[Path]): Other arguments. Where nothing was given, the one file there that is
            named as a checkpoint is taken out of them: an option that takes several values takes it
            too, if it comes right behind.
    """
    if given is not None:
        return given
    every = [(values, path) for values in lists for path in values if path.is_file()]
    found = [pair for pair in every if pair[1].suffix == ".ckpt"]
    exported = next((path for _, path in every if path.suffix in EXPORTED), None)
    if exported and not found:
        parser.error(no_checkpoint(exported))
    if len(found) != 1:
        parser.error("the checkpoint is missing: put it first, or pass --ckpt_path CKPT")
    ((values, path),) = found
    values.remove(path)
    return path


def require_images(parser: Parser, options: argparse.Namespace, *names: str) -> None:
    """Require images where options are given that say how to learn from them.

    Args:
        parser (Parser): Ends the command if there are none.
        options (Namespace): With ``images``, ``undo`` and ``out``.
        *names (str): Those options. ``out`` is one too, unless a step is taken back.
    """
    given = [name for name in names if getattr(options, name)]
    if options.out and not options.undo:
        given.append("out")
    if given and not options.images:
        parser.error(f"--{given[0]} goes with images, and there are none")


def require_named_group(option: str, expression: str | None, paths: Sequence[str] = ()) -> None:
    """Require that a regular expression is valid and matches an image; messages name the option.

    Args:
        option (str): ``--group``, ``--by`` ...
        expression (str | None): Value of the option.
        paths (Sequence[str]): Images, of which it must match at least one.

    Raises:
        ValueError: If it is no regular expression, or matches none.
    """
    from anomalib_sgfr.post_processing.calibration import require_group

    try:
        require_group(expression, paths)
    except ValueError as error:
        raise ValueError(str(error).replace("group", option, 1)) from None


def images_in(path: Path) -> list[Path]:
    """Image files in a folder and those below, or the one file.

    Raises:
        ValueError: If there is none.
    """
    from anomalib.data.utils.image import is_image_file

    found = [path] if path.is_file() else sorted(path.rglob("*"))
    found = [file for file in found if file.is_file() and is_image_file(file)]
    if not found:
        msg = f"{path}: {'not an image' if path.is_file() else 'no image in this folder'}"
        raise ValueError(msg)
    return found


def image_files(paths: Iterable[Path]) -> list[str]:
    """Image files in folders and those below, each once.

    Args:
        paths (Iterable[Path]): Folders or image files.

    Raises:
        ValueError: If one of them is, or holds, no image.
    """
    return list(dict.fromkeys(str(file) for path in paths for file in images_in(path)))


def load(checkpoint: Path, **overrides: Any) -> "Sgfr":  # noqa: ANN401
    """Restore a fitted model on the CPU, and hide what anomalib and Lightning log of every run.

    Args:
        checkpoint (Path): That a fit saved.
        **overrides (Any): Arguments of the model that shall differ.

    Raises:
        ValueError: If the file is not a checkpoint, or not one that Sgfr can use.
        RuntimeError: If it was saved before its fit ended.
    """
    from anomalib_sgfr.lightning_model import Sgfr

    for name in _LOGGERS:  # some of it is false of a restored model
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        model = Sgfr.load_from_checkpoint(checkpoint, map_location="cpu", **overrides)
    except ValueError as error:
        said = str(error)
        raise ValueError(said if str(checkpoint) in said else f"'{checkpoint}': {said}") from error
    except OSError:  # which name the file
        raise
    except Exception as error:
        raise ValueError(no_checkpoint(checkpoint, error)) from error
    model.require_fitted("use")
    return model


def post_processor_of(model: "Sgfr") -> "SgfrPostProcessor":
    """Post-processor of a model that was loaded.

    Raises:
        ValueError: If there is none of Sgfr's.
    """
    from anomalib_sgfr.post_processing.post_processor import SgfrPostProcessor

    if not isinstance(model.post_processor, SgfrPostProcessor):
        msg = "the checkpoint was saved without a post-processor: there is no threshold in it."
        raise ValueError(msg)  # noqa: TRY004  # of the user's, not of the caller's
    return model.post_processor
