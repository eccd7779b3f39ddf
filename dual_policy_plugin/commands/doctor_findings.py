"""What a probe of `dual-policy doctor` gives: a Finding a line."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

OK, MISSING, WRONG = "ok", "missing", "wrong"


@dataclass(kw_only=True, slots=True, frozen=True)
class Finding:
    """One line of the answer."""

    what: str
    state: str
    """ok | missing | wrong."""
    fact: str
    mend: str = ""
    """What to do; empty where nothing is to be done."""
    is_needed: bool = False
    """Whether training needs it."""


def read_text(path: str) -> str:
    """A file's text; empty where it cannot be read."""
    try:
        return Path(path).read_text("utf-8", errors="replace")
    except OSError:
        return ""
