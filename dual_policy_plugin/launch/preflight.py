"""What is checked and pinned before anything is launched: the config, every policy, the credentials of the node.

Words of the command line -> Config -> `npc.lock.json` for the node. A policy that is a file on this machine is carried
along under the name of its digest; the node reads the lock, and verifies there the bytes that were pinned here.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import netrc
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import urlsplit

from dual_policy_plugin.config import Config, PolicySource
from dual_policy_plugin.errors import ConfigError, LaunchError
from dual_policy_plugin.files import publish
from dual_policy_plugin.hydra_app.composition import compose_config
from dual_policy_plugin.hydra_app.overrides import keep_run_names
from dual_policy_plugin.npc.cache import Cache
from dual_policy_plugin.npc.lock import (
    ROLES,
    LockEntry,
    check_held_out,
    lock_entries,
    lock_facts,
    locked_as,
    parse_lock,
    pin_locked,
    read_lock,
)
from dual_policy_plugin.npc.resolver import request_text, resolve_all, unique_names
from dual_policy_plugin.npc.uri import parse_uri
from dual_policy_plugin.report.tables import format_table
from dual_policy_plugin.run.directory import LOCK_KEY as LOCK_KEY
from dual_policy_plugin.run.mirror import read_mirrored
from dual_policy_plugin.wandb_runs import quieter_mode

LOCK_NAME = "npc.lock.json"
NODE_FOLDER = "~/.dual-policy-launch"
"""Where a node finds what was carried to it, whosever home that is; a restart on another node finds it too."""
WANDB_VARIABLE = "WANDB_API_KEY"
AWS_VARIABLES = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
AWS_TOKEN_VARIABLE = "AWS_SESSION_TOKEN"


@dataclass(kw_only=True, slots=True, frozen=True)
class Preflight:
    """A launch that has passed its checks."""

    config: Config
    words: tuple[str, ...]
    """What the node's command is given: the words as they came, and what pins their policies behind them."""
    entries: tuple[LockEntry, ...]
    """Every policy, as it was pinned here."""
    is_locked: bool = True
    """Whether the node gets them as a lock; if not, `words` name each as it was pinned."""
    files: Mapping[str, Path] = field(default_factory=dict)
    """Path on the node -> file here, of what `words` name."""


def check_launch(words: Sequence[str], *, is_shared: bool = False) -> Preflight:
    """Composes and checks the config of `dual-policy train <words>`, and pins every policy that it names.

    Args:
        words: overrides, also +user=...
        is_shared: the run directory and the variables here are the node's too; where the run has begun, its own lock
            pins, and WANDB_MODE may spare it a login.

    Raises:
        DualPolicyError: the config is not possible, a policy cannot be had, or a login that the run will need is
            missing; nothing was written or launched.
    """
    config, _ = compose_config(keep_run_names(words))
    check_env(config)
    begun = config.train_dir / config.run / LOCK_NAME
    has_begun = is_shared and any((begun.parent / "checkpoints").glob("model_*.safetensors")) and begun.exists()
    if has_begun and config.trainer.dual_policy.lock is None:
        dual_policy = replace(config.trainer.dual_policy, lock=begun)
        config = replace(config, trainer=replace(config.trainer, dual_policy=dual_policy))
    mode = quieter_mode(config.wandb.mode, os.environ.get("WANDB_MODE", "")) if is_shared else config.wandb.mode
    there = replace(config, wandb=replace(config.wandb, mode=mode))
    check_logins(there, ())
    entries = pin_config(config, begun=read_begun(config))
    check_logins(there, entries)
    return Preflight(config=config, words=tuple(words), entries=entries)


def check_env(config: Config) -> None:
    """Raises a ConfigError for settings that the arena does not take; other envs check theirs where they are made."""
    if config.env.name == "arena":
        from dual_policy_plugin.envs.arena_config import parse_arena_args

        parse_arena_args({key: value for key, value in config.env.args.items() if value is not None})


