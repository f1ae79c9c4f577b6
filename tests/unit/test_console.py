"""Log filters, which hide nothing else and end with the run; progress bars."""

import io
import logging
import sys
import warnings
from types import SimpleNamespace

import pytest
from rich.logging import RichHandler

from anomalib_sgfr.console import (
    LogFilters,
    _of_use,
    bar_is_on,
    bars,
    progress,
    quiet_loggers,
    quiet_warnings,
)

IDLE = "`LightningModule.configure_optimizers` returned `None`, this fit will run with no optimizer"


def test_only_idle_warnings_are_left_out() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with quiet_warnings():
            warnings.warn(IDLE, stacklevel=1)
            warnings.warn("the disk is full", stacklevel=1)
        warnings.warn(IDLE, stacklevel=1)
    assert [str(item.message) for item in caught] == ["the disk is full", IDLE]


@pytest.mark.parametrize("end", ["teardown", "on_exception"])
def test_a_run_gives_back_filters_and_handlers(end: str) -> None:
    root = logging.getLogger()
    plain, rich = logging.StreamHandler(), RichHandler()
    handlers, root.handlers = root.handlers, [plain, rich]
    try:
        before = list(warnings.filters)
        run = LogFilters()
        run.setup()
        assert warnings.filters != before
        record = logging.makeLogRecord({"msg": "told"})
        assert not rich.filter(record)
        assert plain.filter(record)
        getattr(run, end)()
        assert warnings.filters == before
        assert rich.filter(record)
    finally:
        root.handlers = handlers


def test_one_handler_is_left_as_it_is() -> None:
    root = logging.getLogger()
    rich = RichHandler()
    handlers, root.handlers = root.handlers, [rich]
    try:
        run = LogFilters()
        run.setup()
        assert rich.filter(logging.makeLogRecord({"msg": "told"}))
        run.teardown()
    finally:
        root.handlers = handlers


def test_loggers_return_to_their_levels() -> None:
    chatty = logging.getLogger("tests.chatty")
    chatty.setLevel(logging.DEBUG)
    with quiet_loggers("tests.chatty"):
        assert not chatty.isEnabledFor(logging.INFO)
        assert chatty.isEnabledFor(logging.WARNING)
    assert chatty.level == logging.DEBUG


@pytest.mark.parametrize(
    ("line", "level", "stays"),
    [
        ("TPU available: False, using: 0 TPU cores", logging.INFO, False),
        ("TPU available: False, using: 0 TPU cores", logging.WARNING, True),
        ("Overriding max_epochs from None with 1 for Sgfr", logging.INFO, False),
        ("Overriding max_epochs from 5 with 1 for Sgfr", logging.INFO, True),
        ("GPU available: False, used: False", logging.INFO, True),
    ],
)
def test_lines_of_no_use(line: str, level: int, stays: bool) -> None:
    assert _of_use(logging.makeLogRecord({"msg": line, "levelno": level})) == stays


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stream", "shown", "says"),
    [(Terminal(), True, True), (Terminal(), False, False), (io.StringIO(), True, False)],
)
def test_a_bar_on_a_terminal_alone(
    stream: io.StringIO, shown: bool, says: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", stream)
    assert list(progress(range(3), 3, "Calibrating", shown=shown)) == [0, 1, 2]
    assert ("Calibrating" in stream.getvalue()) is says


def test_a_context_decides_for_all_that_runs_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    with bars(shown=False):
        assert list(progress(range(3), 3, "Calibrating")) == [0, 1, 2]
    assert sys.stderr.getvalue() == ""
    assert list(progress(range(3), 3, "Calibrating")) == [0, 1, 2]
    assert "Calibrating" in sys.stderr.getvalue()


def test_it_follows_the_trainers_bar() -> None:
    assert bar_is_on(None)
    assert bar_is_on(SimpleNamespace(is_global_zero=True, progress_bar_callback=object()))
    assert not bar_is_on(SimpleNamespace(is_global_zero=True, progress_bar_callback=None))
    assert not bar_is_on(SimpleNamespace(is_global_zero=False, progress_bar_callback=object()))
