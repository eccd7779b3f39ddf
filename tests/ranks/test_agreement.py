"""All ranks hold one policy and see global figures, and none starts with another NPC than the others."""

from __future__ import annotations

import json
from pathlib import Path

from dual_policy_plugin.ranks.distributed import Ranks
from tests.harness import MemoryTask, make_loop
from tests.ranks.conftest import Ended, RunRanks
from tests.ranks.programs import ITERATION


def start_of(ended: Ended) -> dict[str, object]:
    """What `note_start` said."""
    line = next(line for line in ended.out.splitlines() if line.startswith("start: "))
    return dict(json.loads(line.removeprefix("start: ")))


def test_ranks_hold_one_policy_and_global_figures(run_ranks: RunRanks) -> None:
    ended = run_ranks("loop", 2)
    assert [one.code for one in ended] == [0, 0], ended
    first, second = (json.loads(one.out) for one in ended)
    assert first["grad"] == second["grad"]
    assert first["flat"] == second["flat"]
    assert first["figures"] == second["figures"]
    alone = make_loop(MemoryTask(8, 4, delay=2))
    alone.env.reset(7, stagger=True)
    single = [alone.iterate(1e-2) for _ in range(3)]
    assert first["figures"][1]["dual_policy/episodes"] == 2 * single[1]["dual_policy/episodes"]
    assert first["rewards"] != second["rewards"]


def test_one_rank_with_another_npc_stops_both(run_ranks: RunRanks, tmp_path: Path) -> None:
    ended = run_ranks("other_npc", 2)
    assert [one.code for one in ended] == [2, 2]
    assert all("rank 1 of 2 holds other NPC bytes than rank 0" in one.err for one in ended)
    assert not (tmp_path / "runs/several/metrics.jsonl").exists()


def test_a_continued_run_has_one_policy_on_all_ranks(run_ranks: RunRanks, tmp_path: Path) -> None:
    begun = run_ranks("note_start", 2, total_timesteps=2 * ITERATION)
    ended = run_ranks("note_start", 2, total_timesteps=4 * ITERATION)
    assert [one.code for one in begun + ended] == [0] * 4, ended
    assert start_of(begun[0]) == start_of(begun[1])
    assert start_of(ended[0]) == start_of(ended[1])
    assert (start_of(begun[0])["step"], start_of(ended[0])["step"]) == (0.0, 2.0)
    assert start_of(ended[0])["flat"] != start_of(begun[0])["flat"]
    lines = [json.loads(line) for line in (tmp_path / "runs/several/metrics.jsonl").read_text().splitlines()]
    assert [line["charts/agent_step"] for line in lines] == [ITERATION * (i + 1) for i in range(4)]


def test_a_number_that_is_not_finite_on_one_rank_stops_all(run_ranks: RunRanks, tmp_path: Path) -> None:
    ended = run_ranks("poison", 2, checkpoint_interval=1)
    assert [one.code for one in ended] == [3, 3], ended
    assert all("iteration 2" in one.err and "not finite" in one.err for one in ended)
    names = {path.name for path in (tmp_path / "runs/several/checkpoints").iterdir()}
    assert "model_0001.safetensors" in names
    assert "model_0002.safetensors" not in names


def test_ranks_part_and_meet_again(run_ranks: RunRanks, tmp_path: Path) -> None:
    ended = run_ranks("twice", 3, num_envs=2)
    assert [one.code for one in ended] == [0, 0, 0], ended
    lines = (tmp_path / "runs/several/metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["charts/agent_step"] for line in lines]
    batch = 3 * ITERATION // 4
    assert steps == [batch * (i + 1) for i in range(6)]


def test_machines_are_counted_by_their_ranks() -> None:
    assert Ranks().num_machines == 1
    assert Ranks(world_size=8, local_world_size=8).num_machines == 1
    assert Ranks(world_size=16, local_world_size=8).num_machines == 2