def read_begun(config: Config) -> tuple[LockEntry, ...]:
    """What a run that goes on from its mirror (trainer.sync_uri) began with, of what was fetched for it.

    Raises:
        RunError: the storage refuses, or cannot be reached.
    """
    uri = config.trainer.sync_uri
    if uri is None or config.trainer.dual_policy.lock is not None:
        return ()
    if not uri.startswith("s3://") and not Path(uri.removeprefix("file://")).expanduser().is_dir():
        return ()  # a folder of the nodes'
    data = read_mirrored(uri, config.run, LOCK_NAME)
    if data is None or read_mirrored(uri, config.run, "state/checkpoints.json") is None:
        return ()  # without a checkpoint the run pins anew
    entries = parse_lock(json.loads(data), f"{LOCK_NAME} of {config.run} under {uri}")
    return tuple(one for one in entries if parse_uri(one.uri).scheme != "file")


def pin_config(config: Config, *, begun: Sequence[LockEntry] = ()) -> tuple[LockEntry, ...]:
    """Every policy that a run names (see `Config.policies`), pinned as the run itself would pin it.

    Args:
        config: of the run.
        begun: what the run began with and stays with, whatever its texts mean by now.

    Raises:
        NpcError: one cannot be had.
        ConfigError: one is held out and an NPC.
    """
    entries = tuple(pin_configs([config], begun=begun))
    npcs = {one.sha256: one.name for one in entries if one.role == "npc"}
    check_held_out([one for one in entries if one.role == "held_out"], npcs)
    return entries


def pin_configs(configs: Sequence[Config], *, begun: Sequence[LockEntry] = ()) -> list[LockEntry]:
    """What the runs of all configs would lock; what several ask for in one way stands there once.

    Raises:
        NpcError: a policy cannot be had.
        ConfigError: the same request means different policies, for example drawn with different seeds: a run that
            looks its request up in the lock would find both.
    """
    when = datetime.now(UTC).isoformat(timespec="seconds")
    by_request: dict[tuple[str, str], list[LockEntry]] = {}
    for config in configs:
        for role, source in config.policies:
            found = list(locked_as(begun, request_text(source), role=role)) or _pin(source, role, config, when)
            before = by_request.setdefault((role, found[0].requested), found)
            if [(one.uri, one.sha256) for one in before] != [(one.uri, one.sha256) for one in found]:
                raise ConfigError(
                    f"{found[0].requested} means other policies in another of the configs; give each its own --output"
                )
    entries = [one for found in by_request.values() for one in found]
    for role in ROLES:  # policies are told apart by their names, within their role
        places = [i for i, one in enumerate(entries) if one.role == role]
        for i, name in zip(places, unique_names([entries[i].name for i in places]), strict=True):
            entries[i] = replace(entries[i], name=name)
    return entries


def _pin(source: PolicySource, role: str, config: Config, when: str) -> list[LockEntry]:
    """The entries of one request: from the lock that the config itself names, as a run would, else resolved now."""
    given, requested = config.trainer.dual_policy.lock, request_text(source)
    offered = (
        () if given is None else read_lock(given) if isinstance(given, Path) else parse_lock(given, "the config's lock")
    )
    with contextlib.redirect_stdout(sys.stderr):  # whatever a client library prints
        if (known := locked_as(offered, requested, role=role)) or (given is not None and role == "npc"):
            pin_locked(offered, requested, role=role)  # stops where other bytes stand by now
            return list(known)
        return list(lock_entries(resolve_all(source, seed=config.seed), when, role=role))


def carry_entries(
    entries: Iterable[LockEntry], folder: str = NODE_FOLDER
) -> tuple[tuple[LockEntry, ...], dict[str, Path]]:
    """The lock as a node without this machine's files needs it, and what is to be carried to it.

    Args:
        entries: as they were pinned here.
        folder: on the node, absolute or in its home.

    Returns:
        The entries, where a file's URI names its place on the node; and node path -> file here.
    """
    there, carried = [], {}
    for entry in entries:
        uri = parse_uri(entry.uri)
        if uri.scheme == "file":
            path = Path(uri.path)
            place = f"{folder}/{entry.sha256}{path.suffix}"
            carried[place] = path
            entry = replace(entry, uri=f"file://{place}")
        there.append(entry)
    return tuple(there), carried


def store_lock(entries: Sequence[LockEntry], cache: Cache | None = None) -> tuple[str, Path]:
    """Keeps a node's lock in the cache, by its content; gives its place on the node and the file here."""
    data = lock_bytes(entries)
    name = lock_name(data)
    path = (cache or Cache()).root / "launches" / name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LaunchError(
            f"{path.parent} cannot be made: {error.strerror}; set DUAL_POLICY_CACHE to a folder with room"
        ) from error
    publish(path, data)
    return f"{NODE_FOLDER}/{name}", path


