"""From a config's node to NPCs that are pinned, verified, loaded and seated, for `DualPolicy.open`."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dual_policy_plugin.config import DualPolicyConfig, PolicySource
from dual_policy_plugin.errors import ConfigError, DigestError, RunError
from dual_policy_plugin.hydra_app.dual_policy_node import load_dual_policy
from dual_policy_plugin.npc.lock import LockEntry, parse_lock, read_lock, write_lock
from dual_policy_plugin.players import Players
from dual_policy_plugin.policies.pool import Npc, NpcPool
from dual_policy_plugin.rollout.assignment import Assignment
from dual_policy_plugin.roster import Roster
from dual_policy_plugin.types import EnvSpec


def load_node(config: Any, key: str) -> DualPolicyConfig:
    """The node as a dataclass; what only `dual-policy train` can do is refused."""
    if config is None:
        return DualPolicyConfig()
    if isinstance(config, str | os.PathLike):
        return DualPolicyConfig(enabled=True, npc=PolicySource(uri=os.fspath(config)))
    dual = config if isinstance(config, DualPolicyConfig) else load_dual_policy(config, key)
    for name in ("self_play", "pct_schedule"):
        if dual.enabled and getattr(dual, name) is not None:
            mend = "name saved policies in pool" if name == "self_play" else "open a DualPolicy for each share"
            raise ConfigError(f"{key}.{name} is done by `dual-policy train` alone; {mend}, and set {name}=null")
    return dual


def hold_to_lock(dual: DualPolicyConfig, path: Path | None) -> DualPolicyConfig:
    """The node with the lock of the run that goes on, where it has one; a given lock must agree with it."""
    if path is None or not path.exists() or not dual.sources:
        return dual
    if dual.lock is not None:
        given = read_lock(dual.lock) if isinstance(dual.lock, Path) else parse_lock(dual.lock, "the given lock")
        pins = [{(entry.requested, entry.sha256) for entry in lock} for lock in (read_lock(path), given)]
        if pins[0] != pins[1]:
            raise DigestError(f"{path} pins other NPCs than the lock that was given; take one away, or start a new run")
    return replace(dual, lock=path)


def keep_lock(path: Path, entries: tuple[LockEntry, ...]) -> None:
    """Writes the lock of a run that begins; now that its NPCs were found good."""
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"run_dir={path.parent} cannot be made: {error.strerror}; use another folder") from error
        write_lock(path, entries)


def seat_npcs(
    npcs: list[Npc],
    players: Players,
    dual: DualPolicyConfig,
    spec: EnvSpec,
    assignment: Assignment,
    device: torch.device,
) -> tuple[NpcPool, Roster]:
    """The pool and who plays next, at the beginning of all envs' first episodes."""
    pool = NpcPool(npcs, num_envs=spec.num_envs, num_npc=assignment.num_npc, device=device)
    roster = Roster.begin(players.entries(), dual.matchmaking, None)
    pool.set_probabilities(roster.probabilities())
    pool.start_episodes()
    return pool, roster
