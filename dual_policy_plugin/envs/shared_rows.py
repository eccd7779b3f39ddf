"""The memory that a training process and its env workers share: one anonymous block, the same layout on both sides.

The block is a memory file without a name, so nothing is left under /dev/shm or on disk however the run ends.
"""

from __future__ import annotations

import math
import mmap
import os
import sys
import tempfile
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dual_policy_plugin.envs.host import HostSpec, Rows

ALIGNMENT = 64  # bytes; a cache line, so that two workers rarely write to the same one

Arrays = dict[str, NDArray[Any]]


def create_memory() -> int:
    """A file descriptor of anonymous memory, empty so far."""
    if sys.platform == "linux":
        return os.memfd_create("dual-policy-envs")
    else:
        with tempfile.TemporaryFile() as file:
            return os.dup(file.fileno())


def row_fields(spec: HostSpec) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> (numpy dtype, shape per env) of every field of `Rows`."""
    agents, space = spec.num_agents, spec.observation_space
    return {
        "actions": ("int64", (agents,)),
        "observations": (space.dtype, (agents, *space.shape)),
        "final_observations": (space.dtype, (agents, *space.shape)),
        "rewards": ("float32", (agents,)),
        "dones": ("bool", (agents,)),
        "truncated": ("bool", (agents,)),
        "weights": ("float32", (agents,)),
        "counters": ("float32", (agents, len(spec.counters))),
        "episode_ends": ("bool", (1,)),
    }


def map_arrays(memory_fd: int, spec: HostSpec, num_envs: int, *, resize: bool) -> Arrays:
    """Arrays (num_envs, *shape per env) over the shared block, which `resize` brings to its size first."""
    fields = row_fields(spec)
    sizes = {name: num_envs * math.prod(shape) * np.dtype(dtype).itemsize for name, (dtype, shape) in fields.items()}
    total = sum(_aligned(size) for size in sizes.values())
    if resize:
        os.ftruncate(memory_fd, total)
    block = mmap.mmap(memory_fd, total)
    arrays, offset = {}, 0
    for name, (dtype, shape) in fields.items():
        flat = np.frombuffer(block, dtype=dtype, count=num_envs * math.prod(shape), offset=offset)
        arrays[name] = flat.reshape(num_envs, *shape)
        offset += _aligned(sizes[name])
    return arrays


def rows_of(arrays: Arrays, index: int) -> Rows:
    """The views of env `index`."""
    return Rows(**{name: array[index] for name, array in arrays.items()})


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
