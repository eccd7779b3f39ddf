"""Whether a run will fit: what is free on its device, compared with an estimate, before anything big is allocated (D9).

`parts.py` adds up what env, experience, update and policies will take and calls `check_memory` before it builds them.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from dual_policy_plugin.errors import ConfigError

if TYPE_CHECKING:
    import torch

HEADROOM = 0.05
"""Fraction of the free memory that stays unplanned: rounding of the allocator, scratch buffers of libraries."""

_GB = 1e9
_MIN_HORIZON = 8
_UNLIMITED = 2**60
"""cgroup v1 writes a number near 2**63 where there is no limit."""


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


def keep_freed_memory() -> None:
    """Lets this process keep what it frees, where the C library is glibc.

    An update allocates and frees the same large tensors again and again. By default glibc gives them back to the system
    each time, and every page is fetched and zeroed anew: a fifth of the update's time (docs/log.md).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_TRIM_THRESHOLD, 2**30)
        mallopt(_M_MMAP_THRESHOLD, 2**30)


def available_bytes(device: torch.device | str) -> int:
    """Bytes that this process can still allocate on `device`: cpu, cuda or cuda:N."""
    import torch

    device = torch.device(device)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free) + unused
    return available_ram()


def available_ram(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """The smaller of what the machine has free and what the limits of our cgroups leave.

    Args:
        proc: where procfs is mounted. Without one (macOS) the answer is the machine's whole memory.
        cgroups: where the cgroup file systems are mounted (v2, v1, or v1 beside v2).
    """
    try:
        lines = (proc / "meminfo").read_text().splitlines()
    except OSError:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    machine = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    return max(0, min([machine, *_cgroup_rooms(proc, cgroups)]))


def check_memory(
    needs: Mapping[str, int],
    available: int,
    device_name: str,
    *,
    num_envs: int,
    horizon: int,
    fixed: Collection[str] = ("policies",),
    per_step: Collection[str] = ("experience",),
) -> None:
    """Raises a ConfigError unless the sum of `needs` fits into `available`, less 5 % headroom.

    Args:
        needs: bytes by part of the run, for example {"experience": ..., "env": ..., "policies": ...}.
        available: bytes, from `available_bytes`.
        device_name: for the message.
        num_envs: as configured; the message says which smaller value would fit.
        horizon: likewise.
        fixed: parts that depend on neither. All others are taken as proportional to num_envs.
        per_step: parts that are proportional to horizon too.
    """
    usable = int(available * (1 - HEADROOM))
    total = sum(needs.values())
    if total <= usable:
        return
    parts = ", ".join(f"{part} {_gb(size)}" for part, size in sorted(needs.items(), key=lambda item: -item[1]))
    num_envs_fit = _fitting(num_envs, sum(size for part, size in needs.items() if part not in fixed), total, usable)
    horizon_fit = _fitting(horizon, sum(size for part, size in needs.items() if part in per_step), total, usable)
    mends = []
    if num_envs_fit >= 1:
        mends.append(f"env.num_envs to {num_envs_fit}")
    if horizon_fit >= _MIN_HORIZON:
        mends.append(f"trainer.horizon to {horizon_fit}")
    mend = f"lower {' or '.join(mends)}" if mends else "use a smaller agent, fewer NPCs, or a device with more memory"
    raise ConfigError(
        f"env.num_envs={num_envs} with trainer.horizon={horizon} needs {_gb(total)} on {device_name} ({parts}), "
        f"but {_gb(usable)} can be used; {mend}"
    )


def _fitting(value: int, scaling: int, total: int, usable: int) -> int:
    """The largest value below `value` at which total fits, if `scaling` bytes of it are proportional to value."""
    room = usable - (total - scaling)
    return value * room // scaling if scaling and room > 0 else 0


def _gb(size: int) -> str:
    return f"{size / _GB:.3g} GB" if size < 1000 * _GB else f"{size / _GB:.0f} GB"


def _cgroup_rooms(proc: Path, cgroups: Path) -> list[int]:
    """Bytes left under the limit of each cgroup that we are in, its parents included; empty without limits."""
    try:
        memberships = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return []
    rooms = []
    for membership in memberships:
        _, controllers, path = membership.split(":", 2)
        if controllers == "":
            mounts = [cgroups, cgroups / "unified"]
            names = ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            mounts = [cgroups / "memory"]
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        group = Path(path.lstrip("/"))
        for mount in mounts:  # inside a container the path may be the host's; then only the mount's root exists
            rooms += [room for part in (group, *group.parents) if (room := _room(mount / part, names)) is not None]
    return rooms


def _room(group: Path, names: tuple[str, str, str]) -> int | None:
    """Limit less usage of one cgroup; page cache that the kernel gives back first counts as free."""
    limit_name, usage_name, cache_name = names
    try:
        limit = (group / limit_name).read_text().strip()
        usage = int((group / usage_name).read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    if limit == "max" or int(limit) >= _UNLIMITED:
        return None
    return int(limit) - usage + int(stat.get(cache_name, 0))
