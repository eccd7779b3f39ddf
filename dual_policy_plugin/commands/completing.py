"""What the Tab key finds: commands, options and their choices, files, and for overrides what the config has.

A shell that sourced `dual-policy completion SHELL` runs the command with the line in the environment and takes the
answer from a file of its own (argcomplete's protocol). The command goes as far as its parser, which answers and ends
the process: nothing is ever run. Whatever goes wrong, it says nothing.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from dual_policy_plugin.config import SELECTOR_TYPES

COMPLETING = "_ARGCOMPLETE"
"""Set by the shell while it asks what the word under the cursor may become."""
OVERRIDE = "key=value"
"""Stands in a help for words of the config."""
URI_NAMES = ("URI", "NEW", "OLD", "FILE", "POLICY")
"""What a parser calls a word that names a policy."""
PATH_NAMES = ("FILE", "DIR")
"""What it calls an option's value that is a path."""
URI_KEYS = ("uri", "checkpoint_path", "policy_uri", "policies", "opponents", "held_out", "pool")
FILE_KEYS = ("train_dir", "lock", "out", "png", "sync_uri")
EVALUATE_KEYS = ("policies", "episodes", "out", "png")
CHOICES = {
    "device": ("auto", "cpu", "cuda"),
    "precision": ("auto", "fp32", "bf16"),
    "matchmaking": ("uniform", "weights", "latest_biased", "pfsp", "adaptive"),
    "assignment": ("first", "last", "interleaved"),
    "type": SELECTOR_TYPES,
    "act": ("sample", "greedy"),
}
"""Last part of a key, or name of an option -> its values."""


def answer(dispatch: Callable[[list[str]], int]) -> NoReturn:
    """Answers the shell and ends the process.

    Args:
        dispatch: what runs the words of a command line.
    """
    try:
        dispatch(_typed_words())
    except BaseException:  # a half-typed line is no error, and a trace would land in the middle of it
        os._exit(1)
    os._exit(0)


def complete_command(program: str, names: Sequence[str]) -> NoReturn:
    """Answers with those names of commands that fit."""
    parser = argparse.ArgumentParser(prog=program, add_help=False)
    parser.add_argument("command", choices=names)
    complete_words(parser)


def complete_words(parser: argparse.ArgumentParser) -> NoReturn:
    """Answers with what may stand under the cursor, by the parser of the command."""
    import argcomplete

    words = _typed_words()
    for action in parser._actions:
        kind = str(action.metavar or "").partition(".")[0]
        is_path = action.type is Path or kind in (PATH_NAMES if action.option_strings else ())
        if action.metavar == OVERRIDE or action.dest == "overrides":
            action.completer = _override_completer(parser, words)  # type: ignore[attr-defined]
        elif kind in URI_NAMES and not is_path:
            action.completer = lambda prefix, **_: [*_builtins(prefix), *_files(prefix)]  # type: ignore[attr-defined]
        elif action.option_strings and action.choices is None and not is_path:
            fitting = CHOICES.get(action.dest, ())  # a number, a name: nothing to offer
            action.completer = lambda fitting=fitting, **_: fitting  # type: ignore[attr-defined]
    # argcomplete counts the program's words from 1
    os.environ[COMPLETING] = str(int(os.environ[COMPLETING]) + len(parser.prog.split()) - 1)
    argcomplete.autocomplete(parser, always_complete_options=False, validator=_fits)
    os._exit(1)


def override_candidates(prefix: str, words: Sequence[str] = ()) -> list[str]:
    """What an override that begins with `prefix` may be: groups, their configs, keys, and values of keys.

    Args:
        prefix: a word of the command line up to the cursor.
        words: the overrides before it, which may bring keys of their own.
    """
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.plugins.completion_plugin import DefaultCompletionPlugin

    from dual_policy_plugin.hydra_app.overrides import CONFIG_DIR, PRIMARY_CONFIG

    key, equals, _ = prefix.partition("=")
    if equals and (values := list(_values(key.lstrip("+~"), prefix))):
        return values
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        plugin = DefaultCompletionPlugin(loader)
        groups, is_group = plugin._query_config_groups(prefix, config_name=PRIMARY_CONFIG, words=[])
        if is_group:
            return sorted(groups)
        config = _compose(loader, PRIMARY_CONFIG, words)
        bare = prefix.lstrip("+~")
        marks = prefix[: len(prefix) - len(bare)]
        if not marks:  # a group that the app does not list takes a plus
            listed = {name.partition("@")[0] for name in config.hydra.runtime.choices}
            groups = [one if _is_listed(one, listed) else f"+{one}" for one in groups]
        return sorted({*groups, *(f"{marks}{one}" for one in plugin._get_matches(config, bare))})


