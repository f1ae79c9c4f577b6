"""Docstrings for mkdocstrings: Sphinx markup of formulas and references becomes Markdown."""

import re
from typing import Any

import griffe

_INLINE = re.compile(r":math:`([^`]+)`")
_DISPLAY = re.compile(r"^( *)\.\. math::(.*(?:\n(?:\1 +.*|(?=\n)))*)", re.MULTILINE)
_REFERENCE = re.compile(r":(?:class|data|func|meth|mod):`(~?)([^`]+)`")


class SphinxMarkup(griffe.Extension):
    """Rewrites the docstrings of a package once all of it is known."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:  # noqa: ANN401
        """Rewrite them all, and have what the package exports documented there alone."""
        _rewrite(pkg)
        for member in pkg.members.values():
            if isinstance(member, griffe.Alias) and member.is_exported:
                member.final_target.public = False


def _rewrite(thing: griffe.Object) -> None:
    if thing.docstring:
        thing.docstring.value = _markdown(thing.docstring.value, thing)
    for name, member in list(thing.members.items()):
        if isinstance(member, griffe.Function) and member.is_special and name != "__init__":
            thing.del_member(name)  # Python calls it, not the reader
        elif isinstance(member, griffe.Object):
            _rewrite(member)


def _markdown(text: str, scope: griffe.Object) -> str:
    def display(found: re.Match[str]) -> str:
        indent, formula = found.groups()
        lines = [line.strip() for line in formula.strip().splitlines()]
        return "\n".join([*(indent + line for line in ("$$", *lines, "$$")), ""])

    def reference(found: re.Match[str]) -> str:
        short, name = found.groups()
        try:
            path = name if "." in name else scope.resolve(name)
        except griffe.NameResolutionError:
            path = name  # which leads nowhere, so that the build complains
        return f"[`{name.rpartition('.')[2] if short else name}`][{path}]"

    text = _DISPLAY.sub(display, text)
    text = _INLINE.sub(lambda found: f"${found[1]}$", text)
    return _REFERENCE.sub(reference, text)