def lock_bytes(entries: Sequence[LockEntry]) -> bytes:
    """A lock file's content, without the time: what is launched twice has one lock."""
    timeless = [replace(one, when="") for one in entries]
    return (json.dumps(lock_facts(timeless), indent=2) + "\n").encode()


def lock_name(data: bytes) -> str:
    """The name of a lock that is kept by its content."""
    return f"{hashlib.sha256(data).hexdigest()[:16]}.npc.lock.json"


def check_carried(config: Config, entries: Iterable[LockEntry]) -> None:
    """Raises a ConfigError for what only this machine has and no lock carries: an optimizer's moments."""
    initial = config.trainer.initial_policy
    if initial is None or not initial.keep_optimizer:
        return
    for entry in entries:
        if entry.role == "initial" and parse_uri(entry.uri).scheme == "file":
            raise ConfigError(
                f"trainer.initial_policy.keep_optimizer=true needs the run of {entry.requested}, which stays on this "
                "machine; leave keep_optimizer away, or train here or with `dual-policy launch slurm`"
            )


def check_logins(config: Config, entries: Iterable[LockEntry]) -> None:
    """Raises a LaunchError for a login that the node will need and that is not even here."""
    wandb_for, aws_for = needed_logins(config, entries)
    if wandb_for and wandb_key() is None:
        raise LaunchError(f"{wandb_for} needs a W&B login on the node, and none is here; set {WANDB_VARIABLE}")
    if aws_for and not aws_login():
        raise LaunchError(
            f"{aws_for} needs an AWS login on the node, and none is here; set {' and '.join(AWS_VARIABLES)}, "
            "or run `aws configure`"
        )


def needed_logins(config: Config, entries: Iterable[LockEntry]) -> tuple[str | None, str | None]:
    """What needs W&B and what needs AWS, in words for a message; None where nothing does."""
    schemes = {parse_uri(entry.uri).scheme: entry.requested for entry in entries}
    wandb_for, aws_for = schemes.get("wandb"), schemes.get("s3")
    if config.wandb.mode == "online":
        wandb_for = wandb_for or "wandb.mode=online"
    for name in ("sync_uri", "publish_uri"):
        if str(getattr(config.trainer, name) or "").startswith("s3://"):
            aws_for = aws_for or f"trainer.{name}"
    return wandb_for, aws_for


def wandb_key() -> str | None:
    """The W&B key of this machine: from the environment, or from the netrc file; None without one."""
    key = os.environ.get(WANDB_VARIABLE)
    if key:
        return key
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname or "api.wandb.ai"
    path = Path(os.environ.get("NETRC") or "~/.netrc").expanduser()
    try:
        login = netrc.netrc(str(path)).authenticators(host)
    except (OSError, netrc.NetrcParseError):
        return None
    return login[2] if login else None


def aws_login() -> dict[str, str]:
    """The AWS login of this machine as variables, wherever boto3's client finds it; empty without one."""
    if all(os.environ.get(name) for name in AWS_VARIABLES):
        return {name: os.environ[name] for name in (*AWS_VARIABLES, AWS_TOKEN_VARIABLE) if os.environ.get(name)}
    try:
        from botocore.exceptions import BotoCoreError
        from botocore.session import Session
    except ImportError:
        return {}
    try:
        found = Session().get_credentials()
    except BotoCoreError:  # a profile that is not there
        return {}
    if found is None:
        return {}
    login = found.get_frozen_credentials()
    values = dict(
        zip((*AWS_VARIABLES, AWS_TOKEN_VARIABLE), (login.access_key, login.secret_key, login.token), strict=True)
    )
    return {name: str(value) for name, value in values.items() if value}


def npc_table(entries: Iterable[LockEntry]) -> str:
    """The policies of a launch for people: role, name, pinned URI, digest, size."""
    rows = [(one.role, one.name, one.sha256[:12], f"{one.num_bytes} B", one.uri) for one in entries]
    return format_table(("Role", "Name", "SHA-256", "Size", "URI"), rows) if rows else "no NPC"
