"""The screen: its lines, its JSON and its exit code, whatever the checks do."""

import json
import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from anomalib_sgfr.cli import doctor
from anomalib_sgfr.cli.checks import Check, CheckFailed, CheckResult, error_line, run_check
from anomalib_sgfr.cli.doctor import line, main
from anomalib_sgfr.cli.self_test import Answer, SelfTest, check_scores, compare_answers

ROOT = Path(__file__).parents[3]
OK = CheckResult("ok", "this", "1.0")
NOTE = CheckResult("note", "that", "none", "get one")
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


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def have(*found: CheckResult) -> None:
        def results(**_: object) -> Iterator[CheckResult]:
            yield from found

        monkeypatch.setattr(doctor, "results", results)

    return have


@pytest.mark.parametrize(
    ("found", "code", "last"),
    [
        ((OK, NOTE), 0, "No faults."),
        ((OK, FAULT), 1, "1 fault."),
        ((FAULT, NOTE, FAULT), 1, "2 faults."),
    ],
)
def test_the_exit_code_and_the_json_follow_the_faults(
    found: tuple[CheckResult, ...],
    code: int,
    last: str,
    made: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    made(*found)
    assert main([]) == code
    lines = capsys.readouterr().out.splitlines()
    assert lines == [*map(line, found), last]
    assert main(["--json"]) == code
    told = json.loads(capsys.readouterr().out)
    assert [CheckResult(**each) for each in told["findings"]] == list(found)
    assert told["faults"] == sum(each.mark == "fault" for each in found)


def test_a_line_ends_with_what_to_do() -> None:
    assert line(OK) == "ok     this              1.0"
    assert line(FAULT) == "fault  the other         2.0: ImportError: no -> mend it"
    assert line(FAULT, coloured=True) == f"\033[31m{line(FAULT)}\033[0m"
    assert line(NOTE, coloured=True) == f"\033[33mnote \033[0m{line(NOTE)[5:]}"


@pytest.mark.parametrize(
    ("terminal", "no_color", "term", "coloured"),
    [
        (True, "", "xterm", True),
        (True, "1", "xterm", False),
        (True, "", "dumb", False),
        (False, "", "xterm", False),
    ],
)
def test_colour_is_for_terminals(
    terminal: bool,
    no_color: str,
    term: str,
    coloured: bool,
    made: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    made(FAULT)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setenv("TERM", term)
    main([])
    assert ("\033[31m" in capsys.readouterr().out) == coloured


def test_quick_leaves_the_self_test_out(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("machine_checks", "version_checks", "software_checks"):
        monkeypatch.setattr(doctor, name, lambda name=name: [Check(name, lambda: OK, "")])
    tested = Check("tested", lambda: NOTE, "")
    monkeypatch.setattr(SelfTest, "checks", lambda _: [tested])
    begun: list[str] = []
    assert list(doctor.results(quick=True)) == [OK] * 3
    assert list(doctor.results(quick=False, begin=begun.append)) == [OK, OK, OK, NOTE]
    assert begun[-1] == "tested"


def test_a_broken_import_is_a_line_and_not_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text(
        "raise OSError('libcudart.so.13: cannot open')", encoding="utf-8"
    )
    done = subprocess.run(
        [sys.executable, "-m", "anomalib_sgfr", "doctor"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    lines = {text[7:24].strip(): text for text in done.stdout.splitlines()}
    assert lines["torch"].startswith("fault")
    assert (
        "OSError: libcudart.so.13: cannot open -> pip install --force-reinstall" in lines["torch"]
    )
    for name in ("torchvision", "anomalib", "plugin", "weights", "fit and predict", "export"):
        assert lines[name].startswith("note")
        assert lines[name].endswith("not tried without torch -> see to torch first")


GOOD, BAD = (
    Answer(0.1, np.full((4, 4), 0.1, np.float32)),
    Answer(0.7, np.full((4, 4), 0.7, np.float32)),
)
LOST = Answer(0.7, np.full((4, 4), np.nan, np.float32))


def test_a_fit_that_tells_a_blob_from_none() -> None:
    assert check_scores(GOOD, BAD, 1.0) == CheckResult(
        "ok", "fit and predict", "a blob scores 0.700, none 0.100, in 1.0 s"
    )


@pytest.mark.parametrize(
    "answers", [(BAD, GOOD), (GOOD, LOST), (GOOD, BAD._replace(score=float("nan")))]
)
def test_a_fit_that_does_not(answers: tuple[Answer, Answer]) -> None:
    with pytest.raises(CheckFailed) as caught:
        check_scores(*answers, 1.0)
    assert caught.value.result.mark == "fault"
    assert "report it" in caught.value.result.remedy


@pytest.mark.parametrize(
    ("there", "mark"),
    [
        (BAD, "ok"),
        (Answer(BAD.score + 9e-5, BAD.map - np.float32(9e-5)), "ok"),
        (Answer(BAD.score + 2e-4, BAD.map), "fault"),
        (Answer(BAD.score, BAD.map + np.eye(4, dtype=np.float32) * 2e-4), "fault"),
        (Answer(float("nan"), BAD.map), "fault"),
        (LOST, "fault"),
    ],
)
def test_parity(there: Answer, mark: str) -> None:
    for order in ([GOOD, there], [there, GOOD]):
        here = [GOOD, BAD] if order[0] is GOOD else [BAD, GOOD]
        found = compare_answers(here, order, 1.0)
        assert found.mark == mark
        assert ("force-reinstall" in found.remedy) == (mark == "fault")


def test_an_export_that_answers_otherwise_is_a_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    test = SelfTest()
    test._model = SimpleNamespace(to_openvino=lambda folder, **_: folder / "model.xml")  # type: ignore[assignment]
    test._folder, test._answers = tmp_path, [GOOD, BAD]
    other = SimpleNamespace(score=0.7, map=BAD.map)
    monkeypatch.setattr("anomalib_sgfr.inspector.Inspector.load", lambda _: lambda _: other)
    _, export = test.checks()
    found = run_check(export, {})
    assert found.mark == "fault"
    assert "scores differ by 6.0e-01, maps by 6.0e-01, more than 1e-04" in found.value


def test_no_room_for_the_self_test_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "tempfile.TemporaryDirectory", lambda **_: raising(OSError(28, "No space left on device"))()
    )
    with SelfTest() as test:
        fit, _ = test.checks()
        found = run_check(fit, {})
    assert (found.mark, found.value) == ("fault", "OSError: [Errno 28] No space left on device")
