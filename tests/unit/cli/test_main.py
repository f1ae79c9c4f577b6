"""The console script: its help, mistyped commands, and one line for what goes wrong."""

import os
import subprocess
import sys
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import pytest
from anomalib.cli import AnomalibCLI

import anomalib_sgfr.cli.main as commands
from anomalib_sgfr.cli.main import ANOMALIBS, OWN, main
from anomalib_sgfr.data.mtd import training_files
from anomalib_sgfr.training.errors import Reason

ROOT = Path(__file__).parents[3]
HEAVY = {"anomalib", "lightning", "numpy", "torch"}
CALL = "import sys; from anomalib_sgfr.cli.main import main\ntry: code = main(sys.argv[1:])\n"
CALL += (
    f"except SystemExit as left: code = left.code\nprint(sorted({HEAVY} & {{*sys.modules}}), code)"
)


def light(*arguments: str) -> tuple[str, str]:
    """What a command prints: its output without the last line, and its errors; it imports nothing
    heavy.
    """
    done = subprocess.run(
        [sys.executable, "-c", CALL, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    *output, last = done.stdout.splitlines()
    code = {"--version": 0, "--help": 0}.get(arguments[-1] if arguments else "", 2)
    assert last == f"[] {code}"
    return "\n".join(output), done.stderr


def test_help_lists_both_kinds_of_commands() -> None:
    output, _ = light("--help")
    for name, command in OWN.items():
        assert f"  {name}" in output
        assert command.help in output
    assert ", ".join(ANOMALIBS) in output
    assert max(map(len, output.splitlines())) < 100
    assert light() == ("", output + "\n")  # no command is a mistake


def test_the_version_is_the_distributions() -> None:
    assert light("--version") == (f"anomalib-sgfr {version('anomalib-sgfr')}", "")


@pytest.mark.parametrize(
    ("typed", "meant"), [("explian", "explain"), ("trian", "train"), ("exprot", "export")]
)
def test_a_mistyped_command_names_the_nearest(typed: str, meant: str) -> None:
    assert light(typed) == ("", f"error: there is no command '{typed}': did you mean {meant}?\n")


def test_a_command_that_is_like_no_other() -> None:
    _, said = light("zzz")
    assert said == "error: there is no command 'zzz': anomalib-sgfr --help lists them.\n"


@pytest.mark.parametrize("name", OWN)
def test_every_command_has_help_of_its_own(name: str) -> None:
    output, _ = light(name, "--help")
    assert output.startswith(f"usage: anomalib-sgfr {name} ")
    assert callable(import_module(OWN[name].module).main)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            [],
            (
                "error: the checkpoint is missing: put it first, or pass --ckpt_path CKPT"
                " (anomalib-sgfr explain --help)"
            ),
        ),
        (["tests"], "error: the checkpoint is missing: put it first, or pass --ckpt_path CKPT"),
        (["--ckpt_path", "LICENSE"], "error: pass images: a file or a folder"),
        (
            ["tests", "--ckpt_path", "LICENSE", "--out", "LICENSE/x"],
            "LICENSE is a file, not a folder",
        ),
        (
            ["nowhere", "--ckpt_path", "LICENSE"],
            "error: argument images: nowhere: no such file or folder",
        ),
        (
            ["tests", "--ckpt_path", "gone.ckpt"],
            "error: argument --ckpt_path: gone.ckpt: no such file or folder",
        ),
        (
            ["tests", "--ckpt_path", "LICENSE", "--regions", "0"],
            "--regions: must be an integer of at least 1, got '0'",
        ),
        (
            ["tests", "--ckpt_path", "LICENSE", "--regions", "x"],
            "--regions: must be an integer of at least 1, got 'x'",
        ),
        (
            ["tests", "--ckpt_path", "LICENSE", "--regoins", "2"],
            "error: unrecognized arguments: --regoins 2",
        ),
    ],
)
def test_what_is_wrong_with_arguments_of_explain_is_one_line(
    arguments: list[str], said: str
) -> None:
    output, errors = light("explain", *arguments)
    assert output == ""
    assert said in errors
    assert errors.count("\n") == 1


def test_anomalibs_commands_are_all_known() -> None:
    cli = AnomalibCLI(["install"], run=False)
    assert set(ANOMALIBS) == set(cli.subcommand_parsers)


def ours() -> None:
    training_files("tiles")


def systems() -> None:
    Path("nowhere/at/all").read_text(encoding="utf-8")


def noted() -> None:
    error = KeyError("worker 3 of 4")
    error.add_note("somebody else's")
    error.add_note(Reason("bad/01.png cannot be read:\n  cut short"))
    raise error


def raised_elsewhere() -> None:
    msg = "raised in the tests,\nso nobody meant it for a user"
    raise ValueError(msg)


@pytest.mark.parametrize(
    ("fault", "said", "traced"),
    [
        (ours, "error: split_name must be one of canonical, tile, got 'tiles'.", False),
        (systems, "error: [Errno 2] No such file or directory: 'nowhere/at/all'", False),
        (noted, "error: bad/01.png cannot be read: cut short", False),
        (
            raised_elsewhere,
            "error: ValueError: raised in the tests, so nobody meant it for a user",
            True,
        ),
    ],
)
@pytest.mark.parametrize("asked", ["no", "option", "variable"])
def test_the_reason_is_the_last_line(
    fault: object,
    said: str,
    traced: bool,
    asked: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(commands, "_run_anomalib", lambda _: fault())  # type: ignore[operator]
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    monkeypatch.setenv("ANOMALIB_SGFR_TRACEBACK", "1" if asked == "variable" else "0")
    assert main([*(["--traceback"] if asked == "option" else []), "train"]) == 1
    *before, last = capsys.readouterr().err.splitlines()
    assert last == said
    assert any("Traceback" in line for line in before) == (traced or asked != "no")
    assert before == [] or traced or asked != "no"


def test_options_and_commands_are_handed_on_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    monkeypatch.setattr(commands, "_run_anomalib", seen.append)
    assert main(["--config", "file.yaml", "train"]) == 0
    assert main(["--traceback", "fit", "--help"]) == 0
    assert seen == [["--config", "file.yaml", "train"], ["fit", "--help"]]


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_a_console_that_cannot_show_a_name_does_not_fail_the_command(
    encoding: str, tmp_path: Path
) -> None:
    module = tmp_path / "named.py"
    module.write_text("def main(arguments): print('Report: 良品'); return 0", encoding="utf-8")
    call = "import sys; from anomalib_sgfr.commands import main as m\n"
    call += "m.OWN['named'] = m.Command('named', ''); sys.exit(m.main(['named']))"
    done = subprocess.run(
        [sys.executable, "-c", call],
        cwd=ROOT,
        env={
            **os.environ,
            "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}",
            "PYTHONIOENCODING": encoding,
        },
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout == b"Report: \\u826f\\u54c1\n"
