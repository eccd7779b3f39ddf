"""From the config's policies to a pool that can act: pinned, locked, the same on every rank, verified, loaded, frozen.

Everything that can be wrong with an NPC ends the run here, before its first step.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from dual_policy_plugin.config import AgentConfig, PolicySource
from dual_policy_plugin.errors import DigestError, DualPolicyError, NpcError, NpcNotFoundError
from dual_policy_plugin.npc.header import read_description
from dual_policy_plugin.npc.lock import (
    LockEntry,
    entry_facts,
    lock_entries,
    lock_facts,
    locked_as,
    parse_lock,
    pin_locked,
    read_lock,
    write_lock,
)
from dual_policy_plugin.npc.resolver import PinnedPolicy, request_text, resolve_all, unique_names
from dual_policy_plugin.policies.loading import load_policy
from dual_policy_plugin.policies.pool import Npc
from dual_policy_plugin.ranks.distributed import Ranks, first_trouble, share_text
from dual_policy_plugin.types import EnvSpec

LOCK_NAME = "npc.lock.json"
MAX_RECORDED_BYTES = 128 * 1024
"""Of the NPCs' record in a checkpoint; above it their metadata stand in the lock file only."""
log = logging.getLogger(__name__)


@dataclass(kw_only=True, slots=True, frozen=True)
class Wish:
    """A policy, or several, that a run asks for."""

    source: PolicySource
    role: str
    """npc | initial | opponent | held_out (see `npc/lock.py`)."""

    @property
    def requested(self) -> str:
        """What is asked for, as it stands in the lock."""
        return request_text(self.source)


@dataclass(kw_only=True, slots=True, frozen=True)
class Pins:
    """What a run's wishes came to."""

    policies: list[list[PinnedPolicy]]
    """For each wish its policies."""
    entries: tuple[LockEntry, ...]
    """The lock: all of them, with the time when each was pinned."""

    def of_role(self, role: str, wishes: Sequence[Wish]) -> list[PinnedPolicy]:
        """The policies of all wishes of a role, in their order."""
        return [one for wish, found in zip(wishes, self.policies, strict=True) if wish.role == role for one in found]


def pin_policies(
    wishes: Sequence[Wish],
    run_path: Path | None,
    *,
    given: Path | dict[str, Any] | None,
    seed: int,
    ranks: Ranks,
    device: torch.device,
) -> Pins:
    """The pinned policies of a run, the same on every rank and after every restart.

    Rank 0 takes them from the run's lock where the run has begun, else from the given lock, else it resolves them, and
    writes the lock; the other ranks are told what it says, and hold just those bytes or stop the run.

    A lock in a run without a checkpoint is of a start that failed, perhaps by this very NPC: it is made again.

    Args:
        wishes: what the config asks for.
        run_path: the run directory; None on ranks that do not own it.
        given: trainer.dual_policy.lock.
        seed: the run's.
        ranks: who we are.
        device: where the process group sends from.

    Raises:
        NpcError: a policy cannot be had, or is not the one that the run began with; on every rank.
    """
    trouble: DualPolicyError | None = None
    pins = Pins(policies=[], entries=())
    if ranks.is_first:
        try:
            pins = _pin_first(wishes, run_path, given, seed)
        except DualPolicyError as error:
            trouble = error
    _stop_all(trouble, ranks, device)
    text = share_text(json.dumps(lock_facts(pins.entries)), ranks, device)
    if not ranks.is_first:
        try:
            entries = parse_lock(json.loads(text), "the lock of rank 0")
            pins = Pins(
                policies=[pin_locked(entries, wish.requested, role=wish.role) for wish in wishes], entries=entries
            )
        except DualPolicyError as error:
            trouble = DigestError(f"rank {ranks.rank} of {ranks.world_size} holds other NPC bytes than rank 0: {error}")
    _stop_all(trouble, ranks, device)
    return pins


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
    if pinned.uri.startswith("wandb://"):
        log.info("Loaded NPC policy from WandB artifact: %s", pinned.uri.removeprefix("wandb://"))
    return Npc(name=pinned.name, policy=policy, is_greedy=source.act == "greedy")


def recorded_npcs(entries: Sequence[LockEntry]) -> list[dict[str, Any]]:
    """The NPCs of the lock as a checkpoint records them: without the time, so that equal runs make equal files."""
    facts = [entry_facts(entry) for entry in entries if entry.role == "npc"]
    facts = [{key: value for key, value in one.items() if key != "when"} for one in facts]
    if len(json.dumps(facts)) > MAX_RECORDED_BYTES:
        facts = [one | {"metadata": {}} for one in facts]
    return facts


