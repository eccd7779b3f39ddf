"""`dual-policy npc`: what a URI or a selector names, what a policy file holds, lock files, and the cache.

    dual-policy npc resolve URI [--type --range --metric --filter k=v] [--json]
    dual-policy npc inspect FILE [--json]
    dual-policy npc lock CONFIG... [--output npc.lock.json]
    dual-policy npc cache {ls,prune,verify}

Standard output holds the answer and nothing else; notes go to standard error.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
from collections.abc import Callable
from pathlib import Path

from dual_policy_plugin.commands import npc_facts
from dual_policy_plugin.commands.npc_cache import run_cache
from dual_policy_plugin.commands.words import choose_command, make_parser, parse_words
from dual_policy_plugin.config import SELECTOR_TYPES, Config, PolicySource, check_selector
from dual_policy_plugin.errors import ConfigError, NpcError, RunError
from dual_policy_plugin.files import encode_json
from dual_policy_plugin.npc.lock import LockEntry, read_lock, write_lock
from dual_policy_plugin.npc.resolver import resolve, resolve_all
from dual_policy_plugin.report.tables import format_table

LOCK_NAME = "npc.lock.json"
Answer = tuple[str, int]
"""What goes to standard output, and the exit code."""


def run(words: list[str]) -> int:
    """Runs `dual-policy npc <words>` and returns the exit code."""
    command = choose_command("dual-policy npc", words, _COMMANDS, examples=_EXAMPLES)
    if command is None:
        return 0
    text, exit_code = command(words[1:])
    if text:
        print(text)
    return exit_code


def resolve_policies(words: list[str]) -> Answer:
    """`npc resolve`: the policies that a URI or a selector names now, pinned, as a table or as JSON."""
    parser = make_parser(
        "dual-policy npc resolve",
        "URI [options]",
        "Pins the policies that a URI names, as a run would, and shows what they are.",
        note="The selector's options are the keys of trainer.dual_policy.checkpoint_npc.",
        examples=(
            "dual-policy npc resolve builtin://arena/medium",
            "dual-policy npc resolve train_dir/first --type all",
            "dual-policy npc resolve wandb://entity/project --type top --range 3 \\\n"
            "      --metric dual_policy/win_rate",
        ),
    )
    parser.add_argument("uri", metavar="URI", help="path, file://, wandb://, s3:// or builtin://")
    parser.add_argument("--type", metavar="TYPE", default="specific", help=f"{', '.join(SELECTOR_TYPES)} (specific)")
    parser.add_argument("--range", metavar="N", default=1, type=_whole, help="how many of them (1)")
    parser.add_argument(
        "--metric", metavar="NAME", default="epoch", help="what `top` orders by; shown as a column (epoch)"
    )
    parser.add_argument(
        "--filter", default=[], action="append", type=_filter, metavar="KEY=VALUE", help="what the metadata must say"
    )
    parser.add_argument(
        "--seed", metavar="N", default=1, type=_whole, help="the run's seed, which `rand` draws with (1)"
    )
    parser.add_argument("--json", action="store_true", help="all that is known, as a list of objects")
    args = parse_words(parser, words)
    metric = args.metric if args.type == "top" else "epoch"
    filters = dict(args.filter) or None
    check_selector("--", type=args.type, range=args.range, metric=metric, filters=filters, name=None)
    source = PolicySource(uri=args.uri, type=args.type, range=args.range, metric=metric, filters=filters)
    with _clients_silenced():
        found = [npc_facts.describe(pinned) for pinned in resolve_all(source, seed=args.seed)]
    for _, trouble in found:
        if trouble:
            print(f"note: {trouble}", file=sys.stderr)
    if args.json:
        return encode_json([facts for facts, _ in found], indent=2), 0
    return format_table(npc_facts.header(args.metric), [npc_facts.row(facts, args.metric) for facts, _ in found]), 0


def inspect_policy(words: list[str]) -> Answer:
    """`npc inspect`: what one policy file holds, after every check that loading makes of it."""
    parser = make_parser(
        "dual-policy npc inspect",
        "FILE [--tensors] [--json]",
        "Reads one policy file, checks all of it, runs nothing, and says what it holds.",
        examples=(
            "dual-policy npc inspect builtin://arena/medium --tensors",
            "dual-policy npc inspect train_dir/first/checkpoints/best.safetensors",
        ),
    )
    parser.add_argument("file", metavar="FILE", help="a .safetensors or .pt file; any URI will do")
    parser.add_argument("--tensors", action="store_true", help="list every tensor too")
    parser.add_argument("--json", action="store_true", help="as one object, tensors included")
    args = parse_words(parser, words)
    with _clients_silenced():
        pinned = resolve(args.file)
        held = npc_facts.contents(pinned)
        facts, _ = npc_facts.describe(pinned)
    if args.json:
        return encode_json(facts | held, indent=2), 0
    lines = npc_facts.as_lines(facts, held, with_tensors=args.tensors)
    return format_table(lines[0], lines[1:]), 0


def lock_policies(words: list[str]) -> Answer:
    """`npc lock`: pins the policies of configs and writes the lock that `trainer.dual_policy.lock=` takes."""
    parser = make_parser(
        "dual-policy npc lock",
        "CONFIG... [--output FILE]",
        "Pins the NPCs of a config without training. Train from the lock with trainer.dual_policy.lock=PATH, anywhere "
        "and any number of times.",
        note="CONFIG is what `dual-policy train` takes (+user=mine, key=value), a file with a defaults list, or the "
        "config.yaml of a run; several files give one lock.",
        examples=(
            "dual-policy npc lock +dual_policy=checkpoint \\\n"
            "      trainer.dual_policy.checkpoint_npc.uri=builtin://arena/weak",
            "dual-policy npc lock train_dir/first/config.yaml --output again.lock.json",
        ),
    )
    parser.add_argument("config", nargs="+", metavar="CONFIG", help="overrides, or .yaml files")
    parser.add_argument(
        "-o", "--output", metavar="FILE", type=Path, default=Path(LOCK_NAME), help=f"the lock to write ({LOCK_NAME})"
    )
    args = parse_words(parser, words, is_mixed=True)
    _check_no_run(args.output)
    from dual_policy_plugin.launch.preflight import pin_configs

    entries = pin_configs(_read_configs(args.config))
    if not entries:
        raise ConfigError(
            f"{' '.join(args.config)}: no NPC in this config; add +dual_policy=checkpoint and "
            "trainer.dual_policy.checkpoint_npc.uri="
        )
    before = {(one.role, one.name): one.sha256 for one in _locked_before(args.output)}
    write_lock(args.output, entries)
    for one in entries:
        mark = " (changed)" if before and before.get((one.role, one.name)) != one.sha256 else ""
        print(f"{one.role} {one.name}: {one.uri} sha256 {one.sha256[:12]}{mark}", file=sys.stderr)
    return str(args.output), 0


def _read_configs(words: list[str]) -> list[Config]:
    """The configs that are meant: files one by one, each with the overrides; without files the overrides alone."""
    from dual_policy_plugin.hydra_app.composition import compose_config

    paths = [Path(word) for word in words if "=" not in word and word.endswith((".yaml", ".yml"))]
    overrides = [word for word in words if Path(word) not in paths]
    if not paths:
        return [compose_config(overrides)[0]]
    return [_read_config(path, overrides) for path in paths]


def _read_config(path: Path, overrides: list[str]) -> Config:
    """The config in a file: one to compose with ours (a defaults list, a `@package` line), or one that is whole."""
    from omegaconf import DictConfig, OmegaConf

    from dual_policy_plugin.hydra_app.composition import compose_config
    from dual_policy_plugin.hydra_app.interpolation import keep_requested
    from dual_policy_plugin.hydra_app.loading import load_config
    from dual_policy_plugin.hydra_app.overrides import search_path

    try:
        text = path.read_text("utf-8")
        cfg = OmegaConf.create(text)
    except OSError as error:
        why = error.strerror or type(error).__name__
        raise ConfigError(f"{path} cannot be read: {why}; name a config file, or words such as +user=mine") from error
    except Exception as error:
        if not type(error).__module__.startswith(("yaml.", "omegaconf.")) and not isinstance(error, ValueError):
            raise
        raise ConfigError(f"{path} is no valid YAML: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(cfg, DictConfig):
        raise ConfigError(f"{path} is no config; a config has keys such as trainer")
    folder = path.resolve().parent
    if re.search(r"^#\s*@package", text, re.MULTILINE):
        return compose_config([search_path(folder.parent), f"+{folder.name}={path.stem}", *overrides])[0]
    if "defaults" in cfg:
        return compose_config(overrides, folder=folder, primary=path.stem)[0]
    if overrides:
        raise ConfigError(f"{overrides[0]} cannot be added to {path}, which is a whole config; change it in the file")
    return load_config(keep_requested(cfg))


def _locked_before(output: Path) -> tuple[LockEntry, ...]:
    """The lock that is to be replaced; anything else at its place is left alone."""
    if not output.exists():
        return ()
    try:
        return read_lock(output)
    except NpcError as error:
        raise RunError(f"{error}; or choose another --output") from error


def _check_no_run(output: Path) -> None:
    """The lock of a run that has begun is its record, and no command's to replace."""
    if output.name == LOCK_NAME and any((output.parent / "checkpoints").glob("model_*")):
        raise RunError(f"{output} is the lock of a run that has begun; choose another --output")
    if output.is_dir():
        raise RunError(f"{output} is a folder; name the file, for example {output / LOCK_NAME}")


def _filter(word: str) -> tuple[str, str]:
    key, equals, value = word.partition("=")
    if not equals or not key:
        raise argparse.ArgumentTypeError(f"{word!a} is no KEY=VALUE, for example run=my_experiment")
    return key, value


def _whole(word: str) -> int:
    if re.fullmatch(r"[0-9]{1,9}", word) is None:
        raise argparse.ArgumentTypeError(f"{word!a} is no whole number")
    return int(word)


def _clients_silenced() -> contextlib.AbstractContextManager[object]:
    """Whatever a client library prints goes to standard error."""
    return contextlib.redirect_stdout(sys.stderr)


_EXAMPLES = (
    "dual-policy npc resolve builtin://arena/medium",
    "dual-policy npc inspect builtin://arena/medium",
    "dual-policy npc cache ls",
)
_COMMANDS: dict[str, tuple[Callable[[list[str]], Answer], str]] = {
    "resolve": (resolve_policies, "the policies that a URI or a selector names, pinned"),
    "inspect": (inspect_policy, "what one policy file holds"),
    "lock": (lock_policies, "pin the NPCs of a config without training"),
    "cache": (run_cache, "fetched policies: ls, prune, verify"),
}
