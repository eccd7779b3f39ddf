"""From the config's NPC to a pool that can act: pinned, locked, verified, loaded, frozen.

Everything that can be wrong with an NPC ends the run here, before its first step.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch

from dual_policy_plugin.config import AgentConfig, PolicySource
from dual_policy_plugin.npc.lock import lock_entries, pin_locked, read_lock, write_lock
from dual_policy_plugin.npc.resolver import PinnedPolicy, resolve
from dual_policy_plugin.policies.loading import load_policy
from dual_policy_plugin.policies.pool import Npc
from dual_policy_plugin.types import EnvSpec

LOCK_NAME = "npc.lock.json"
log = logging.getLogger(__name__)


def pin_npcs(sources: Sequence[PolicySource], run_path: Path | None) -> list[PinnedPolicy]:
    """The pinned policies of a run: by its lock where it has begun, else resolved now and locked.

    A lock in a run without a checkpoint is of a start that failed, perhaps by this very NPC: it is made again.

    Args:
        sources: the NPCs of the config.
        run_path: the run directory; None where another rank owns it: then nothing is written.

    Raises:
        NpcError: an NPC cannot be had, or is not the one that the run began with.
    """
    path = None if run_path is None else run_path / LOCK_NAME
    has_begun = run_path is not None and any((run_path / "checkpoints").glob("model_*.safetensors"))
    if path is not None and path.exists() and has_begun:
        lock = read_lock(path)
        return [pin_locked(lock, source.uri) for source in sources]
    pinned = [resolve(source.uri) for source in sources]
    if path is not None and pinned:
        write_lock(path, lock_entries(pinned, when=datetime.now(UTC).isoformat(timespec="seconds")))
    return pinned


def load_npc(
    source: PolicySource,
    pinned: PinnedPolicy,
    spec: EnvSpec,
    agent: AgentConfig,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> Npc:
    """A frozen, packed policy that is bound to the env by the names of features and actions.

    Raises:
        CheckpointError: it cannot be read, or was made for other observations or actions.
    """
    policy = load_policy(
        pinned,
        observation_space=spec.observation_space,
        actions=spec.actions,
        default_agent=source.agent or agent.name,
        default_args=agent.args if source.agent in (None, agent.name) else {},
        device=device,
        compute_dtype=dtype,
    )
    return Npc(name=pinned.name, policy=policy, is_greedy=source.act == "greedy")
