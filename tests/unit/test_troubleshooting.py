"""The troubleshooting page tells of messages that the package has, word for word."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
MESSAGES = re.findall(r"^### `(.*)`$", PAGE, re.MULTILINE)


def strings() -> list[str]:
    """All texts of the package, with a tab for each value that is put in."""
    found = []
    for file in (ROOT / "anomalib_sgfr").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [
                    part.value if isinstance(part, ast.Constant) else "\t" for part in node.values
                ]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(re.sub(r"%[sd]", "\t", node.value))
    return found


STRINGS = strings()


def is_said(message: str) -> bool:
    pattern = re.compile(".*?".join(map(re.escape, message.split("..."))))
    return any(pattern.search(text) for text in STRINGS)


@pytest.mark.parametrize("message", MESSAGES)
def test_a_message_of_the_page_is_one_of_the_package(message: str) -> None:
    assert is_said(message)


def test_a_message_of_other_words_is_noticed() -> None:
    assert not is_said("there is no such command '...'")
    assert len(set(MESSAGES)) == len(MESSAGES) >= 20
