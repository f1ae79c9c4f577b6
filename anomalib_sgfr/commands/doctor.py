"""``anomalib-sgfr doctor``: whether this machine will do, and what to do where it will not."""

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence

from anomalib_sgfr.commands.checks import machine_checks, software_checks
from anomalib_sgfr.commands.findings import Finding, looked_at
from anomalib_sgfr.commands.inputs import Parser
from anomalib_sgfr.commands.self_test import SelfTest
from anomalib_sgfr.commands.versions import version_checks

__all__ = ["findings", "line", "main"]

_COLOURS = {"ok": 32, "note": 33, "fault": 31}
_WIDTH = 16  # of the longest name


def main(arguments: Sequence[str] | None = None) -> int:
    """Look and tell; returns the exit code, 1 if there is a fault."""
    parser = Parser(prog="anomalib-sgfr doctor", description=__doc__.partition(": ")[2])
    parser.add_argument("--quick", action="store_true", help="leave out the self-test: a fit, and an export of it")
    parser.add_argument("--json", action="store_true", help="print the same as JSON")
    options = parser.parse_args(arguments)

    terminal = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
    coloured = terminal and not os.environ.get("NO_COLOR")
    found = []
    for each in findings(quick=options.quick, begin=_waiting if terminal and not options.json else None):
        found.append(each)
        if not options.json:
            print(line(each, coloured=coloured), flush=True)  # a library that ends the process shows where it did
    faults = sum(each.mark == "fault" for each in found)
    if options.json:
        print(json.dumps({"faults": faults, "findings": [each._asdict() for each in found]}, indent=2))
    else:
        print(f"{faults or 'No'} fault{'s' if faults != 1 else ''}.")
    return int(faults > 0)


def findings(*, quick: bool, begin: Callable[[str], None] | None = None) -> Iterator[Finding]:
    """Look at one thing after the other.

    Args:
        quick (bool): Whether to leave the self-test out.
        begin (Callable[[str], None] | None): Is told the name of each before it is looked at.

    Yields:
        Finding: A line each, as soon as it is known.
    """
    broken: dict[str, str] = {}
    with SelfTest() as test:
        tested = [] if quick else test.checks()
        for check in (*machine_checks(), *version_checks(), *software_checks(), *tested):
            if begin is not None:
                begin(check.what)
            yield looked_at(check, broken)


def _waiting(what: str) -> None:
    """Show what is being looked at, on a terminal, until its line takes the place."""
    print(f"       {what} ...", end="\r", flush=True)


def line(found: Finding, *, coloured: bool = False) -> str:
    """A line of the screen: mark, what, value, and what to do.

    Args:
        found (Finding): What it says.
        coloured (bool): Whether it is for a terminal: all of a fault is red, of others the mark.
    """
    mark, rest = f"{found.mark:5}", f"  {found.what:{_WIDTH}}  {found.value}"
    rest += f" -> {found.remedy}" if found.remedy else ""
    if not coloured:
        return mark + rest
    start, end = f"\033[{_COLOURS[found.mark]}m", "\033[0m"
    return f"{start}{mark}{rest}{end}" if found.mark == "fault" else f"{start}{mark}{end}{rest}"
