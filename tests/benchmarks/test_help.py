"""Every command answers by the words its documentation gives it."""

import runpy
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
COMMANDS = sorted(
    {path.stem for path in BENCHMARKS.glob("[!_]*.py")}
    | {path.parent.name for path in BENCHMARKS.glob("*/__main__.py")}
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
