"""Writes the pages that are made from the source: `python -m docs.generate`, or `make docs-reference`."""

from __future__ import annotations

from pathlib import Path

from docs.config_page import config_page
from docs.error_page import error_page

DOCS = Path(__file__).parent
PACKAGE = DOCS.parent / "dual_policy_plugin"


def pages() -> dict[Path, str]:
    """Each generated page and what it has to say now."""
    return {DOCS / "configuration.md": config_page(DOCS.parent), DOCS / "errors.md": error_page(PACKAGE)}


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text, "utf-8")
        print(f"{path.relative_to(DOCS.parent)}: {len(text.splitlines())} lines")
