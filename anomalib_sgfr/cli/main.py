"""``anomalib-sgfr``, also ``python -m anomalib_sgfr``: Sgfr's commands and all of anomalib's.

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
    """Arguments that cannot be used; the message says why."""


class Command(NamedTuple):
    """A command of this package.

    Attributes:
        module (str): Module whose ``main`` takes arguments and returns the exit code.
        help (str): Line of help.
    """

    module: str
    help: str


OWN = {
    name: Command(f"anomalib_sgfr.cli.{name}", line)
    for name, line in {
        "accept": "learn from false alarms: images that are good, or take that back",
        "adapt": "go on after a domain shift (light, camera), from a few good images",
        "doctor": "check this machine and say what to do where a check fails",
        "explain": "draw why images are anomalous, with training crops beside",
        "reject": "learn from missed defects, or take that back",
        "report": "one page to inspect and share, of any folder of images",
        "sensitivity": "what would be missed, by defects drawn into good images",
        "threshold": "show what a threshold is calibrated on, or choose another without a fit",
        "watch": "score images as they arrive in a folder, tell when conditions change",
    }.items()
}
ANOMALIBS = ("train", "fit", "validate", "test", "predict", "export", "benchmark", "install")
_OPTIONS = ("--out=", "--ckpt_path=")
_SWITCH = "ANOMALIB_SGFR_TRACEBACK"
# packages and types of errors whose messages are written for the user
_PACKAGES = {"anomalib", "anomalib_sgfr", "lightning"}
_ERRORS = (ValueError, TypeError, RuntimeError, LookupError, ImportError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments (Sequence[str] | None): Arguments that follow the program's name; ``None`` for the
            process's own.

    Returns:
        int: Exit code: 0 for success, 1 for an error, 2 for wrong arguments, 130 for Ctrl-C.
    """
    # a file name that the console cannot show must not make the command fail
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")
    given = list(sys.argv[1:] if arguments is None else arguments)
    trace = os.environ.get(_SWITCH, "0").lower() not in {"", "0", "false", "no", "off"}
    if given[:1] == ["--traceback"]:
        trace, given = True, given[1:]
    if not given:
        print(_help(), file=sys.stderr)
        return 2
    if given[0] in {"-h", "--help"}:
        print(_help())
        return 0
    if given[0] == "--version":
        from anomalib_sgfr.report.fit_record import installed

        print(f"anomalib-sgfr {installed('anomalib-sgfr')}")
        return 0
    if not given[0].startswith("-") and given[0] not in {*OWN, *ANOMALIBS}:
        near = difflib.get_close_matches(given[0], [*OWN, *ANOMALIBS], n=2)
        hint = f"did you mean {' or '.join(near)}?" if near else "anomalib-sgfr --help lists them."
        return _fail(f"there is no command '{given[0]}': {hint}", 2)
    return _run(given, trace=trace)


def _help() -> str:
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
        "predict takes --out DIR besides: scores, images, and maps and masks as arrays and PNG.",
        "",
        "COMMAND --help lists the options of one. An error that explains itself ends in one line;",
        f"--traceback before the command, or {_SWITCH}=1, shows where it came from.",
    ]
    return "\n".join(lines)


def _run(given: list[str], *, trace: bool) -> int:
    """Run a command; an error ends in one line that says what is wrong."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of other packages, to each other
            if given[0] in OWN:
                code: int = import_module(OWN[given[0]].module).main(given[1:])
                return code
            _run_anomalib(given)
    except UsageError as error:
        return _fail(str(error), 2)
    except BaseException as raised:
        if _interrupted(raised):  # after Ctrl-C Lightning exits, and an import may fail otherwise
            return _fail("interrupted", 130)
        if not isinstance(raised, Exception):
            raise
        cause = _cause(raised)
        if trace or not _explains_itself(cause):
            sys.excepthook(type(cause), cause, cause.__traceback__)
        return _fail(_message(cause), 1)
    return 0


def _interrupted(error: BaseException | None) -> bool:
    """Whether an error was caused by Ctrl-C."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def _translated(given: list[str]) -> list[str]:
    """Arguments with ``predict --out DIR`` and missing checkpoints of ``latest`` replaced."""
    from anomalib_sgfr.run_paths import complete_checkpoint

    parts = [
        part
        for item in given
        for part in (item.split("=", 1) if item.startswith(_OPTIONS) else [item])
    ]
    for place, name in enumerate(parts[:-1]):
        path = parts[place + 1]
        other = complete_checkpoint(Path(path)) if name == "--ckpt_path" else None
        if other is not None:
            note = f"note: {path} is missing, as that run has not ended: {other} is used."
            print(note, file=sys.stderr)
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


def _run_anomalib(given: list[str]) -> None:
    """Run anomalib's command line, with Sgfr and the data sets known even without the plugin.

    Each line is logged once; anomalib's own ``main`` sets up two handlers.
    """
    from anomalib.cli import AnomalibCLI

    from anomalib_sgfr.console import configure_logging

    import_module("anomalib_sgfr.data")
    import_module("anomalib_sgfr.lightning_model")

    class RaisingCLI(AnomalibCLI):
        """anomalib's, whose parsers raise errors instead of printing them with the usage."""

        @staticmethod
        def init_parser(**kwargs: Any) -> Any:  # noqa: ANN401
            return AnomalibCLI.init_parser(exit_on_error=False, **kwargs)

    configure_logging()
    try:
        RaisingCLI(_translated(given))
    except ArgumentError as error:
        raise UsageError(in_one_line(str(error))) from None


def _explains_itself(error: BaseException) -> bool:
    """Whether the system, this package, anomalib or Lightning wrote the message for the user."""
    if isinstance(error, OSError) or _notes(error):
        return True
    package, frame, line = _raised_in(error)
    if explain_error(error, frame):
        return True
    known = isinstance(error, _ERRORS) or type(error).__name__ == "MisconfigurationException"
    if not known or not str(error):
        return False
    statement = linecache.getline(frame.f_code.co_filename, line).lstrip() if frame else ""
    return package in _PACKAGES and statement.startswith("raise ")


def _cause(error: BaseException) -> BaseException:
    """The error for the user among those for which jsonargparse refused a class's arguments."""
    package, frame, _ = _raised_in(error)
    tried = frame.f_locals.get("exceptions", ()) if frame and package == "jsonargparse" else ()
    inner = (_cause(found) for found in tried if isinstance(found, BaseException))
    return next(filter(_explains_itself, inner), error)


def _raised_in(error: BaseException) -> tuple[str, FrameType | None, int]:
    """Top-level package, frame and line that an error came from."""
    frames = list(traceback.walk_tb(error.__traceback__))
    if not frames:
        return "", None, 0
    frame, line = frames[-1]
    return str(frame.f_globals.get("__name__", "")).partition(".")[0], frame, line


def _notes(error: BaseException) -> list[str]:
    """Notes that this package added to an exception of another package."""
    notes = getattr(error, "__notes__", [])
    if not notes:
        return []
    from anomalib_sgfr.training.errors import Reason

    return [note for note in notes if isinstance(note, Reason)]


def _message(error: BaseException) -> str:
    explained = explain_error(error, _raised_in(error)[1])
    text = " ".join("; ".join(_notes(error) or [explained or str(error)]).split())
    if _explains_itself(error) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _fail(message: str, code: int) -> int:
    print(f"error: {message}", file=sys.stderr, flush=True)
    return code
