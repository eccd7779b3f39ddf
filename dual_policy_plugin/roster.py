"""Who is in a run's pool: NPCs of the config and snapshots of the learner, with what the learner won against each.

Takes an iteration's games; gives the shares of the episodes to come, and says when a snapshot is due, who leaves and
who moves in. Plain numbers on the host, the same on every rank; `snapshots.py` brings the weights, `policies/pool.py`
plays.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from dual_policy_plugin import matchmaking
from dual_policy_plugin.errors import ConfigError, RunError
from dual_policy_plugin.evaluation.sequential import sprt
from dual_policy_plugin.matchmaking import Record
from dual_policy_plugin.pool_config import MatchmakingConfig, SelfPlayConfig

EMPTY, PLAYING, RETIRED = "empty", "playing", "retired"
_ERROR = 0.05
"""Error rate of the gate that makes snapshots, of either kind."""
_log = logging.getLogger(__name__)


@dataclass(kw_only=True, slots=True)
class Entry:
    """An NPC: in a slot of the pool, or a snapshot that waits for one."""

    name: str = ""
    sha256: str = ""
    """Of its policy file."""
    weight: float = 1.0
    """For matchmaking=weights."""
    born: int = 0
    """The iteration that a snapshot was made after, also its checkpoint's epoch; 0 for an NPC of the config, or less
    where another one of those is known to be newer."""
    is_snapshot: bool = False
    state: str = EMPTY
    """empty | playing | retired: plays on until the episodes end that it is in."""
    record: Record = field(default_factory=Record)
    """The learner's games against it."""


