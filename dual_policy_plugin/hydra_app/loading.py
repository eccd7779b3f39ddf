"""From a composed Hydra config to a `Config`, once; the first step of every command that trains.

Takes the DictConfig of our own app, checks every key and type, maps older spellings to today's names, fills in the
defaults that the config leaves null, and gives the frozen dataclasses of `config.py`. Nothing that a user wrote is
ignored in silence: what this version cannot do yet is an error that says what works.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig

from dual_policy_plugin.config import (
    AgentConfig,
    Config,
    EnvConfig,
    EvalsConfig,
    PolicySource,
    TrainerConfig,
    WandbConfig,
)
from dual_policy_plugin.errors import ConfigError
from dual_policy_plugin.hydra_app.dual_policy_node import (
    SOURCE_KEYS,
    dual_policy_keys,
    load_dual_policy,
    load_source,
    rename_older,
)
from dual_policy_plugin.hydra_app.nodes import Node, build, check_keys, child, named, to_plain

HOURLY_COST_VARIABLE = "METTA_HOURLY_COST"
INITIAL_POLICY_KEY = "trainer.initial_policy"
INITIAL_POLICY_KEYS = (*(name for name in SOURCE_KEYS if name != "weight"), "keep_optimizer")
TOP_KEYS = (
    *("run", "cmd", "seed", "device", "train_dir", "trainer", "agent", "env", "evals", "wandb"),
    *("tensorboard", "report"),
)
ADDED_GROUPS = ("dual_policy", "sweep", "user")
"""Groups of configs that are added with a plus; what they hold stands elsewhere."""
OTHER_COMMANDS = ("import", "demo")


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
    _refuse_mistyped_groups(node)
    check_keys(node, TOP_KEYS, "", known_keys())
    cmd = node.get("cmd")
    if cmd not in (None, "train"):
        there = f"run `dual-policy {cmd}`" if cmd in OTHER_COMMANDS else "this program trains; use cmd: train"
        raise ConfigError(f"cmd={cmd!r} is not what this command does; {there}")
    top = {name: node.get(name) for name in ("run", "seed", "device", "train_dir", "tensorboard", "report")}
    wandb = node.get("wandb")
    return build(
        Config,
        top,
        "",
        trainer=load_trainer(child(node, "trainer", "")),
        agent=AgentConfig(**named(child(node, "agent", ""), "agent", AgentConfig)),
        env=EnvConfig(**named(child(node, "env", ""), "env", EnvConfig)),
        evals=build(EvalsConfig, child(node, "evals", ""), "evals"),
        wandb=build(WandbConfig, {"mode": wandb} if isinstance(wandb, bool) else child(node, "wandb", ""), "wandb"),
        hourly_cost=read_hourly_cost(os.environ.get(HOURLY_COST_VARIABLE)),
    )


def _refuse_mistyped_groups(node: Node) -> None:
    """Raises a ConfigError for +dual_polcy=checkpoint, which Hydra takes for a key of its own."""
    for name in node:
        near = [] if name in TOP_KEYS else difflib.get_close_matches(name, [*TOP_KEYS, *ADDED_GROUPS], n=1)
        if near and near[0] in ADDED_GROUPS:
            raise ConfigError(f"{name} is not a known key; did you mean the group, +{near[0]}=...?")


def load_trainer(node: Node) -> TrainerConfig:
    """The `trainer` node as a dataclass, the two policies in it included."""
    flat = {name: value for name, value in node.items() if name not in ("dual_policy", "initial_policy")}
    names = [field.name for field in dataclasses.fields(TrainerConfig)]
    check_keys(node, names, "trainer", known_keys())
    return build(
        TrainerConfig,
        flat,
        "trainer",
        dual_policy=load_dual_policy(child(node, "dual_policy", "trainer")),
        initial_policy=_initial_policy(child(node, "initial_policy", "trainer")),
    )


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
    keys += dual_policy_keys()
    return keys + [f"{INITIAL_POLICY_KEY}.{name}" for name in INITIAL_POLICY_KEYS]


def _initial_policy(node: Node) -> PolicySource | None:
    key = INITIAL_POLICY_KEY
    node = rename_older(node, key, "uri")
    if node.get("act") is not None:
        raise ConfigError(f"{key}.act={node['act']!r} has no effect, the learner always samples; remove it")
    source = load_source(node, key, INITIAL_POLICY_KEYS)
    lost = [name for name, value in node.items() if value not in (None, False, {}) and source is None]
    if lost:
        raise ConfigError(f"{key}.{lost[0]}={node[lost[0]]!r} is set without a checkpoint; set {key}.uri too")
    if source is not None and (source.range > 1 or source.type == "all"):
        raise ConfigError(
            f"{key}.type={source.type} with range={source.range} names several; a learner starts from one"
        )
    return source
