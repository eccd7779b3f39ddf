"""Which rank this process is, by the variables of whoever started it: torchrun, or a Slurm step with several tasks.

Takes the environment; gives Ranks. `train.py` asks once, before it chooses a device.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

from dual_policy_plugin.errors import ConfigError
from dual_policy_plugin.ranks.distributed import Ranks

_TORCHRUN = ("RANK", "WORLD_SIZE")
_FIRST_PORT, _NUM_PORTS = 12000, 20000  # below those that the system gives to connections


def find_ranks(variables: Mapping[str, str] | None = None) -> Ranks:
    """Who we are: torchrun's RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT; without
    them Slurm's, in a step of several tasks; else one rank alone.

    A process in an allocation's shell, or in a step of one task, is alone: there is nobody else.

    Args:
        variables: the environment; None: this process's.

    Raises:
        ConfigError: a variable is missing, or says what cannot be.
    """
    found = os.environ if variables is None else variables
    if any(name in found for name in _TORCHRUN):
        return _torchrun_ranks(found)
    if _number(found, "SLURM_STEP_NUM_TASKS", default=1) > 1:
        return _slurm_ranks(found)
    return Ranks()


def _torchrun_ranks(found: Mapping[str, str]) -> Ranks:
    world_size = _number(found, "WORLD_SIZE", least=1)
    rank = _below(found, "RANK", world_size, "WORLD_SIZE")
    local_world_size = _number(found, "LOCAL_WORLD_SIZE", default=1, least=1)
    local_rank = _number(found, "LOCAL_RANK", default=0)
    if world_size == 1:
        return Ranks(local_rank=local_rank)
    return Ranks(
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        local_world_size=local_world_size,
        address=_text(found, "MASTER_ADDR"),
        port=_number(found, "MASTER_PORT", least=1, most=65535),
        is_port_served=found.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
    )


def _slurm_ranks(found: Mapping[str, str]) -> Ranks:
    """Of a Slurm step: `srun`, or submitit, with several tasks.

    Rank 0 is expected on the step's first host, which holds for every distribution but `arbitrary`; MASTER_ADDR names
    another one, MASTER_PORT another port.
    """
    world_size = _number(found, "SLURM_STEP_NUM_TASKS")
    return Ranks(
        rank=_below(found, "SLURM_PROCID", world_size, "SLURM_STEP_NUM_TASKS"),
        world_size=world_size,
        local_rank=_number(found, "SLURM_LOCALID"),
        local_world_size=_tasks_here(found),
        address=found.get("MASTER_ADDR") or first_host(_text(found, "SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST")),
        port=_number(found, "MASTER_PORT", default=_slurm_port(found), least=1, most=65535),
        is_port_ours=not found.get("MASTER_PORT"),
    )


def _tasks_here(found: Mapping[str, str]) -> int:
    """How many tasks of the step run on this node; Slurm writes `2(x3),1` for three nodes of two and one of one."""
    name = "SLURM_STEP_TASKS_PER_NODE" if "SLURM_STEP_TASKS_PER_NODE" in found else "SLURM_NTASKS_PER_NODE"
    counts: list[int] = []
    for part in _text(found, name).split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if match is None:
            raise ConfigError(f"{name}={found[name]} is not as Slurm writes it, for example 2(x3),1")
        counts += [int(match[1])] * int(match[2] or 1)
    node = _number(found, "SLURM_NODEID", default=0)
    return counts[min(node, len(counts) - 1)]


def _slurm_port(found: Mapping[str, str]) -> int:
    """The same on all tasks of a step, another one for the next step, job, or start of a requeued job.

    A socket of the last start may still be closing; and two jobs may share a machine.
    """
    job, step, restart = (
        _number(found, name, default=0) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
    )
    return _FIRST_PORT + (7 * job + 131 * step + 1009 * restart) % _NUM_PORTS


def first_host(hosts: str) -> str:
    """The first host of a Slurm list: `a7` of `a[7-9,12],b1`, and `r1n01` of `r[1-2]n[01-04]`."""
    match = re.fullmatch(r"((?:[^,\[\]]|\[[^\[\]]+\])+)(?:,.*)?", hosts.strip())
    if match is None:
        raise ConfigError(f"{hosts!r} is not a list of hosts as Slurm writes it; set MASTER_ADDR to rank 0's host")
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", match[1])


def _text(found: Mapping[str, str], *names: str) -> str:
    for name in names:
        if found.get(name):
            return found[name]
    raise ConfigError(
        f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'} not set, as several ranks need; start them by "
        "torchrun, or by srun with several tasks"
    )


def _number(
    found: Mapping[str, str], name: str, *, default: int | None = None, least: int = 0, most: int = 2**31
) -> int:
    if not found.get(name) and default is not None:
        return default
    text = _text(found, name)
    if not text.isdecimal() or not least <= int(text) <= most:
        raise ConfigError(f"{name}={text} is no number from {least} to {most}; whoever starts the ranks sets it")
    return int(text)


def _below(found: Mapping[str, str], name: str, count: int, of: str) -> int:
    number = _number(found, name)
    if number >= count:
        raise ConfigError(f"{name}={number} with {of}={count}: the ranks are 0 to {count - 1}")
    return number
