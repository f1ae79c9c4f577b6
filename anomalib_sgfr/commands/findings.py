"""What a look at the machine finds: a line each, also where looking fails."""

import io
import logging
import warnings
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Literal, NamedTuple

from anomalib_sgfr.commands.mistakes import in_one_line

__all__ = ["Broken", "Check", "Finding", "Mark", "looked_at", "said"]

Mark = Literal["ok", "note", "fault"]
_LONGEST = 300  # characters of somebody else's error


class Finding(NamedTuple):
    """A line of the screen.

    Attributes:
        mark (Mark): ``"ok"``; ``"note"``, what may be as it is; ``"fault"``, what will not do.
        what (str): What was looked at.
        value (str): What was found.
        remedy (str): What to do; empty where all is well.
    """

    mark: Mark
    what: str
    value: str
    remedy: str = ""


class Check(NamedTuple):
    """Something to look at.

    Attributes:
        what (str): Its name.
        look (Callable[[], Finding]): Looks; may raise.
        remedy (str): What to do if it raises something unforeseen.
        needs (tuple[str, ...]): Names of checks without which there is no use in looking.
        known (str): What is known of it without looking.
    """

    what: str
    look: Callable[[], Finding]
    remedy: str
    needs: tuple[str, ...] = ()
    known: str = ""


class Broken(Exception):  # noqa: N818
    """A check found what nothing that needs it can do without.

    Args:
        finding (Finding): Its line.
    """

    def __init__(self, finding: Finding) -> None:
        super().__init__(finding.value)
        self.finding = finding


def looked_at(check: Check, broken: MutableMapping[str, str]) -> Finding:
    """Carry out a check; whatever it raises is a line too.

    Args:
        check (Check): The check.
        broken (MutableMapping[str, str]): Checks that others need not try to build on, and for each the one that broke
            first; this one is added if it is among them.

    Returns:
        Finding: Its line.
    """
    before = f"{check.known}: " if check.known else ""
    culprit = next((broken[name] for name in check.needs if name in broken), None)
    if culprit is not None:
        broken[check.what] = culprit
        return Finding("note", check.what, f"{before}not tried without {culprit}", f"see to {culprit} first")
    try:
        with _silence():
            return check.look()
    except Broken as found:
        broken[check.what] = check.what
        return found.finding
    except Exception as error:  # noqa: BLE001  # whatever it is, the screen goes on
        broken[check.what] = check.what
        return Finding("fault", check.what, before + said(error), check.remedy)


def said(error: BaseException) -> str:
    """An error in one line.

    Args:
        error (BaseException): Anybody's.
    """
    text = in_one_line(f"{type(error).__name__}: {error}".removesuffix(": "))
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 4]} ..."


@contextmanager
def _silence() -> Iterator[None]:
    """Leave out what libraries tell when they are imported and used: the line says what matters."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