def _pin_first(wishes: Sequence[Wish], run_path: Path | None, given: Path | dict[str, Any] | None, seed: int) -> Pins:
    """Rank 0's pins, and the lock file where they are new."""
    path = None if run_path is None else run_path / LOCK_NAME
    has_begun = run_path is not None and any((run_path / "checkpoints").glob("model_*.safetensors"))
    kept = read_lock(path) if path is not None and has_begun and path.exists() else ()
    if run_path is not None and kept:
        _check_record(run_path, kept)
    offered = (
        read_lock(given) if isinstance(given, Path) else parse_lock(given, "trainer.dual_policy.lock") if given else ()
    )
    when = datetime.now(UTC).isoformat(timespec="seconds")
    policies: list[list[PinnedPolicy]] = []
    entries: list[LockEntry] = []
    for wish in wishes:
        lock = (
            kept if has_begun and (wish.role == "npc" or locked_as(kept, wish.requested, role=wish.role)) else offered
        )
        known = locked_as(lock, wish.requested, role=wish.role)
        if known or (wish.role == "npc" and (has_begun or given is not None)):
            _check_lock_there(path, has_begun, kept, wish)
            found, theirs = pin_locked(lock, wish.requested, role=wish.role), known
            _check_offer(theirs, locked_as(offered, wish.requested, role=wish.role))
        else:
            found = resolve_all(wish.source, seed=seed)
            theirs = lock_entries(found, when, role=wish.role)
        policies.append(found)
        entries += theirs
    policies, entries = _with_unique_names(policies, entries)
    if path is not None and entries and tuple(entries) != kept:
        write_lock(path, entries)
    return Pins(policies=policies, entries=tuple(entries))


def _check_record(run_path: Path, kept: Sequence[LockEntry]) -> None:
    """The lock of a run must name the NPCs that its checkpoints recorded: a lock that was edited since is found."""
    latest = run_path / "checkpoints" / "latest.safetensors"
    if not latest.is_file():
        return  # a crash before it was written; the numbered files are whole, and the next start makes it again
    with latest.open("rb") as file:

        def read_range(start: int, stop: int) -> bytes:
            file.seek(start)
            return file.read(stop - start)

        description = read_description(read_range, latest.stat().st_size, where=str(latest))
    recorded = [(one["requested"], one["sha256"]) for one in description.get("metadata", {}).get("npcs", [])]
    locked = [(entry.requested, entry.sha256) for entry in kept if entry.role == "npc"]
    if sorted(recorded) != sorted(locked):
        differing = next(iter(set(locked) ^ set(recorded)))
        raise DigestError(
            f"{run_path / LOCK_NAME} is not what this run began with: {differing[0]} sha256 {differing[1][:12]} stands "
            f"in one of lock and {latest.name} only; restore the lock, or start a new run"
        )


def _check_lock_there(path: Path | None, has_begun: bool, kept: Sequence[LockEntry], wish: Wish) -> None:
    if has_begun and not kept and wish.role == "npc":
        raise NpcNotFoundError(
            f"{path} is gone, so nobody knows which {wish.requested} the run began with; restore it, or start a new run"
        )


def _check_offer(kept: Sequence[LockEntry], offered: Sequence[LockEntry]) -> None:
    """A lock that is given to a run which has begun must be the one that it began with."""
    if offered and [entry.sha256 for entry in kept] != [entry.sha256 for entry in offered]:
        raise DigestError(
            f"trainer.dual_policy.lock pins {offered[0].requested} as {offered[0].uri} sha256 {offered[0].sha256[:12]},"
            f" this run began with {kept[0].uri} sha256 {kept[0].sha256[:12]}; take the lock away, or start a new run"
        )


def _with_unique_names(
    policies: list[list[PinnedPolicy]], entries: list[LockEntry]
) -> tuple[list[list[PinnedPolicy]], list[LockEntry]]:
    """Within a role every policy has a name of its own: -2, -3, ... behind those that came later."""
    for role in {entry.role for entry in entries}:
        places = [i for i, entry in enumerate(entries) if entry.role == role]
        for i, name in zip(places, unique_names([entries[i].name for i in places]), strict=True):
            entries[i] = replace(entries[i], name=name)
    names = iter([entry.name for entry in entries])
    return [[replace(one, name=next(names)) for one in found] for found in policies], entries


def _stop_all(trouble: DualPolicyError | None, ranks: Ranks, device: torch.device) -> None:
    """Raises this rank's error, or tells of another's: no rank waits for one that has stopped."""
    first = first_trouble("" if trouble is None else str(trouble), ranks, device)
    if trouble is not None:
        raise trouble
    if first is not None:
        raise NpcError(first[1])
