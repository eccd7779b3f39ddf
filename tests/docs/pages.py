"""The pages of the documentation as the tests read them: fenced blocks, commands, links, anchors."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import dual_policy_plugin

ROOT = Path(dual_policy_plugin.__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "examples").rglob("*.md"))]
_FENCE = re.compile(r"^```([^\n`]*)\n(.*?)^```$", re.M | re.S)
_INDENTED = re.compile(r"(?:(?<=\n\n)|\A)((?: {4}[^\n]*\n+)+)")


@dataclass(frozen=True)
class Block:
    """One block of code of a page."""

    page: Path
    language: str
    """Of its fence; where it has none, `session` if it shows a prompt and what came back, else `indented`: commands."""
    text: str

    @property
    def where(self) -> str:
        return f"{self.page.relative_to(ROOT)}: {self.text.splitlines()[0][:60]}"


def blocks(page: Path) -> list[Block]:
    """All blocks of a page: those in fences, then those that are indented."""
    text = page.read_text("utf-8")
    fenced = [Block(page, language, body) for language, body in _FENCE.findall(text)]
    assert text.count("```") == 2 * len(fenced), f"{page.name}: a fence that does not begin its line, or has no end"
    indented = (re.sub(r"^ {4}", "", body, flags=re.M).strip() + "\n" for body in _INDENTED.findall(prose(page)))
    return fenced + [Block(page, "session" if body.startswith("$ ") else "indented", body) for body in indented]


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return _FENCE.sub("", page.read_text("utf-8"))


def commands(page: Path) -> list[str]:
    """The command lines of a page, without comments, in their order."""
    found = []
    for block in blocks(page):
        if block.language in ("sh", "indented"):
            lines = re.sub(r"\\\n\s*", "", block.text).splitlines()
            found += [without_comment(line) for line in lines if without_comment(line)]
    return found


def mentions(page: Path) -> list[str]:
    """The commands of ours in a page's sentences and tables."""
    return re.findall(r"`((?:make|dual-policy) [^`]+)`", " ".join(prose(page).split()))


def without_comment(line: str) -> str:
    """A command line as it is typed, without the comment behind it."""
    lexer = shlex.shlex(line, posix=False, punctuation_chars=False)
    lexer.whitespace_split, lexer.commenters = True, ""
    words = []
    for word in lexer:
        if word.startswith("#"):
            break
        words.append(word)
    return " ".join(words)


def links(page: Path) -> list[str]:
    """The targets of a page's links and pictures."""
    text = re.sub(r"`[^`\n]*`", "", prose(page))
    return re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and the site make them."""
    titles = re.findall(r"^#+ (.*)$", prose(page), re.M)
    plain = (re.sub(r"[`*]", "", title).lower() for title in titles)
    return {re.sub(r"[^\w\- ]", "", title).replace(" ", "-") for title in plain}
