"""The roster: payoffs, shares by slot, when a snapshot is due, who retires and who moves in."""

from __future__ import annotations

import json

import pytest

from dual_policy_plugin.errors import ConfigError, RunError
from dual_policy_plugin.matchmaking import Record
from dual_policy_plugin.pool_config import MatchmakingConfig, SelfPlayConfig
from dual_policy_plugin.roster import Entry, Roster

UNIFORM = MatchmakingConfig()


def begin(num_npcs: int = 1, *, window: int = 2, interval: int | None = 10, gate: float | None = None) -> Roster:
    npcs = [Entry(name=f"npc{k}", sha256=f"sha{k}") for k in range(num_npcs)]
    return Roster.begin(npcs, UNIFORM, SelfPlayConfig(snapshot_interval=interval, gate=gate, window=window))


def states(roster: Roster) -> list[str]:
    return [f"{slot.name} {slot.state}".strip() for slot in roster.slots]


def test_there_is_room_for_the_npcs_the_window_and_one_that_leaves() -> None:
    roster = begin(2, window=3)
    assert states(roster) == ["npc0 playing", "npc1 playing", "empty", "empty", "empty", "empty"]
    assert roster.probabilities() == [0.5, 0.5, 0.0, 0.0, 0.0, 0.0]
    fixed = Roster.begin([Entry(name="npc")], UNIFORM, None)
    assert states(fixed) == ["npc playing"]
    assert not fixed.is_due(1000)


def test_the_oldest_snapshot_retires_leaves_and_is_overwritten() -> None:
    roster = begin(1, window=2)
    free = [0] * 4
    for epoch, slot in ((10, 1), (20, 2)):
        roster.take(epoch, f"sha{epoch}")
        assert roster.advance(free) == ([], [slot])
    assert roster.probabilities()[3] == 0
    roster.take(30, "sha30")
    assert roster.advance([1, 5, 0, 0]) == ([], [3])
    assert states(roster) == ["npc0 playing", "snapshot-10 retired", "snapshot-20 playing", "snapshot-30 playing"]
    shares = roster.probabilities()
    assert shares[1] == 0
    assert sum(shares) == 1
    assert min(shares[0], *shares[2:]) > 0.33
    roster.take(40, "sha40")
    assert roster.advance([1, 1, 3, 3]) == ([], [])  # one env still plays snapshot-10: 40 waits
    assert [entry.name for entry in roster.snapshots()] == [f"snapshot-{epoch}" for epoch in (10, 20, 30, 40)]
    assert roster.opponents()[0] == {"name": "snapshot-10", "sha256": "sha10"}
    assert len(roster.opponents()) == 3  # not the waiting one
    assert roster.advance([2, 0, 3, 3]) == ([1], [1])
    assert states(roster) == ["npc0 playing", "snapshot-40 playing", "snapshot-20 retired", "snapshot-30 playing"]
    assert roster.has_changes()
    assert roster.advance([2, 3, 0, 3]) == ([2], [])
    assert states(roster)[2] == "empty"
    assert not roster.has_changes()


def test_waiting_snapshots_move_in_in_order_and_are_no_more_than_the_window() -> None:
    roster = begin(0, window=2)
    roster.take(0, "sha0")
    roster.advance([0, 0, 0])
    assert states(roster) == ["snapshot-0 playing", "empty", "empty"]
    for epoch in (1, 2, 3, 4, 5):
        roster.take(epoch, f"sha{epoch}")
        roster.advance([4, 4, 4])
    assert states(roster) == ["snapshot-0 retired", "snapshot-1 playing", "snapshot-2 playing"]
    assert [entry.name for entry in roster.waiting] == ["snapshot-4", "snapshot-5"]  # 3 is given up
    assert roster.advance([0, 4, 4]) == ([0], [0])
    assert states(roster) == ["snapshot-4 playing", "snapshot-1 retired", "snapshot-2 playing"]
    assert [entry.name for entry in roster.waiting] == ["snapshot-5"]


