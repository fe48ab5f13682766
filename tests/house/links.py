"""Links between the project's Markdown files: every file and every #anchor they name must be there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import PurePosixPath
from urllib.parse import unquote, urlsplit

from markdown_it import MarkdownIt
from markdown_it.token import Token

from tests.house.tree import Tree, Violation

_MARKDOWN = MarkdownIt("commonmark").enable(["table", "strikethrough"])
_HTML_ANCHOR = re.compile(r"""<\w+[^>]*\s(?:id|name)=["']([^"']+)["']""")


def broken_links(tree: Tree) -> list[Violation]:
    """Relative links that lead to no file of the project, or to no heading of it."""
    pages = {path: _MARKDOWN.parse(tree.text(path)) for path in tree.files if path.endswith(".md")}
    anchors = {path: _anchors(tokens) for path, tokens in pages.items()}
    there = {*tree.files, *tree.folders()}
    violations = []
    for path, tokens in pages.items():
        for line, link in _links(tokens):
            url = urlsplit(link)
            if url.scheme or url.netloc:
                continue
            target = _resolve(path, unquote(url.path)) if url.path else path
            if target is None or target not in there:
                remedy = "name a file of the project, relative to this one"
                violations.append(Violation(path, line, f"link to {link}, which is not there", remedy))
            elif url.fragment and target in anchors and unquote(url.fragment) not in anchors[target]:
                remedy = f"{target} has: {', '.join(sorted(anchors[target])) or 'no headings'}"
                violations.append(Violation(path, line, f"link to {link}: no such heading", remedy))
    return violations


def heading_anchor(text: str) -> str:
    """The anchor that GitHub gives a heading.

    >>> heading_anchor("What works, and what doesn't (yet)")
    'what-works-and-what-doesnt-yet'
    """
    return re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-")


def _resolve(page: str, link: str) -> str | None:
    """Path below the root; None if it leads out of it. A link that starts with / counts from the root, as on GitHub."""
    parts: list[str] = [] if link.startswith("/") else list(PurePosixPath(page).parent.parts)
    for part in PurePosixPath(link.lstrip("/")).parts:
        if part == ".." and not parts:
            return None
        if part == "..":
            parts.pop()
        else:
            parts.append(part)
    return "/".join(parts) or "."


def _links(tokens: list[Token]) -> Iterator[tuple[int, str]]:
    for token in tokens:
        line = token.map[0] + 1 if token.map else 1
        for child in token.children or []:
            if child.type in ("softbreak", "hardbreak"):
                line += 1
            link = child.attrGet("href") if child.type == "link_open" else child.attrGet("src")
            if link is not None:
                yield line, str(link)


def _anchors(tokens: list[Token]) -> set[str]:
    anchors: set[str] = set()
    for before, token in zip([None, *tokens], tokens, strict=False):
        if before is not None and before.type == "heading_open":
            text = "".join(child.content for child in token.children or [] if child.type in ("text", "code_inline"))
            anchor = plain = heading_anchor(text)
            repeats = 0
            while anchor in anchors:
                repeats += 1
                anchor = f"{plain}-{repeats}"
            anchors.add(anchor)
        if token.type in ("html_block", "inline"):
            anchors.update(_HTML_ANCHOR.findall(token.content))
    return anchors
