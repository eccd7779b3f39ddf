"""What a replay takes from the run that made its policy: the env and the seats, and whom it played against."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dual_policy_plugin.errors import ConfigError, RunError
from dual_policy_plugin.hydra_app.overrides import text_override
from dual_policy_plugin.npc.lock import pin_locked, read_lock
from dual_policy_plugin.npc.resolver import PinnedPolicy
from dual_policy_plugin.policies.npcs import LOCK_NAME
from dual_policy_plugin.replay.record import MAKE_FRAMES

CONFIG_NAME = "config.yaml"
_URI_KEYS = ("uri", "checkpoint_path", "policy_uri")
"""The spellings of an NPC's name."""


def run_of(policy: PinnedPolicy) -> Path | None:
    """The run directory that a policy's file stands in; None where it stands in none."""
    if policy.path is None or policy.path.parent.name != "checkpoints":
        return None
    run = policy.path.parent.parent
    return run if (run / CONFIG_NAME).is_file() else None


def run_words(run: Path, overrides: Sequence[str]) -> list[str]:
    """The run's env, seats and seed as overrides, but for what the user's own overrides say otherwise.

    Raises:
        RunError: its config.yaml cannot be read.
    """
    loaded = _read_config(run)
    env, dual = _node(loaded, "env"), _node(_node(loaded, "trainer"), "dual_policy")
    values: dict[str, Any] = {}
    name = env.pop("name", "arena")
    if name not in MAKE_FRAMES:
        values["env.name"] = name
    elif name != "arena":
        values["env"] = name
    if name in MAKE_FRAMES:
        values |= {f"env.{key}": value for key, value in env.items()}
    pct = dual.get("training_agents_pct") or dual.get("policy_a_percentage")
    if isinstance(pct, float | int) and pct < 1:
        values["trainer.dual_policy.training_agents_pct"] = pct
        values["trainer.dual_policy.assignment"] = dual.get("assignment")
    values["seed"] = loaded.get("seed") if isinstance(loaded, dict) else None
    said = {word.partition("=")[0].lstrip("+") for word in overrides}
    return [
        _word(key, value)
        for key, value in values.items()
        if value is not None and key not in said and not ("env" in said and key.partition(".")[0] == "env")
    ]


def first_npc(run: Path) -> tuple[PinnedPolicy, bool, int]:
    """The first NPC of a run as its lock pins it, whether it acts greedily there, and how many there are.

    Raises:
        ConfigError: the run has no NPC; names the mend.
        RunError: its config.yaml cannot be read.
        NpcError: the lock cannot be read, or other bytes stand there now.
    """
    path = run / LOCK_NAME
    lock = read_lock(path) if path.is_file() else ()
    npcs = [entry for entry in lock if entry.role == "npc"]
    if not npcs:
        raise ConfigError(
            f"{run} has locked no NPC; name whom to play against with --npc, for example the policy itself, --npc {run}"
        )
    dual = _node(_node(_read_config(run), "trainer"), "dual_policy")
    source, pool = _node(dual, "checkpoint_npc"), dual.get("pool")
    if not any(source.get(name) for name in _URI_KEYS) and isinstance(pool, list):
        source = pool[0] if pool and isinstance(pool[0], dict) else {}
    return pin_locked(lock, npcs[0].requested)[0], source.get("act") == "greedy", len(npcs)


def _read_config(run: Path) -> Any:
    try:
        return OmegaConf.to_container(OmegaConf.load(run / CONFIG_NAME), resolve=False)
    except (OSError, yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise RunError(f"{run / CONFIG_NAME} cannot be read ({type(error).__name__}); restore it") from error


def _node(node: Any, name: str) -> dict[str, Any]:
    """A copy of the mapping under a name; an empty one where there is none."""
    child = node.get(name) if isinstance(node, dict) else None
    return dict(child) if isinstance(child, dict) else {}


def _word(key: str, value: Any) -> str:
    return text_override(key, value) if isinstance(value, str) else f"{key}={json.dumps(value)}"
