"""README for the package index: its links lead to the repository as files beside it are missing."""

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

_LINK = re.compile(r"(!?)(\[[^\]]*\]\()(?!https?://|#)([^)]+)\)")


def absolute(text: str, repository: str) -> str:
    """Markdown with the links to files of a repository made absolute.

    Args:
        text (str): Markdown whose links are relative to the repository's root.
        repository (str): Its address.

    Returns:
        str: The same, with pages at ``blob/main`` and pictures at ``raw/main``.
    """
    return _LINK.sub(
        lambda found: (
            f"{found[1]}{found[2]}{repository}/{'raw' if found[1] else 'blob'}/main/{found[3]})"
        ),
        text,
    )


class ReadmeHook(MetadataHookInterface):
    """Fills in ``readme``, which ``pyproject.toml`` declares dynamic."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Add the README to the metadata."""
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        metadata["readme"] = {
            "content-type": "text/markdown",
            "text": absolute(text, metadata["urls"]["Source"]),
        }
