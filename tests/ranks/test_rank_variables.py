"""Which rank a process is, by the variables of torchrun and of Slurm."""

from __future__ import annotations

import pytest

from dual_policy_plugin.errors import ConfigError
from dual_policy_plugin.ranks.distributed import Ranks
from dual_policy_plugin.ranks.variables import find_ranks, first_host

TORCHRUN = {
    "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "a1",
    "MASTER_PORT": "29500",
}  # fmt: skip
SLURM = {
    "SLURM_JOB_ID": "1234", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "7", "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1", "SLURM_NODEID": "2", "SLURM_STEP_TASKS_PER_NODE": "2(x3),1",
    "SLURM_STEP_NODELIST": "n[07-09,12]",
}  # fmt: skip


def test_torchrun_says_who_we_are() -> None:
    expected = Ranks(rank=3, world_size=4, local_rank=1, local_world_size=2, address="a1", port=29500)
    assert find_ranks(TORCHRUN) == expected
    assert find_ranks(TORCHRUN | SLURM) == expected  # torchrun in a step of several tasks
    served = find_ranks(TORCHRUN | {"TORCHELASTIC_USE_AGENT_STORE": "True"})
    assert served.is_port_served
    assert find_ranks({"RANK": "0", "WORLD_SIZE": "1"}) == Ranks()


def test_slurm_says_who_we_are() -> None:
    port = 12000 + 7 * 1234
    expected = Ranks(
        rank=5, world_size=7, local_rank=1, local_world_size=2, address="n07", port=port, is_port_ours=True
    )
    assert find_ranks(SLURM) == expected
    assert find_ranks(SLURM | {"SLURM_NODEID": "3"}).local_world_size == 1
    moved = find_ranks(SLURM | {"MASTER_ADDR": "b9", "MASTER_PORT": "40000"})
    assert (moved.address, moved.port, moved.is_port_ours) == ("b9", 40000, False)
    ports = {
        find_ranks(SLURM | change).port
        for change in ({}, {"SLURM_STEP_ID": "1"}, {"SLURM_RESTART_COUNT": "1"}, {"SLURM_JOB_ID": "1235"})
    }
    assert len(ports) == 4
    assert all(12000 <= one < 32000 for one in ports)


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "a1", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"},  # salloc's shell
        SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
        {"LOCAL_RANK": "2"},
    ],
)
def test_a_process_without_others_is_alone(variables: dict[str, str]) -> None:
    assert find_ranks(variables) == Ranks()


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"RANK": "1"}, "WORLD_SIZE is not set"),
        ({"WORLD_SIZE": "2"}, "RANK is not set"),
        (TORCHRUN | {"RANK": "4"}, "RANK=4 with WORLD_SIZE=4: the ranks are 0 to 3"),
        (TORCHRUN | {"RANK": "first"}, "RANK=first is no number"),
        (TORCHRUN | {"WORLD_SIZE": "0"}, "WORLD_SIZE=0 is no number from 1 to"),
        (TORCHRUN | {"MASTER_ADDR": ""}, "MASTER_ADDR is not set"),
        (TORCHRUN | {"MASTER_PORT": "70000"}, "MASTER_PORT=70000 is no number from 1 to 65535"),
        (TORCHRUN | {"MASTER_PORT": "-1"}, "MASTER_PORT=-1 is no number from 1 to"),
        ({name: value for name, value in SLURM.items() if name != "SLURM_PROCID"}, "SLURM_PROCID is not set"),
        (
            {name: value for name, value in SLURM.items() if name != "SLURM_STEP_NODELIST"},
            "SLURM_STEP_NODELIST and SLURM_JOB_NODELIST are not set",
        ),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "two"}, "SLURM_STEP_TASKS_PER_NODE=two is not as Slurm writes it"),
        (SLURM | {"SLURM_STEP_NODELIST": "n[07-"}, "is not a list of hosts as Slurm writes it; set MASTER_ADDR"),
    ],
)
def test_what_cannot_be_is_a_mistake(variables: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        find_ranks(variables)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("a1", "a1"),
        ("a1,b2", "a1"),
        ("host[01-04,7]", "host01"),
        ("host[7,01-04],x", "host7"),
        ("r[1-2]n[03-04].local,b1", "r1n03.local"),
        ("gpu-a[1-3]-ib", "gpu-a1-ib"),
    ],
)
def test_the_first_host_of_a_list(hosts: str, first: str) -> None:
    assert first_host(hosts) == first
