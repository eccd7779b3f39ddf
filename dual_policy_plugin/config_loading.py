"""From a composed Hydra config to a `Config`, once; the first step of every command that trains.

Takes the DictConfig of our own app, checks every key and type, maps older spellings to today's names, fills in the
defaults that the config leaves null, and gives the frozen dataclasses of `config.py`. Nothing that a user wrote is
ignored in silence: what this version cannot do yet is an error that says what works.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import logging
import math
import os
import re
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dual_policy_plugin.config import (
    AgentConfig,
    Config,
    DualPolicyConfig,
    EnvConfig,
    EvalsConfig,
    PolicySource,
    TrainerConfig,
    WandbConfig,
    check_selector,
)
from dual_policy_plugin.errors import ConfigError
from dual_policy_plugin.npc.uri import parse_uri

T = TypeVar("T")
Node = dict[str, Any]

HOURLY_COST_VARIABLE = "METTA_HOURLY_COST"
DUAL_POLICY_KEY = "trainer.dual_policy"
INITIAL_POLICY_KEY = "trainer.initial_policy"

# The one place of older spellings: today's name -> its older names.
OLDER_SPELLINGS = {
    "training_agents_pct": ("policy_a_percentage",),
    "uri": ("checkpoint_path", "policy_uri"),
}
SELECTOR_DEFAULTS: Node = {"type": "specific", "range": 1, "metric": "epoch", "filters": None, "name": None}
SOURCE_KEYS = ("uri", "agent", "act", *SELECTOR_DEFAULTS)
LATER_KEYS = ("pool", "matchmaking")
DUAL_POLICY_KEYS = ("enabled", "training_agents_pct", "assignment", "npc_type", "checkpoint_npc", "lock", *LATER_KEYS)
TOP_KEYS = ("run", "cmd", "seed", "device", "train_dir", "trainer", "agent", "env", "evals", "wandb")
OTHER_COMMANDS = ("import", "demo")

_TYPE_NAMES: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    Path: "a path",
    list[str]: "a list of texts",
    list[int]: "a list of whole numbers",
}
_log = logging.getLogger(__name__)


def load_config(cfg: DictConfig | Mapping[str, Any]) -> Config:
    """The run that a composed config describes, with METTA_HOURLY_COST from the environment.

    Raises:
        ConfigError: an unknown key, a wrong type, a value out of range, two spellings of one thing, or something that
            this version cannot do yet; one line that names the key and the mend.
    """
    node = to_plain(cfg)
    if "user" in node or "__global__" in node:
        raise ConfigError(
            "user: the +user= file has landed under a key of its own and would be ignored; "
            "make `# @package _global_` the first line of that file"
        )
    _check_keys(node, TOP_KEYS, "")
    cmd = node.get("cmd")
    if cmd not in (None, "train"):
        there = f"run `dual-policy {cmd}`" if cmd in OTHER_COMMANDS else "this program trains; use cmd: train"
        raise ConfigError(f"cmd={cmd!r} is not what this command does; {there}")
    top = {name: node.get(name) for name in ("run", "seed", "device", "train_dir")}
    wandb = node.get("wandb")
    return _build(
        Config,
        top,
        "",
        trainer=load_trainer(_child(node, "trainer", "")),
        agent=AgentConfig(**_named(_child(node, "agent", ""), "agent", AgentConfig)),
        env=EnvConfig(**_named(_child(node, "env", ""), "env", EnvConfig)),
        evals=_build(EvalsConfig, _child(node, "evals", ""), "evals"),
        wandb=_build(WandbConfig, {"mode": wandb} if isinstance(wandb, bool) else _child(node, "wandb", ""), "wandb"),
        hourly_cost=read_hourly_cost(os.environ.get(HOURLY_COST_VARIABLE)),
    )


def load_trainer(node: Node) -> TrainerConfig:
    """The `trainer` node as a dataclass, the two policies in it included."""
    flat = {name: value for name, value in node.items() if name not in ("dual_policy", "initial_policy")}
    names = [field.name for field in dataclasses.fields(TrainerConfig)]
    _check_keys(node, names, "trainer")
    return _build(
        TrainerConfig,
        flat,
        "trainer",
        dual_policy=load_dual_policy(_child(node, "dual_policy", "trainer")),
        initial_policy=_initial_policy(_child(node, "initial_policy", "trainer")),
    )


def load_dual_policy(cfg: DictConfig | Mapping[str, Any], key: str = DUAL_POLICY_KEY) -> DualPolicyConfig:
    """The `dual_policy` node as a dataclass; any Hydra app may call this on the node that the plugin gave it.

    Args:
        cfg: the node, as the config groups `dual_policy/{off,checkpoint}` lay it out.
        key: where the node stands, for the error lines.
    """
    node = _rename(to_plain(cfg), key, "training_agents_pct")
    _check_keys(node, DUAL_POLICY_KEYS, key)
    source = _rename(_child(node, "checkpoint_npc", key), f"{key}.checkpoint_npc", "uri")
    npc = _policy_source(source, f"{key}.checkpoint_npc", SOURCE_KEYS)
    for name in LATER_KEYS:
        if node.get(name) not in (None, {}, []):
            raise ConfigError(
                f"{key}.{name}={node[name]!r} is not in this version yet; one NPC from {key}.checkpoint_npc.uri works"
            )
    values = {name: node.get(name) for name in ("enabled", "training_agents_pct", "assignment", "lock")}
    result = _build(DualPolicyConfig, values, key)
    _check_assignment(result.assignment, f"{key}.assignment")
    if node.get("enabled") is None:
        _check_nothing_set(node, source, key)
    _check_npc_type(node.get("npc_type"), npc, key)
    if not result.enabled or result.training_agents_pct == 1:
        return result
    if npc is None:
        raise ConfigError(
            f"{key}.checkpoint_npc.uri is not set, but {key}.enabled=true needs an NPC; "
            "name one, for example builtin://arena/medium or a checkpoint file"
        )
    return dataclasses.replace(result, npc=npc)


def read_hourly_cost(text: str | None) -> float | None:
    """Dollars per hour from the text of METTA_HOURLY_COST; None where it is not set.

    Raises:
        ConfigError: the text is no number of at least 0.
    """
    if text is None or not text.strip():
        return None
    try:
        cost = float(text)
    except ValueError:
        cost = math.nan
    if not (math.isfinite(cost) and cost >= 0):
        raise ConfigError(f"{HOURLY_COST_VARIABLE}={text} is not possible; use dollars per hour, for example 2.5")
    return cost


def known_keys() -> list[str]:
    """Every key that `load_config` knows, dotted; the settings of envs and nets are known to those alone."""
    keys = list(TOP_KEYS)
    for name, cls in (("agent", AgentConfig), ("env", EnvConfig), ("evals", EvalsConfig), ("wandb", WandbConfig)):
        keys += [f"{name}.{field.name}" for field in dataclasses.fields(cls) if field.name != "args"]
    keys += [f"trainer.{field.name}" for field in dataclasses.fields(TrainerConfig)]
    keys += [f"{DUAL_POLICY_KEY}.{name}" for name in DUAL_POLICY_KEYS]
    keys += [f"{DUAL_POLICY_KEY}.checkpoint_npc.{name}" for name in SOURCE_KEYS]
    return keys + [f"{INITIAL_POLICY_KEY}.{name}" for name in (*SOURCE_KEYS, "keep_optimizer")]


def nearest_key(key: str, keys: typing.Iterable[str]) -> str | None:
    """The key of `keys` that `key` most likely meant: a sibling with a like name, else the same name elsewhere."""
    keys = list(keys)
    parent, _, leaf = key.rpartition(".")
    siblings = {name.rpartition(".")[2]: name for name in keys if name.rpartition(".")[0] == parent}
    near = difflib.get_close_matches(leaf, siblings, n=1)
    if near:
        return siblings[near[0]]
    elsewhere = [name for name in keys if name.rpartition(".")[2] == leaf]
    if elsewhere:
        return min(elsewhere, key=len)
    others = [name for name in keys if not key.startswith(f"{name}.")]
    return next(iter(difflib.get_close_matches(key, others, n=1, cutoff=0.8)), None)


def unknown_key(key: str, keys: typing.Iterable[str]) -> ConfigError:
    """The error for a key that nobody reads, with the nearest of `keys` or the list of its siblings."""
    keys = list(keys)
    near = nearest_key(key, keys)
    if near is not None:
        return ConfigError(f"{key} is not a known key; did you mean {near}?")
    parent = key.rpartition(".")[0]
    siblings = {name.rpartition(".")[2] for name in keys if name.rpartition(".")[0] == parent}
    where = f"in {parent}" if parent else "at the top"
    return ConfigError(f"{key} is not a known key; {where} there are {', '.join(sorted(siblings))}")


def to_plain(cfg: DictConfig | Mapping[str, Any]) -> Node:
    """Plain dicts, lists and scalars with every interpolation resolved.

    Raises:
        ConfigError: a value is missing (???) or an interpolation points nowhere.
    """
    if not isinstance(cfg, DictConfig):
        return dict(cfg)
    try:
        plain = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        text = str(error.msg or error).splitlines()[0]
        text = re.sub(r"^\w+ raised while resolving interpolation: ", "", text)  # what ${npc:...} has to say is enough
        if "interpolation type npc" in text:
            call = "dual_policy_plugin.interpolation.register_resolver()"
            text = f"the resolver ${{npc:...}} is not registered; call {call} first"
        raise ConfigError(f"{error.full_key}: {text}") from error
    return typing.cast(Node, plain)


def _policy_source(node: Node, key: str, keys: tuple[str, ...]) -> PolicySource | None:
    """A `checkpoint_npc`-like node (older names already mapped) as a PolicySource; None where no URI is set."""
    _check_keys(node, keys, key)
    if node.get("act") not in (None, "sample", "greedy"):
        raise ConfigError(f"{key}.act={node['act']!r} is not possible; use sample or greedy")
    if node.get("uri") is None:
        lost = [name for name, default in SELECTOR_DEFAULTS.items() if node.get(name) not in (None, {}, default)]
        if lost:
            raise ConfigError(f"{key}.{lost[0]}={node[lost[0]]!r} is set without a policy; set {key}.uri too")
        return None
    said = {name: value for name, value in node.items() if value not in (None, {})}
    if isinstance(said["uri"], str):
        parse_uri(said["uri"])  # what no URI can be, a password in it too, is never written into a run's config.yaml
    hints = typing.get_type_hints(PolicySource)
    selector = {n: _convert(f"{key}.{n}", said[n], hints[n]) if n in said else d for n, d in SELECTOR_DEFAULTS.items()}
    check_selector(f"{key}.", **selector)
    return _build(PolicySource, said, key)


def _initial_policy(node: Node) -> PolicySource | None:
    key = INITIAL_POLICY_KEY
    node = _rename(node, key, "uri")
    if node.get("act") is not None:
        raise ConfigError(f"{key}.act={node['act']!r} has no effect, the learner always samples; remove it")
    source = _policy_source(node, key, (*SOURCE_KEYS, "keep_optimizer"))
    lost = [name for name, value in node.items() if value not in (None, False, {}) and source is None]
    if lost:
        raise ConfigError(f"{key}.{lost[0]}={node[lost[0]]!r} is set without a checkpoint; set {key}.uri too")
    if source is not None and (source.range > 1 or source.type == "all"):
        raise ConfigError(
            f"{key}.type={source.type} with range={source.range} names several; a learner starts from one"
        )
    return source


def _check_nothing_set(node: Node, source: Node, key: str) -> None:
    """Nobody said whether the NPC is wanted: then nothing else of the node may be set either."""
    said = {name: value for name, value in node.items() if name != "checkpoint_npc"}
    said |= {f"checkpoint_npc.{name}": value for name, value in source.items()}
    for name, value in said.items():
        if value not in (None, {}, []):
            raise ConfigError(
                f"{key}.{name}={value!r} is set, but the NPC is not switched on; "
                f"add {key}.enabled=true (or false, to keep the setting unused)"
            )


def _check_npc_type(npc_type: object, npc: PolicySource | None, key: str) -> None:
    if npc_type not in (None, "checkpoint", "scripted"):
        raise ConfigError(f"{key}.npc_type={npc_type!r} is not possible; use checkpoint or scripted")
    if npc_type == "scripted" and npc is not None and not npc.uri.startswith("builtin://"):
        raise ConfigError(
            f"{key}.npc_type=scripted does not go with checkpoint_npc.uri={npc.uri}; "
            "use builtin://arena/random, builtin://arena/forager or builtin://arena/hunter"
        )


def _check_assignment(assignment: str | list[int], key: str) -> None:
    if isinstance(assignment, str) and assignment not in ("first", "last", "interleaved"):
        raise ConfigError(f"{key}={assignment!r} is not possible; use first, last, interleaved or a list of seats")


@functools.cache
def _warn_older(old_key: str, new_key: str) -> None:
    _log.warning("%s is an older name; write %s", old_key, new_key)


def _rename(node: Node, key: str, name: str) -> Node:
    """The node with the older spellings of `name` mapped to it; two spellings that are both set are an error."""
    result = dict(node)
    said = [name] if node.get(name) is not None else []
    for older in OLDER_SPELLINGS[name]:
        value = result.pop(older, None)
        if value is not None:
            said.append(older)
            result[name] = value
    if len(said) > 1:
        both = " and ".join(f"{key}.{one}={node[one]!r}" for one in said)
        raise ConfigError(f"{both} are two spellings of one thing; keep {name} and set {said[-1]}=null")
    if said and said[0] != name:
        _warn_older(f"{key}.{said[0]}", f"{key}.{name}")
    return result


def _child(node: Node, name: str, key: str) -> Node:
    """A sub-node; {} where it is absent or null."""
    value = node.get(name)
    if value is None:
        return {}
    if not isinstance(value, dict):
        path = f"{key}.{name}" if key else name
        raise ConfigError(f"{path}={value!r} is not possible; it is a node with keys of its own")
    return value


def _named(node: Node, key: str, cls: type) -> Node:
    """A node `name`, fields of `cls`, and flat arguments, as keyword arguments of `cls`; null arguments fall away."""
    hints = typing.get_type_hints(cls)
    fields = {n: _convert(f"{key}.{n}", v, hints[n]) for n, v in node.items() if n in hints and v is not None}
    args = {n: v for n, v in node.items() if n not in hints and v is not None}
    return {**fields, "args": {**args, **fields.get("args", {})}}


def _check_keys(node: Node, names: typing.Iterable[str], key: str) -> None:
    names = list(names)
    for name in node:
        if name not in names:
            path = f"{key}.{name}" if key else str(name)
            raise unknown_key(path, [f"{key}.{one}" if key else one for one in names] + known_keys())


def _build(cls: type[T], node: Node, key: str, **ready: object) -> T:
    """The dataclass `cls` from a node of scalars and lists; null leaves a field's default."""
    hints = typing.get_type_hints(cls)
    _check_keys(node, hints, key)
    prefix = f"{key}." if key else ""
    values = {name: _convert(prefix + name, node[name], hints[name]) for name in node if node[name] is not None}
    return cls(**values, **ready)


def _convert(key: str, value: object, hint: Any) -> Any:
    """`value` as the type that `hint` asks for, without guessing.

    Raises:
        ConfigError: another type; names the key, the value and what would be right.
    """
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    for option in options:
        if option is bool and isinstance(value, bool):
            return value
        if option is float and number:
            return float(typing.cast(float, value))
        if option is int and number and float(typing.cast(float, value)).is_integer():
            return int(typing.cast(float, value))  # 1e6 is a whole number too
        if option in (str, Path) and (isinstance(value, str) or type(value) is int):
            return option(str(value))
        if option is str and value is False and key.endswith("wandb.mode"):
            return "off"  # YAML reads an unquoted off as false
        if option is dict or typing.get_origin(option) is dict:
            if isinstance(value, dict):
                return value
        elif typing.get_origin(option) is list and isinstance(value, list):
            return [_convert(f"{key}[{i}]", one, typing.get_args(option)[0]) for i, one in enumerate(value)]
    right = " or ".join(_TYPE_NAMES[option] for option in options if option in _TYPE_NAMES)
    raise ConfigError(f"{key}={value!r} is not possible; use {right or 'a node with keys of its own'}")
