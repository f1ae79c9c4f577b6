"""What is written for people: the source tree in CONTRIBUTING.md, names of files, words."""

import itertools
import re
import tomllib

import pytest

from tests.documents import BLOCK, CONTRIBUTING, ROOT, tree

TEXTS = [
    *ROOT.glob("*.md"),
    *(ROOT / "docs").rglob("*.md"),
    *(ROOT / "benchmarks").glob("*.md"),
    *(ROOT / "anomalib_sgfr").rglob("*.py"),
    *(ROOT / "benchmarks").rglob("*.py"),
    *(ROOT / "examples").glob("*.py"),
    *(ROOT / "configs").glob("*.yaml"),
]
# earlier names, which have to be written there
EXEMPT = {ROOT / "CHANGELOG.md", ROOT / "anomalib_sgfr" / "aliases.py"}
# metaphors and private words of earlier versions, and what to write in place of them
WORDS = {
    r"ears|hears?|heard": "layers that contribute to the anomaly map or the image score",
    r"verdicts?": "image-level prediction, image score",
    r"rests? on|vouch(es|ed)?": "calibrated on, supports",
    r"looks at|looked at": "reads, checks",
    r"house|rooms|wings?": "package, modules",
    r"witness|aught": "plain English",
    r"another light": "domain shift",
    r"in force": "current threshold",
    r"true range": "high bit depth",
    r"gallery": "training crops",
    r"(?:an?|the|of|in|these|result|test|large|small|grey) pictures?": "image",
}


def names(lines: str) -> list[str]:
    """First word of each line, with its indent."""
    return [found[0] for line in lines.splitlines() if (found := re.match(r" *\S+", line))]


def test_contributing_lists_every_module() -> None:
    (written,) = BLOCK.findall(CONTRIBUTING.read_text(encoding="utf-8"))
    assert names(written) == names(tree(ROOT / "anomalib_sgfr")), "run python -m tests.documents"


def test_every_module_says_what_it_is() -> None:
    for line in tree(ROOT / "anomalib_sgfr").splitlines()[1:]:
        assert len(line.split()) > 2, line


def test_api_pages_list_every_public_module() -> None:
    """The site's build refuses a page that lacks one, minutes later."""
    for page in (ROOT / "docs" / "api").glob("*.md"):
        listed = re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
        for module in (ROOT / "anomalib_sgfr" / page.stem).glob("[!_]*.py"):
            if "__all__" in module.read_text(encoding="utf-8"):
                assert f"anomalib_sgfr.{page.stem}.{module.stem}" in listed, page.name


def test_pyproject_names_files_that_exist() -> None:
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    build = tool["hatch"]["build"]["targets"]
    patterns = [
        *tool["ruff"]["lint"]["per-file-ignores"],
        *(path.lstrip("/") for path in build["sdist"]["include"]),
    ]
    overrides = itertools.chain(*(entry["module"] for entry in tool["mypy"]["overrides"]))
    patterns += [
        name.replace(".", "/") + "*" for name in overrides if name.startswith("anomalib_sgfr")
    ]
    gone = [pattern for pattern in patterns if not any(ROOT.glob(pattern))]
    assert not gone


def test_the_citation_has_the_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {project['version']}\n" in citation


def test_every_file_names_the_versions_of_python_that_pyproject_does() -> None:
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    classifiers = " ".join(pyproject["project"]["classifiers"])
    tested = re.findall(r"Python :: (3\.\d+)", classifiers)
    oldest, newest = tested[0], tested[-1]
    assert pyproject["project"]["requires-python"] == f">={oldest}"
    assert pyproject["tool"]["mypy"]["python_version"] == oldest
    texts = {path: path.read_text(encoding="utf-8") for path in [*TEXTS, ROOT / "Makefile"]}
    ranges = {
        path.name: found
        for path, text in texts.items()
        if (found := re.findall(r"Python (3\.\d+) to (3\.\d+)", text)) and path not in EXEMPT
    }
    assert {"Makefile", "README.md"} <= set(ranges)
    assert {pair for pairs in ranges.values() for pair in pairs} == {(oldest, newest)}
    makefile = texts[ROOT / "Makefile"]
    assert f"({oldest.replace('.', ', ')}) <= sys.version_info" in makefile
    assert "for python in " + " ".join(f"python{each}" for each in reversed(tested)) in makefile
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    assert f'python: ["{oldest}", "{newest}"]' in workflow


@pytest.mark.parametrize("words", WORDS)
def test_a_word_of_earlier_versions_does_not_come_back(words: str) -> None:
    pattern = re.compile(rf"(?<![\w/`.-])(?:{words})(?![\w/`.-])", re.IGNORECASE)
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in sorted({*TEXTS} - EXEMPT)
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if pattern.search(line)
    ]
    assert not found, f"write '{WORDS[words]}':\n" + "\n".join(found)
