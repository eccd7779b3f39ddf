"""What the subcommands share: which of them is meant, their help, and words from the command line.

Every parser is made by `make_parser` and read by `parse_words`, every choice of a subcommand goes through
`choose_command`: so help looks alike everywhere, and the Tab key finds what is possible (`completing.py`).
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import shutil
import textwrap
from collections.abc import Mapping, Sequence
from typing import NoReturn, TypeVar

from dual_policy_plugin.commands.completing import COMPLETING, complete_command, complete_words
from dual_policy_plugin.errors import ConfigError

HELP_WORDS = ("-h", "--help", "help")
_MAX_WIDTH = 100
_MIN_WIDTH = 40

Command = TypeVar("Command")


def choose_command(
    program: str,
    words: list[str],
    commands: Mapping[str, tuple[Command, str]],
    *,
    examples: Sequence[str] = (),
    groups: Mapping[str, Sequence[str]] | None = None,
    note: str = "",
) -> Command | None:
    """The command that the first word names; None where it asks for help, which is printed.

    Args:
        program: what stands before the words, beginning with `dual-policy`.
        words: of the command line, behind the program.
        commands: name -> the command and its summary.
        examples: command lines that work as they stand, for the help.
        groups: heading -> names of commands, in the order of the help; None: all under one heading.
        note: ends the help.

    Raises:
        ConfigError: no such command; names the nearest one.
    """
    if COMPLETING in os.environ and not words:
        complete_command(program, list(commands))
    if not words or words[0] in HELP_WORDS:
        _print_commands(program, commands, groups or {"commands": list(commands)}, examples, note)
        return None
    name = words[0]
    if name not in commands:
        is_override = "=" in name and "train" in commands
        near = ["train"] if is_override else difflib.get_close_matches(name, commands, n=1)
        hint = f"did you mean `{program} {near[0]}`? " if near else ""
        given = f"{program} {name}".removeprefix("dual-policy ")
        raise ConfigError(f"{given} is not a command; {hint}there are {', '.join(commands)}")
    return commands[name][0]


def _print_commands(
    program: str,
    commands: Mapping[str, tuple[Command, str]],
    groups: Mapping[str, Sequence[str]],
    examples: Sequence[str],
    note: str,
) -> None:
    column = max(8, *map(len, commands))
    lines = [f"usage: {program} COMMAND [...]", ""]
    for heading, names in groups.items():
        lines.append(f"{heading}:")
        for name in names:
            summary = textwrap.wrap(commands[name][1], _help_width() - column - 3)
            lines.append(f"  {name:{column}} {summary[0]}")
            lines += [" " * (column + 3) + more for more in summary[1:]]
    if examples:
        lines += ["", "examples:", *(f"  {example}" for example in examples)]
    lines += ["", *textwrap.wrap(f"`{program} COMMAND --help` says more.{note}", _help_width())]
    print("\n".join(lines))


def make_parser(
    program: str, usage: str, description: str, *, examples: Sequence[str], note: str = "", allow_abbrev: bool = True
) -> argparse.ArgumentParser:
    """The parser of a command, with a help of one form.

    Args:
        program: the words before its own, beginning with `dual-policy`.
        usage: what may follow them.
        description: what the command does.
        examples: command lines that work as they stand; they end the help.
        note: stands between the options and the examples.
        allow_abbrev: whether an option may be shortened.
    """
    shown = "\n".join(f"  {example}" for example in examples)
    return argparse.ArgumentParser(
        prog=program,
        usage=f"{program} {usage}".replace("%", "%%"),
        description=description,
        epilog="\n".join([*([note, ""] if note else []), "examples:", shown]),
        formatter_class=_Help,
        allow_abbrev=allow_abbrev,
    )


class _Help(argparse.HelpFormatter):
    """The help of argparse, no wider than is good to read, and with examples as they stand."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=26, width=_help_width())

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        lines = (
            indent + line if line.startswith("  ") else textwrap.fill(line, width, break_on_hyphens=False)
            for line in text.splitlines()
        )
        return "\n".join(lines)


def _help_width() -> int:
    return min(max(shutil.get_terminal_size().columns, _MIN_WIDTH), _MAX_WIDTH)


def check_read(overrides: list[str], unread: Mapping[str, str]) -> None:
    """Raises a ConfigError for an override that a command would not read, though its name says that it does.

    Args:
        overrides: words of the command line for the config.
        unread: key -> what to do instead.
    """
    for word in overrides:
        mend = unread.get(word.partition("=")[0].lstrip("+"))
        if mend is not None:
            raise ConfigError(f"{word} is not read here; {mend}")


def seed_word(word: str) -> int:
    """The seed that a word is; for a parser's `type`."""
    if re.fullmatch(r"[0-9]{1,10}", word) is None or int(word) >= 2**31:
        raise argparse.ArgumentTypeError(f"{word!a} is no seed; use a whole number from 0 to {2**31 - 1}")
    return int(word)


def parse_words(
    parser: argparse.ArgumentParser, words: list[str], hint: str = "", *, is_mixed: bool = False
) -> argparse.Namespace:
    """The parsed words, with a ConfigError in place of argparse's usage text and exit; flags anywhere if `is_mixed`.

    While a shell asks for completions it is answered instead, and the process ends.
    """
    if COMPLETING in os.environ:
        complete_words(parser)

    def fail(message: str) -> NoReturn:
        message, near = _nearest(message, parser, words)
        raise ConfigError(f"{message}; {near}{hint or f'see `{parser.prog} --help`'}")

    parser.error = fail  # type: ignore[method-assign]
    return parser.parse_intermixed_args(words) if is_mixed else parser.parse_args(words)


def _nearest(message: str, parser: argparse.ArgumentParser, words: list[str]) -> tuple[str, str]:
    """The message, of words that are not known only those; and a question where something like one is known."""
    what = "unrecognized arguments: "
    known: list[str] = list(parser._option_string_actions)
    given = ""
    unknown = [word for word in message.removeprefix(what).split(" ") if word.startswith("-") and word in words]
    if message.startswith(what) and unknown:  # behind one argparse names words that it could have read
        message = what + " ".join(unknown)
        given = unknown[0].partition("=")[0]
    elif message.startswith("the following arguments are required"):  # one of them may be there, mistyped
        options = [word.partition("=")[0] for word in words if word.startswith("--")]
        given = next((word for word in options if not any(name.startswith(word) for name in known)), "")
    for action in parser._actions:
        name = "/".join(action.option_strings) or action.metavar or action.dest
        if action.choices is not None and message.startswith(f"argument {name}: invalid choice: '"):
            known, given = list(map(str, action.choices)), message.split("'")[1]
    near = difflib.get_close_matches(given, known, n=1)
    return message, f"did you mean {near[0]}? " if near else ""
