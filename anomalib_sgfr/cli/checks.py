"""Checks of doctor: run in order, and what each of them found.

Nothing heavy is imported: a check must work where PyTorch cannot be imported.
"""

import io
import logging
import warnings
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Literal, NamedTuple

from anomalib_sgfr.cli.errors import in_one_line

__all__ = ["Check", "CheckFailed", "CheckResult", "Mark", "error_line", "run_check"]

Mark = Literal["ok", "note", "fault"]
_MAX_LENGTH = 300  # characters of an error message


class CheckResult(NamedTuple):
    """Result of a check.

    Attributes:
        mark (Mark): ``"ok"``; ``"note"``, which can stay as it is; ``"fault"``, which must be
            mended.
        what (str): Name of the check.
        value (str): What was found.
        remedy (str): What to do; empty where nothing is to be done.
    """

    mark: Mark
    what: str
    value: str
    remedy: str = ""


class Check(NamedTuple):
    """A check that has not been run.

    Attributes:
        what (str): Its name.
        run (Callable[[], CheckResult]): Runs it; may raise.
        remedy (str): What to do if it raises an unforeseen exception.
        needs (tuple[str, ...]): Names of checks that must have passed before.
        known (str): What is known without running it.
    """

    what: str
    run: Callable[[], CheckResult]
    remedy: str
    needs: tuple[str, ...] = ()
    known: str = ""


class CheckFailed(Exception):  # noqa: N818
    """A check failed, and those that need it cannot be run.

    Args:
        result (CheckResult): Its result.
    """

    def __init__(self, result: CheckResult) -> None:
        super().__init__(result.value)
        self.result = result


def run_check(check: Check, failed: MutableMapping[str, str]) -> CheckResult:
    """Run a check; whatever it raises becomes a result.

    Args:
        check (Check): The check.
        failed (MutableMapping[str, str]): For each check that failed or was skipped, the check that
            failed first. This one is added if it fails or is skipped.

    Returns:
        CheckResult: Its result.
    """
    prefix = f"{check.known}: " if check.known else ""
    cause = next((failed[name] for name in check.needs if name in failed), None)
    if cause is not None:
        failed[check.what] = cause
        value = f"{prefix}not tried without {cause}"
        return CheckResult("note", check.what, value, f"see to {cause} first")
    try:
        with _silence():
            return check.run()
    except CheckFailed as error:
        failed[check.what] = check.what
        return error.result
    except Exception as error:  # noqa: BLE001  # whatever it is, the other checks go on
        failed[check.what] = check.what
        return CheckResult("fault", check.what, prefix + error_line(error), check.remedy)


def error_line(error: BaseException) -> str:
    """Type and message of an exception in one line of at most 300 characters.

    Args:
        error (BaseException): Any exception.
    """
    text = in_one_line(f"{type(error).__name__}: {error}".removesuffix(": "))
    return text if len(text) <= _MAX_LENGTH else f"{text[: _MAX_LENGTH - 4]} ..."


@contextmanager
def _silence() -> Iterator[None]:
    """Suppress what libraries log, warn of and print."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    output = io.StringIO()
    try:
        with warnings.catch_warnings(), redirect_stdout(output), redirect_stderr(output):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