@dataclass(kw_only=True, slots=True)
class Roster:
    """The slots of a pool, in its order: the NPCs of the config, which stay, then room for snapshots.

    There is room for `window` snapshots that play and one that leaves. Where the one that leaves is still played, the
    next ones wait.
    """

    matchmaking: MatchmakingConfig
    self_play: SelfPlayConfig | None
    slots: list[Entry]
    waiting: list[Entry] = field(default_factory=list)
    """Snapshots without a slot, oldest first; never more than `window`."""
    newest: int = 0
    """The iteration of the last snapshot; before the first one 0."""
    since: Record = field(default_factory=Record)
    """All games since then."""
    kept: list[int] = field(default_factory=list)
    """Epochs of the snapshots whose checkpoints stay, see `keep`."""

    @classmethod
    def begin(cls, npcs: Sequence[Entry], config: MatchmakingConfig, self_play: SelfPlayConfig | None) -> Roster:
        """The roster of a new run: its NPCs play, the slots for snapshots are empty.

        Raises:
            ConfigError: an NPC has a name that a snapshot will have.
        """
        taken = next((npc.name for npc in npcs if re.fullmatch(r"snapshot-\d+", npc.name)), None)
        if self_play is not None and taken is not None:
            raise ConfigError(f"an NPC is named {taken}, as self-play names its snapshots; give it another name")
        num_slots = 0 if self_play is None else self_play.window + 1
        slots = [replace(npc, state=PLAYING) for npc in npcs] + [Entry() for _ in range(num_slots)]
        return cls(matchmaking=config, self_play=self_play, slots=slots)

    def probabilities(self) -> list[float]:
        """Each slot's share of the episodes to come; sums to 1. At least one must play."""
        # oldest first; of one age, the NPCs of the config in their order
        playing = sorted((k for k, slot in enumerate(self.slots) if slot.state == PLAYING), key=self._age)
        entries = [self.slots[k] for k in playing]
        shares = matchmaking.probabilities(
            [entry.record for entry in entries], [entry.weight for entry in entries], self.matchmaking
        )
        share_of = dict(zip(playing, shares, strict=True))
        return [share_of.get(k, 0.0) for k in range(len(self.slots))]

    def add(self, wins: Sequence[float], games: Sequence[float]) -> None:
        """Adds an iteration's games of all ranks; wins with draws as half, and games, of each slot."""
        for slot, won, played in zip(self.slots, wins, games, strict=True):
            slot.record.add(won, played, self.matchmaking.memory)
        self.since.wins += sum(wins)
        self.since.games += sum(games)

    def is_due(self, iteration: int) -> bool:
        """Whether the learner of now, after `iteration`, is to become a snapshot.

        The gate is a sequential test, whose error rate holds however often it looks. Where it finds that the win rate
        is not above `gate`, it begins anew with the games to come: the learner of those is another one.
        """
        config = self.self_play
        if config is None or iteration == self.newest:
            return False
        if config.snapshot_interval is not None and iteration - self.newest >= config.snapshot_interval:
            return True
        if config.gate is None:
            return False
        better = config.gate + (1 - config.gate) / 4
        verdict = sprt(self.since.wins, int(self.since.games), p0=config.gate, p1=better, alpha=_ERROR, beta=_ERROR)
        if verdict.passed is False:
            self.since = Record()
        return verdict.passed is True

    def take(self, epoch: int, sha256: str) -> None:
        """Notes the snapshot of an iteration, which moves in with `advance`.

        Where `window` wait already, the oldest of them is given up: it would have been the first to leave.
        """
        assert self.self_play is not None
        self.waiting.append(Entry(name=f"snapshot-{epoch}", sha256=sha256, born=epoch, is_snapshot=True))
        self.newest, self.since = epoch, Record()
        if len(self.waiting) > self.self_play.window:
            gone = self.waiting.pop(0)
            _log.info("%s found no slot before %d newer ones, and never plays", gone.name, len(self.waiting))

    def has_changes(self) -> bool:
        """Whether `advance` may have something to do, so that it is worth asking who plays."""
        return bool(self.waiting) or any(slot.state == RETIRED for slot in self.slots)

    def advance(self, live: Sequence[int]) -> tuple[list[int], list[int]]:
        """Empties the slots of the retired that no env plays any more, and lets waiting snapshots move in, in order.

        With each that moves in beyond `window` the oldest snapshot that plays retires.

        Args:
            live: how many envs, of all ranks, play each slot.

        Returns:
            The slots that became empty, and those (maybe some of the same) whose policy is to be put.
        """
        emptied = [k for k, slot in enumerate(self.slots) if slot.state == RETIRED and live[k] == 0]
        for k in emptied:
            self.slots[k] = Entry()
        filled = []
        while self.waiting and (free := self._free_slot()) is not None:
            entry = self.waiting.pop(0)
            entry.state = PLAYING
            self.slots[free] = entry
            filled.append(free)
            self._retire_oldest()
        return emptied, filled

    def snapshots(self) -> list[Entry]:
        """All snapshots that the pool holds or will hold, oldest first: those of the slots, then the waiting ones."""
        in_slots = [self.slots[k] for k in sorted(self.snapshot_slots(), key=self._age)]
        return in_slots + self.waiting

    def keep(self) -> None:
        """Notes the snapshots of now as those whose checkpoints stay until this is called again.

        It belongs to the run's state: were it read from the index of the checkpoints, a machine that is lost between
        the two would have the run end with other files.
        """
        self.kept = [entry.born for entry in self.snapshots()]

    def snapshot_slots(self) -> list[int]:
        """The slots in which a snapshot plays or has retired."""
        return [k for k, slot in enumerate(self.slots) if slot.is_snapshot]

    def opponents(self) -> list[dict[str, str]]:
        """Name and sha256 of the snapshots that the learner plays against, oldest first, for a checkpoint."""
        return [{"name": one.name, "sha256": one.sha256} for one in self.snapshots() if one.state != EMPTY]

    def as_dict(self) -> dict[str, Any]:
        """Everything that changes, for the run's state."""
        return {
            "slots": [asdict(slot) for slot in self.slots],
            "waiting": [asdict(entry) for entry in self.waiting],
            "newest": self.newest,
            "since": asdict(self.since),
            "kept": self.kept,
        }

    def restore(self, saved: Mapping[str, Any], where: str) -> None:
        """Takes back what `as_dict` gave.

        Raises:
            RunError: it is of a pool with other NPCs.
        """
        slots, ours = [_entry(one) for one in saved["slots"]], [s.sha256 for s in self.slots if not s.is_snapshot]
        theirs = ["" if one.is_snapshot else one.sha256 for one in slots]
        if theirs != ours:
            raise RunError(f"{where}: its pool has other NPCs than this run; use another run= name")
        self.slots, self.waiting = slots, [_entry(one) for one in saved["waiting"]]
        self.newest, self.since = int(saved["newest"]), Record(**saved["since"])
        self.kept = list(saved.get("kept", ()))

    def _age(self, k: int) -> tuple[int, bool, int]:
        return self.slots[k].born, self.slots[k].is_snapshot, k

    def _free_slot(self) -> int | None:
        return next((k for k, slot in enumerate(self.slots) if slot.state == EMPTY), None)

    def _retire_oldest(self) -> None:
        """Retires the oldest snapshot where more than `window` play."""
        assert self.self_play is not None
        playing = [k for k in self.snapshot_slots() if self.slots[k].state == PLAYING]
        if len(playing) > self.self_play.window:
            self.slots[min(playing, key=self._age)].state = RETIRED


def _entry(saved: Mapping[str, Any]) -> Entry:
    return Entry(**{**saved, "record": Record(**saved["record"])})
