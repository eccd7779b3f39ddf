"""What the subcommands share: words from the command line in, a table of text out."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NoReturn

from dual_policy_plugin.errors import ConfigError


def parse_words(
    parser: argparse.ArgumentParser, words: list[str], hint: str = "", *, is_mixed: bool = False
) -> argparse.Namespace:
    """The parsed words, with a ConfigError in place of argparse's usage text and exit; flags anywhere if `is_mixed`."""

    def fail(message: str) -> NoReturn:
        raise ConfigError(f"{message}; {hint or f'see `{parser.prog} --help`'}")

    parser.error = fail  # type: ignore[method-assign]
    return parser.parse_intermixed_args(words) if is_mixed else parser.parse_args(words)


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lines of aligned columns, two spaces apart; nothing is cut off, so that a URI can be copied.

    What would move a terminal's cursor is written out: names and metadata come from other people.
    """
    lines = [[printable(cell) for cell in line] for line in (header, *rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def printable(text: str) -> str:
    """`text` with an escape in place of every character that cannot be seen."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)
