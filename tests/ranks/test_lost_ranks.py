"""A rank that ends, however and whenever, ends the job: soon, with its own error, and one line from each other rank."""

from __future__ import annotations

import socket

import pytest

from dual_policy_plugin.errors import RankLostError
from dual_policy_plugin.ranks.distributed import join_ranks
from dual_policy_plugin.ranks.variables import find_ranks
from tests.ranks.conftest import Ended, RunRanks
from tests.ranks.programs import ITERATION

EVALUATED = {"episodes": 4, "evaluate_interval": 1, "total_timesteps": 9 * ITERATION}


def seconds_after(ended: list[Ended], rank: int) -> float:
    """From the end of a rank to that of the last one."""
    return max(one.at_s for one in ended) - ended[rank].at_s


def only_line(ended: Ended) -> str:
    """The one line of an error on stderr; the log's lines begin with a time or a level."""
    lines = [line for line in ended.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, ended.err
    assert "Traceback" not in ended.err
    return lines[0]


@pytest.mark.parametrize(
    ("how", "code", "moment", "rank"),
    [
        ("killed", -9, "building", 1),
        ("killed", -9, "rollout", 1),
        ("exits", 9, "update", 1),
        ("killed", -9, "saving", 0),
        ("killed", -9, "evaluating", 0),
    ],
)
def test_a_rank_that_dies_ends_the_other(run_ranks: RunRanks, how: str, code: int, moment: str, rank: int) -> None:
    ended = run_ranks("fail", 2, how=how, moment=moment, rank=rank, **EVALUATED)
    assert ended[rank].code == code
    assert ended[1 - rank].code == 75
    assert f"rank {rank} of 2 (" in only_line(ended[1 - rank])
    assert "the same command continues the run" in only_line(ended[1 - rank])
    assert seconds_after(ended, rank) < 10.0


@pytest.mark.slow
def test_a_rank_that_is_killed_while_the_first_one_evaluates_ends_it(run_ranks: RunRanks) -> None:
    """Rank 0 asks nobody for a minute: the thread must end it."""
    ended = run_ranks("fail", 2, how="killed", moment="asking", rank=1, hold="evaluating", **EVALUATED)
    assert [one.code for one in ended] == [75, -9]
    assert "rank 1 of 2 (" in only_line(ended[0])
    assert 5.0 < seconds_after(ended, 1) < 15.0  # watch.GRACE_S, and no more than it


@pytest.mark.parametrize("hold", ["", "evaluating"])
@pytest.mark.parametrize(("how", "code"), [("raises", 1), ("mistaken", 2)])
def test_an_own_error_is_told_to_the_others(run_ranks: RunRanks, how: str, code: int, hold: str) -> None:
    limits = {"GRACE_S": 1.0}
    ended = run_ranks("fail", 2, how=how, moment="asking", rank=1, hold=hold, limits=limits, **EVALUATED)
    said = {"raises": "ValueError: a defect", "mistaken": "trainer.colour=blue is no colour; use red"}[how]
    assert [one.code for one in ended] == [code, code]  # no launcher starts a mistake again
    assert only_line(ended[0]).endswith(f"has ended: {said}")
    assert "rank 1 of 2 (" in only_line(ended[0])
    assert said in ended[1].err
    assert "has ended" not in ended[1].err
    assert ("Traceback" in ended[1].err) == (how == "raises")
    assert seconds_after(ended, 1) < 5.0


@pytest.mark.parametrize("moment", ["choosing a device", "building"])
def test_a_mistake_before_the_first_step_is_told(run_ranks: RunRanks, moment: str) -> None:
    ended = run_ranks("fail", 3, how="mistaken", moment=moment, rank=1, num_envs=2, limits={"GRACE_S": 1.0})
    assert [one.code for one in ended] == [2, 2, 2]
    for rank in (0, 2):
        assert only_line(ended[rank]).endswith("has ended: trainer.colour=blue is no colour; use red")
    assert seconds_after(ended, 1) < 5.0


def test_the_first_rank_s_own_error_is_told_too(run_ranks: RunRanks) -> None:
    ended = run_ranks("fail", 4, how="raises", moment="evaluating", rank=0, num_envs=2, **EVALUATED)
    assert [one.code for one in ended] == [1, 1, 1, 1]
    assert "Traceback" in ended[0].err
    for one in ended[1:]:
        assert only_line(one).endswith("has ended: ValueError: a defect")
    assert seconds_after(ended, 0) < 5.0


def test_all_others_name_the_one_that_is_lost(run_ranks: RunRanks) -> None:
    ended = run_ranks("fail", 4, how="killed", moment="update", rank=2, num_envs=2, **EVALUATED)
    assert [one.code for one in ended] == [75, 75, -9, 75]
    for rank in (0, 1, 3):
        assert "rank 2 of 4 (" in only_line(ended[rank])
    assert seconds_after(ended, 2) < 10.0


@pytest.mark.slow
def test_a_rank_that_hangs_is_waited_for_and_then_lost(run_ranks: RunRanks) -> None:
    """Its thread still says that it lives; the job ends so that a launcher begins it again."""
    ended = run_ranks("hang", 2, rank=1, wait_s=3.0, **EVALUATED)
    assert [one.code for one in ended] == [75, 75]
    assert "rank 0 of 2 has waited 3 s for another rank, which lives and does not come" in only_line(ended[0])
    assert "rank 0 of 2 (" in only_line(ended[1])
    assert max(one.at_s for one in ended) < 25.0


@pytest.mark.slow
@pytest.mark.parametrize("evaluate_interval", [2, None])
def test_all_ranks_show_signs_of_life_while_the_first_evaluates(
    run_ranks: RunRanks, evaluate_interval: int | None
) -> None:
    """Each may be watched on a machine of its own; rank 0 evaluates for 4 s, between two updates or at the end."""
    changes = EVALUATED | {"evaluate_interval": evaluate_interval}
    ended = run_ranks("evaluate_long", 2, seconds=4.0, env={"DUAL_POLICY_HEARTBEAT": "heartbeat"}, **changes)
    assert [one.code for one in ended] == [0, 0]
    longest_s = [float(one.out.splitlines()[-1]) for one in ended]
    assert max(longest_s) < 3.0


@pytest.mark.slow
def test_a_rank_that_falls_silent_is_lost(run_ranks: RunRanks) -> None:
    """A stopped process stands for a machine that is gone: its connections stay open, and nothing comes."""
    limits = {"SILENT_S": 2.0, "GRACE_S": 1.0}
    ended = run_ranks("fail", 2, limit_s=7.0, how="stopped", moment="update", rank=1, limits=limits, **EVALUATED)
    assert [one.code for one in ended] == [75, -9]  # killed by the test, at its limit
    assert "has not been heard of for 2 s" in only_line(ended[0])
    assert 2.0 < ended[0].at_s < 6.0


def test_a_rank_that_never_comes_is_named(run_ranks: RunRanks) -> None:
    ended = run_ranks("come_late", 3, rank=2, wait_s=1.0)
    assert [one.code for one in ended] == [75, 75, 0]
    assert "rank 0 of 3 has waited 1 s for rank 2" in only_line(ended[0])
    assert "rank 0 has ended while it waited" in only_line(ended[1])
    assert all(one.at_s < 5.0 for one in ended)


def test_without_the_first_rank_nobody_waits_long(run_ranks: RunRanks) -> None:
    ended = run_ranks("come_late", 2, rank=0, wait_s=1.0)
    assert [one.code for one in ended] == [0, 75]
    assert "MASTER_ADDR:MASTER_PORT=127.0.0.1:" in only_line(ended[1])
    assert "has not answered for 1 s" in only_line(ended[1])
    assert ended[1].at_s < 5.0


def test_a_port_that_is_taken_is_a_mistake(run_ranks: RunRanks) -> None:
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        ended = run_ranks("come_late", 2, rank=1, wait_s=1.0, env={"MASTER_PORT": str(port)})
    assert ended[0].code == 2
    assert only_line(ended[0]).endswith(
        f"127.0.0.1:{port} cannot be served (Address already in use); set MASTER_PORT to a free port"
    )


def test_a_port_of_our_own_that_is_taken_is_no_mistake() -> None:
    """The job is queued again, and by its number of starts comes to another one."""
    slurm = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_TASKS_PER_NODE": "2"}
    slurm |= {"SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_JOB_ID": "4242"}
    ranks = find_ranks(slurm)
    with socket.create_server(("", ranks.port)), pytest.raises(RankLostError) as caught, join_ranks(ranks, wait_s=1.0):
        pass
    assert str(caught.value) == (
        f"MASTER_ADDR:MASTER_PORT=127.0.0.1:{ranks.port} cannot be served (Address already in use); "
        "the next start takes another port"
    )
    assert caught.value.exit_code == 75
    assert find_ranks(slurm | {"SLURM_RESTART_COUNT": "1"}).port != ranks.port