def _override_completer(parser: argparse.ArgumentParser, words: Sequence[str]) -> Callable[..., list[str]]:
    own = EVALUATE_KEYS if parser.prog.endswith("evaluate") else ()
    overrides = [word for word in words if "=" in word and word[:1] != "-" and word.partition("=")[0] not in own]

    def complete(prefix: str, **_: Any) -> list[str]:
        found = override_candidates(prefix, overrides)
        return [*(f"{name}=" for name in own if name.startswith(prefix)), *found]

    return complete


def _compose(loader: Any, name: str, words: Sequence[str]) -> Any:
    """The config with the words; of an interpolation nothing, which would tell a variable or fetch a policy."""
    from hydra.types import RunMode
    from omegaconf import OmegaConf

    try:
        config = loader.load_configuration(name, list(words), run_mode=RunMode.MULTIRUN)
    except Exception:  # a word before the cursor is wrong; its error comes when the line is run
        config = loader.load_configuration(name, [], run_mode=RunMode.MULTIRUN)
    return OmegaConf.create(_plain(OmegaConf.to_container(config, resolve=False)))


def _plain(node: Any) -> Any:
    if isinstance(node, dict):
        return {key: _plain(value) for key, value in node.items()}
    if isinstance(node, list):
        return [_plain(value) for value in node]
    return None if isinstance(node, str) and "${" in node else node


def _is_listed(candidate: str, listed: Iterable[str]) -> bool:
    name = candidate.rstrip("=/")
    return name in listed or candidate.startswith("hydra")


def _values(key: str, prefix: str) -> Iterator[str]:
    """Values that only we know of: URIs, files, and words of a choice; of a list, of its last element."""
    leaf = key.rpartition(".")[2]
    head = prefix[: max(prefix.rfind(mark) for mark in "=[,") + 1]
    value = prefix[len(head) :]
    found: list[str] = []
    if leaf in URI_KEYS:
        found = [*_builtins(value), *_files(value)]
    elif leaf in FILE_KEYS:
        found = _files(value)
    elif leaf in CHOICES:
        found = [one for one in CHOICES[leaf] if one.startswith(value)]
    for one in found:
        yield f"{head}{one}"


def _builtins(prefix: str) -> list[str]:
    """The URIs of our own policies; nothing where a path is being typed."""
    if not "builtin://".startswith(prefix[:10]):
        return []
    from dual_policy_plugin.npc.sources.builtin import known_names

    return [uri for name in known_names() if (uri := f"builtin://{name}").startswith(prefix)]


def _files(prefix: str) -> list[str]:
    from argcomplete.completers import FilesCompleter

    return list(FilesCompleter()(prefix)) if "://" not in prefix else []


def _fits(candidate: str, prefix: str) -> bool:
    return candidate.startswith(prefix) or candidate.lstrip("+").startswith(prefix)


def _typed_words() -> list[str]:
    """The words between the program and the one under the cursor."""
    from argcomplete.lexers import split_line

    line, point = os.environ["COMP_LINE"], int(os.environ["COMP_POINT"])
    breaks = os.environ.pop("_ARGCOMPLETE_COMP_WORDBREAKS", None)  # they split what is one word to us
    try:
        _, _, _, words, _ = split_line(line, point)
    finally:
        if breaks is not None:
            os.environ["_ARGCOMPLETE_COMP_WORDBREAKS"] = breaks
    return [re.sub(r"^['\"]|['\"]$", "", word) for word in words[1:]]
