"""The rungs of a ladder: resolved, pinned and loaded once, before stage 1; afterwards taken from `npc.lock.json`.

Takes the settings and a job's config; gives PinnedPolicies, one for each stage, and the lock that every job is held to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import torch

from dual_policy_plugin.config import Config, PolicySource
from dual_policy_plugin.curriculum.config import KEY, CurriculumConfig
from dual_policy_plugin.curriculum.state import Rung
from dual_policy_plugin.errors import ConfigError, DigestError, DualPolicyError
from dual_policy_plugin.evaluate import cross_play, load_pinned, read_spec
from dual_policy_plugin.npc.lock import ROLES, LockEntry, lock_entries, locked_as, pin_locked, read_lock, write_lock
from dual_policy_plugin.npc.resolver import PinnedPolicy, request_text, resolve, resolve_all, unique_names
from dual_policy_plugin.policies.npcs import LOCK_NAME


def pin_rungs(settings: CurriculumConfig, configs: Sequence[Config]) -> list[PinnedPolicy]:
    """The NPCs that are known before stage 1, in the order in which they were given, each with a name of its own.

    Every one is resolved, fetched and loaded for the env, so that a rung in the middle cannot fail a sweep late.

    Args:
        settings: of the sweep.
        configs: of the grid's jobs, those alone that differ in who plays where.

    Raises:
        DualPolicyError: one of them cannot be had or cannot play; the message says which.
    """
    config, sources = configs[0], list(settings.ladder or ())
    if settings.is_self_play:
        sources = [_first_source(settings, config)]
    found: list[PinnedPolicy] = []
    for number, source in enumerate(sources, 1):
        try:
            chosen = resolve_all(source, seed=config.seed)
        except DualPolicyError as error:
            raise type(error)(f"{KEY}.ladder, rung {number} of {len(sources)}: {error}") from error
        is_downward = source.type in ("latest", "top")  # the newest, the best first
        found += reversed(chosen) if is_downward else chosen
    names = unique_names([one.name for one in found])
    pinned = [replace(one, name=name) for one, name in zip(found, names, strict=True)]
    for one in configs:
        _check_playable(pinned, one)
        _check_held_out(pinned, one)
    return pinned


def locked_rungs(folder: Path, rungs: Sequence[Rung]) -> list[PinnedPolicy]:
    """The NPCs of a sweep that has begun, as its lock pins them.

    Raises:
        NpcError: the lock cannot be read, or a pinned file is gone.
        DigestError: other bytes stand there now, or the lock is not the one that the sweep began with.
    """
    lock = read_lock(folder / LOCK_NAME)
    pinned = [replace(pin_locked(lock, rung.uri)[0], name=rung.name) for rung in rungs]
    for rung, one in zip(rungs, pinned, strict=True):
        if one.sha256 != rung.sha256:
            raise DigestError(
                f"{folder / LOCK_NAME} is not what this sweep began with: {rung.uri} is sha256 {one.sha256[:12]} there,"
                f" {rung.sha256[:12]} in the sweep; restore the lock, or use another run= name"
            )
    return pinned


def pin_others(configs: Sequence[Config]) -> list[LockEntry]:
    """What else the jobs name: whom they start from and are evaluated against, pinned once for the whole sweep.

    A draw (type=rand) is each job's own, by its seed.

    Args:
        configs: of the grid's jobs, those alone that differ in who plays where.

    Raises:
        DualPolicyError: one of them cannot be had.
    """
    found: dict[tuple[str, str], list[LockEntry]] = {}
    for config in configs:
        for role, source in config.policies:
            key = role, request_text(source)
            if role != "npc" and source.type != "rand" and key not in found:
                found[key] = list(lock_entries(resolve_all(source, seed=config.seed), _now(), role=role))
    return [entry for entries in found.values() for entry in entries]


def begin_lock(folder: Path, rungs: Sequence[PinnedPolicy], others: Sequence[LockEntry]) -> None:
    """Writes the sweep's lock, in place of one that a start which failed has left."""
    lock = _with_entries((), rungs, "npc")
    for role in ROLES:
        theirs = [one for one in others if one.role == role]
        names = unique_names([one.name for one in theirs])
        lock += tuple(replace(one, name=name) for one, name in zip(theirs, names, strict=True))
    write_lock(folder / LOCK_NAME, lock)