def test_the_npcs_of_the_config_never_leave() -> None:
    roster = begin(2, window=1)
    for epoch in range(1, 6):
        roster.take(epoch, "")
        roster.advance([0] * 4)
        roster.advance([0] * 4)
    assert states(roster)[:2] == ["npc0 playing", "npc1 playing"]
    assert sorted(states(roster)[2:]) == ["empty", "snapshot-5 playing"]


def test_the_newest_is_known_by_its_age_and_not_by_its_slot() -> None:
    roster = begin(1, window=2)
    roster.matchmaking = MatchmakingConfig(type="latest_biased", latest_share=0.75)
    for epoch in (10, 20, 30, 40):
        roster.take(epoch, "")
        roster.advance([0] * 4)
    roster.advance([0] * 4)
    newest = next(k for k, slot in enumerate(roster.slots) if slot.name == "snapshot-40")
    assert newest != 3
    assert roster.probabilities()[newest] == 0.75


def test_the_interval_counts_from_the_last_snapshot() -> None:
    roster = begin(interval=10)
    assert [i for i in range(12) if roster.is_due(i)] == [10, 11]
    roster.take(10, "")
    assert [i for i in range(10, 25) if roster.is_due(i)] == [20, 21, 22, 23, 24]


def test_the_gate_is_a_sequential_test_that_begins_anew_where_it_fails() -> None:
    """Gate 0.5 against 0.625: a win adds log 1.25, a loss log 0.75; log 20 passes, -log 20 fails."""
    roster = begin(1, interval=None, gate=0.5)
    zeros = [0.0] * 3
    assert not roster.is_due(1)
    roster.add([55.0, *zeros], [100.0, *zeros])  # -0.67
    assert not roster.is_due(2)
    assert roster.since == Record(wins=55.0, games=100.0)
    roster.add([5.0, *zeros], [40.0, *zeros])  # 60 of 140: -9.6
    assert not roster.is_due(3)
    assert roster.since == Record()
    roster.add([115.0, *zeros], [190.0, *zeros])  # 4.1, though 175 of 330 would not pass
    assert roster.is_due(4)
    roster.take(4, "")
    assert not roster.is_due(5)  # counted anew
    assert roster.slots[0].record == Record(wins=175.0, games=330.0)  # the payoffs stay


def test_payoffs_belong_to_the_npc_and_not_to_the_slot() -> None:
    roster = begin(0, window=1)
    roster.matchmaking = MatchmakingConfig(type="pfsp", min_games=1, explore=0.0)
    roster.take(0, "")
    roster.advance([0, 0])
    roster.add([3.0, 0.0], [4.0, 0.0])
    roster.take(5, "")
    roster.advance([2, 0])
    roster.add([1.0, 1.0], [1.0, 2.0])  # the retired one's games count too
    assert [slot.record for slot in roster.slots] == [Record(4.0, 5.0), Record(1.0, 2.0)]
    assert roster.since == Record(2.0, 3.0)
    roster.advance([0, 2])
    roster.take(9, "")
    roster.advance([0, 2])
    assert roster.slots[0].name == "snapshot-9"
    assert roster.slots[0].record == Record()


def test_it_goes_through_json_unchanged() -> None:
    roster = begin(1, window=1)
    for epoch in (1, 2, 3):
        roster.take(epoch, f"sha{epoch}")
        roster.advance([3, 3, 3])
        roster.add([0.1, 0.2, 0.5], [0.3, 0.9, 1.0])
    assert [entry.name for entry in roster.waiting] == ["snapshot-3"]
    other = begin(1, window=1)
    other.restore(json.loads(json.dumps(roster.as_dict())), "state")
    assert other == roster
    with pytest.raises(RunError, match="its pool has other NPCs than this run"):
        begin(2, window=1).restore(roster.as_dict(), "state")
    with pytest.raises(RunError, match="its pool has other NPCs than this run"):
        begin(1, window=2).restore(roster.as_dict(), "state")


def test_an_npc_may_not_be_named_like_a_snapshot() -> None:
    with pytest.raises(ConfigError, match="an NPC is named snapshot-5"):
        Roster.begin([Entry(name="snapshot-5")], UNIFORM, SelfPlayConfig(snapshot_interval=1))
    Roster.begin([Entry(name="snapshot-5")], UNIFORM, None)
