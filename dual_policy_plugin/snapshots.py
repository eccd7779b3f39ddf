"""Brings the learner's snapshots into the pool of its run, and the roster's decisions with them.

Between the roster, which decides, the run directory, which has the checkpoints, and the pool, which plays. All ranks
call these together: the first one has the files, the others get what stands in them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dual_policy_plugin.checkpoint import decode_policy
from dual_policy_plugin.errors import DigestError, DualPolicyError, RunError
from dual_policy_plugin.policies.pool import NpcPool
from dual_policy_plugin.ranks.distributed import Ranks, copy_from_first, first_trouble, share_text, sum_over_ranks
from dual_policy_plugin.roster import EMPTY, Entry, Roster
from dual_policy_plugin.run.directory import RunDirectory


def start_pool(
    roster: Roster, pool: NpcPool, saved: Mapping[str, Any] | None, run: RunDirectory | None, ranks: Ranks
) -> None:
    """Puts roster and pool where the run was stopped, or where a new one begins; all envs begin an episode.

    Where the config names no NPC, the first one is the learner as it begins, whose checkpoint has been saved.

    Args:
        roster: as `Roster.begin` gives it.
        pool: in which the NPCs of the config are.
        saved: the roster of the run's state, on the first rank; None in a new run.
        run: its directory; None on ranks that do not own it.
        ranks: who we are.

    Raises:
        RunError: the state is of another pool; or as `put_snapshots`.
    """
    saved = json.loads(share_text(json.dumps(saved), ranks, pool.state.device))
    if saved is not None:
        roster.restore(saved, "the state of this run" if run is None else str(run.path))
        put_snapshots(roster, pool, roster.snapshot_slots(), run, ranks)
        pool.set_probabilities(roster.probabilities())
    else:
        if all(slot.state == EMPTY for slot in roster.slots):
            take_snapshot(roster, run, 0, ranks, pool.state.device)
        advance_pool(roster, pool, run, ranks)
    pool.start_episodes()


def count_games(roster: Roster | None, pool: NpcPool | None, sums: Tensor, iteration: int) -> bool:
    """Adds an iteration's games to the payoffs; gives whether the learner of now becomes a snapshot.

    Args:
        roster: of the run; None without NPCs.
        pool: that played; None where all agents learned.
        sums: (num_npcs, num_fields) of all ranks, as EpisodeMetrics has them.
        iteration: that has been finished.
    """
    if roster is None:
        return False
    if pool is not None:
        roster.add(sums[:, 1].tolist(), sums[:, 0].tolist())
    return roster.is_due(iteration)


def change_npcs(
    roster: Roster | None, pool: NpcPool | None, run: RunDirectory | None, snapshot: int | None, ranks: Ranks
) -> None:
    """The NPCs of the next iteration and their shares.

    Args:
        roster, pool: of the run; None without NPCs.
        run: its directory; None on ranks that do not own it.
        snapshot: epoch of the checkpoint that joins them; None: no new one.
        ranks: who we are.
    """
    if roster is None or pool is None:
        return
    if snapshot is not None:
        take_snapshot(roster, run, snapshot, ranks, pool.state.device)
    advance_pool(roster, pool, run, ranks)


def take_snapshot(roster: Roster, run: RunDirectory | None, epoch: int, ranks: Ranks, device: torch.device) -> None:
    """Notes the checkpoint of `epoch`, which has been saved, as a snapshot that is to play.

    Args:
        roster: of the run.
        run: its directory; None on ranks that do not own it.
        epoch: of the checkpoint, which is the learner of now.
        ranks: who we are.
        device: where the process group sends from.
    """
    digest = "" if run is None else hashlib.sha256(run.checkpoint_path(epoch).read_bytes()).hexdigest()
    roster.take(epoch, share_text(digest, ranks, device))


def advance_pool(roster: Roster, pool: NpcPool, run: RunDirectory | None, ranks: Ranks) -> None:
    """Lets retired NPCs leave whom no env plays, waiting ones move in, and has the next ones drawn by the payoffs.

    Args, Raises:
        As `put_snapshots`.
    """
    if roster.has_changes():
        emptied, filled = roster.advance(sum_over_ranks(pool.live(), ranks).tolist())
        for k in emptied:
            pool.clear(k)
        put_snapshots(roster, pool, filled, run, ranks)
    pool.set_probabilities(roster.probabilities())


def put_snapshots(roster: Roster, pool: NpcPool, slots: Sequence[int], run: RunDirectory | None, ranks: Ranks) -> None:
    """Puts the snapshots that the roster has in some slots into the pool, from their checkpoints.

    Args:
        roster: of the run.
        pool: no env plays these slots.
        slots: which.
        run: its directory; None on ranks that do not own it.
        ranks: who we are.

    Raises:
        RunError: a checkpoint is gone, on every rank.
        DigestError: it is another than the roster knows; on the other ranks a RunError.
    """
    for k in slots:
        entry, weights, trouble = roster.slots[k], {}, None
        try:
            if run is not None:
                weights = _read_weights(run.checkpoint_path(entry.born), entry)
        except DualPolicyError as error:
            trouble = error
        told = first_trouble("" if trouble is None else str(trouble), ranks, pool.state.device)
        if trouble is not None or told is not None:
            raise trouble or RunError(told[1] if told else "")
        if ranks.world_size > 1:
            own = pool.weights(k)
            weights = {key: weights[key].to(own[key].device) if weights else own[key].clone() for key in own}
            for tensor in weights.values():
                copy_from_first(tensor, ranks)
        pool.put(k, entry.name, weights)


def _read_weights(path: Path, entry: Entry) -> dict[str, Tensor]:
    """The weights of a snapshot's checkpoint."""
    mend = "restore the file, or use another run= name"
    try:
        data = path.read_bytes()
    except OSError as error:
        reason = f"cannot be read ({error.strerror})"
        raise RunError(f"{path}, the NPC {entry.name} of this run, {reason}; {mend}") from error
    digest = hashlib.sha256(data).hexdigest()
    if digest != entry.sha256:
        raise DigestError(
            f"{path}, the NPC {entry.name} of this run, has sha256 {digest[:12]}, it had {entry.sha256[:12]}; {mend}"
        )
    return decode_policy(data, str(path)).tensors
