"""Source tree in CONTRIBUTING.md, a sentence for each module from its docstring.

    python -m tests.documents

Rewrites what stands between the markers in ``CONTRIBUTING.md``.
"""

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
CONTRIBUTING = ROOT / "CONTRIBUTING.md"
BLOCK = re.compile(r"(?<=<!-- tree -->\n```text\n).*?(?=```\n<!-- end of tree -->)", re.DOTALL)


def tree(package: Path) -> str:
    """A line for each module and subpackage: its name, and the first sentence of its docstring."""
    lines = []
    folders = sorted(file.parent for file in package.glob("*/__init__.py"))
    for folder in (package, *folders):
        indent = "  " if folder == package else "    "
        if folder == package:
            lines.append(f"{package.name}/")
        else:
            lines.append(f"  {folder.name + '/':<22}{sentence(folder / '__init__.py')}")
        lines += [
            f"{indent + file.stem:<24}{sentence(file)}" for file in sorted(folder.glob("[!_]*.py"))
        ]
    return "\n".join(lines) + "\n"


def sentence(file: Path) -> str:
    """First sentence of a module's docstring, as plain text."""
    docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    first = " ".join(docstring.split("\n\n")[0].split())
    return re.sub(r"(?::\w+:)?`+~?([^`]+)`+", r"\1", first)


def main() -> int:
    """Rewrite the tree; returns the exit code."""
    text = CONTRIBUTING.read_text(encoding="utf-8")
    written, number = BLOCK.subn(lambda _: tree(ROOT / "anomalib_sgfr"), text)
    CONTRIBUTING.write_text(written, encoding="utf-8")
    return int(number != 1)


if __name__ == "__main__":
    sys.exit(main())
