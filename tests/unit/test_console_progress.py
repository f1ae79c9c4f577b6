"""The bar is for a terminal, and for who wants one."""

import io
import sys
from types import SimpleNamespace

import pytest

from anomalib_sgfr.console import bar_is_on, bars, progress


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
