"""Self-test of doctor: scores of a fit, and answers of its export."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from anomalib_sgfr.cli.checks import CheckFailed, CheckResult, run_check
from anomalib_sgfr.cli.self_test import Answer, SelfTest, check_scores, compare_answers

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
    def full(**_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.TemporaryDirectory", full)
    with SelfTest() as test:
        fit, _ = test.checks()
        found = run_check(fit, {})
    assert (found.mark, found.value) == ("fault", "OSError: [Errno 28] No space left on device")
