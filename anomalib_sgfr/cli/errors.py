"""What parsers, Lightning and the system say of a mistake, in one line that says what would be
right.
"""

import difflib
import enum
import inspect
import re
import sys
from importlib import import_module
from pathlib import Path
from types import FrameType

__all__ = ["explain_error", "in_one_line"]

_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "NoneType": "null",
    "Sequence": "a list",
}
_HOMES = {"model": "anomalib.models", "data": "anomalib.data"}


def in_one_line(message: str) -> str:
    """What jsonargparse says of an argument, in some eight lines, in one.

    Args:
        message (str): Its message; one of another form is kept, on one line.
    """
    keys = re.findall(r'Parser key "([^"]+)"', message)
    unknown = re.search(r"Option '([^']+)' is not accepted", message)
    required = re.search(r"Option '(\w+\.)?([\w.]+)' is required", message)
    if required:  # of the command, or of a class
        return (
            f"--{required[2]} is missing"
            if required[1]
            else f"--{keys[0]}.{required[2]} is missing"
        )
    if not keys:
        return " ".join(message.split())
    if unknown:
        return f"there is no --{keys[0]}.{unknown[1]}{_near(unknown[1], _parameters(message))}"
    block = message[message.rindex('Parser key "') :]
    expected = re.findall(r"Expected (?:an? )?(.+?)(?:\. Got value: .*)?$", block, re.MULTILINE)
    given = re.search(r"(?:Got value|Given value): (.*)$", block, re.MULTILINE)
    path = re.search(r"dot import path string: (\S+)", block)
    if path:
        names = getattr(import_module(_HOMES[keys[0]]), "__all__", []) if keys[0] in _HOMES else []
        return f"--{keys[0]}: there is no '{path[1]}'{_near(path[1], names)}"
    wanted = _kinds(expected)
    if not wanted or not given:
        return " ".join(message.split())
    name = ".".join(dict.fromkeys((keys[0], keys[-1])))
    return f"--{name} must be {' or '.join(wanted)}, got '{given[1]}'"


def _kinds(expected: list[str]) -> list[str]:
    """What would do, in words, each once; that nothing would is said only where nothing else would."""
    options: list[str] = []
    kinds: list[str] = []
    for item in expected:
        listed = re.search(r"Literal\[(.*)\]|<enum '\w+'>: \{(.*)\}", item)
        named = re.fullmatch(r"<class '(?:[\w.]*\.)?(\w+)'>", item)
        if listed:
            options += [
                option.strip() for option in (listed[1] or listed[2]).replace("'", "").split(",")
            ]
        else:
            kinds.append(_KINDS.get(named[1], f"a {named[1]}") if named else f"a {item}")
    found = list(dict.fromkeys(kinds)) + (
        [f"one of {', '.join(dict.fromkeys(options))}"] if options else []
    )
    return [item for item in found if item != "null"] or found


def _parameters(message: str) -> list[str]:
    """Arguments of the class that a message is about."""
    path = re.search(r"class_path '([\w.]+)\.(\w+)'", message)
    found = getattr(import_module(path[1]), path[2], None) if path else None
    return list(inspect.signature(found).parameters) if callable(found) else []


def _near(name: str, names: list[str]) -> str:
    near = difflib.get_close_matches(name, names, n=2)
    return f": did you mean {' or '.join(near)}?" if near else ""


def explain_error(error: BaseException, frame: FrameType | None) -> str | None:
    """What others' errors mean that say it in other words, or leave out what would be right.

    Args:
        error (BaseException): The error.
        frame (FrameType | None): That it was raised in.

    Returns:
        str | None: The words, or ``None`` where its own are as good.
    """
    said = str(error)
    missing = re.match(r"`(\w+)_dataloader` must be implemented", said)
    if missing:
        return (
            f"there are no images to {missing[1]} {'on' if missing[1] == 'train' else 'with'}: pass"
            " --data"
        )
    path = re.match(r"Path contains non-printable characters: (.*)", said, re.DOTALL)
    if path:
        return (
            f"anomalib takes paths of ASCII characters only, and {path[1]!r} has others: rename or"
            " copy the folder (to predict, go into the folder and pass a relative path; report and"
            " explain take any)"
        )
    kind = frame.f_locals.get("cls") if frame is not None and "is not a valid" in said else None
    if isinstance(kind, enum.EnumType):
        return f"{said}: it must be one of {', '.join(str(item.value) for item in kind)}"  # type: ignore[var-annotated]
    return _of_the_system(error) or _of_a_run(error)


def _of_the_system(error: BaseException) -> str | None:
    if isinstance(error, FileExistsError | NotADirectoryError):
        return f"'{error.filename}' is a file, or lies under one: a folder is needed there"
    if not isinstance(error, IsADirectoryError):
        return None
    if Path(str(error.filename)).name == "latest":
        return (
            f"'{error.filename}' is a folder, and anomalib makes a link of that name: rename the"
            " folder, or remove it"
        )
    return f"'{error.filename}' is a folder: a file is needed there"


def _of_a_run(error: BaseException) -> str | None:
    run = sys.modules.get(
        "anomalib_sgfr.training.errors"
    )  # loaded with PyTorch, if a run has begun
    found: str | None = run.remedy(error) if run else None
    return found