def extend_lock(folder: Path, policy: PinnedPolicy, role: str) -> None:
    """Adds a policy to the sweep's lock unless it is there: a rung (npc), or what jobs start from (initial).

    Raises:
        DigestError: the lock has other bytes under this URI.
    """
    lock = read_lock(folder / LOCK_NAME)
    known = locked_as(lock, policy.uri, role=role)
    if not known:
        write_lock(folder / LOCK_NAME, _with_entries(lock, [policy], role))
    elif known[0].sha256 != policy.sha256:
        raise DigestError(
            f"{policy.uri}: {folder / LOCK_NAME} pins it as sha256 {known[0].sha256[:12]}, now {policy.sha256[:12]}; "
            "bring the pinned file back, or use another run= name"
        )


def pin_made(folder: Path, path: str, sha256: str) -> PinnedPolicy:
    """The policy that a job of the sweep at `folder` made, as it was when the job ended.

    Raises:
        NpcError: it is gone.
        DigestError: other bytes stand there now.
    """
    pinned = resolve(f"file://{folder.absolute() / path}")
    if pinned.sha256 != sha256:
        raise DigestError(
            f"{folder / path} was sha256 {sha256[:12]} when its job ended, now {pinned.sha256[:12]}; "
            "bring that file back, or use another run= name"
        )
    return pinned


def rate_rungs(
    rungs: Sequence[Rung],
    pinned: Sequence[PinnedPolicy],
    config: Config,
    *,
    episodes: int,
    seed: int,
    device: torch.device,
) -> list[Rung]:
    """The rungs with ratings from games of all against all, the weakest first; equal ones stay in their order.

    Args:
        rungs: as they were given.
        pinned: their policies.
        config: of a job; its env is played.
        episodes: per pair.
        seed: of the games.
        device: where they are played.
    """
    result = cross_play(pinned, config, episodes=episodes, seed=seed, device=device)
    found, first = result.ratings, len(rungs) if result.roles else 0  # with roles an NPC's is the second one
    rated = [
        replace(rung, rating=found.rating[i], low=found.low[i], high=found.high[i])
        for i, rung in enumerate(rungs, first)
    ]
    return sorted(rated, key=lambda rung: float(rung.rating or 0.0))


def as_rung(pinned: PinnedPolicy) -> Rung:
    """A pinned policy as the state file has it."""
    return Rung(name=pinned.name, requested=pinned.requested, uri=pinned.uri, sha256=pinned.sha256)


def _first_source(settings: CurriculumConfig, config: Config) -> PolicySource:
    """Whom the first stage of `self` is played against."""
    if settings.start is not None:
        return PolicySource(uri=settings.start)
    initial = config.trainer.initial_policy
    if initial is None:
        raise ConfigError(
            f"{KEY}.start is not set, and ladder=self needs an NPC for its first stage; "
            f"use for example {KEY}.start=builtin://arena/weak, or set trainer.initial_policy.uri"
        )
    return replace(initial, keep_optimizer=False, name=None)


def _check_playable(pinned: Sequence[PinnedPolicy], config: Config) -> None:
    """Loads each policy for the env and forgets it."""
    spec, device = read_spec(config), torch.device("cpu")
    for one in pinned:
        load_pinned([one], spec, config, device)


def _check_held_out(pinned: Sequence[PinnedPolicy], config: Config) -> None:
    for uri in config.evals.held_out:
        for held in resolve_all(PolicySource(uri=uri), seed=config.seed):
            same = next((one for one in pinned if one.sha256 == held.sha256), None)
            if same is not None:
                raise ConfigError(
                    f"evals.held_out={uri} is the rung {same.uri} of {KEY}.ladder; take it out of one of the two"
                )


def _with_entries(lock: Sequence[LockEntry], policies: Sequence[PinnedPolicy], role: str) -> tuple[LockEntry, ...]:
    """The lock and an entry for each URI that is not in it: jobs ask for the pinned URI, so that is what is locked."""
    by_uri = {one.uri: replace(one, requested=one.uri) for one in policies}
    more = lock_entries(by_uri.values(), _now(), role=role)
    names = unique_names([entry.name for entry in (*lock, *more) if entry.role == role])[-len(more) :]
    return (*lock, *(replace(entry, name=name) for entry, name in zip(more, names, strict=True)))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
