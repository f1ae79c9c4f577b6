"""Every command answers by the words its documentation gives it."""

import runpy
import sys

import pytest

COMMANDS = (
    "accepting",
    "agreement",
    "domain_shift",
    "compare",
    "compressed",
    "deciding",
    "edge",
    "false_alarms",
    "frames",
    "gpu",
    "headline",
    "large_images",
    "scaling",
    "startup",
    "study",
)


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_says_what_it_is_for(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module(f"benchmarks.{name}", run_name="__main__")
    assert not stopped.value.code
    assert f"python -m benchmarks.{name}" in capsys.readouterr().out
