"""Nodes of a composed config as plain values: keys that are known, types that are right, no guessing.

Takes dicts; gives dataclasses, or one line that names the key and the mend. `hydra_app/loading.py` and
`hydra_app/dual_policy_node.py` say which nodes there are.
"""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dual_policy_plugin.errors import ConfigError

T = TypeVar("T")
Node = dict[str, Any]

_TYPE_NAMES: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    Path: "a path",
    list[str]: "a list of texts",
    list[int]: "a list of whole numbers",
    list[float]: "a list of numbers",
}


def nearest_key(key: str, keys: typing.Iterable[str]) -> str | None:
    """The key of `keys` that `key` most likely meant: one like it in its node, or that name elsewhere."""
    keys = list(keys)
    parent, _, leaf = key.rpartition(".")
    parents = {name.rpartition(".")[0] for name in keys}
    if parent not in parents and (like := difflib.get_close_matches(parent, parents, n=1, cutoff=0.8)):
        return nearest_key(f"{like[0]}.{leaf}", keys) or like[0]
    siblings = {name.rpartition(".")[2]: name for name in keys if name.rpartition(".")[0] == parent}
    near = difflib.get_close_matches(leaf, siblings, n=1)
    if near:
        return siblings[near[0]]
    elsewhere = [name for name in keys if name.rpartition(".")[2] == leaf]
    if elsewhere:  # the one that was written from its middle on; an NPC's rather than that of the learner's start
        return min(elsewhere, key=lambda name: (not name.endswith(f".{key}"), "initial_policy" in name, len(name)))
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
            call = "dual_policy_plugin.hydra_app.interpolation.register_resolver()"
            text = f"the resolver ${{npc:...}} is not registered; call {call} first"
        raise ConfigError(f"{error.full_key}: {text}") from error
    return typing.cast(Node, plain)


def child(node: Node, name: str, key: str) -> Node:
    """A sub-node; {} where it is absent or null."""
    value = node.get(name)
    if value is None:
        return {}
    if not isinstance(value, dict):
        path = f"{key}.{name}" if key else name
        raise ConfigError(f"{path}={value!r} is not possible; it is a node with keys of its own")
    return value


def named(node: Node, key: str, cls: type) -> Node:
    """A node `name`, fields of `cls`, and flat arguments, as keyword arguments of `cls`; null arguments fall away."""
    hints = typing.get_type_hints(cls)
    fields = {n: convert(f"{key}.{n}", v, hints[n]) for n, v in node.items() if n in hints and v is not None}
    args = {n: v for n, v in node.items() if n not in hints and v is not None}
    return {**fields, "args": {**args, **fields.get("args", {})}}


def check_keys(node: Node, names: typing.Iterable[str], key: str, elsewhere: typing.Iterable[str] = ()) -> None:
    """Raises a ConfigError for a key of `node` that is none of `names`.

    Args:
        node: what stands at `key`.
        names: that are known there.
        key: where the node stands; empty: at the top.
        elsewhere: other dotted keys that the user may have meant.
    """
    names = list(names)
    for name in node:
        if name not in names:
            path = f"{key}.{name}" if key else str(name)
            raise unknown_key(path, [*(f"{key}.{one}" if key else one for one in names), *elsewhere])


def build(cls: type[T], node: Node, key: str, **ready: object) -> T:
    """The dataclass `cls` from a node of scalars and lists; null leaves a field's default."""
    hints = typing.get_type_hints(cls)
    check_keys(node, hints, key)
    prefix = f"{key}." if key else ""
    values = {name: convert(prefix + name, node[name], hints[name]) for name in node if node[name] is not None}
    return cls(**values, **ready)


def convert(key: str, value: object, hint: Any) -> Any:
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
            return [convert(f"{key}[{i}]", one, typing.get_args(option)[0]) for i, one in enumerate(value)]
    right = " or ".join(_TYPE_NAMES[option] for option in options if option in _TYPE_NAMES)
    raise ConfigError(f"{key}={value!r} is not possible; use {right or 'a node with keys of its own'}")
