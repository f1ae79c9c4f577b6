"""Checks of doctor: order, errors that become results, and silence."""

import logging
import sys
import warnings
from collections.abc import Callable

import pytest

from anomalib_sgfr.cli.checks import Check, CheckFailed, CheckResult, error_line, run_check

OK = CheckResult("ok", "this", "1.0")
FAULT = CheckResult("fault", "the other", "2.0: ImportError: no", "mend it")


def raising(error: Exception) -> Callable[[], CheckResult]:
    def look() -> CheckResult:
        raise error

    return look


def test_what_is_raised_is_a_line() -> None:
    broken: dict[str, str] = {}
    check = Check("it", raising(OSError("libx.so:\n cannot open")), "mend it", known="2.0")
    assert run_check(check, broken) == CheckResult(
        "fault", "it", "2.0: OSError: libx.so: cannot open", "mend it"
    )
    assert broken == {"it": "it"}


def test_what_stands_on_what_is_broken_is_not_tried() -> None:
    broken: dict[str, str] = {}
    run_check(Check("first", raising(CheckFailed(FAULT)), ""), broken)
    second = Check("second", raising(AssertionError("was tried")), "", ("zeroth", "first"), "1.1")
    assert run_check(second, broken) == CheckResult(
        "note", "second", "1.1: not tried without first", "see to first first"
    )
    third = run_check(Check("third", raising(AssertionError("was tried")), "", ("second",)), broken)
    assert third.remedy == "see to first first"  # where it began


def test_a_fault_that_breaks_nothing_stops_nothing() -> None:
    broken: dict[str, str] = {}
    assert run_check(Check("the other", lambda: FAULT, ""), broken) == FAULT
    assert run_check(Check("this", lambda: OK, "", ("the other",)), broken) == OK


def test_what_libraries_tell_meanwhile_is_left_out(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    def look() -> CheckResult:
        sys.stdout.write("told")
        sys.stderr.write("told")
        logging.getLogger("made").error("told")
        warnings.warn("told", stacklevel=1)
        return OK

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run_check(Check("this", look, ""), {}) == OK
    assert capsys.readouterr() == ("", "")
    assert not caplog.records
    logging.getLogger("made").error("told again")
    assert caplog.records


def test_a_long_error_is_cut() -> None:
    assert error_line(ValueError()) == "ValueError"
    text = error_line(ValueError("word " * 200))
    assert len(text) <= 300
    assert text.endswith(" ...")
