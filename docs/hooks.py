"""What MkDocs is asked to do besides: the site is made of files where they stand in the repository.

Every page keeps its path from the root of the repository, so that a link holds on the site as it
does there. Results join the navigation by themselves, formulas become MathML, which browsers draw
without a script, and links are followed in what was built.
"""

import html
import posixpath
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from math_core import LatexError, LatexToMathML
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import get_plugin_logger
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
# Besides docs/: pages, what they show, and what they link to.
OTHERS = ("CHANGELOG.md", "CONTRIBUTING.md", "benchmarks/README.md", "examples/run_openvino.py")
RESULTS = ("**/README.md", "**/*.png")

_RESULTS_HERE = "<!-- the table of results in README.md -->"
_RESULTS_THERE = re.compile(r"<!-- results -->\n(.*?)\n<!-- end of results -->", re.DOTALL)
_LINK = re.compile(r"(?<=\]\()([^)#\s:]+)(?=[)#])")
_FORMULA = re.compile(r'(<(span|div) class="arithmatex">)\\[\[(](.*?)\\[\])](</\2>)', re.DOTALL)

log = get_plugin_logger("site")
_mathml = LatexToMathML(annotation=True, fancy_error=False)


def on_pre_build(**_: Any) -> None:  # noqa: ANN401
    """Warn of modules that the page of their package lacks."""
    for page in (ROOT / "docs" / "api").glob("*.md"):
        written = page.read_text(encoding="utf-8").splitlines()
        for module in (ROOT / "anomalib_sgfr" / page.stem).glob("[!_]*.py"):
            name = f"anomalib_sgfr.{page.stem}.{module.stem}"
            if f"::: {name}" not in written and "__all__" in module.read_text(encoding="utf-8"):
                log.warning("docs/api/%s lacks %s", page.name, name)


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Give the files of docs/ their path in the repository, and add what lies outside."""
    chosen = []
    for file in files:
        if file.src_dir != config.docs_dir:
            chosen.append(file)  # the theme's
        elif file.src_uri.endswith(".py"):
            continue
        else:
            chosen.append(_file(f"docs/{file.src_uri}", config, dest_uri=file.dest_uri))
    results = ROOT / "benchmarks" / "results"
    found = sorted(
        path.relative_to(ROOT).as_posix() for pattern in RESULTS for path in results.glob(pattern)
    )
    chosen += [_file(path, config) for path in (*OTHERS, *found)]
    pages = sorted((path for path in found if path.endswith(".md")), key=_name)
    for section in config.nav or []:
        if "Benchmarks" in section:
            section["Benchmarks"] += [{_name(path): path} for path in pages]
    return Files(chosen)


def on_page_markdown(markdown: str, *, page: Page, files: Files, **_: Any) -> str:  # noqa: ANN401
    """Put in the table of results; let links to a folder lead to its page."""

    def page_of(link: re.Match[str]) -> str:
        inside = posixpath.join(link[1], "README.md")
        path = posixpath.normpath(posixpath.join(posixpath.dirname(page.file.src_uri), inside))
        return inside if files.get_file_from_path(path) else link[1]

    if _RESULTS_HERE in markdown:
        table = _RESULTS_THERE.search((ROOT / "README.md").read_text(encoding="utf-8"))
        if table is None:
            log.warning("README.md has no table of results")
        else:
            markdown = markdown.replace(_RESULTS_HERE, table[1])
    return _LINK.sub(page_of, markdown)


def on_page_content(content: str, *, page: Page, **_: Any) -> str:  # noqa: ANN401
    """Turn formulas into MathML."""

    def drawn(formula: re.Match[str]) -> str:
        before, kind, latex, after = formula.groups()
        try:
            mathml = _mathml.convert_with_local_state(
                html.unescape(latex).strip(), displaystyle=kind == "div"
            )
        except LatexError as error:
            log.warning("%s: %s in %s", page.file.src_uri, error, latex)
            return formula[0]
        # browsers draw accents through the letter where they find no font for mathematics
        return before + mathml.replace(' accent="true"', "") + after

    if "<p>$$" in content:
        log.warning("%s: a formula between $$ was not recognised", page.file.src_uri)
    return _FORMULA.sub(drawn, content)


def on_post_build(*, config: MkDocsConfig) -> None:
    """Check every link of the built site; warn of those without a target."""
    site = Path(config.site_dir)
    built = {path: _Links.of(path) for path in site.rglob("*.html") if path.name != "404.html"}
    for path, links in built.items():
        for link in sorted(links.targets):
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (
                Path(posixpath.normpath(path.parent / unquote(parts.path))) if parts.path else path
            )
            place = unquote(parts.fragment)
            if not target.is_file():
                log.warning("%s: %s has no target", path.relative_to(site), link)
            elif place and target in built and place not in built[target].anchors:
                log.warning("%s: %s names no heading of that page", path.relative_to(site), link)


class _Links(HTMLParser):
    """What a page links to, shows or loads, and the places in it that can be linked to."""

    def __init__(self) -> None:
        super().__init__()
        self.targets: set[str] = set()
        self.anchors: set[str] = {"", "__skip"}

    @classmethod
    def of(cls, path: Path) -> "_Links":
        parser = cls()
        parser.feed(path.read_text(encoding="utf-8"))
        return parser

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if value and name in {"href", "src"}:
                self.targets.add(value)
            elif value and (name == "id" or (name == "name" and tag == "a")):
                self.anchors.add(value)


def _file(path: str, config: MkDocsConfig, dest_uri: str | None = None) -> File:
    return File(path, str(ROOT), config.site_dir, config.use_directory_urls, dest_uri=dest_uri)


def _name(path: str) -> str:
    """Title of results in the navigation: the name of their folder."""
    return posixpath.basename(posixpath.dirname(path))
