"""Errors of parsers, Lightning and the system in one line that says what would be right."""

import difflib
import enum
import inspect
import re
import sys
from importlib import import_module
from pathlib import Path
from types import FrameType

__all__ = ["explain_error", "in_one_line"]

_TYPES = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "NoneType": "null",
    "Sequence": "a list",
}
_PACKAGES = {"model": "anomalib.models", "data": "anomalib.data"}


def in_one_line(message: str) -> str:
    """Jsonargparse's message about an argument, of some eight lines, in one line.

    Args:
        message (str): The message. One of another form is kept, on one line.

    Returns:
        str: The line.
    """
    keys = re.findall(r'Parser key "([^"]+)"', message)
    required = re.search(r"Option '(\w+\.)?([\w.]+)' is required", message)
    if required:  # by the command, or by a class
        return f"--{'' if required[1] else f'{keys[0]}.'}{required[2]} is missing"
    if not keys:
        return " ".join(message.split())
    unknown = re.search(r"Option '([^']+)' is not accepted", message)
    if unknown:
        return f"there is no --{keys[0]}.{unknown[1]}{_near(unknown[1], _parameters(message))}"
    block = message[message.rindex('Parser key "') :]
    path = re.search(r"dot import path string: (\S+)", block)
    if path:
        package = _PACKAGES.get(keys[0])
        names = getattr(import_module(package), "__all__", []) if package else []
        return f"--{keys[0]}: there is no '{path[1]}'{_near(path[1], names)}"
    expected = re.findall(r"Expected (?:an? )?(.+?)(?:\. Got value: .*)?$", block, re.MULTILINE)
    given = re.search(r"(?:Got value|Given value): (.*)$", block, re.MULTILINE)
    allowed = _allowed(expected)
    if not allowed or not given:
        return " ".join(message.split())
    name = ".".join(dict.fromkeys((keys[0], keys[-1])))
    return f"--{name} must be {' or '.join(allowed)}, got '{given[1]}'"


def _allowed(expected: list[str]) -> list[str]:
    """Types and values that an argument can have; ``null`` only where there is no other."""
    values: list[str] = []
    types: list[str] = []
    for item in expected:
        listed = re.search(r"Literal\[(.*)\]|<enum '\w+'>: \{(.*)\}", item)
        named = re.fullmatch(r"<class '(?:[\w.]*\.)?(\w+)'>", item)
        if listed:
            values += map(str.strip, (listed[1] or listed[2]).replace("'", "").split(","))
        else:
            types.append(_TYPES.get(named[1], f"a {named[1]}") if named else f"a {item}")
    found = list(dict.fromkeys(types))
    found += [f"one of {', '.join(dict.fromkeys(values))}"] if values else []
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
    """Explanation of an error of another package whose message does not say what would be right.

    Args:
        error (BaseException): The error.
        frame (FrameType | None): Frame that raised it.

    Returns:
        str | None: The explanation; ``None`` where the error's own message is as good.
    """
    message = str(error)
    missing = re.match(r"`(\w+)_dataloader` must be implemented", message)
    if missing:
        use = "train on" if missing[1] == "train" else f"{missing[1]} with"
        return f"there are no images to {use}: pass --data"
    path = re.match(r"Path contains non-printable characters: (.*)", message, re.DOTALL)
    if path:
        return (
            f"anomalib takes paths of ASCII characters only, and {path[1]!r} has others: rename or"
            " copy the folder (to predict, go into the folder and pass a relative path; report and"
            " explain take any)"
        )
    kind = frame.f_locals.get("cls") if frame is not None and "is not a valid" in message else None
    if isinstance(kind, enum.EnumType):
        members: list[enum.Enum] = list(kind)
        return f"{message}: it must be one of {', '.join(str(item.value) for item in members)}"
    run = sys.modules.get("anomalib_sgfr.training.errors")  # loaded with PyTorch by a run
    return _explain_system_error(error) or (run.remedy(error) if run else None)


def _explain_system_error(error: BaseException) -> str | None:
    if isinstance(error, FileExistsError | NotADirectoryError):
        return f"'{error.filename}' is a file, or lies under one: a folder is needed there"
    if not isinstance(error, IsADirectoryError):
        return None
    if Path(str(error.filename)).name != "latest":
        return f"'{error.filename}' is a folder: a file is needed there"
    return (
        f"'{error.filename}' is a folder, and anomalib makes a link of that name: rename the"
        " folder, or remove it"
    )
