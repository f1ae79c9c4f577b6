"""``anomalib-sgfr ...``, also ``python -m anomalib_sgfr ...``: Sgfr's own commands, and all of
anomalib's.

Help, the version and a mistyped command import neither PyTorch nor anomalib.
"""

import difflib
import io
import linecache
import os
import sys
import traceback
import warnings
from argparse import ArgumentError
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from anomalib_sgfr.cli.errors import explain_error, in_one_line

__all__ = ["ANOMALIBS", "OWN", "Command", "UsageError", "main"]


class UsageError(Exception):
    """Of the user, in the arguments."""


class Command(NamedTuple):
    """A module whose ``main`` takes arguments and returns the exit code, and a line of help."""

    module: str
    help: str


OWN = {
    "accept": Command(
        "anomalib_sgfr.cli.accept", "this one is good: learn from false alarms, or take that back"
    ),
    "adapt": Command(
        "anomalib_sgfr.cli.adapt", "another light: go on from a few good images of it"
    ),
    "doctor": Command(
        "anomalib_sgfr.cli.doctor", "whether this machine will do, and what to do where not"
    ),
    "explain": Command(
        "anomalib_sgfr.cli.explain", "draw why images are anomalous: the mimic view"
    ),
    "report": Command(
        "anomalib_sgfr.cli.report", "one page to look at, judge and share, of any folder of images"
    ),
    "threshold": Command(
        "anomalib_sgfr.cli.threshold", "what calibrates a threshold; another one without a fit"
    ),
}
ANOMALIBS = ("train", "fit", "validate", "test", "predict", "export", "benchmark", "install")
_OPTIONS = ("--out=", "--ckpt_path=")
_SWITCH = "ANOMALIB_SGFR_TRACEBACK"
_MEANT = {"anomalib", "anomalib_sgfr", "lightning"}
_EXPLAINED = (ValueError, TypeError, RuntimeError, LookupError, ImportError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments (Sequence[str] | None): What follows the program's name. Defaults to those of the
            process.

    Returns:
        int: The exit code: 0 if all went well, 1 if not, 2 if the arguments are at fault.
    """
    for stream in (
        sys.stdout,
        sys.stderr,
    ):  # a name that a console cannot show is no reason to fail after the work
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")
    given = list(sys.argv[1:] if arguments is None else arguments)
    whole = os.environ.get(_SWITCH, "0").lower() not in {"", "0", "false", "no", "off"}
    if given[:1] == ["--traceback"]:
        whole, given = True, given[1:]
    if not given:
        print(_page(), file=sys.stderr)
        return 2
    if given[0] in {"-h", "--help"}:
        print(_page())
        return 0
    if given[0] == "--version":
        from importlib.metadata import version

        print(f"anomalib-sgfr {version('anomalib-sgfr')}")
        return 0
    if not given[0].startswith("-") and given[0] not in {*OWN, *ANOMALIBS}:
        near = difflib.get_close_matches(given[0], [*OWN, *ANOMALIBS], n=2)
        hint = f"did you mean {' or '.join(near)}?" if near else "anomalib-sgfr --help lists them."
        return _say(f"there is no command '{given[0]}': {hint}", 2)
    return _run(given, whole=whole)


def _page() -> str:
    width = max(map(len, OWN))
    lines = [
        "usage: anomalib-sgfr [--traceback] COMMAND ...",
        "       anomalib-sgfr --help | --version",
        "",
        "Sgfr's own commands:",
        *(f"  {name:{width}}  {command.help}" for name, command in OWN.items()),
        "",
        "All of anomalib's commands work too and are handed on, with Sgfr and its data sets known:",
        f"  {', '.join(ANOMALIBS)}",
        (
            "predict takes --out DIR besides: for scores, pictures, and maps and masks as arrays"
            " and PNG."
        ),
        "",
        "COMMAND --help lists the options of one. An error that explains itself ends in one line;",
        f"--traceback before the command, or {_SWITCH}=1, shows where it came from.",
    ]
    return "\n".join(lines)


def _run(given: list[str], *, whole: bool) -> int:
    """Run one of Sgfr's commands, or hand on to anomalib; what goes wrong ends in a line that says
    what.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of other packages, to each other
            if given[0] in OWN:
                code: int = import_module(OWN[given[0]].module).main(given[1:])
                return code
            _hand_on(given)
    except UsageError as mistake:
        return _say(str(mistake), 2)
    except BaseException as raised:  # whatever it is, its reason comes last
        if _interrupted(raised):  # Lightning exits then, and an import may fail in another way
            return _say("interrupted", 130)
        if not isinstance(raised, Exception):
            raise
        error = _meant(raised)
        if whole or not _explains_itself(error):
            sys.excepthook(type(error), error, error.__traceback__)
        return _say(_reason(error), 1)
    return 0


def _interrupted(error: BaseException | None) -> bool:
    """Whether an error comes of Ctrl-C."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def _translated(given: list[str]) -> list[str]:
    """Arguments as anomalib takes them: ``predict --out DIR``, and ``--ckpt_path`` by a ``latest``
    that did not end.
    """
    from anomalib_sgfr.run_paths import complete_checkpoint

    parts = [
        part
        for item in given
        for part in (item.split("=", 1) if item.startswith(_OPTIONS) else [item])
    ]
    for place, name in enumerate(parts[:-1]):
        other = complete_checkpoint(Path(parts[place + 1])) if name == "--ckpt_path" else None
        if other is not None:
            print(
                f"note: {parts[place + 1]} is missing, as that run has not ended: {other} is used.",
                file=sys.stderr,
            )
            parts[place + 1] = str(other)
    if given[:1] != ["predict"] or "--out" not in parts:
        return parts
    place = parts.index("--out")
    if place + 1 == len(parts) or parts[place + 1].startswith("--"):
        msg = "--out: name the folder for the predictions"
        raise UsageError(msg)
    added = [
        "--trainer.callbacks+=anomalib_sgfr.Predictions",
        f"--trainer.callbacks.folder={parts[place + 1]}",
    ]
    return [*parts[:place], *parts[place + 2 :], *added]


def _hand_on(given: list[str]) -> None:
    """Do as anomalib's own ``main`` does, with Sgfr and the data sets loaded, wherever the plugin
    is not.

    But that each line is told once, where anomalib's has two handlers.
    """
    from anomalib.cli import AnomalibCLI

    from anomalib_sgfr.console import configure_logging

    import_module("anomalib_sgfr.data")
    import_module("anomalib_sgfr.lightning_model")

    class Telling(AnomalibCLI):
        """Has its parsers raise what is wrong, in place of printing it with the usage."""

        @staticmethod
        def init_parser(**kwargs: Any) -> Any:  # noqa: ANN401
            return AnomalibCLI.init_parser(exit_on_error=False, **kwargs)

    configure_logging()
    try:
        Telling(_translated(given))
    except ArgumentError as error:
        raise UsageError(in_one_line(str(error))) from None


def _explains_itself(error: BaseException) -> bool:
    """Whether somebody meant the message for the user: the system, this package, anomalib or
    Lightning, by a raise.
    """
    if isinstance(error, OSError) or _notes(error):
        return True
    package, frame, line = _raised_in(error)
    if explain_error(error, frame):
        return True
    if not (
        isinstance(error, _EXPLAINED) or type(error).__name__ == "MisconfigurationException"
    ) or not str(error):
        return False
    statement = linecache.getline(frame.f_code.co_filename, line).lstrip() if frame else ""
    return package in _MEANT and statement.startswith("raise ")


def _meant(error: BaseException) -> BaseException:
    """The error that explains itself among those that jsonargparse had when it refused a class's
    arguments.
    """
    package, frame, _ = _raised_in(error)
    tried = frame.f_locals.get("exceptions", ()) if frame and package == "jsonargparse" else ()
    inner = (_meant(found) for found in tried if isinstance(found, BaseException))
    return next(filter(_explains_itself, inner), error)


def _raised_in(error: BaseException) -> tuple[str, FrameType | None, int]:
    """Top-level package, frame and line that an error came from."""
    frames = list(traceback.walk_tb(error.__traceback__))
    if not frames:
        return "", None, 0
    frame, line = frames[-1]
    return str(frame.f_globals.get("__name__", "")).partition(".")[0], frame, line


def _notes(error: BaseException) -> list[str]:
    """What this package added to an exception of somebody else's."""
    notes = getattr(error, "__notes__", [])
    if not notes:
        return []
    from anomalib_sgfr.training.errors import Reason

    return [note for note in notes if isinstance(note, Reason)]


def _reason(error: BaseException) -> str:
    words = explain_error(error, _raised_in(error)[1])
    said = " ".join("; ".join(_notes(error) or [words or str(error)]).split())
    if _explains_itself(error) and said:
        return said
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


def _say(message: str, code: int) -> int:
    print(f"error: {message}", file=sys.stderr, flush=True)
    return code
