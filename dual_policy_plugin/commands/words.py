"""What the subcommands share: which of them is meant, and words from the command line."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Mapping
from typing import NoReturn, TypeVar

from dual_policy_plugin.errors import ConfigError

Command = TypeVar("Command")


def choose_command(
    program: str, words: list[str], commands: Mapping[str, tuple[Command, str]], note: str = ""
) -> Command | None:
    """The command that the first word names; None where it asks for help, which is printed.

    Args:
        program: what stands before the words, beginning with `dual-policy`.
        words: of the command line, behind the program.
        commands: name -> the command and its summary.
        note: ends the help.

    Raises:
        ConfigError: no such command; names the nearest one.
    """
    if not words or words[0] in ("-h", "--help", "help"):
        print(f"usage: {program} COMMAND [...]\n\ncommands:")
        width = max(8, *map(len, commands))
        for name, (_, summary) in commands.items():
            print(f"  {name:{width}} {summary}")
        print(f"\n`{program} COMMAND --help` says more.{note}")
        return None
    name = words[0]
    if name not in commands:
        is_override = "=" in name and "train" in commands
        near = ["train"] if is_override else difflib.get_close_matches(name, commands, n=1)
        hint = f"did you mean `{program} {near[0]}`? " if near else ""
        given = f"{program} {name}".removeprefix("dual-policy ")
        raise ConfigError(f"{given} is not a command; {hint}there are {', '.join(commands)}")
    return commands[name][0]


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


def parse_words(
    parser: argparse.ArgumentParser, words: list[str], hint: str = "", *, is_mixed: bool = False
) -> argparse.Namespace:
    """The parsed words, with a ConfigError in place of argparse's usage text and exit; flags anywhere if `is_mixed`."""

    def fail(message: str) -> NoReturn:
        what, near = "unrecognized arguments: ", ""
        unknown = [word for word in message.removeprefix(what).split(" ") if word.startswith("-") and word in words]
        if message.startswith(what) and unknown:  # behind one argparse names words that it could have read
            message = what + " ".join(unknown)
            options = parser._option_string_actions
            near = "".join(
                f"did you mean {one}? " for one in difflib.get_close_matches(unknown[0].partition("=")[0], options, n=1)
            )
        raise ConfigError(f"{message}; {near}{hint or f'see `{parser.prog} --help`'}")

    parser.error = fail  # type: ignore[method-assign]
    return parser.parse_intermixed_args(words) if is_mixed else parser.parse_args(words)
