"""The `dual_policy` node, and every node that names a policy, as dataclasses; older spellings are mapped here.

Any Hydra app may call `load_dual_policy` on the node that the plugin gave it.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from omegaconf import DictConfig

from dual_policy_plugin.config import DualPolicyConfig, PolicySource, check_selector
from dual_policy_plugin.errors import ConfigError
from dual_policy_plugin.hydra_app.nodes import Node, build, check_keys, child, convert, to_plain
from dual_policy_plugin.npc.uri import parse_uri
from dual_policy_plugin.pool_config import (
    MATCHMAKING_READERS,
    SCHEDULE_READERS,
    MatchmakingConfig,
    SelfPlayConfig,
    ShareSchedule,
    check_read,
    check_weight,
)

DUAL_POLICY_KEY = "trainer.dual_policy"
# The one place of older spellings: today's name -> its older names.
OLDER_SPELLINGS = {
    "training_agents_pct": ("policy_a_percentage",),
    "uri": ("checkpoint_path", "policy_uri"),
}
SELECTOR_DEFAULTS: Node = {"type": "specific", "range": 1, "metric": "epoch", "filters": None, "name": None}
SOURCE_KEYS = ("uri", "agent", "act", "weight", *SELECTOR_DEFAULTS)
# nodes of settings: the dataclass, and a field of it that is set elsewhere
_NODES: dict[str, tuple[type, str | None]] = {
    "matchmaking_args": (MatchmakingConfig, "type"),
    "self_play": (SelfPlayConfig, None),
    "pct_schedule": (ShareSchedule, None),
}
_SCALARS = ("enabled", "training_agents_pct", "assignment", "lock")
DUAL_POLICY_KEYS = (*_SCALARS, "npc_type", "checkpoint_npc", "pool", "matchmaking", *_NODES)
_log = logging.getLogger(__name__)


def load_dual_policy(cfg: DictConfig | Mapping[str, Any], key: str = DUAL_POLICY_KEY) -> DualPolicyConfig:
    """The `dual_policy` node as a dataclass; any Hydra app may call this on the node that the plugin gave it.

    Args:
        cfg: the node, as the config groups `dual_policy/{off,checkpoint,self_play}` lay it out.
        key: where the node stands, for the error lines.
    """
    node = rename_older(to_plain(cfg), key, "training_agents_pct")
    check_keys(node, DUAL_POLICY_KEYS, key, dual_policy_keys(key))
    npc_node = rename_older(child(node, "checkpoint_npc", key), f"{key}.checkpoint_npc", "uri")
    npc = load_source(npc_node, f"{key}.checkpoint_npc", SOURCE_KEYS)
    pool = _load_pool(node.get("pool"), f"{key}.pool")
    sources = {f"{key}.checkpoint_npc": npc, **{f"{key}.pool[{i}]": source for i, source in enumerate(pool)}}
    parts = {name: _load_node(node, name, key) for name in _NODES}
    result = build(
        DualPolicyConfig,
        {name: node.get(name) for name in _SCALARS},
        key,
        matchmaking=_load_matchmaking(node, parts.pop("matchmaking_args"), [npc, *pool], key),
        **parts,
    )
    _check_assignment(result.assignment, f"{key}.assignment")
    if node.get("enabled") is None:
        _check_nothing_set({**node, "checkpoint_npc": npc_node}, key)
    for place, source in sources.items():
        _check_npc_type(node.get("npc_type"), source, key, place)
    if not result.enabled:
        return dataclasses.replace(result, self_play=None, pct_schedule=None)
    if result.training_agents_pct == 1 and result.pct_schedule is None:
        if result.self_play is not None:
            raise ConfigError(
                f"{key}.training_agents_pct=1.0 leaves no agent to the snapshots of {key}.self_play; "
                "use a share below 1, for example 0.5"
            )
        return result
    if npc is None and not pool and result.self_play is None:
        raise ConfigError(
            f"{key}.checkpoint_npc.uri is not set, but {key}.enabled=true needs an NPC; "
            "name one, for example builtin://arena/medium or a checkpoint file, "
            f"or set {key}.self_play.snapshot_interval for snapshots of the learner"
        )
    return dataclasses.replace(result, npc=npc, pool=pool)


def dual_policy_keys(key: str = DUAL_POLICY_KEY) -> list[str]:
    """Every key of the node, dotted."""
    keys = [f"{key}.{name}" for name in DUAL_POLICY_KEYS]
    keys += [f"{key}.checkpoint_npc.{name}" for name in SOURCE_KEYS]
    return keys + [f"{key}.{name}.{field}" for name in _NODES for field in _fields(name)]


def _fields(name: str) -> list[str]:
    """The keys of a node of settings."""
    cls, elsewhere = _NODES[name]
    return [field.name for field in dataclasses.fields(cls) if field.name != elsewhere]


def _load_node(node: Node, name: str, key: str) -> Any:
    """A node of settings as its dataclass, or as the node of what was said where a field of it stands elsewhere.

    None where nothing was said.
    """
    cls, elsewhere = _NODES[name]
    said = {field: value for field, value in child(node, name, key).items() if value is not None}
    check_keys(said, _fields(name), f"{key}.{name}", dual_policy_keys(key))
    if not said or elsewhere is not None:
        return said or None
    if cls is ShareSchedule and "type" not in said:
        first, value = next(iter(said.items()))
        raise ConfigError(
            f"{key}.{name}.{first}={value} is set without a type; set {key}.{name}.type to steps, linear or adaptive"
        )
    result: object = build(cls, said, f"{key}.{name}")
    if isinstance(result, ShareSchedule):
        check_read(f"{key}.{name}", said, SCHEDULE_READERS, f"type={result.type}")
    return result


def _load_matchmaking(node: Node, args: Node | None, sources: list[PolicySource | None], key: str) -> MatchmakingConfig:
    """How the next NPC is chosen; by the weights where an NPC has one and nobody said otherwise."""
    weights = [source.weight for source in sources if source is not None]
    weighted = any(weight is not None for weight in weights)
    said = node.get("matchmaking")
    if not isinstance(said, str | None):
        raise ConfigError(f"{key}.matchmaking={said!r} is not possible; use a name, and {key}.matchmaking_args")
    if weighted and said not in (None, "weights"):
        raise ConfigError(f"{key}.matchmaking={said} does not read the NPCs' weights; use weights, or remove them")
    values = {"type": said or ("weights" if weighted else "uniform"), **(args or {})}
    result = build(MatchmakingConfig, values, f"{key}.matchmaking_args")
    check_read(f"{key}.matchmaking_args", args or {}, MATCHMAKING_READERS, f"matchmaking={result.type}")
    if weights and all(weight == 0 for weight in weights):
        raise ConfigError(f"{key}.matchmaking=weights lets no NPC play, every weight is 0; give one a weight above 0")
    return result


def _load_pool(listed: object, key: str) -> list[PolicySource]:
    if listed in (None, {}, []):
        return []
    if not isinstance(listed, list) or not all(isinstance(one, dict | str) for one in listed):
        raise ConfigError(f"{key}={listed!r} is not possible; use a list of URIs, or of nodes like checkpoint_npc")
    sources = []
    for i, one in enumerate(listed):
        node = rename_older({"uri": one} if isinstance(one, str) else one, f"{key}[{i}]", "uri")
        source = load_source(node, f"{key}[{i}]", SOURCE_KEYS)
        if source is None:
            raise ConfigError(f"{key}[{i}].uri is not set; name a policy, for example builtin://arena/medium")
        sources.append(source)
    return sources


def load_source(node: Node, key: str, keys: tuple[str, ...]) -> PolicySource | None:
    """A `checkpoint_npc`-like node (older names already mapped) as a PolicySource; None where no URI is set."""
    check_keys(node, keys, key, dual_policy_keys())
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
    selector = {n: convert(f"{key}.{n}", said[n], hints[n]) if n in said else d for n, d in SELECTOR_DEFAULTS.items()}
    check_selector(f"{key}.", **selector)
    if "weight" in said:
        check_weight(f"{key}.weight", convert(f"{key}.weight", said["weight"], hints["weight"]))
    return build(PolicySource, said, key)


def _check_nothing_set(node: Node, key: str) -> None:
    """Nobody said whether the NPC is wanted: then nothing else of the node may be set either."""
    for name, value in _leaves(node):
        raise ConfigError(
            f"{key}.{name}={value!r} is set, but the NPC is not switched on; "
            f"add {key}.enabled=true (or false, to keep the setting unused)"
        )


def _leaves(node: Node, prefix: str = "") -> Iterator[tuple[str, object]]:
    """What was said in a node and the nodes in it, by dotted names."""
    for name, value in node.items():
        if isinstance(value, dict) and value and f"{prefix}{name}" not in ("lock", "checkpoint_npc.filters"):
            yield from _leaves(value, f"{prefix}{name}.")
        elif value not in (None, {}, []):
            yield f"{prefix}{name}", value


def _check_npc_type(npc_type: object, npc: PolicySource | None, key: str, place: str) -> None:
    """`place` is where the NPC stands."""
    if npc_type not in (None, "checkpoint", "scripted"):
        raise ConfigError(f"{key}.npc_type={npc_type!r} is not possible; use checkpoint or scripted")
    if npc_type == "scripted" and npc is not None and not npc.uri.startswith("builtin://"):
        raise ConfigError(
            f"{key}.npc_type=scripted does not go with {place}.uri={npc.uri}; "
            "use builtin://arena/random, builtin://arena/forager or builtin://arena/hunter"
        )


def _check_assignment(assignment: str | list[int], key: str) -> None:
    if isinstance(assignment, str) and assignment not in ("first", "last", "interleaved"):
        raise ConfigError(f"{key}={assignment!r} is not possible; use first, last, interleaved or a list of seats")


@functools.cache
def _warn_older(old_key: str, new_key: str) -> None:
    _log.warning("%s is an older name; write %s", old_key, new_key)


def rename_older(node: Node, key: str, name: str) -> Node:
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
